//! Pushing a guest's pages out to swap: on zram where the machine lets us make some, else what is
//! said where there is none.

use memory::page_out::has_swap;
use serde_json::{Value, json};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm, eventually, field};
use tests::zram::{Zram, swap_alone};

fn stop(sandbox: &Sandbox, vm: Vm) {
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    assert_eq!(vm.into_running().wait().success().stderr, "");
    sandbox.assert_clean_within(SOON);
}

/// Pages of guest RAM that are on swap, by the page table.
fn swapped(vm: &Vm) -> u64 {
    vm.page_entries().iter().filter(|entry| entry.swapped()).count() as u64
}

#[test]
fn pages_are_pushed_out_where_there_is_swap_and_come_back_whole() {
    require_kvm!();
    let _alone = swap_alone();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "64M"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some());
    let page_out = |pages: u64| vm.ask(&json!({"op": "page_out", "pages": pages}));
    if has_swap().is_err() {
        let refused = page_out(100);
        assert!(refused["error"].as_str().is_some_and(|e| e.contains("no active swap")), "{refused}");
    }
    let filled = com2.command("fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages=10000");
    assert_eq!(field(&filled, "pages"), 10_000);
    let _zram = match Zram::new(256) {
        Ok(zram) => zram,
        Err(why) => {
            let why = format!("{why:#}");
            tests::host::skipped("pages_are_pushed_out_where_there_is_swap_and_come_back_whole", &why);
            return stop(&sandbox, vm);
        }
    };
    let number = |answer: &Value, key: &str| {
        answer["paged_out"][key].as_u64().unwrap_or_else(|| panic!("no {key} in {answer}"))
    };
    let first = page_out(1000);
    assert!(number(&first, "advised_pages") <= 1000 && number(&first, "swapped_pages") > 0, "{first}");
    assert!(swapped(&vm) >= number(&first, "swapped_pages") / 2, "{first}");
    // The hand goes on: not the same pages again. A request takes some milliseconds and no more, so
    // that several are needed.
    eventually("most of it is on swap", || {
        let answer = page_out(10_000);
        assert!(number(&answer, "swapped_pages") <= number(&answer, "advised_pages"), "{answer}");
        swapped(&vm) > 8000
    });
    // A second time round there is little left.
    let rest = page_out(20_000);
    assert!(number(&rest, "advised_pages") < 4000, "{rest}");
    let verified = com2.command("verify");
    assert_eq!((field(&verified, "checked"), field(&verified, "mismatched")), (10_000, 0), "{verified}");
    stop(&sandbox, vm);
}
