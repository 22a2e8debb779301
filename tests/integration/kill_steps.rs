//! Processes that end at each step of a capture and of a clone's start, one step after the other: each that can be seen from outside. A capture is a
//! conversation, of which a test plays one side; a process that is stopped (SIGSTOP) stands before its next step, whatever that is.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::keeper::Listener;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually};
use tests::{require_kvm, require_slabs};

use super::clones::Fleet;

const FILL: &str = "fill seed=1 common=7 zero=10 common_pct=40 dup=10 unique=40 pages=3000";
/// More questions than a capture of such a guest has.
const MOST_STEPS: usize = 40;
const FLEET: &str = r#"
name = "clones"
pool = 1
[overcommit]
admission = "off"
policy = false
[[guest]]
name = "web"
memory = "32M"
fill = { zero = 10, common = 40, duplicate = 10, unique = 40 }
"#;

fn filled(sandbox: &Sandbox, name: &str) -> (Vm, Client) {
    let vm = Vm::start(sandbox, name, &["--memory", "32M"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some_and(|line| line.starts_with("ready ")));
    assert!(com2.command(FILL).starts_with("ok "));
    (vm, com2)
}

fn send(client: &mut Client, request: &Value) {
    client.send(format!("{request}\n").as_bytes());
}

/// Has `vm` captured by a keeper that goes away after `steps` answers. Whether that was before the last.
fn captured(
    sandbox: &Sandbox,
    vm: &str,
    listener: &Listener,
    steps: usize,
    at_the_end: impl FnOnce(),
) -> bool {
    let (control, _) = Vm::sockets(sandbox, vm);
    let mut daemon = Client::connect(&control);
    send(&mut daemon, &json!({"op": "capture", "socket": listener.path()}));
    let mut keeper = listener.accept().expect("the VM connects");
    for step in 0..steps {
        if keeper.step().unwrap_or_else(|error| panic!("step {step}: {error}")) {
            let answer = daemon.line().expect("an answer");
            assert!(answer.contains("captured"), "{answer}");
            return false;
        }
    }
    at_the_end();
    drop(keeper);
    if let Some(answer) = daemon.line() {
        assert!(!answer.contains(r#""captured""#), "it was not kept: {answer}");
    }
    true
}

#[test]
fn a_keeper_that_goes_away_at_any_step_costs_its_vm_nothing() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = filled(&sandbox, "vm");
    let listener = Listener::bind(sandbox.file("keeper.sock")).expect("a socket");
    let mut steps = 0;
    while captured(&sandbox, "vm", &listener, steps, || {}) {
        assert_eq!(vm.status()["paused"], false, "after step {steps}");
        let verified = com2.command("verify");
        assert!(verified.contains("checked=3000 mismatched=0"), "after step {steps}: {verified}");
        steps += 1;
        assert!(steps < MOST_STEPS, "a capture without an end");
    }
    // Memory, then state: not fewer than these.
    assert!(steps > 4, "{steps} steps");
    eprintln!("{steps} steps");
    assert_eq!(vm.ask(&json!({"op": "stop"})), "done");
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_vm_that_is_killed_at_any_step_is_all_that_ends() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let listener = Listener::bind(sandbox.file("keeper.sock")).expect("a socket");
    for steps in 0..MOST_STEPS {
        let name = format!("vm-{steps}");
        let (vm, com2) = filled(&sandbox, &name);
        let kill = || vm.running().kill(Signal::KILL);
        let was_killed = captured(&sandbox, &name, &listener, steps, kill);
        drop(com2);
        if !was_killed {
            assert_eq!(vm.ask(&json!({"op": "stop"})), "done");
        }
        assert_eq!(vm.into_running().wait().code == Some(0), !was_killed, "{steps} steps");
        for path in <[_; 2]>::from(Vm::sockets(&sandbox, &name)) {
            let _ = std::fs::remove_file(path);
        }
        if !was_killed {
            break;
        }
    }
    sandbox.assert_clean_within(SOON);
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a process"), signal).expect("a signal");
}

fn standby(fleet: &Fleet) -> i32 {
    let find = || fleet.sandbox.processes().into_iter().find(|process| process.args.contains(" standby "));
    eventually("one stands by", || fleet.status(&[])["pool"]["standing_by"] == 1);
    find().expect("one stands by").pid
}

/// It has been handed all that it needs, and has read none of it.
#[test]
fn a_process_that_ends_before_it_reads_its_image_is_no_clone() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let _ = fleet.ok(&["snapshot", "web", "warm"]);
    let pid = standby(&fleet);
    signal(pid, Signal::STOP);
    let command = fleet.run(&["clone", "warm", "--as", "c"]).start();
    let has_log = || fleet.sandbox.runtime_dir().join("fleets/clones/c-0.json").exists();
    eventually("it is being started", has_log);
    signal(pid, Signal::KILL);
    let outcome = command.wait();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("guest c-0") && outcome.stderr.contains("signal 9"), "{outcome}");
    assert_eq!(fleet.names(), ["web"]);
    let _ = fleet.ok(&["clone", "warm", "--as", "c"]);
    fleet.verify();
    fleet.down();
}

/// The daemon has handed over an image and ended; what it was handed to finds that out before anything of a guest runs.
#[test]
fn a_process_whose_daemon_ends_before_it_reads_its_image_is_no_clone() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let _ = fleet.ok(&["snapshot", "web", "warm"]);
    let pid = standby(&fleet);
    signal(pid, Signal::STOP);
    let command = fleet.run(&["clone", "warm", "--as", "c"]).start();
    let has_log = || fleet.sandbox.runtime_dir().join("fleets/clones/c-0.json").exists();
    eventually("it is being started", has_log);
    fleet.kill_daemon();
    assert_ne!(command.wait().code, Some(0));
    signal(pid, Signal::CONT);
    // Of the kernel's signal for stopped processes that lose their parent, if not by itself.
    eventually("it ends", || fleet.sandbox.processes().iter().all(|process| process.pid != pid));
    fleet.come_up();
    assert_eq!(fleet.names(), ["web"]);
    fleet.verify();
    fleet.down();
}

/// A guest's VM has been asked to be captured, and has not begun.
#[test]
fn a_vm_or_a_daemon_that_ends_before_a_capture_begins_ends_alone() {
    require_slabs!();
    let two = FLEET.replace("name = \"web\"", "name = \"web\"\ncount = 2");
    let fleet = Fleet::up(&two);
    let vm = fleet.vm("web-0").pid;
    signal(vm, Signal::STOP);
    let command = fleet.run(&["snapshot", "web-0", "warm"]).start();
    let asks = || fleet.sandbox.runtime_dir().join("fleets/clones/web-0.cap").exists();
    eventually("it is asked", asks);
    fleet.kill_daemon();
    assert_ne!(command.wait().code, Some(0));
    signal(vm, Signal::CONT);
    fleet.come_up();
    assert_eq!((fleet.names(), fleet.vm("web-0").pid), (vec!["web-0".to_owned(), "web-1".to_owned()], vm));
    fleet.verify();
    signal(vm, Signal::STOP);
    let command = fleet.run(&["snapshot", "web-0", "warm"]).start();
    eventually("it is asked", asks);
    signal(vm, Signal::KILL);
    let outcome = command.wait();
    assert!(outcome.code == Some(1) && outcome.stderr.contains("web-0"), "{outcome}");
    assert!(fleet.ok(&["snapshot", "list"]).stdout.contains("no snapshots"));
    eventually("it has ended", || fleet.guests().iter().any(|guest| guest["state"] == "dead"));
    fleet.verify();
    fleet.down();
}
