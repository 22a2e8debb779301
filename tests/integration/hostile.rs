//! A hostile or broken guest can only end its VM, with an error that says why.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use tests::code::{COM1, COM2, Code, Rubbish, Width};
use tests::require_kvm;
use tests::run::{Outcome, Run};
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, counts_up_to, eventually};

use super::kernels::Elf;

/// RAM of a tiny guest; its code is at 16 MiB.
const MEMORY: &str = "32M";
const MEMORY_BYTES: u32 = 32 << 20;
/// The windows of virtio devices, and the one that has a device.
const VIRTIO: u32 = 0xd000_0000;
const WINDOW: u32 = 0x1000;

fn kernel(sandbox: &Sandbox, code: &Code) -> OsString {
    Elf::with(code.bytes()).write(sandbox, "tiny").into_os_string()
}

/// Runs a tiny guest to its end. Returns how it ended and what it wrote to its console.
#[track_caller]
fn run(code: &Code) -> (Outcome, Vec<u8>) {
    let sandbox = Sandbox::new();
    let console = sandbox.file("console");
    let kernel = kernel(&sandbox, code);
    let args = ["run".as_ref(), "--memory".as_ref(), MEMORY.as_ref()];
    let files = ["--kernel".as_ref(), &*kernel, "--console".as_ref(), console.as_os_str()];
    let outcome = sandbox.samepage(args.into_iter().chain(files)).timeout(SOON * 2).output();
    assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    sandbox.assert_clean_within(SOON);
    (outcome, fs::read(console).unwrap_or_default())
}

#[track_caller]
fn assert_fault(code: &Code, words: &[&str]) {
    let (outcome, _) = run(code);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    for word in words.iter().chain(&["rip 0000000001", "rax", "cr2", "likely cause"]) {
        assert!(outcome.stderr.contains(word), "the error does not name {word:?}: {outcome}");
    }
}

/// Nothing was said but, at most, the note that this KVM emulates ring 0.
fn quiet(stderr: &str) -> bool {
    stderr.lines().all(|line| line.starts_with("note: this KVM"))
}

