//! A VM's outside: its control socket and its COM2 socket, with the built-in guest.

use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually, field};

fn builtin(sandbox: &Sandbox, memory: &str) -> Vm {
    Vm::start(sandbox, "vm", &["--memory", memory])
}

/// Its COM2, once the guest is ready; with the line that says so.
fn ready(vm: &Vm) -> (Client, String) {
    let mut com2 = vm.com2();
    let line = com2.line().expect("the ready line");
    assert!(line.starts_with("ready "), "{line:?}");
    (com2, line)
}

fn stop(sandbox: &Sandbox, vm: Vm) {
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    assert_eq!(vm.into_running().wait().success().stderr, "");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn status_is_what_the_host_shows() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "48M", "--cpus", "2", "--name", "mine"]);
    let status = vm.status();
    let doctor = sandbox.samepage(["doctor", "--json"]).output().success().json();
    assert_eq!(status["name"], "mine");
    assert_eq!(status["pid"], vm.running().pid());
    assert_eq!((&status["paused"], &status["vcpus"]), (&json!(false), &json!(2)), "{status}");
    assert_eq!(status["memory_bytes"], 48 << 20, "{status}");
    assert_eq!(status["backend"], doctor["backend"]);
    let extents = status["extents"].as_array().expect("extents");
    assert_eq!(extents.len(), 1, "{status}");
    assert_eq!((&extents[0]["gpa"], &extents[0]["bytes"]), (&json!(0), &json!(48 << 20)));
    // Where it says its memory is, the process has a mapping of that size.
    let hva = extents[0]["hva"].as_u64().expect("hva");
    let mapping = format!("{hva:x}-{:x} rw", hva + (48 << 20));
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.running().pid())).expect("maps");
    assert!(maps.contains(&mapping), "no {mapping} in\n{maps}");
    eventually("2 vCPU threads", || vm.vcpu_threads().len() == 2);
    stop(&sandbox, vm);
}

/// A VM's own account of its frames against what another process reads of it, and against what its
/// guest wrote.
#[test]
fn status_says_what_the_vm_adds_to_the_host() {
    require_kvm!();
    const FILLED: u64 = 4000;
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "32M");
    let (mut com2, _) = ready(&vm);
    assert_eq!(vm.status()["frames"], Value::Null, "it takes time, and was not asked for");
    let frames = || {
        let frames = vm.ask(&json!({"op": "status", "frames": true}))["status"]["frames"].clone();
        let of = |key: &str| frames[key].as_u64().unwrap_or_else(|| panic!("no {key} in {frames}"));
        let (resident, frames, marginal) = (of("resident_pages"), of("frames"), of("marginal_frames"));
        assert!(marginal <= frames && frames <= resident, "{marginal} {frames} {resident}");
        marginal
    };
    let before = frames();
    let fill =
        com2.command(&format!("fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages={FILLED}"));
    assert!(fill.starts_with("ok "), "{fill}");
    let after = frames();
    let rollup = kernel_view::smaps::SharePages::of(vm.running().pid()).expect("its mappings");
    // What the VM needed only to start may still count before.
    assert!(after >= FILLED && before < FILLED / 2, "{before} and then {after}");
    assert!(after.abs_diff(rollup.marginal_frames) < 100, "{after} and {rollup:?}");
    stop(&sandbox, vm);
}

#[test]
fn a_paused_vm_stands_still_and_goes_on() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    let (mut com2, _) = ready(&vm);
    let fill = com2.command("fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages=256");
    assert!(fill.starts_with("ok "), "{fill}");
    let churn = com2.command("churn class=unique rate=2000");
    assert!(churn.starts_with("ok "), "{churn}");
    let changes = |over_ms| {
        let before = vm.memory();
        thread::sleep(Duration::from_millis(over_ms));
        before != vm.memory()
    };
    eventually("the churn changes memory", || changes(50));

    for _ in 0..2 {
        // Twice in a row is no mistake.
        assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    }
    assert_eq!(vm.status()["paused"], true);
    let ticks = vm.vcpu_ticks();
    assert!(!changes(500), "memory changed while the VM was paused");
    assert!(vm.vcpu_ticks() <= ticks + 1, "a vCPU ran while the VM was paused");
    // Input sent meanwhile is read later.
    com2.send(b"report\n");
    assert!(!changes(100));

    assert_eq!(vm.ask(&json!({"op": "resume"})), json!("done"));
    assert_eq!(vm.status()["paused"], false);
    let report = com2.line().expect("an answer after the pause");
    assert!(report.starts_with("ok command=report"), "{report}");
    eventually("the churn goes on", || field(&com2.command("report"), "churned") > field(&report, "churned"));
    let verify = com2.command("verify");
    assert_eq!(field(&verify, "mismatched"), 0, "{verify}");
    stop(&sandbox, vm);
}

#[test]
fn a_paused_vm_can_be_stopped() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    let _ = ready(&vm);
    assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    stop(&sandbox, vm);
}

