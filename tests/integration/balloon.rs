//! The balloon of a VM with the built-in guest: what the guest says against what the host sees.

use serde_json::{Value, json};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually, field};

const FILL: &str = "fill seed=1 common=7 zero=10 common_pct=40 dup=10 unique=40";

fn start(sandbox: &Sandbox, more: &[&str]) -> (Vm, Client) {
    let mut args = vec!["--memory", "128M"];
    args.extend(more);
    let vm = Vm::start(sandbox, "vm", &args);
    let mut com2 = vm.com2();
    let line = com2.line().expect("the ready line");
    assert!(line.starts_with("ready "), "{line:?}");
    (vm, com2)
}

fn balloon(vm: &Vm) -> Value {
    vm.ask(&json!({"op": "balloon"}))["balloon"].clone()
}

/// Asks for a size, and waits until the guest says that it has it and the host has got all of it.
#[track_caller]
fn set(vm: &Vm, pages: u64, reached: u64) {
    vm.ask(&json!({"op": "balloon_target", "pages": pages}));
    eventually("the balloon gets to its size", || {
        let balloon = balloon(vm);
        balloon["actual_pages"] == reached && balloon["host"]["held_pages"] == reached
    });
}

#[track_caller]
fn verify(com2: &mut Client, pages: u64) {
    let verified = com2.command("verify");
    assert_eq!(verified, format!("ok command=verify checked={pages} mismatched=0 first=none"));
}

/// Ends the VM, which must have had nothing to say, or only warnings of what its guest did.
fn stop(sandbox: &Sandbox, vm: Vm, warns: bool) {
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    let outcome = vm.into_running().wait();
    let outcome = outcome.success();
    assert_eq!(outcome.stderr.contains("WARN"), warns, "{outcome}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn what_the_guest_gives_the_host_has_and_what_it_holds_stays() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = start(&sandbox, &[]);
    assert_eq!(com2.command(&format!("{FILL} pages=20000")), "ok command=fill pages=20000");
    com2.command("free percent=50");
    let full_kib = vm.rss_kib();
    set(&vm, 20_000, 20_000);
    let host = balloon(&vm)["host"].clone();
    assert_eq!((&host["absent_pages"], &host["touched_pages"]), (&json!(20_000), &json!(0)), "{host}");
    // Of the pages given, some 10000 had been filled.
    assert!(vm.rss_kib() + 20_000 < full_kib, "{full_kib} KiB before, {} after", vm.rss_kib());
    verify(&mut com2, 10_000);

    // More than the guest has to spare: it stops where its filled pages begin.
    let report = com2.command("balloon report");
    let spare = field(&report, "given") + field(&report, "free");
    set(&vm, 32_000, spare);
    assert_eq!(field(&com2.command("balloon report"), "free"), 0);
    verify(&mut com2, 10_000);
    let refused = com2.command(&format!("{FILL} pages=30000"));
    assert_eq!(refused, "err code=memory pages=30000, expected at most 10000");

    set(&vm, 0, 0);
    let checked = com2.command("balloon check");
    assert_eq!((field(&checked, "checked"), field(&checked, "nonzero")), (spare, 0), "{checked}");
    assert_eq!(com2.command(&format!("{FILL} pages=30000")), "ok command=fill pages=30000");
    verify(&mut com2, 30_000);
    stop(&sandbox, vm, false);
}

#[test]
fn a_fill_takes_pages_back_where_that_was_agreed() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = start(&sandbox, &["--deflate-on-oom"]);
    set(&vm, 30_000, 30_000);
    assert_eq!(com2.command(&format!("{FILL} pages=25000")), "ok command=fill pages=25000");
    let report = com2.command("balloon report");
    assert_eq!((field(&report, "target"), field(&report, "free")), (30_000, 0), "{report}");
    let left = field(&report, "actual");
    assert!(left < 30_000, "{report}");
    verify(&mut com2, 25_000);
    eventually("the host knows", || balloon(&vm)["host"]["held_pages"] == left);
    // What is freed goes back into it.
    com2.command("free percent=100");
    eventually("the balloon has its size again", || balloon(&vm)["actual_pages"] == 30_000);
    stop(&sandbox, vm, false);
}

#[test]
fn freed_pages_are_reported_and_the_host_gets_them() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = start(&sandbox, &["--free-page-reporting"]);
    com2.command(&format!("{FILL} pages=20000"));
    let full_kib = vm.rss_kib();
    com2.command("free percent=75");
    eventually("all is reported", || balloon(&vm)["host"]["reported_bytes"] == 15_000 * 4096);
    assert!(vm.rss_kib() + 50_000 < full_kib, "{full_kib} KiB before, {} after", vm.rss_kib());
    verify(&mut com2, 5_000);
    assert_eq!(field(&com2.command("balloon check"), "nonzero"), 0);
    assert_eq!(com2.command(&format!("{FILL} pages=20000")), "ok command=fill pages=20000");
    verify(&mut com2, 20_000);
    stop(&sandbox, vm, false);
}