#[test]
fn exceptions_without_a_handler_are_a_triple_fault() {
    require_kvm!();
    let codes = [
        // xor ecx, ecx; div ecx
        Code::new().raw(&[0x31, 0xc9, 0xf7, 0xf1]),
        // ud2
        Code::new().raw(&[0x0f, 0x0b]),
        // mov rbx, 1 << 40; mov eax, [rbx]: not mapped
        Code::new().raw(&[0x48, 0xbb, 0, 0, 0, 0, 0, 1, 0, 0, 0x8b, 0x03]),
    ];
    for code in codes {
        assert_fault(&code, &["triple fault"]);
    }
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_shown() {
    require_kvm!();
    let doctor = Sandbox::new().samepage(["doctor", "--json"]).output().success().json();
    if doctor["backend"] != "pvm" {
        let why = format!("this KVM ({}) runs such instructions itself", doctor["backend"]);
        return tests::host::skipped("an_instruction_that_kvm_cannot_emulate_is_shown", &why);
    }
    // mov ebx, 1 MiB; lock cmpxchg16b [rbx]
    let code = Code::new().raw(&[0xbb, 0, 0, 0x10, 0, 0xf0, 0x48, 0x0f, 0xc7, 0x0b]);
    assert_fault(&code, &["suberror 1", "instruction bytes: f0 48 0f c7 0b", "PVM"]);
}

#[test]
fn power_off_and_both_resets_end_the_vm() {
    require_kvm!();
    for (port, value) in [(0x600, 0x34), (0x602, 1), (0x64, 0xfe)] {
        let code = Code::new().say(COM1, "bye").port_write(Width::Byte, port, value).hang();
        let (outcome, console) = run(&code);
        assert!(quiet(&outcome.success().stderr), "port {port:#x}");
        assert_eq!(console, b"bye", "port {port:#x}");
    }
}

/// The ports where rubbish is an order: 0x64 (also as the end of a wider access) resets, 0x505 says
/// that the guest has panicked, 0x600 to 0x603 and 0x60c end the VM (0x609 and above as the end of
/// a wider access), and 0x604 parks the guest for as long as the rubbish says.
fn is_an_order(port: u16) -> bool {
    (0x61..=0x64).contains(&port)
        || port == 0x505
        || (0x600..=0x604).contains(&port)
        || (0x609..=0x60d).contains(&port)
}

#[test]
fn rubbish_to_ports_and_registers_does_no_harm() {
    require_kvm!();
    for seed in 1..=4 {
        let mut rubbish = Rubbish::new(seed);
        let mut code = Code::new();
        for port in (0..0x800).filter(|port| !is_an_order(*port)) {
            for width in Width::PORT {
                code = code.port_write(width, port, rubbish.next_u32()).port_read(width, port);
            }
        }
        // The window that has a device, several times over; then windows that have none.
        for at in (0..5 * WINDOW).step_by(4) {
            let address = VIRTIO + at % (2 * WINDOW);
            let width = Width::MEMORY[rubbish.next_u32() as usize % 4];
            code = code
                .memory_write(Width::Dword, address, rubbish.next_u32())
                .memory_write(width, address + rubbish.next_u32() % 8, rubbish.next_u32())
                .memory_read(width, address);
        }
        // The ports may have left COM1 anyhow, so what counts is that the last instructions are
        // carried out.
        let (outcome, _) = run(&code.power_off());
        assert_eq!(outcome.code, Some(0), "seed {seed}: {outcome}");
    }
}

/// A driver that gets as far as a driver can, with rings where no memory is, on itself, and at the
/// end of memory.
#[test]
fn a_driver_with_rubbish_rings_does_no_harm() {
    require_kvm!();
    const STATUS: u32 = VIRTIO + 0x70;
    let register =
        |code: Code, (offset, value): (u32, u32)| code.memory_write(Width::Dword, VIRTIO + offset, value);
    let rings = [
        [0, 0, 0],
        [MEMORY_BYTES, MEMORY_BYTES, MEMORY_BYTES],
        [MEMORY_BYTES - 16, MEMORY_BYTES - 4, MEMORY_BYTES - 4],
        [0x10_0000, 0x10_0000, 0x10_0000],
        [VIRTIO, VIRTIO, VIRTIO],
        [0xffff_fff0, 0xffff_fffe, 0xffff_fffc],
        // On the code that runs: a used ring there writes over it, behind what has run.
        [16 << 20, 0x10_1000, 0x10_2000],
    ];
    let mut rubbish = Rubbish::new(9);
    // Indexes and descriptors for those rings that are in memory, leaving the boot tables below 64
    // KiB alone.
    let mut code = Code::new().each((0x10_0000..0x10_4000).step_by(4), |code, at| {
        code.memory_write(Width::Dword, at, rubbish.next_u32())
    });
    for [descriptors, available, used] in rings {
        for size in [1, 8, 256, 0x8000, 3] {
            let setup = [
                // Reset; acknowledge, driver; VIRTIO_F_VERSION_1; features are right.
                (0x70, 0),
                (0x70, 3),
                (0x24, 1),
                (0x20, 1),
                (0x70, 11),
                (0x30, 0),
                (0x38, size),
                (0x80, descriptors),
                (0x90, available),
                (0xa0, used),
                (0x44, 1),
                (0x70, 15),
                (0x50, 0),
                (0x50, 7),
                (0x50, u32::MAX),
            ];
            code = code.each(setup, register).memory_read(Width::Dword, STATUS).say_rax(Width::Byte);
        }
    }
    let (outcome, console) = run(&code.power_off());
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert_eq!(console.len(), rings.len() * 5, "{outcome}");
    // Feature bits and the status machine held up to the end: the device is there and was driven.
    assert!(console.iter().any(|status| status & 0xf == 0xf), "no setup was taken: {console:x?}");
}

#[test]
fn there_is_nothing_outside_ram() {
    require_kvm!();
    // Behind RAM, in the hole, in a device's window without a device, below the 4 GiB that the
    // guest has mapped.
    let places = [MEMORY_BYTES, MEMORY_BYTES + 0x123_4568, 0xc000_0000, VIRTIO + 64 * WINDOW, 0xffff_fff0];
    let code = places.iter().fold(Code::new(), |code, at| {
        code.each(Width::MEMORY, |code, width| {
            code.memory_write(width, *at, 0x5a5a_5a5a).memory_read(width, *at).say_rax(width)
        })
    });
    // Where there is RAM it keeps what is written: so it is not this test that is blind.
    let last = MEMORY_BYTES - 8;
    let code = code
        .memory_write(Width::Qword, last, 0x5a5a_5a5a)
        .memory_read(Width::Qword, last)
        .say_rax(Width::Qword);
    let (outcome, console) = run(&code.power_off());
    let _ = outcome.success();
    let (nothing, something) = console.split_at(places.len() * 15);
    assert!(nothing.iter().all(|byte| *byte == 0xff), "{console:x?}");
    assert_eq!(something, [0x5a; 8]);
}

/// An `ins` or `outs` with a repeat prefix is many accesses to one port, which KVM may hand over at
/// once.
#[test]
fn string_instructions_stay_at_their_port() {
    require_kvm!();
    const SCRATCH: u16 = COM1 + 7;
    let text = b"strings arrive in one piece";
    let code = Code::new()
        // mov dx, COM1; lea rsi, [rip + over the jump]; mov ecx, length; jmp over the text
        .raw(&[0x66, 0xba])
        .raw(&COM1.to_le_bytes())
        .raw(&[0x48, 0x8d, 0x35, 7, 0, 0, 0, 0xb9])
        .raw(&(text.len() as u32).to_le_bytes())
        .raw(&[0xeb, text.len() as u8])
        .raw(text)
        // rep outsb
        .raw(&[0xf3, 0x6e])
        .port_write(Width::Byte, SCRATCH, b'A'.into())
        // mov dx, SCRATCH; mov edi, 1 MiB; mov ecx, 8; rep insb
        .raw(&[0x66, 0xba])
        .raw(&SCRATCH.to_le_bytes())
        .raw(&[0xbf, 0, 0, 0x10, 0, 0xb9, 8, 0, 0, 0, 0xf3, 0x6c])
        .memory_read(Width::Qword, 0x10_0000)
        .say_rax(Width::Qword)
        .power_off();
    let (outcome, console) = run(&code);
    let _ = outcome.success();
    let expected = [&text[..], b"AAAAAAAA"].concat();
    assert_eq!(String::from_utf8_lossy(&console), String::from_utf8_lossy(&expected));
}

#[test]
fn a_guest_that_spins_can_be_stopped() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = kernel(&sandbox, &Code::new().raw(&[0xfa]).hang());
    for by_signal in [true, false] {
        let args = ["--memory".as_ref(), MEMORY.as_ref(), "--kernel".as_ref(), &*kernel];
        let vm = Vm::start(&sandbox, "spin", &args);
        eventually("the guest spins", || vm.vcpu_ticks() > 2);
        if by_signal {
            vm.running().kill(Signal::TERM);
        } else {
            assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
        }
        // Two seconds are generous for it, not for a machine that is busy with other tests.
        let mut running = vm.into_running();
        eventually("the VM has ended", || !running.is_running());
        let stderr = running.wait().success().stderr;
        let said = if by_signal { "note: SIGTERM: the VM ends\n" } else { "" };
        assert!(stderr.ends_with(said) && quiet(stderr.trim_end_matches(said)), "{stderr}");
        sandbox.assert_clean_within(SOON);
    }
}