/// Has the kernel been told that it may merge guest memory?
fn is_mergeable(vm: &Vm) -> bool {
    let hva = vm.status()["extents"][0]["hva"].as_u64().expect("hva");
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.running().pid())).expect("smaps");
    let mapping = smaps.lines().skip_while(|line| !line.starts_with(&format!("{hva:x}-")));
    let flags = mapping.clone().find(|line| line.starts_with("VmFlags:")).expect("VmFlags");
    flags.split_whitespace().any(|flag| flag == "mg")
}

#[test]
fn merging_is_allowed_and_undone() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    assert!(!is_mergeable(&vm));
    let answer = vm.ask(&json!({"op": "mergeable", "on": true}));
    if !std::path::Path::new("/sys/kernel/mm/ksm").exists() {
        assert!(answer["error"].is_string(), "{answer}");
        return tests::host::skipped("merging_is_allowed_and_undone", "this kernel has no KSM");
    }
    for on in [true, false, true] {
        assert_eq!(vm.ask(&json!({"op": "mergeable", "on": on})), json!("done"));
        assert_eq!(is_mergeable(&vm), on);
    }
    stop(&sandbox, vm);
}

#[test]
fn kvm_counts() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    let (mut com2, _) = ready(&vm);
    let count = |key: &str| vm.ask(&json!({"op": "kvm_stats"}))["kvm_stats"][key].as_u64();
    let exits = count("exits");
    assert!(exits > Some(0), "{exits:?} exits");
    for key in ["io_exits", "mmio_exits", "insn_emulation", "remote_tlb_flush", "pages_4k"] {
        assert!(count(key).is_some(), "no {key}");
    }
    let _ = com2.command("report");
    assert!(count("exits") > exits, "an answer is output, and output an exit");
    stop(&sandbox, vm);
}

#[test]
fn rubbish_on_the_control_socket_is_refused_politely() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    let mut client = Client::connect(&vm.control);
    let deep = "[".repeat(1000);
    let rubbish = [
        "",
        "hello",
        "{}",
        "null",
        "[]",
        "7",
        r#"{"op":"explode"}"#,
        r#"{"op":1}"#,
        r#"{"op":"pause","now":true}"#,
        r#"{"op":"mergeable"}"#,
        r#"{"op":"mergeable","on":"yes"}"#,
        r#"{"op":"status"}{"op":"stop"}"#,
        "{\"op\":\"status\0\"}",
        &deep,
    ];
    for line in rubbish {
        let answer: Value = serde_json::from_str(&client.exchange(line)).expect("JSON");
        assert!(answer["error"].is_string(), "{line:?} was answered {answer}");
        assert_eq!(answer["kind"], "not-a-request", "{line:?} was answered {answer}");
    }
    client.send(b"\xff\xfe\x80\n");
    let answer = client.line().expect("an answer");
    assert!(answer.starts_with(r#"{"error":"#), "{answer}");
    // The same client goes on, in pieces and with several requests at once.
    client.send(b"{\"op\":\"sta");
    thread::sleep(Duration::from_millis(50));
    client.send(b"tus\"}\n{\"op\":\"kvm_stats\"}\n{\"op\":\"status\"}\n");
    for key in ["status", "kvm_stats", "status"] {
        let answer: Value = serde_json::from_str(&client.line().expect("an answer")).expect("JSON");
        assert!(answer[key].is_object(), "{answer}");
    }
    stop(&sandbox, vm);
}

#[test]
fn errors_say_of_which_kind_they_are() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "16M", "--no-balloon", "--backing", "memfd"]);
    for (request, kind) in [
        (json!({"op": "balloon"}), "no-balloon"),
        (json!({"op": "balloon_size"}), "no-balloon"),
        (json!({"op": "balloon_statistics"}), "no-balloon"),
        (json!({"op": "balloon_target", "pages": 1}), "no-balloon"),
        (json!({"op": "throttle", "pages_per_second": 1}), "not-anonymous"),
        (json!({"op": "mergeable", "on": true}), "not-anonymous"),
        (json!({"op": "working_set"}), "not-sampled"),
        (json!({"op": "explode"}), "not-a-request"),
    ] {
        let answer = vm.ask(&request);
        assert!(answer["error"].is_string() && answer["kind"] == kind, "{request} was answered {answer}");
    }
    stop(&sandbox, vm);
    let vm = builtin(&sandbox, "16M");
    let too_large = json!({"op": "balloon_target", "pages": 5000});
    assert_eq!(vm.ask(&too_large)["kind"], "balloon-too-large");
    assert_eq!(vm.ask(&json!({"op": "throttle", "pages_per_second": 0}))["kind"], "zero-rate");
    stop(&sandbox, vm);
}

#[test]
fn a_line_that_does_not_end_is_hung_up_on() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    let mut client = Client::connect(&vm.control);
    client.send(&[b'a'; 16 << 10]);
    client.assert_hung_up();
    assert_eq!(vm.status()["paused"], false);
    stop(&sandbox, vm);
}

