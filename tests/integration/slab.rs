//! The engine `slab`, among built-in guests that fill, rewrite, free and check their memory while
//! it merges.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kernel_view::pagemap::{FrameFlags, FrameTable, Pagemap, PagemapEntry, Pfn};
use measure::frames::{self, Frames};
use measure::{Space, by_kind};
use memory::PAGE_BYTES;
use merge::Engine;
use merge::slab::Counters;
use merge::slab::engine::{SlabEngine, Tuning};
use serde_json::json;
use tests::api::ApiVm;
use tests::code::{Code, Width};
use tests::require_slabs;
use tests::sandbox::Sandbox;
use tests::torture::{Options, Tally};
use tests::vm::{Client, SOON, Vm, eventually, field};

use super::kernels::Elf;

struct Guest {
    vm: Vm,
    com2: Client,
}

impl Guest {
    /// One with `admit` called before it is ready.
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

/// Runs the torture, and finds every page as it should be.
#[track_caller]
fn torture(seed: u64, pages: u64, hash_mask: u64, sampling: Option<Duration>) -> Tally {
    let program = tests::samepage().with_file_name("torture");
    let limit = SOON * 4;
    let clones = false;
    let options =
        Options { seed, guests: 3, memory_mib: 32, pages, hash_mask, sampling, clones, limit, program };
    tortured(&options)
}

#[track_caller]
fn tortured(options: &Options) -> Tally {
    let (seed, pages) = (options.seed, options.pages);
    let tally = tests::torture::run(options, &|_| {}).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
    assert_eq!(tally.mismatches, 0, "seed {seed}: {tally:?}");
    assert!(tally.verified >= pages, "{tally:?}");
    tally
}

/// The same again, until what was wanted has happened: how much is merged between two writes goes
/// with what else the machine does.
#[track_caller]
fn torture_until(seed: u64, sampling: Option<Duration>, enough: impl Fn(&Tally) -> bool) {
    let mut tallies = Vec::new();
    while tallies.len() < 5 {
        let tally = torture(seed + 100 * tallies.len() as u64, 100_000, u64::MAX, sampling);
        if enough(&tally) {
            return;
        }
        tallies.push(tally);
    }
    panic!("{tallies:?}");
}

#[test]
fn nothing_is_lost_while_pages_merge_and_break_and_merge_again() {
    require_slabs!();
    torture_until(3, None, |tally| tally.merged > 5000 && tally.zeros > 1000 && tally.ballooned > 0);
}

#[test]
fn nothing_is_lost_while_pages_are_sampled_and_merge_and_are_given_back() {
    require_slabs!();
    let enough = |tally: &Tally| tally.merged > 1000 && tally.ballooned > 0 && tally.periods > 3;
    torture_until(4, Some(Duration::from_millis(50)), enough);
}

/// Guests are captured in the middle of what they do, and others go on from there.
#[test]
fn nothing_is_lost_while_guests_are_captured_and_clones_take_their_places() {
    require_slabs!();
    let program = tests::samepage().with_file_name("torture");
    let (seed, pages, hash_mask, sampling, limit) = (5, 150_000, u64::MAX, None, SOON * 8);
    let options =
        Options { seed, guests: 3, memory_mib: 32, pages, hash_mask, sampling, clones: true, limit, program };
    let tally = tortured(&options);
    assert!(tally.clones > 0 && tally.captures >= tally.clones + tally.given_up, "{tally:?}");
}

/// A hash never merges a page: not if all pages have the same one, and not if a few have.
#[test]
fn pages_whose_hashes_collide_stay_as_they_are() {
    require_slabs!();
    // Each offer finds the one content that is in a slab, and nearly always differs from it.
    let all = torture(1, 20_000, 0, None);
    assert!(all.agents.host.zero_pages > 500, "{all:?}");
    let many = torture(2, 20_000, 0xff, None);
    assert!(many.merged > 0 && many.agents.host.zero_pages > 500, "{many:?}");
    assert!(
        all.agents.host.differed_pages > 1000 && many.agents.host.differed_pages > 1000,
        "{all:?}\n{many:?}"
    );
}

/// Two guests that were filled, and an engine that has merged more than 9000 pages of them.
fn merged_pair(sandbox: &Sandbox, socket: &Path, pages: u64) -> (SlabEngine, Vec<Guest>) {
    let (mut engine, mut guests) = (engine(socket), guests(sandbox, socket, 2));
    for (n, guest) in (0..).zip(&mut guests) {
        guest.fill(n, pages);
    }
    eventually("pages are merged", || merged(&mut engine) > 9000);
    (engine, guests)
}

#[test]
fn what_is_merged_and_given_to_the_balloon_comes_back_as_zeros() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let (engine, mut guests) = merged_pair(&sandbox, &socket, 9000);
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

/// What was done to a guest's memory is reported with its end, should it be the reason.
#[test]
fn a_fault_after_merges_shows_them() {
    const SAME: u32 = 0x140_0000;
    const ZERO: u32 = 0x150_0000;
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    // Pages that are equal and pages of zeros; a wait for whatever comes on COM2; an instruction
    // that is none.
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
        pagemap.read(memory::Hva(hva(gpa)), 16, &mut entries).expect("entries");
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
    let (first, mut guests) = merged_pair(&sandbox, &socket, 8000);
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
    assert!(looks == 0 && merged(&mut engine) < 1000, "no agent was ordered to look for more");
    engine.start(&[]).expect("it starts");
    eventually("the rest is shared", || merged(&mut engine) > 9000);
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
}

/// The frames of a guest that other processes map too, but for the zero page, which is the kernel's. Needs root.
fn shared_frames(guest: &Guest) -> HashSet<Pfn> {
    let status = guest.vm.ask(&json!({"op": "status"}))["status"].clone();
    let (mut pagemap, mut entries) = (Pagemap::open(guest.vm.running().pid()).expect("pagemap"), Vec::new());
    let mut frames = HashSet::new();
    for extent in status["extents"].as_array().expect("extents") {
        let number = |key: &str| extent[key].as_u64().expect("a number");
        let pages = (number("bytes") / PAGE_BYTES) as usize;
        pagemap.read(memory::Hva(number("hva")), pages, &mut entries).expect("its page table");
        frames.extend(entries.iter().filter(|e| e.present() && !e.exclusive()).filter_map(|e| e.pfn()));
    }
    let (mut ascending, mut flags) = (frames.into_iter().collect::<Vec<_>>(), Vec::new());
    ascending.sort_unstable();
    if let Ok(mut table) = FrameTable::open() {
        table.flags(&ascending, &mut flags).expect("the flags of its frames");
    }
    let is_zero = flags.into_iter().map(FrameFlags::zero).chain(std::iter::repeat(false));
    ascending.into_iter().zip(is_zero).filter(|(_, zero)| !zero).map(|(frame, _)| frame).collect()
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

/// What the ledger counts by kind is what every frame, looked at one by one, says: of merged pages,
/// of those that are broken up, of zeros, of absent ones, in a balloon and out of it.
#[test]
fn counted_by_kind_frames_are_those_that_are_counted_one_by_one() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 3);
    guests.iter_mut().for_each(|guest| guest.fill(5, 8000));
    eventually("they are merged", || merged(&mut engine) > 9000);
    assert_eq!(guests[0].com2.command("churn class=all rate=3000 seconds=1"), "ok command=churn rate=3000");
    guests[1].balloon(500);
    thread::sleep(Duration::from_secs(1));
    for guest in &guests {
        assert_eq!(guest.vm.ask(&json!({"op": "pause"})), json!("done"));
    }
    let space = |guest: &Guest| {
        let status = guest.vm.ask(&json!({"op": "status"}))["status"].clone();
        let extents = serde_json::from_value(status["extents"].clone()).expect("extents");
        Space { name: "guest".into(), pid: guest.vm.running().pid(), extents }
    };
    let spaces: Vec<_> = guests.iter().map(space).collect();
    // Merging that was under way ends, and no page moves from then on.
    let mut both = (Frames::default(), Frames::default());
    eventually("nothing moves any more", || {
        let before = frames::measure(&spaces).expect("frames");
        both = (by_kind::measure(&spaces).expect("kinds"), frames::measure(&spaces).expect("frames"));
        before == both.1
    });
    let (kinds, one_by_one) = both;
    if one_by_one.estimated {
        return tests::host::skipped(module_path!(), "frame numbers: only root sees them");
    }
    for (kinds, one_by_one) in kinds.guests.iter().zip(&one_by_one.guests) {
        assert_eq!((kinds.pages, kinds.anonymous), (one_by_one.pages, one_by_one.anonymous));
        assert!((kinds.frames - one_by_one.frames).abs() < 1e-3, "{} {}", kinds.frames, one_by_one.frames);
    }
    assert_eq!((kinds.pages, kinds.frames), (one_by_one.pages, one_by_one.frames));
    assert_eq!((&kinds.shared_by, kinds.shared_by_what), (&one_by_one.shared_by, one_by_one.shared_by_what));
    assert_eq!((kinds.saved_pages, kinds.estimated), (one_by_one.saved_pages, false));
    let pages = kinds.pages;
    assert!(pages.shared > 5000 && pages.private > 100 && pages.absent > 500, "{pages:?}");
    for guest in &guests {
        guest.vm.ask(&json!({"op": "resume"}));
    }
    guests.into_iter().for_each(Guest::end);
}

