//! The ledger's frames, told again and again from walks now and then and the kernel's counters, of
//! guests that are merged, write, and give memory back.

use std::thread;
use std::time::Duration;

use measure::frames::{self, Frames};
use measure::rolling::{REFRESH, Reading, Rolling, Subject};
use measure::{Space, by_kind};
use merge::Engine;
use merge::slab::engine::SlabEngine;
use serde_json::json;
use tests::require_slabs;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually};

/// All the time that it wants.
const ALL: u32 = 1;
/// None but for guests of which nothing is known.
const NONE: u32 = u32::MAX;
/// Pages of a guest that are not told by a counter's change: its VMM's own memory comes and goes.
const MARGIN: u64 = 600;

/// Guests that are merged and paused.
struct Fleet {
    engine: SlabEngine,
    guests: Vec<(Vm, Client)>,
    subjects: Vec<Subject>,
    _sandbox: Sandbox,
}

impl Fleet {
    fn new(count: u64) -> Self {
        let sandbox = Sandbox::new();
        let socket = sandbox.file("merge.sock");
        let mut engine = SlabEngine::new(socket.clone());
        engine.start(&[]).expect("the engine");
        let mut guests = Vec::new();
        for n in 0..count {
            let merge = socket.to_str().expect("UTF-8");
            let name = format!("vm-{n}");
            let vm = Vm::start(&sandbox, &name, &["--memory", "48M", "--huge-pages", "no", "--merge", merge]);
            let mut com2 = vm.com2();
            let line = com2.line().expect("the ready line");
            assert!(line.starts_with("ready "), "{line:?}");
            let fill = "fill seed=5 common=7 zero=10 common_pct=50 dup=20 unique=20 pages=8000";
            assert_eq!(com2.command(fill), "ok command=fill pages=8000");
            guests.push((vm, com2));
        }
        let subject = |(vm, _): &(Vm, Client)| {
            let status = vm.ask(&json!({"op": "status"}))["status"].clone();
            let extents = serde_json::from_value(status["extents"].clone()).expect("extents");
            let space = Space { name: "guest".into(), pid: vm.running().pid(), extents };
            Subject { space, parked_pages: 0, given_back_pages: 0 }
        };
        let subjects = guests.iter().map(subject).collect();
        let mut fleet = Self { engine, guests, subjects, _sandbox: sandbox };
        eventually("they are merged", || fleet.merged() > 9000);
        fleet.hold();
        fleet
    }

    fn merged(&mut self) -> u64 {
        self.engine.progress().expect("progress").merged_pages
    }

    fn all(&self, op: &str) {
        self.guests.iter().for_each(|(vm, _)| assert_eq!(vm.ask(&json!({"op": op})), json!("done")));
    }

    /// Holds all still, until what was under way has come to its end.
    fn hold(&self) {
        self.all("pause");
        let mut last = by_kind::measure(&self.spaces()).expect("kinds");
        eventually("nothing moves any more", || {
            thread::sleep(Duration::from_millis(200));
            let before = std::mem::replace(&mut last, by_kind::measure(&self.spaces()).expect("kinds"));
            before == last
        });
    }

    fn spaces(&self) -> Vec<Space> {
        self.subjects.iter().map(|subject| subject.space.clone()).collect()
    }

    fn read(&self, rolling: &mut Rolling) -> Reading {
        rolling.read(&self.subjects, None, SOON).expect("a reading").expect("guests with page types")
    }

    fn end(self) {
        self.all("resume");
        for (vm, _) in self.guests {
            assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
            assert_eq!(vm.into_running().wait().success().stderr, "");
        }
    }
}

#[track_caller]
fn assert_exact(reading: &Reading, exact: &Frames) {
    for (guest, exact) in reading.guests.iter().zip(&exact.guests) {
        assert!(!guest.by_counters, "{guest:?}");
        assert_eq!((guest.frames.pages, guest.frames.anonymous), (exact.pages, exact.anonymous));
        assert!(
            (guest.frames.frames - exact.frames).abs() < 1e-3,
            "{} {}",
            guest.frames.frames,
            exact.frames
        );
    }
    assert_eq!(reading.frames, exact.frames);
}

