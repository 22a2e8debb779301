//! The engine `slab`, among built-in guests that fill, rewrite, free and check their memory while it merges.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde_json::json;
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually, field};
use vmm::memory::PAGE_BYTES;
use vmm::memory::pagemap::{Pagemap, Pfn};
use vmm::merge::Engine;
use vmm::merge::slab::engine::{SlabEngine, Tuning};

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
    /// One that is told to `admit` before it is ready.
    fn start(sandbox: &Sandbox, name: &str, merge: &Path, admit: impl FnOnce(u32)) -> Self {
        let merge = merge.to_str().expect("UTF-8");
        let vm = Vm::start(sandbox, name, &["--memory", "48M", "--merge", merge]);
        admit(vm.running().pid());
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
    guests_of(sandbox, socket, count, |_, _| {})
}

fn guests_of(
    sandbox: &Sandbox,
    socket: &Path,
    count: usize,
    mut admit: impl FnMut(usize, u32),
) -> Vec<Guest> {
    (0..count).map(|n| Guest::start(sandbox, &format!("vm-{n}"), socket, |pid| admit(n, pid))).collect()
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

#[test]
fn what_guests_start_from_is_shared_before_anybody_looks_for_more() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = SlabEngine::new(socket.clone());
    engine.open().expect("the engine");
    let mut guests = guests(&sandbox, &socket, 3);
    eventually("what they have loaded is shared", || merged(&mut engine) > 30);
    guests.iter_mut().for_each(|guest| guest.fill(1, 8000));
    let looks = engine.statistics().expect("statistics").host.passes;
    assert!(looks == 0 && merged(&mut engine) < 1000, "nobody was told to look for more");
    engine.start(&[]).expect("it starts");
    eventually("the rest is shared", || merged(&mut engine) > 9000);
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
}

/// The frames of a guest that somebody else maps too. Needs root.
fn shared_frames(guest: &Guest) -> HashSet<Pfn> {
    let status = guest.vm.ask(&json!({"op": "status"}))["status"].clone();
    let (mut pagemap, mut entries) = (Pagemap::open(guest.vm.running().pid()).expect("pagemap"), Vec::new());
    let mut frames = HashSet::new();
    for extent in status["extents"].as_array().expect("extents") {
        let number = |key: &str| extent[key].as_u64().expect("a number");
        let pages = (number("bytes") / PAGE_BYTES) as usize;
        pagemap.read(number("hva"), pages, &mut entries).expect("its page table");
        frames.extend(entries.iter().filter(|e| e.present() && !e.exclusive()).filter_map(|e| e.pfn()));
    }
    frames
}

#[test]
fn domains_with_the_same_contents_have_no_frame_in_common() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = SlabEngine::for_members(socket.clone(), &Tuning::default());
    engine.start(&[]).expect("the engine");
    let mut guests = guests_of(&sandbox, &socket, 4, |n, pid| {
        engine.admit(&format!("vm-{n}"), pid, ["red", "blue"][n % 2], 48 << 20);
    });
    guests.iter_mut().for_each(|guest| guest.fill(3, 8000));
    eventually("both domains are merged", || {
        let domains = engine.statistics().expect("statistics").domains;
        domains.len() == 2 && domains.values().all(|domain| domain.counters.shared_now > 10_000)
    });
    let frames: Vec<_> = guests.iter().map(shared_frames).collect();
    if frames.iter().all(HashSet::is_empty) {
        return tests::host::skipped(module_path!(), "frame numbers: only root sees them");
    }
    assert!(!frames[0].is_disjoint(&frames[2]) && !frames[1].is_disjoint(&frames[3]), "they share at home");
    for (red, blue) in [(0, 1), (0, 3), (2, 1), (2, 3)] {
        assert!(frames[red].is_disjoint(&frames[blue]), "{red} and {blue} have frames in common");
    }
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
}

#[test]
fn slabs_go_with_their_last_user_and_thin_ones_are_put_together() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let engine = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 2);
    let slab_pages = |engine: &SlabEngine| {
        let all = engine.statistics().expect("statistics").domains.into_values().next().unwrap_or_default();
        (all.slab_live_bytes / PAGE_BYTES, all.slab_dead_bytes / PAGE_BYTES)
    };
    guests.iter_mut().for_each(|guest| guest.fill(1, 9000));
    eventually("all is in slabs", || slab_pages(&engine).0 > 4000);
    // Each writes to most of it, at random: what is left in use moves into another slab, and the rest comes back.
    for guest in &mut guests {
        let churn = "churn class=all rate=9000 seconds=2";
        assert_eq!(guest.com2.command(churn), "ok command=churn rate=9000");
    }
    thread::sleep(Duration::from_secs(2));
    guests.iter_mut().for_each(|guest| _ = guest.com2.command("idle"));
    eventually("what nobody uses is let go of", || {
        let (live, dead) = slab_pages(&engine);
        let moved = engine.statistics().expect("statistics").host.moved_pages;
        moved > 0 && dead * 2 < live
    });
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
    eventually("no slab outlives its users", || slab_pages(&engine) == (0, 0));
}