/// One that the API starts is merged as any other: from birth, with one that the command line
/// started, and when it is throttled.
#[test]
fn a_vm_that_the_api_starts_is_merged() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = engine(&socket);
    let merge = socket.to_str().expect("UTF-8");
    let vm = ApiVm::start(&sandbox, &["--merge", merge]);
    assert!(engine.statistics().expect("statistics").guests.is_empty(), "there is no VM yet");
    vm.boot(48);
    let vm = vm.into_vm();
    let mut guest = Guest { com2: vm.com2(), vm };
    let line = guest.com2.line().expect("the ready line");
    assert!(line.starts_with("ready "), "{line:?}");
    let mut other = Guest::start(&sandbox, "other", &socket, |_| {});
    for guest in [&mut guest, &mut other] {
        guest.fill(3, 9000);
    }
    // Two guests with the same contents: half of all pages are saved.
    eventually("they are merged with each other", || merged(&mut engine) > 16_000);
    // What is saved counts both; the last pages of this one may still be on their way.
    eventually("the API's VM has its pages in slabs", || {
        guest.vm.page_entries().iter().filter(|page| page.file_or_shared()).count() > 8000
    });
    for mut guest in [guest, other] {
        assert_eq!(guest.verify(), 9000);
        guest.end();
    }
    drop(engine);
    sandbox.assert_clean_within(SOON);
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
    // Each writes to most of what is common, at random (`churn` would go round): what is left in
    // use moves into another slab, and the rest comes back.
    for guest in &mut guests {
        let writes = guest.com2.command("latency class=common rate=1000 seconds=4");
        assert!(writes.starts_with("ok "), "{writes}");
    }
    thread::sleep(Duration::from_secs(4));
    guests.iter_mut().for_each(|guest| _ = guest.com2.command("idle"));
    eventually("unused slabs are released", || {
        let (live, dead) = slab_pages(&engine);
        let moved = engine.statistics().expect("statistics").host.moved_pages;
        moved > 0 && dead * 2 < live
    });
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
    eventually("no slab outlives its users", || slab_pages(&engine) == (0, 0));
}