#[test]
fn a_guest_that_changes_is_walked_again_and_one_that_does_not_is_not() {
    require_slabs!();
    let mut fleet = Fleet::new(3);
    let mut rolling = Rolling::new(ALL, REFRESH);
    let first = fleet.read(&mut rolling);
    let exact = frames::measure(&fleet.spaces()).expect("frames");
    if exact.estimated {
        return tests::host::skipped(module_path!(), "frame numbers: only root sees them");
    }
    assert_exact(&first, &exact);
    assert!(first.walks > Duration::ZERO);
    // Nothing moves: no walk, and the age says so. VM processes may have something to do of their
    // own for a moment.
    let mut again = first.clone();
    eventually("a reading needs no walk", || {
        again = fleet.read(&mut rolling);
        again.walks == Duration::ZERO && again.guests.iter().all(|guest| !guest.by_counters)
    });
    assert_exact(&again, &exact);
    assert!(again.guests.iter().all(|guest| guest.walk_age > Duration::ZERO), "{again:?}");
    // One of them breaks what was merged, another one gives memory back.
    fleet.all("resume");
    let churned = fleet.guests[0].1.command("churn class=all rate=3000 seconds=1");
    assert_eq!(churned, "ok command=churn rate=3000");
    fleet.guests[1].0.ask(&json!({"op": "balloon_target", "pages": 500}));
    thread::sleep(Duration::from_secs(1));
    fleet.hold();
    let exact = frames::measure(&fleet.spaces()).expect("frames");
    assert!(exact.pages.absent > 500, "{:?}", exact.pages);
    let mut last = None;
    eventually("all that changed has been walked", || {
        let reading = fleet.read(&mut rolling);
        let done = reading.guests.iter().all(|guest| !guest.by_counters);
        last = Some(reading);
        done
    });
    assert_exact(&last.take().expect("a reading"), &exact);
    // One guest left out, and a new one; only those measured together count.
    let left_out = fleet.subjects.remove(1);
    for again in [None, Some(left_out)] {
        fleet.subjects.extend(again);
        let exact = by_kind::measure(&fleet.spaces()).expect("kinds");
        eventually("they are put together", || {
            last = Some(fleet.read(&mut rolling));
            last.iter().flat_map(|reading| &reading.guests).all(|guest| !guest.by_counters)
        });
        assert_exact(&last.take().expect("a reading"), &exact);
    }
}

#[test]
fn without_time_for_walks_counters_tell_what_changed_and_how_old_the_rest_is() {
    require_slabs!();
    let mut fleet = Fleet::new(2);
    let mut rolling = Rolling::new(NONE, Duration::ZERO);
    let first = fleet.read(&mut rolling);
    fleet.all("resume");
    // Both break up merges; one gives 2000 pages back.
    for (_, com2) in &mut fleet.guests {
        assert!(com2.command("churn class=all rate=3000 seconds=1").starts_with("ok "));
    }
    fleet.guests[1].0.ask(&json!({"op": "balloon_target", "pages": 2000}));
    thread::sleep(Duration::from_secs(1));
    fleet.hold();
    let exact = by_kind::measure(&fleet.spaces()).expect("kinds");
    let reading = fleet.read(&mut rolling);
    assert_eq!(reading.walks, Duration::ZERO, "there was no time for that");
    for ((now, exact), first) in reading.guests.iter().zip(&exact.guests).zip(&first.guests) {
        assert!(now.by_counters && now.walk_age > first.walk_age + Duration::from_secs(1), "{now:?}");
        let (seen, real) = (&now.frames.pages, &exact.pages);
        assert_eq!(seen.total, seen.absent + seen.zero + seen.private + seen.shared + seen.swapped);
        assert_eq!(seen.total, real.total);
        for (what, seen, real) in [
            ("with frames", seen.private + seen.shared, real.private + real.shared),
            ("absent", seen.absent, real.absent),
            ("anonymous", now.frames.anonymous, exact.anonymous),
        ] {
            assert!(seen.abs_diff(real) < MARGIN, "{what}: {seen}, and it is {real}: {now:?} {exact:?}");
        }
        assert_ne!(first.frames.pages, exact.pages, "nothing has changed");
    }
    fleet.end();
}
