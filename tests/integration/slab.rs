//! The engine `slab`, among built-in guests that fill, rewrite, free and check their memory while it merges.

use std::path::{Path, PathBuf};

use serde_json::json;
use tests::code::{Code, Width};
use tests::require_slabs;
use tests::sandbox::Sandbox;
use tests::torture::{Options, Tally};
use tests::vm::{Client, SOON, Vm, eventually, field};
use vmm::memory::pagemap::{Pagemap, PagemapEntry};
use vmm::merge::Engine;
use vmm::merge::slab::engine::SlabEngine;

use super::kernels::Elf;

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

/// Runs the torture, and finds every page as it should be.
#[track_caller]
fn torture(seed: u64, pages: u64, hash_mask: u64) -> Tally {
    let program = tests::samepage().with_file_name("torture");
    let limit = SOON * 4;
    let options = Options { seed, guests: 3, memory_mib: 32, pages, hash_mask, limit, program };
    let tally = tests::torture::run(&options, &|_| {}).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
    assert_eq!(tally.mismatches, 0, "seed {seed}: {tally:?}");
    assert!(tally.verified >= pages, "{tally:?}");
    tally
}

#[test]
fn nothing_is_lost_while_pages_merge_and_break_and_merge_again() {
    require_slabs!();
    let tally = torture(3, 100_000, u64::MAX);
    assert!(tally.merged > 5000 && tally.zeros > 1000 && tally.ballooned > 0, "{tally:?}");
}

/// A hash never merges a page: not if all pages have the same one, and not if a few have.
#[test]
fn pages_whose_hashes_collide_stay_as_they_are() {
    require_slabs!();
    // Each offer finds the one content that is in a slab, and nearly always differs from it.
    let all = torture(1, 20_000, 0);
    assert!(all.zeros > 500, "{all:?}");
    let many = torture(2, 20_000, 0xff);
    assert!(many.merged > 0 && many.zeros > 500, "{many:?}");
    assert!(
        all.agents.host.differed_pages > 1000 && many.agents.host.differed_pages > 1000,
        "{all:?}\n{many:?}"
    );
}

#[test]
fn what_is_merged_and_given_to_the_balloon_comes_back_as_zeros() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 2);
    for (n, guest) in (0..).zip(&mut guests) {
        guest.fill(n, 9000);
    }
    eventually("pages are merged", || merged(&mut engine) > 9000);
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
        assert!(field(&check, "checked") >= freed && field(&check, "nonzero") == 0, "{check}");
        guest.verify();
    }
    guests.into_iter().for_each(Guest::end);
    drop(engine);
    sandbox.assert_clean_within(SOON);
}

/// What was done to a guest's memory is told with its end, should it be the reason.
#[test]
fn a_fault_after_merges_shows_them() {
    const SAME: u32 = 0x140_0000;
    const ZERO: u32 = 0x150_0000;
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    // Pages that are equal and pages of zeros; a wait for whatever comes on COM2; an instruction that is none.
    let write = |value| move |code: Code, page: u32| code.memory_write(Width::Dword, page, value);
    let pages = |from: u32| (from..from + 16 * 4096).step_by(4096);
    let code = Code::new().each(pages(SAME), write(7)).each(pages(ZERO), write(0));
    let code = code.port_write(Width::Dword, 0x604, u32::MAX).raw(&[0x0f, 0x0b]);
    let kernel = Elf::with(code.bytes()).write(&sandbox, "tiny");
    let merge = socket.to_str().expect("UTF-8");
    let kernel = kernel.to_str().expect("UTF-8");
    let vm = Vm::start(&sandbox, "tiny", &["--memory", "32M", "--kernel", kernel, "--merge", merge]);
    let _engine = engine(&socket);
    let extent = vm.status()["extents"][0].clone();
    let hva = |gpa: u32| extent["hva"].as_u64().expect("hva") + u64::from(gpa);
    let mut pagemap = Pagemap::open(vm.running().pid()).expect("pagemap");
    let mut all = |gpa: u32, is: fn(&PagemapEntry) -> bool| {
        let mut entries = Vec::new();
        pagemap.read(hva(gpa), 16, &mut entries).expect("entries");
        entries.iter().all(is)
    };
    eventually("the pages are merged", || {
        all(SAME, |page| page.file_or_shared()) && all(ZERO, |page| !page.exclusive())
    });
    vm.com2().send(b"\n");
    let ended = vm.into_running().wait();
    assert_eq!(ended.code, Some(1), "{ended}");
    let line = |from: u32, what| {
        let shown = |line: &&str| line.contains(&format!("{from:#011x}-")) && line.contains(what);
        ended.stderr.lines().find(shown).unwrap_or_else(|| panic!("no {from:#x} {what}: {ended}"))
    };
    assert!(line(SAME, "pages of a slab").contains("ms before") && line(ZERO, "zeros").contains("ms before"));
    assert!(ended.stderr.contains("triple fault") && ended.stderr.contains("rip"), "{ended}");
    // Nothing is said of merges where there were none: `hostile.rs` has such guests.
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