/// What all agents have counted.
fn counters(engine: &SlabEngine) -> Counters {
    engine.statistics().expect("statistics").host
}

#[test]
fn pages_whose_merges_break_are_merged_ever_less_and_never_given_up() {
    const PAGES: u64 = 1000;
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 2);
    guests.iter_mut().for_each(|guest| guest.fill(1, 2 * PAGES));
    // Of each guest the common pages, and those of zeros.
    let all = 2 * (PAGES + PAGES / 5);
    eventually("all is merged", || merged(&mut engine) >= all);
    let (before, began) = (counters(&engine), Instant::now());
    // Each common page every two seconds, with the same in both.
    for guest in &mut guests {
        let churn = "churn class=common rate=500 seconds=24";
        assert_eq!(guest.com2.command(churn), "ok command=churn rate=500");
    }
    thread::sleep(Duration::from_secs(24));
    let (after, seconds) = (counters(&engine), began.elapsed().as_secs_f64());
    let again = (after.merged_pages - after.moved_pages) - (before.merged_pages - before.moved_pages);
    // What the watcher promises; and once that it has seen the page before it was watched.
    let bound = (2 * PAGES) as f64 * ((seconds + 2.0).log2() + 1.0);
    assert!(again as f64 <= bound, "{again} merges of {} pages in {seconds} s: {after:?}", 2 * PAGES);
    assert!(after.broken_soon_pages > before.broken_soon_pages, "{after:?}");
    eventually("all is merged again", || merged(&mut engine) >= all);
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
}