/// A guest that never says that it is ready, by silence or in a flood of other words.
#[test]
fn a_fleet_does_not_wait_forever() {
    require_kvm!();
    let silence = Code::new().say(COM1, "booting\x1b[2J...").hang();
    let flood = Code::new().say(COM1, "booting...\n").say(COM2, "ready for nothing\n").again();
    for code in [silence, flood] {
        let sandbox = Sandbox::new();
        let kernel = kernel(&sandbox, &code);
        let file = sandbox.file("fleet.toml");
        let text = format!(
            "name = 'mute'\nengine = 'off'\n[[guest]]\nname = 'dumb'\nmemory = '{MEMORY}'\nkernel = {kernel:?}\nready_seconds = 3\n"
        );
        fs::write(&file, text).expect("a file in the sandbox");
        let args = ["fleet".as_ref(), "up".as_ref(), file.as_os_str()];
        let outcome = sandbox.samepage(args).timeout(SOON * 2).output();
        assert_eq!(outcome.code, Some(1), "{outcome}");
        for words in ["dumb", "COM2", "within 3 s", "ready_seconds", "booting", "stopped"] {
            assert!(outcome.stderr.contains(words), "the error does not say {words:?}: {outcome}");
        }
        assert!(
            !outcome.stderr.contains('\x1b'),
            "a guest's escape sequence reached the terminal: {outcome}"
        );
        sandbox.assert_clean_within(SOON);
    }
}

