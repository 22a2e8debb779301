//! Pacing how fast a guest takes frames, with the built-in guest that fills its memory.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm, eventually, field};

const FILL: &str = "fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100";

fn throttle(vm: &Vm, pages_per_second: Option<u64>) -> Value {
    vm.ask(&json!({"op": "throttle", "pages_per_second": pages_per_second}))
}

fn throttled(vm: &Vm, key: &str) -> u64 {
    vm.status()["throttle"][key].as_u64().unwrap_or_else(|| panic!("no {key} in {}", vm.status()))
}

/// Pages of the process's own, as the kernel counts them.
fn own_pages(vm: &Vm) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", vm.running().pid())).expect("statm");
    let fields: Vec<u64> = statm.split(' ').filter_map(|f| f.parse().ok()).collect();
    fields[1] - fields[2]
}

fn stop(sandbox: &Sandbox, vm: Vm) {
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    assert_eq!(vm.into_running().wait().success().stderr, "");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_guest_takes_no_more_than_its_rate() {
    require_kvm!();
    let sandbox = Sandbox::new();
    for cpus in ["1", "4"] {
        let vm = Vm::start(&sandbox, "vm", &["--memory", "128M", "--cpus", cpus]);
        let mut com2 = vm.com2();
        assert!(com2.line().is_some_and(|line| line.starts_with("ready ")));
        assert_eq!(vm.status()["throttle"]["pages_per_second"], Value::Null);
        const RATE: u64 = 5000;
        let (before, began) = (own_pages(&vm), Instant::now());
        assert_eq!(throttle(&vm, Some(RATE)), json!("done"));
        let filled = com2.command(&format!("{FILL} pages=20000"));
        assert_eq!(field(&filled, "pages"), 20_000);
        let (grown, seconds) = (own_pages(&vm) - before, began.elapsed().as_secs_f64());
        // As fast as it can takes a quarter of a second. Never is it more than a second's worth
        // ahead, which the VM states itself.
        assert!(grown >= 20_000 && grown as f64 <= RATE as f64 * (seconds + 1.0), "{grown} in {seconds} s");
        let status = vm.status()["throttle"].clone();
        assert_eq!(status["pages_per_second"], RATE);
        assert!(status["ahead_pages"].as_u64().is_some_and(|pages| pages <= RATE), "{status}");
        // The kernel's count may be some pages off.
        assert!(status["admitted_pages"].as_u64() > Some(19_000), "{status}");
        assert!(throttled(&vm, "held_ms") > 1000, "{status}");
        // What it has may be rewritten as fast as it likes, once what it took last is paid for.
        let held = || throttled(&vm, "held_ms");
        eventually("all is paid for", || {
            let before = held();
            thread::sleep(Duration::from_millis(200));
            held() == before
        });
        let held = held();
        let verified = com2.command("verify");
        assert_eq!((field(&verified, "checked"), field(&verified, "mismatched")), (20_000, 0), "{verified}");
        // At its rate the pages would take four seconds. One or two of the guest's own may be new.
        let held_meanwhile = throttled(&vm, "held_ms") - held;
        assert!(held_meanwhile < 100, "{held_meanwhile} ms for what it has");
        stop(&sandbox, vm);
    }
}

#[test]
fn a_pause_and_a_throttle_do_not_undo_each_other() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "256M"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some());
    // So few that it is held most of the time.
    assert_eq!(throttle(&vm, Some(100)), json!("done"));
    com2.send(format!("{FILL} pages=60000\n").as_bytes());
    let is_held = |over| throttled(&vm, "held_ms") > over;
    eventually("it is held", || is_held(200));
    let stands = |vm: &Vm| {
        let (ticks, pages) = (vm.vcpu_ticks(), own_pages(vm));
        thread::sleep(Duration::from_millis(300));
        vm.vcpu_ticks() <= ticks + 1 && own_pages(vm).abs_diff(pages) < 64
    };
    // Paused while it is held: a hold that ends does not let it run.
    assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    assert!(stands(&vm), "it ran while it was paused");
    // Nor does lifting the rate.
    assert_eq!(throttle(&vm, None), json!("done"));
    assert!(stands(&vm), "it ran while it was paused");
    // And a resume does not lift a rate.
    assert_eq!(throttle(&vm, Some(100)), json!("done"));
    assert_eq!(vm.ask(&json!({"op": "resume"})), json!("done"));
    let held = throttled(&vm, "held_ms");
    eventually("it is held again", || is_held(held + 200));
    // Not for ever: it goes on a little between two holds.
    let had = own_pages(&vm);
    eventually("it goes on", || own_pages(&vm) > had + 64);
    assert_eq!(throttle(&vm, None), json!("done"));
    let held = throttled(&vm, "held_ms");
    let mut answer = com2.line().expect("an answer");
    while answer.starts_with("progress ") {
        answer = com2.line().expect("an answer");
    }
    assert_eq!(field(&answer, "pages"), 60_000);
    assert_eq!(throttled(&vm, "held_ms"), held, "no vCPU is held without a rate");
    stop(&sandbox, vm);
}

#[test]
fn a_vm_that_is_held_can_be_stopped() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "256M", "--cpus", "2"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some());
    assert_eq!(throttle(&vm, Some(1)), json!("done"));
    com2.send(format!("{FILL} pages=60000\n").as_bytes());
    eventually("it is held", || throttled(&vm, "held_ms") > 200);
    stop(&sandbox, vm);
}

#[test]
fn a_rate_of_nothing_is_refused() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "16M"]);
    let refused = throttle(&vm, Some(0));
    assert!(refused["error"].as_str().is_some_and(|e| e.contains("pause")), "{refused}");
    assert_eq!(vm.status()["throttle"]["pages_per_second"], Value::Null);
    stop(&sandbox, vm);
    let vm = Vm::start(&sandbox, "vm", &["--memory", "16M", "--backing", "memfd"]);
    let refused = throttle(&vm, Some(1000));
    assert!(refused["error"].as_str().is_some_and(|e| e.contains("anonymous")), "{refused}");
    stop(&sandbox, vm);
}