#[test]
fn agents_let_others_run_after_each_millisecond_unless_memory_is_short() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 2);
    let fill = |seed: u64, guests: &mut Vec<Guest>, engine: &SlabEngine| {
        let before = counters(engine).merged_pages;
        guests.iter_mut().for_each(|guest| guest.fill(seed, 9000));
        eventually("it is merged", || counters(engine).merged_pages > before + 9000);
    };
    fill(1, &mut guests, &engine);
    let now = counters(&engine);
    let nanoseconds = now.hash_ns + now.publish_ns + now.merge_ns;
    // Pieces are counted that were ended by that; others by a rest.
    assert!(now.pieces * 2_000_000 > nanoseconds, "{nanoseconds} ns in {} pieces", now.pieces);
    for guest in &guests {
        let tasks = format!("/proc/{}/task", guest.vm.running().pid());
        let agents = std::fs::read_dir(tasks).expect("threads").filter_map(|task| {
            let stat = std::fs::read_to_string(task.expect("a thread").path().join("stat")).ok()?;
            stat.split_once("(merge) ").map(|(_, fields)| fields.to_owned())
        });
        let agents: Vec<_> = agents.collect();
        // A writer waits for the thread that has frozen its page: such a thread must never be one
        // that runs only when no other wants to.
        for agent in &agents {
            let field = |n: usize| agent.split(' ').nth(n - 3).expect("a field").to_owned();
            let (nice, policy) = (field(19), field(41));
            assert!(policy == "0" && nice.parse::<i32>().is_ok_and(|nice| nice <= 5), "{nice} {policy}");
        }
        assert_eq!(agents.len(), 1);
    }
    engine.set_priority(true);
    // The order takes time to arrive: only what it does after that counts.
    fill(2, &mut guests, &engine);
    let pieces = counters(&engine).pieces;
    fill(3, &mut guests, &engine);
    assert_eq!(counters(&engine).pieces, pieces, "memory is short");
    engine.set_priority(false);
    fill(4, &mut guests, &engine);
    fill(5, &mut guests, &engine);
    assert!(counters(&engine).pieces > pieces);
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
}

#[test]
fn little_of_the_slabs_is_dead_once_guests_rest() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let socket = socket(&sandbox);
    let mut engine = engine(&socket);
    let mut guests = guests(&sandbox, &socket, 2);
    guests.iter_mut().for_each(|guest| guest.fill(1, 9000));
    let slab_pages = |engine: &SlabEngine| {
        let all = engine.statistics().expect("statistics").domains.into_values().next().unwrap_or_default();
        (all.slab_live_bytes / PAGE_BYTES, all.slab_dead_bytes / PAGE_BYTES)
    };
    eventually("all is in slabs", || merged(&mut engine) >= 2 * (4500 + 900) && slab_pages(&engine).0 > 4000);
    // A fifth of the pages or so, here and there; each guest's are its own now.
    for guest in &mut guests {
        let writes = guest.com2.command("latency class=common rate=1000 seconds=1");
        assert!(writes.starts_with("ok "), "{writes}");
    }
    let broken = |engine: &SlabEngine| counters(engine).broken_pages;
    eventually("it is broken", || broken(&engine) > 500);
    eventually("next to nothing is dead", || {
        let (live, dead) = slab_pages(&engine);
        counters(&engine).moved_pages > 0 && live > 0 && dead * 15 <= live + 15 * 64
    });
    guests.iter_mut().for_each(|guest| _ = guest.verify());
    guests.into_iter().for_each(Guest::end);
}
