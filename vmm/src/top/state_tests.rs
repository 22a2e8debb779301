//! The state of `samepage top`: order, rates, holding, a daemon that is gone.

use super::*;
use overcommit::ledger::{Debt, Ledger};
use overcommit::view::HostView;

fn guest(name: &str, frames: f64, balloon: u64) -> GuestView {
    let balloon = Some(BalloonView { target_pages: balloon, actual_pages: balloon });
    GuestView { name: name.into(), frames, balloon, ..GuestView::default() }
}

fn look(seconds: f64, free: u64, saved: u64, guests: Vec<GuestView>) -> Management {
    let account = |view: &GuestView| Account {
        name: view.name.clone(),
        saved: 100.0 - view.frames,
        debt: Debt { sharing: 1, demand: view.frames as u64 },
        ..Account::default()
    };
    let ledger = Ledger { saved, guests: guests.iter().map(account).collect(), ..Ledger::default() };
    Management {
        host: Some(HostView { now_seconds: seconds, free_pages: free, ..HostView::default() }),
        ledger: Some(ledger),
        ledger_seconds: (0.01, 1.0),
        guests,
        ..Management::default()
    }
}

fn order(management: &Management, sort: Sort, reversed: bool) -> String {
    rows(management, sort, reversed).iter().map(|row| row.name.as_str()).collect()
}

#[test]
fn guests_stand_in_the_order_asked_for() {
    let mut guests = vec![guest("b", 3.0, 0), guest("a", 1.0, 9), guest("c", 3.0, 5)];
    guests[1].touched_pages_per_second = 7.0;
    let seen = look(0.0, 0, 0, guests);
    for (sort, forwards, backwards) in [
        (Sort::Name, "abc", "cba"),
        (Sort::Frames, "bca", "abc"),
        (Sort::Saved, "abc", "bca"),
        (Sort::Debt, "bca", "abc"),
        (Sort::Balloon, "acb", "bca"),
        (Sort::Touched, "abc", "bca"),
    ] {
        assert_eq!(
            (order(&seen, sort, false), order(&seen, sort, true)),
            (forwards.into(), backwards.into())
        );
    }
}

#[test]
fn the_key_steps_through_all_orders() {
    let mut top = Top::new("f".into(), Sort::Name);
    let mut seen = Vec::new();
    for _ in 0..Sort::ALL.len() {
        seen.push(top.sort);
        top.press(Key::Reverse);
        top.press(Key::Sort);
        assert!(!top.reversed);
    }
    assert_eq!((seen.as_slice(), top.sort), (&Sort::ALL[..], Sort::Name));
}

#[test]
fn rates_are_of_the_last_seconds() {
    let mut top = Top::new("f".into(), Sort::Name);
    assert_eq!(top.merged_pages_per_second(), 0.0);
    top.saw(look(0.0, 50, 1000, vec![guest("a", 0.0, 0)]));
    assert_eq!(top.merged_pages_per_second(), 0.0);
    top.saw(look(10.0, 40, 2000, vec![guest("a", 0.0, 100)]));
    top.saw(look(14.0, 30, 2200, vec![guest("a", 0.0, 60)]));
    assert_eq!((top.merged_pages_per_second(), top.ballooned_pages_per_second()), (50.0, -10.0));
    assert_eq!((top.free_pages(2), top.free_pages(9)), (vec![40, 30], vec![50, 40, 30]));
    // The same look again adds nothing.
    top.saw(look(14.0, 30, 2200, vec![]));
    assert_eq!(top.free_pages(9).len(), 3);
    // Another daemon.
    top.saw(look(1.0, 20, 0, vec![]));
    assert_eq!((top.free_pages(9), top.merged_pages_per_second()), (vec![20], 0.0));
}

#[test]
fn a_slow_ledger_is_given_time() {
    let mut top = Top::new("f".into(), Sort::Name);
    for (seconds, saved) in [(0.0, 100), (10.0, 100), (20.0, 300)] {
        top.saw(Management { ledger_seconds: (0.1, 10.0), ..look(seconds, 0, saved, vec![]) });
    }
    assert_eq!(top.merged_pages_per_second(), 10.0);
}

#[test]
fn no_more_is_remembered_than_can_be_shown() {
    let mut top = Top::new("f".into(), Sort::Name);
    for n in 0..MAX_SAMPLES + 10 {
        top.saw(look(n as f64, n as u64, 0, vec![]));
    }
    let free = top.free_pages(usize::MAX);
    assert_eq!((free.len(), free[0]), (MAX_SAMPLES, 10));
}

#[test]
fn a_held_display_freezes_and_resumes_with_current_data() {
    let mut top = Top::new("f".into(), Sort::Name);
    // Nothing to hold yet.
    top.press(Key::Pause);
    assert!(!top.is_held());
    top.saw(look(1.0, 7, 0, vec![]));
    top.press(Key::Pause);
    top.saw(look(2.0, 8, 0, vec![]));
    let free = |top: &Top| top.shown().and_then(|m| m.host.as_ref()).map(|host| host.free_pages);
    assert_eq!((top.is_held(), free(&top)), (true, Some(7)));
    top.press(Key::Pause);
    assert_eq!((top.is_held(), free(&top)), (false, Some(8)));
}

#[test]
fn what_was_seen_last_outlives_the_daemon() {
    let mut top = Top::new("f".into(), Sort::Name);
    top.saw(look(1.0, 7, 0, vec![]));
    top.missed("no".into(), 3.0);
    top.missed("still no".into(), 5.0);
    assert_eq!(top.source, Source::Gone { since_seconds: 3.0, why: "still no".into() });
    assert!(top.shown().is_some());
    top.saw(look(0.5, 9, 0, vec![]));
    assert_eq!(top.source, Source::Daemon);
}

#[test]
fn the_list_never_ends_up_beyond_its_last_guest() {
    let mut top = Top::new("f".into(), Sort::Name);
    top.press(Key::Down);
    assert_eq!(top.first, 0);
    top.saw(look(1.0, 0, 0, (0..25).map(|n| guest(&n.to_string(), 0.0, 0)).collect()));
    for (key, first) in [
        (Key::Down, 1),
        (Key::PageDown, 11),
        (Key::Up, 10),
        (Key::End, 24),
        (Key::Down, 24),
        (Key::PageUp, 14),
        (Key::Home, 0),
        (Key::Up, 0),
    ] {
        top.press(key);
        assert_eq!(top.first, first, "{key:?}");
    }
}