#[test]
fn many_clients_do_not_disturb() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    let (mut com2, _) = ready(&vm);
    let mut clients: Vec<_> = (0..20).map(|_| Client::connect(&vm.control)).collect();
    // The accepted ones are served, in any order; the others are disconnected at once.
    let mut served = 0;
    for client in clients.iter_mut().rev() {
        client.send(b"{\"op\":\"status\"}\n");
        served += usize::from(client.line().is_some());
    }
    assert!((10..=20).contains(&served), "{served} of 20 were served");
    assert!(com2.command("report").starts_with("ok "));
    drop(clients);
    // A client that sends requests and never reads is disconnected, and delays no other for long.
    let mut deaf = Client::connect(&vm.control);
    deaf.stream().set_nonblocking(true).expect("a non-blocking socket");
    for _ in 0..2000 {
        deaf.send(b"{\"op\":\"kvm_stats\"}\n");
    }
    assert!(com2.command("report").starts_with("ok "));
    eventually("others are served", || {
        let mut client = Client::connect(&vm.control);
        client.send(b"{\"op\":\"status\"}\n");
        client.line().is_some()
    });
    drop(deaf);
    stop(&sandbox, vm);
}

#[test]
fn com2_keeps_the_ready_line_for_its_first_client() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    // The guest has long been ready when its processor time does not grow any more.
    let mut ticks = None;
    eventually("the guest waits", || {
        let before = ticks.replace(vm.vcpu_ticks());
        thread::sleep(Duration::from_millis(300));
        before == Some(vm.vcpu_ticks())
    });
    let (_com2, line) = ready(&vm);
    // All but what firmware had below 1 MiB.
    assert!(field(&line, "mem_pages").abs_diff((16 << 20) / 4096) < 128, "{line}");
    stop(&sandbox, vm);
}

#[test]
fn com2_takes_commands_in_pieces_and_clients_one_after_another() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "16M");
    let (mut first, _) = ready(&vm);
    for byte in b"report\n" {
        first.send(&[*byte]);
        thread::sleep(Duration::from_millis(2));
    }
    let answer = first.line().expect("an answer");
    assert!(answer.starts_with("ok command=report"), "{answer}");
    // Gone in the middle of a word: the guest has half a line, which the next client ends.
    first.send(b"rep");
    thread::sleep(Duration::from_millis(100));
    drop(first);
    let mut second = vm.com2();
    let answer = second.exchange("");
    assert!(answer.starts_with("err "), "{answer}");
    assert!(second.command("report").starts_with("ok "));
    // Gone without waiting for the answer, which is kept for the next.
    second.send(b"report\n");
    drop(second);
    let mut third = vm.com2();
    third.send(b"idle\n");
    eventually("the answer to `idle`", || third.line().expect("an answer").starts_with("ok command=idle"));
    // A new client takes the place of one that is still there.
    let mut fourth = vm.com2();
    assert!(fourth.command("report").starts_with("ok "));
    third.assert_hung_up();
    // More than all buffers hold, at once: nothing is lost on the way.
    let many = 20_000;
    fourth.stream().set_nonblocking(false).expect("a blocking socket");
    let writer = fourth.stream().try_clone().expect("a second handle");
    let writing = thread::spawn(move || {
        use std::io::Write;
        (&mut &writer).write_all("\n".repeat(many).as_bytes())
    });
    writing.join().expect("the writer").expect("all are taken");
    let answer = fourth.exchange("report");
    assert!(answer.starts_with("ok ") || answer.starts_with("err "), "{answer}");
    stop(&sandbox, vm);
}

#[test]
fn thirty_two_vcpus_start() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "64M", "--cpus", "32"]);
    let (mut com2, _) = ready(&vm);
    assert_eq!(vm.status()["vcpus"], 32);
    // A thread has its name once it has begun to run.
    eventually("32 vCPU threads", || vm.vcpu_threads().len() == 32);
    for op in ["pause", "resume"] {
        assert_eq!(vm.ask(&json!({"op": op})), json!("done"));
    }
    assert!(com2.command("report").starts_with("ok "));
    stop(&sandbox, vm);
}

#[test]
fn memory_above_4_gib() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = builtin(&sandbox, "5G");
    let (mut com2, line) = ready(&vm);
    assert!(field(&line, "mem_pages").abs_diff((5 << 30) / 4096) < 128, "{line}");
    assert!(field(&line, "pages") > (9 << 29) / 4096, "{line}");
    let extents = vm.status()["extents"].clone();
    let places: Vec<_> = extents
        .as_array()
        .expect("extents")
        .iter()
        .map(|e| (e["gpa"].as_u64(), e["bytes"].as_u64()))
        .collect();
    assert_eq!(places, [(Some(0), Some(3 << 30)), (Some(4 << 30), Some(2 << 30))]);
    assert!(com2.command("report").starts_with("ok "));
    // Nothing was filled: memory is taken when it is touched, not before.
    assert!(vm.rss_kib() < 256 << 10, "{} KiB resident", vm.rss_kib());
    stop(&sandbox, vm);
}