/// A named pipe, filled to its capacity and never read.
fn unread_pipe(sandbox: &Sandbox, name: &str) -> PathBuf {
    let path = sandbox.file(name);
    let made = Command::new("mkfifo").arg(&path).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfifo");
    path
}

/// Output that is not read is lost, not kept: and neither the guest nor its console blocks the VM.
#[test]
fn a_flood_of_output_is_not_kept_and_holds_nothing_up() {
    require_kvm!();
    /// Half of them to each port; kept, they would show.
    const FLOOD_BYTES: u64 = 1 << 19;
    let sandbox = Sandbox::new();
    let (control, com2) = Vm::sockets(&sandbox, "flood");
    let flood = Code::new().each(0..64, |code, n| code.port_write(Width::Byte, COM1, n));
    let flood = flood.each(0..64, |code, n| code.port_write(Width::Byte, COM2, n)).again();
    let kernel = kernel(&sandbox, &flood);
    let (output, input) = (unread_pipe(&sandbox, "output"), unread_pipe(&sandbox, "input"));
    // Opened for both directions, a named pipe is there at once and never ends.
    let script = r#"out=$1 in=$2; shift 2; exec "$@" <>"$in" 1<>"$out""#;
    let args = ["-c".as_ref(), script.as_ref(), "sh".as_ref()];
    let args = args.into_iter().chain([output.as_os_str(), input.as_os_str()]);
    let program = tests::samepage();
    let run = [program.as_os_str(), "run".as_ref(), "--memory".as_ref(), MEMORY.as_ref()];
    let run = run.into_iter().chain(["--kernel".as_ref(), &*kernel]);
    let sockets = ["--control".as_ref(), control.as_os_str(), "--com2".as_ref(), com2.as_os_str()];
    let running = Run::program("sh", args.chain(run).chain(sockets))
        .env("SAMEPAGE_RUNTIME_DIR", sandbox.runtime_dir())
        .timeout(SOON * 2)
        .start();
    let vm = Vm::of(running, control, com2);

    // Each byte is an exit; where ring 0 is emulated, exits of this kind are not counted, but its
    // instructions are.
    let written = || {
        let stats = vm.ask(&json!({"op": "kvm_stats"}));
        let count = |key: &str| stats["kvm_stats"][key].as_u64().expect("a number");
        count("io_exits") + count("insn_emulation") / 3
    };
    // A client that is sent it all and reads nothing: its socket takes some hundred KiB.
    let _deaf = vm.com2();
    counts_up_to(3 * FLOOD_BYTES, "buffers are full", written);
    let (before_kib, from) = (vm.rss_kib(), written());
    counts_up_to(from + FLOOD_BYTES, "the flood goes on", written);
    let grown_kib = vm.rss_kib().saturating_sub(before_kib);
    assert!(
        grown_kib < FLOOD_BYTES / 4 / 1024,
        "{grown_kib} KiB more resident after {FLOOD_BYTES} unread bytes"
    );

    // Keys for a guest whose console is stuck: the VM must still hear us.
    let mut keys = fs::OpenOptions::new().read(true).write(true).open(&input).expect("a pipe");
    keys.write_all(b"hello?\n").expect("room in a pipe");
    thread::sleep(Duration::from_millis(200));
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

/// A client of a guest that does not read sends more than is held for it, and goes away.
#[test]
fn a_guest_that_does_not_read_costs_nothing() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = kernel(&sandbox, &Code::new().hang());
    let args = ["--memory".as_ref(), MEMORY.as_ref(), "--kernel".as_ref(), &*kernel];
    let vm = Vm::start(&sandbox, "deaf", &args);
    let client = Client::connect(&vm.com2);
    client.stream().set_nonblocking(true).expect("a non-blocking socket");
    let mut pushed = 0;
    eventually("the VM takes no more", || {
        let before = pushed;
        while let Ok(count) = (&mut client.stream()).write(&[b'x'; 4096]) {
            pushed += count;
        }
        pushed == before
    });
    assert!(pushed > 64 << 10, "only {pushed} bytes were taken");
    drop(client);
    // The main thread has nothing to do now.
    let main = vm.running().pid();
    let _ = vm.status();
    let before = vm.ticks(main);
    thread::sleep(Duration::from_secs(1));
    let used = vm.ticks(main) - before;
    assert!(used < 20, "the VM's event loop was busy for {used} ticks of 100");
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    let _ = vm.into_running().wait().success();
}
