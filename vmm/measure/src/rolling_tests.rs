use proptest::prelude::*;

use super::super::walks::Shares;
use super::*;
use memory::{Extent, Gpa, Hva, PAGE_BYTES};

const TOTAL: u64 = 1000;

/// A guest of 1000 pages: 300 of its own, 50 of zeros, 20 on swap, 30 of an image, 400 of slabs, of
/// which 100 are its own and the others shared with one more guest each. Its process has 30
/// anonymous pages besides.
fn split() -> Split {
    let extents = vec![Extent { gpa: Gpa(0), hva: Hva(1 << 32), bytes: TOTAL * PAGE_BYTES }];
    let at = Instant::now();
    Split {
        space: Space { name: "a".into(), pid: 7, extents },
        at,
        counters: counters(330, 400, 20),
        private: 300,
        zero: 50,
        swapped: 20,
        image: 30,
        slab: 400,
        shares: Shares { single: 0.25, frames: 0.625 },
        shares_at: Some(at),
        besides: Besides { anonymous: 30, shared_memory: 0, swapped: 0 },
        estimated: false,
    }
}

fn counters(anonymous: u64, shared_memory: u64, swapped: u64) -> Counters {
    let process = ProcessPages { anonymous, shared_memory, swapped, ..ProcessPages::default() };
    Counters { process, ..Counters::default() }
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn what_no_counter_contradicts_is_as_it_was_walked() {
    let split = split();
    let Recent { frames, by_counters, walk_age, .. } = split.recent(&split.counters, later());
    let expected =
        Pages { total: TOTAL, image: 30, absent: 200, zero: 50, private: 400, shared: 300, swapped: 20 };
    assert_eq!((frames.pages, frames.anonymous, by_counters), (expected, 350, false));
    assert!((frames.frames - 550.0).abs() < 1e-9 && walk_age >= Duration::from_secs(4));
    // Pages of the program that are read, and page tables, say nothing of guest memory.
    let mut other = split.counters;
    (other.process.file, other.process.page_tables) = (9, 9);
    assert!(!split.recent(&other, later()).by_counters);
    // What was walked after the counters were read is newer than they.
    let before = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
    assert_eq!(split.recent(&counters(0, 0, 0), before).frames.pages, expected);
}

#[test]
fn what_counters_tell_is_new_and_the_split_as_it_was() {
    let split = split();
    // 40 pages of slabs were written to, 10 on swap came back, 60 were touched for the first time.
    let now = counters(330 + 110, 360, 10);
    let Recent { frames, by_counters, .. } = split.recent(&now, later());
    let expected =
        Pages { total: TOTAL, image: 30, absent: 140, zero: 50, private: 410 + 90, shared: 270, swapped: 10 };
    assert_eq!((frames.pages, frames.anonymous, by_counters), (expected, 460, true));
    assert!((frames.frames - (410.0 + 225.0)).abs() < 1e-9);
    // Parked pages have frames elsewhere in the process, and are absent here.
    let parked = Counters { parked: 60, ..now };
    assert_eq!(split.recent(&parked, later()).frames.pages.private, 350 + 90);
    // A fault alone says that something may be otherwise.
    let faulted = Counters { faults: 1, ..split.counters };
    assert!(split.recent(&faulted, later()).by_counters);
}

#[test]
fn a_walk_is_as_old_as_what_is_known_of_its_shares() {
    let walked = split();
    let long_ago = walked.at.checked_sub(Duration::from_secs(60));
    for (shares_at, by_counters, age) in [(Some(walked.at), false, 4), (long_ago, true, 64), (None, true, 4)]
    {
        let split = Split { shares_at, ..walked.clone() };
        let recent = split.recent(&split.counters, later());
        assert_eq!(recent.by_counters, by_counters);
        assert!(recent.walk_age >= Duration::from_secs(age), "{recent:?}");
        assert_eq!(recent.frames.pages, walked.recent(&walked.counters, later()).frames.pages);
    }
    // Without slabs there is nothing to be shared.
    let split = Split { shares_at: None, slab: 0, ..walked };
    assert!(!split.recent(&split.counters, later()).by_counters);
}

#[test]
fn when_one_guest_has_changed_the_sharing_of_the_others_is_unknown() {
    let (still, moved) = (split(), Counters { faults: 1, ..split().counters });
    let without = Split { slab: 0, shares_at: None, ..split() };
    let mut guests = vec![
        still.recent(&still.counters, later()),
        still.recent(&moved, later()),
        without.recent(&without.counters, later()),
    ];
    mark(&mut guests[..1]);
    assert!(!guests[0].by_counters);
    mark(&mut guests);
    assert_eq!(guests.iter().map(|guest| guest.by_counters).collect::<Vec<_>>(), [true, true, false]);
}

#[test]
fn slabs_have_no_more_frames_than_their_files() {
    let split = split();
    let changed = || vec![split.recent(&Counters { faults: 1, ..split.counters }, later())];
    let frames = |guests: &[Recent]| guests[0].frames.frames;
    let mut guests = changed();
    bound(&mut guests, Some(200));
    assert!((frames(&guests) - 500.0).abs() < 1e-9);
    let Pages { total, private, shared, .. } = guests[0].frames.pages;
    assert_eq!((total, private, shared), (TOTAL, 380, 320));
    for unbound in [None, Some(250), Some(900)] {
        let mut guests = changed();
        bound(&mut guests, unbound);
        assert!((frames(&guests) - 550.0).abs() < 1e-9);
    }
    // Walks are more exact than counters.
    let mut exact = vec![split.recent(&split.counters, later())];
    bound(&mut exact, Some(200));
    assert!((frames(&exact) - 550.0).abs() < 1e-9);
}

#[test]
fn nothing_is_known_of_a_process_that_is_gone() {
    let mut space = split().space;
    space.pid = u32::MAX;
    let subject = Subject { space, parked_pages: 0, given_back_pages: 0 };
    let read = Rolling::default().read(&[subject], None, Duration::ZERO);
    assert!(matches!(read, Ok(None)));
    let none = Rolling::default().read(&[], None, Duration::ZERO).unwrap().unwrap();
    assert_eq!((none.frames, none.guests.len()), (0, 0));
}

proptest! {
    #[test]
    fn every_page_is_in_one_class_whatever_counters_say(
        anonymous in 0u64..5000, shared in 0u64..5000, swapped in 0u64..5000, parked in 0u64..5000, faults in 0u64..2,
        held in proptest::option::of(0u64..500),
    ) {
        let now = Counters { parked, faults, ..counters(anonymous, shared, swapped) };
        let mut guests = vec![split().recent(&now, later())];
        bound(&mut guests, held);
        let Recent { frames, .. } = guests.remove(0);
        let Pages { total, absent, image, zero, private, shared, swapped } = frames.pages;
        prop_assert_eq!(total, TOTAL);
        prop_assert_eq!(absent + image + zero + private + shared + swapped, total);
        prop_assert!(frames.anonymous <= private + zero);
        prop_assert!(frames.frames <= (private + shared) as f64 + 1e-6);
    }
}
