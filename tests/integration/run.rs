//! `samepage run`: how a VM ends.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::require_kvm;
use tests::run::Run;
use tests::sandbox::Sandbox;

use super::kernels::{Elf, RUBBISH, SILENCE, TRIPLE_FAULT};

const SOON: Duration = Duration::from_secs(5);

fn run(sandbox: &Sandbox, name: &str, code: &[u8]) -> Run {
    let kernel = Elf::with(code).write(sandbox, name);
    let kernel = kernel.to_str().expect("a path in UTF-8");
    sandbox.samepage(["run", "--console", "none", "--memory", "32M", "--kernel", kernel])
}

#[test]
fn a_triple_fault_is_named_and_ends_the_vm() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let outcome = run(&sandbox, "fault", TRIPLE_FAULT).timeout(Duration::from_secs(30)).output();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    for word in ["triple fault", "rip"] {
        assert!(outcome.stderr.to_lowercase().contains(word), "{word} is not named: {outcome}");
    }
    sandbox.assert_clean_within(SOON);
}

#[test]
fn rubbish_to_every_port_does_no_harm() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let outcome = run(&sandbox, "rubbish", RUBBISH).timeout(Duration::from_secs(120)).output();
    // It may hit a power-off before it gets to its reset; either is an ordinary end.
    let _ = outcome.success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn signals_end_a_silent_guest() {
    require_kvm!();
    let sandbox = Sandbox::new();
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let socket = sandbox.runtime_dir().join("vm.sock");
        let running = run(&sandbox, "silence", SILENCE).env("RUST_LOG", "warn").start();
        thread::sleep(Duration::from_millis(500));
        running.kill(signal);
        let outcome = running.wait();
        assert!(outcome.took < Duration::from_secs(10), "{signal:?}: {outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
        assert!(!socket.exists());
        sandbox.assert_clean_within(SOON);
    }
}

#[test]
fn sockets_go_with_their_vm() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = Elf::with(SILENCE).write(&sandbox, "silence");
    let (control, com2) = (sandbox.runtime_dir().join("control"), sandbox.runtime_dir().join("com2"));
    let running = sandbox
        .samepage(
            ["run".as_ref(), "--console".as_ref(), "none".as_ref(), "--kernel".as_ref(), kernel.as_os_str()]
                .into_iter()
                .chain(["--control".as_ref(), control.as_os_str(), "--com2".as_ref(), com2.as_os_str()]),
        )
        .start();
    let until = Instant::now() + SOON;
    while !(control.exists() && com2.exists()) {
        assert!(Instant::now() < until, "no sockets: {}", running.stderr_so_far());
        thread::sleep(Duration::from_millis(10));
    }
    running.kill(Signal::TERM);
    let _ = running.wait();
    sandbox.assert_clean_within(SOON);
}