#[test]
fn statistics_are_the_guest_s_own() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = start(&sandbox, &[]);
    com2.command(&format!("{FILL} pages=10000"));
    let report = com2.command("balloon report");
    let free_bytes = field(&report, "free") * 4096;
    eventually("fresh statistics", || {
        vm.ask(&json!({"op": "balloon_statistics"}));
        let guest = balloon(&vm)["guest"].clone();
        guest["free_memory"] == free_bytes && guest["minor_faults"] == 10_000
    });
    stop(&sandbox, vm, false);
}

#[test]
fn a_guest_that_writes_to_its_balloon_is_noticed() {
    require_kvm!();
    let sandbox = Sandbox::new();
    // A huge page would cover more than what is touched.
    let (vm, mut com2) = start(&sandbox, &["--huge-pages", "no"]);
    set(&vm, 10_000, 10_000);
    assert_eq!(com2.command("balloon touch pages=300"), "ok command=balloon action=touch touched=300");
    let host = balloon(&vm)["host"].clone();
    let number = |key: &str| host[key].as_u64().expect("a number");
    assert_eq!(number("touched_pages") + number("swept_pages"), 300, "{host}");
    assert_eq!(number("touched_pages") + number("absent_pages"), 10_000, "{host}");
    // After a while the host drops them again.
    eventually("the balloon has no frames", || {
        let host = balloon(&vm)["host"].clone();
        host["swept_pages"] == 300 && host["absent_pages"] == 10_000
    });
    set(&vm, 0, 0);
    assert_eq!(field(&com2.command("balloon check"), "nonzero"), 0);
    stop(&sandbox, vm, false);
}

/// A guest's statistics have an age, which grows while it sends no new ones: while it is paused,
/// say.
#[test]
fn what_the_guest_said_has_an_age() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, _com2) = start(&sandbox, &[]);
    // A driver begins with statistics of its own accord; before it has there is no age.
    let first = balloon(&vm);
    assert_eq!(first.get("age_seconds").is_none(), first["updates"] == 0, "{first}");
    let age = || balloon(&vm)["age_seconds"].as_f64();
    eventually("fresh statistics", || {
        vm.ask(&json!({"op": "balloon_statistics"}));
        age().is_some()
    });
    vm.ask(&json!({"op": "pause"}));
    // An answer that was on its way may still come.
    let updates = || balloon(&vm)["updates"].as_u64();
    let (before, least) = loop {
        let (counted, before, began) = (updates(), age().expect("an age"), std::time::Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let (least, after) = (began.elapsed().as_secs_f64(), age());
        if updates() == counted {
            assert!(after >= Some(before + least), "{before} s, and {after:?} s after {least} s more");
            break (before, least);
        }
    };
    let stats =
        sandbox.samepage(["balloon".as_ref(), "stats".as_ref(), Vm::sockets(&sandbox, "vm").0.as_os_str()]);
    let stats = stats.output().success();
    assert!(stats.stdout.contains("its statistics are") && stats.stdout.contains("s ago"), "{stats}");
    vm.ask(&json!({"op": "resume"}));
    eventually("they are fresh again", || {
        vm.ask(&json!({"op": "balloon_statistics"}));
        age() < Some(before + least)
    });
    stop(&sandbox, vm, false);
}

#[test]
fn a_driver_may_go_and_come_back() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = start(&sandbox, &[]);
    set(&vm, 10_000, 10_000);
    for _ in 0..3 {
        assert_eq!(com2.command("balloon off"), "ok command=balloon action=off");
        let gone = balloon(&vm);
        assert_eq!((&gone["driver"], &gone["host"]["held_pages"]), (&json!(false), &json!(0)), "{gone}");
        let back = com2.command("balloon on");
        assert!(back.starts_with("ok command=balloon action=on features="), "{back}");
        eventually("the balloon has its size again", || balloon(&vm)["actual_pages"] == 10_000);
    }
    stop(&sandbox, vm, false);
}

#[test]
fn hostile_requests_are_answered_and_harm_nobody() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = start(&sandbox, &["--free-page-reporting", "--free-page-hinting"]);
    assert_eq!(com2.command(&format!("{FILL} pages=10000")), "ok command=fill pages=10000");
    for kind in ["outside", "repeated", "length", "direction", "loop", "statistics", "reporting", "hinting"] {
        let answer = com2.command(&format!("balloon hostile kind={kind}"));
        let expected = format!("ok command=balloon action=hostile kind={kind} completed=yes status=0xf");
        assert_eq!(answer, expected);
    }
    assert!(balloon(&vm)["host"]["refused"].as_u64() >= Some(5), "{}", balloon(&vm));
    verify(&mut com2, 10_000);
    // Driver and device still understand each other.
    assert_eq!(com2.command("balloon off"), "ok command=balloon action=off");
    com2.command("balloon on");
    set(&vm, 5_000, 5_000);
    verify(&mut com2, 10_000);
    stop(&sandbox, vm, true);
}

#[test]
fn a_vm_without_a_balloon_has_none_of_it() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (vm, mut com2) = start(&sandbox, &["--no-balloon"]);
    let answer = com2.command("balloon report");
    assert_eq!(answer, "err code=unsupported this guest drives no balloon device");
    assert_eq!(com2.command(&format!("{FILL} pages=1000")), "ok command=fill pages=1000");
    verify(&mut com2, 1000);
    stop(&sandbox, vm, false);
}
