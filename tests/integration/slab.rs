//! The engine `slab`, among built-in guests that fill, rewrite, free and check their memory while it merges.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde_json::json;
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually, field};
use vmm::merge::Engine;
use vmm::merge::slab::engine::SlabEngine;

/// Ends the test, visibly, where merging by slabs is not possible.
macro_rules! require_slabs {
    () => {
        require_kvm!();
        if let Err(why) = vmm::memory::userfault::probe() {
            return tests::host::skipped(module_path!(), &format!("userfaultfd: {why}"));
        }
    };
}

struct Guest {
    vm: Vm,
    com2: Client,
}

impl Guest {
    fn start(sandbox: &Sandbox, name: &str, merge: &Path) -> Self {
        let merge = merge.to_str().expect("UTF-8");
        let vm = Vm::start(sandbox, name, &["--memory", "48M", "--merge", merge]);
        let mut com2 = vm.com2();
        let line = com2.line().expect("the ready line");
        assert!(line.starts_with("ready "), "{line:?}");
        Self { vm, com2 }
    }

    fn fill(&mut self, seed: u64, pages: u64) {
        let fill = format!("fill seed={seed} common=7 zero=10 common_pct=50 dup=20 unique=20 pages={pages}");
        assert_eq!(self.com2.command(&fill), format!("ok command=fill pages={pages}"));
    }

    #[track_caller]
    fn verify(&mut self) -> u64 {
        let verified = self.com2.command("verify");
        assert_eq!(field(&verified, "mismatched"), 0, "{verified}");
        field(&verified, "checked")
    }

    fn balloon(&self, pages: u64) {
        self.vm.ask(&json!({"op": "balloon_target", "pages": pages}));
    }

    fn end(self) {
        assert_eq!(self.vm.ask(&json!({"op": "stop"})), json!("done"));
        assert_eq!(self.vm.into_running().wait().success().stderr, "");
    }
}

fn engine(socket: &Path) -> SlabEngine {
    let mut engine = SlabEngine::new(socket.to_owned());
    engine.start(&[]).expect("the engine");
    engine
}

fn guests(sandbox: &Sandbox, socket: &Path, count: usize) -> Vec<Guest> {
    (0..count).map(|n| Guest::start(sandbox, &format!("vm-{n}"), socket)).collect()
}

fn socket(sandbox: &Sandbox) -> PathBuf {
    sandbox.file("merge.sock")
}

fn merged(engine: &mut SlabEngine) -> u64 {
    engine.progress().expect("progress").merged_pages
}

#[test]
fn nothing_is_lost_while_pages_merge_and_break_and_merge_again() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 3);
    let mut checked = 0;
    for round in 0..3u64 {
        for (n, guest) in (0u64..).zip(&mut guests) {
            guest.fill(10 * round + n, 9000);
            // One rewrites common pages, one all, one rests.
            let class = ["common", "all", "unique"][n as usize];
            let rate = [2000, 20_000, 0][n as usize];
            let churn = format!("churn class={class} rate={rate} seconds=2");
            assert_eq!(guest.com2.command(&churn), format!("ok command=churn rate={rate}"));
        }
        for turn in 0..6 {
            guests[2].balloon(if turn % 2 == 0 { 2000 } else { 0 });
            thread::sleep(Duration::from_millis(300));
        }
        for guest in &mut guests {
            let _ = guest.com2.command("idle");
            checked += guest.verify();
        }
        eventually("pages are merged", || merged(&mut engine) > 5000);
    }
    assert_eq!(checked, 3 * 3 * 9000);
    // What is merged and given to the balloon comes back as zeros.
    for guest in &mut guests {
        let freed = field(&guest.com2.command("free percent=60"), "freed");
        guest.balloon(freed);
        eventually("the balloon has it", || {
            let balloon = guest.vm.ask(&json!({"op": "balloon"}))["balloon"].clone();
            balloon["actual_pages"] == freed && balloon["host"]["absent_pages"] == freed
        });
        guest.balloon(0);
        eventually("the guest has it again", || {
            guest.vm.ask(&json!({"op": "balloon_size"}))["balloon_size"]["actual_pages"] == 0
        });
        let check = guest.com2.command("balloon check");
        assert_eq!(field(&check, "nonzero"), 0, "{check}");
        guest.verify();
    }
    guests.into_iter().for_each(Guest::end);
    drop(engine);
    sandbox.assert_clean_within(SOON);
}

#[test]
fn guests_go_on_without_the_engine_and_with_the_next() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut first = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 2);
    for (n, guest) in (0..).zip(&mut guests) {
        guest.fill(n, 8000);
    }
    eventually("pages are merged", || merged(&mut first) > 9000);
    drop(first);
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    for (n, guest) in (5..).zip(&mut guests) {
        guest.fill(n, 8000);
    }
    let mut second = engine(&socket);
    eventually("the next engine merges", || merged(&mut second) > 9000);
    // One guest that is killed takes nothing from the other.
    let killed = guests.remove(0);
    killed.vm.running().kill(rustix::process::Signal::KILL);
    let _ = killed.vm.into_running().wait();
    guests[0].verify();
    guests.remove(0).end();
}
