//! How much of its memory a guest uses, as its VM estimates it; and what that costs: nothing of
//! what is in the pages.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use kernel_view::pagemap::Pagemap;
use serde_json::{Value, json};
use tests::require_slabs;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually, field};

fn start(sandbox: &Sandbox, args: &[&str]) -> (Vm, Client) {
    let vm = Vm::start(sandbox, "vm", args);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some_and(|line| line.starts_with("ready ")));
    (vm, com2)
}

fn working_set(vm: &Vm) -> Value {
    vm.ask(&json!({"op": "working_set"}))["working_set"].clone()
}

fn number(of: &Value, key: &str) -> u64 {
    of[key].as_u64().unwrap_or_else(|| panic!("no {key} in {of}"))
}

/// The estimate after `more` further periods.
fn after_periods(vm: &Vm, more: u64) -> Value {
    let periods = |found: &Value| found["periods"].as_u64().unwrap_or(0);
    let begin = periods(&working_set(vm));
    eventually("more periods", || periods(&working_set(vm)) >= begin + more);
    working_set(vm)
}

fn mappings(vm: &Vm) -> usize {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm.running().pid())).expect("maps");
    maps.lines().count()
}

fn stop(sandbox: &Sandbox, vm: Vm) {
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    assert_eq!(vm.into_running().wait().success().stderr, "");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_guest_that_rests_is_told_from_one_that_uses_half_of_its_memory() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let args = ["--memory", "96M", "--sample-working-set", "2", "--samples", "400"];
    let (vm, mut com2) = start(&sandbox, &args);
    let filled = com2.command("fill seed=1 common=7 zero=0 common_pct=0 dup=50 unique=50 pages=20000");
    assert_eq!(field(&filled, "pages"), 20_000);
    let idle = after_periods(&vm, 2);
    assert!(number(&idle, "samples") >= 390 && number(&idle, "sampled_pages") >= 20_000, "{idle}");
    assert_eq!((&idle["period_seconds"], &idle["written_pages"]), (&json!(2.0), &Value::Null), "{idle}");
    // What waits for commands uses some pages of its own.
    assert!(number(&idle, "estimated_pages") <= number(&idle, "error_pages") + 100, "{idle}");
    // Round and round over the 10,000 unique pages, each in every period and more often.
    assert!(com2.command("churn class=unique rate=20000").starts_with("ok "));
    let used = after_periods(&vm, 3);
    // 95 % is no certainty: twice the error is, nearly.
    let off = number(&used, "estimated_pages").abs_diff(10_000);
    assert!(off <= 2 * number(&used, "error_pages"), "{used}");
    assert!(number(&used, "error_pages") < 1500, "{used}");
    assert!(com2.command("idle").starts_with("ok "));
    let idle = after_periods(&vm, 2);
    assert!(number(&idle, "estimated_pages") <= number(&idle, "error_pages") + 100, "{idle}");
    let verified = com2.command("verify");
    assert_eq!((field(&verified, "checked"), field(&verified, "mismatched")), (20_000, 0), "{verified}");
    stop(&sandbox, vm);
}

#[test]
fn nothing_is_lost_while_a_thousand_pages_are_sampled_twenty_times_a_second() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let args = [
        "--memory",
        "64M",
        "--cpus",
        "2",
        "--free-page-reporting",
        "--sample-working-set",
        "0.05",
        "--samples",
        "1000",
    ];
    let (vm, mut com2) = start(&sandbox, &args);
    let whole = {
        assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
        let whole = mappings(&vm);
        assert_eq!(vm.ask(&json!({"op": "resume"})), json!("done"));
        whole
    };
    let mut checked = 0;
    for round in 0..12 {
        let fill = format!("fill seed={round} common=7 zero=10 common_pct=30 dup=20 unique=40 pages=12000");
        assert!(com2.command(&fill).starts_with("ok "));
        assert!(com2.command("churn class=all rate=30000").starts_with("ok "));
        thread::sleep(Duration::from_millis(300));
        assert!(com2.command("idle").starts_with("ok "));
        let verified = com2.command("verify");
        assert_eq!(field(&verified, "mismatched"), 0, "{verified}");
        checked += field(&verified, "checked");
        // Half of it is given back, and used again.
        assert!(com2.command("free percent=50").starts_with("ok "));
        assert_eq!(vm.ask(&json!({"op": "balloon_target", "pages": 5000})), json!("done"));
        let size = || vm.ask(&json!({"op": "balloon_size"}))["balloon_size"]["actual_pages"].clone();
        eventually("the balloon is full", || size() == 5000);
        let verified = com2.command("verify");
        assert_eq!(field(&verified, "mismatched"), 0, "{verified}");
        assert_eq!(vm.ask(&json!({"op": "balloon_target", "pages": 0})), json!("done"));
        eventually("the balloon is empty", || size() == 0);
        let zeros = com2.command("balloon check");
        assert_eq!(field(&zeros, "nonzero"), 0, "{zeros}");
    }
    assert_eq!(checked, 12 * 12_000);
    let found = working_set(&vm);
    assert!(number(&found, "periods") > 20 && number(&found, "samples") > 100, "{found}");
    assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    // What else has come since is no page's: threads, their stacks, heaps.
    assert!(mappings(&vm) <= whole + 20, "{} mappings, and {whole} before", mappings(&vm));
    stop(&sandbox, vm);
}

#[test]
fn who_looks_from_outside_sees_all_of_a_paused_guest() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let args = ["--memory", "32M", "--sample-working-set", "3", "--samples", "500"];
    let (vm, mut com2) = start(&sandbox, &args);
    assert!(
        com2.command("fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages=4000")
            .starts_with("ok ")
    );
    let parked = || vm.status()["parked_pages"].as_u64().expect("parked_pages");
    eventually("pages are parked", || parked() > 300);
    let extent = vm.status()["extents"][0].clone();
    let (hva, bytes) = (number(&extent, "hva"), number(&extent, "bytes"));
    let present = || {
        let mut entries = Vec::new();
        let mut pagemap = Pagemap::open(vm.running().pid()).expect("its pagemap");
        pagemap.read(memory::Hva(hva), bytes as usize / 4096, &mut entries).expect("its pagemap");
        entries.into_iter().map(|entry| entry.present()).collect::<Vec<_>>()
    };
    let away = present();
    // A read of a page that is elsewhere does not hang, whatever comes of it, nor do the next ones
    // of the guest.
    let memory = File::open(format!("/proc/{}/mem", vm.running().pid())).expect("its memory");
    let mut page = [0u8; 4096];
    for (n, _) in away.iter().enumerate().filter(|(_, present)| !**present).take(2000) {
        let _ = memory.read_at(&mut page, hva + n as u64 * 4096);
    }
    assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    assert_eq!(parked(), 0);
    let all = present();
    assert!(all.iter().filter(|present| **present).count() >= 4000);
    for (n, _) in all.iter().enumerate().filter(|(_, present)| **present) {
        memory.read_exact_at(&mut page, hva + n as u64 * 4096).expect("a page of a paused guest");
    }
    assert_eq!(vm.ask(&json!({"op": "resume"})), json!("done"));
    eventually("pages are parked again", || parked() > 300);
    let verified = com2.command("verify");
    assert_eq!((field(&verified, "checked"), field(&verified, "mismatched")), (4000, 0), "{verified}");
    stop(&sandbox, vm);
}

#[test]
fn a_vm_that_is_not_sampled_says_so() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "16M"]);
    let answer = vm.ask(&json!({"op": "working_set"}));
    assert!(answer["error"].as_str().is_some_and(|e| e.contains("--sample-working-set")), "{answer}");
    assert_eq!(vm.status()["parked_pages"], 0);
    stop(&sandbox, vm);
    for wrong in ["0", "-1", "4000", "often"] {
        let refused = sandbox.samepage(["run".to_owned(), format!("--sample-working-set={wrong}")]).output();
        assert!(refused.code == Some(2) && refused.stderr.contains("0.01 to 3600"), "{refused}");
    }
}
