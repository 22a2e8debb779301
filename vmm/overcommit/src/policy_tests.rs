//! The policy against guests that follow, and guests that do not: none below its minimum, no more
//! than there is, no swinging.

use proptest::prelude::*;

use super::world::{Guest, MIB, World, any_guest, check, named, state_of};
use super::*;
use crate::action::Reason;
use crate::view::{BalloonView, Psi};

#[test]
fn without_guests_nothing_is_done() {
    assert_eq!(World::new(1000 * MIB, Vec::new()).seconds(10), []);
    let mut without = World::new(0, vec![Guest::new("a", 64 * MIB, 64 * MIB, 0)]);
    assert_eq!(without.seconds(10), []);
    let mut dead = Guest::new("a", 64 * MIB, 64 * MIB, 0);
    dead.view.state = GuestState::Dead;
    let views = [dead.view];
    assert_eq!(step(&mut Memory::default(), &without.view(), &views, &Knobs::default()), []);
}

#[test]
fn images_without_a_name_go_first_and_only_under_pressure() {
    let world = World::new(1000 * MIB, vec![Guest::new("a", 900 * MIB, 900 * MIB, 900 * MIB)]);
    let views = [world.guests[0].view.clone()];
    let actions = |free_pages, unnamed_image_pages| {
        let view = HostView { free_pages, unnamed_image_pages, ..world.view() };
        step(&mut Memory::default(), &view, &views, &Knobs::default())
    };
    assert_eq!(actions(10 * MIB, 7).first(), Some(&Action::DropImages { pages: 7 }));
    let drops = |actions: Vec<Action>| actions.iter().any(|a| matches!(a, Action::DropImages { .. }));
    assert!(!drops(actions(10 * MIB, 0)) && !drops(actions(900 * MIB, 7)));
}

#[test]
fn the_idle_give_to_the_busy() {
    let guests = vec![
        Guest::new("a", 1000 * MIB, 1000 * MIB, 100 * MIB),
        Guest::new("b", 1000 * MIB, 1000 * MIB, 100 * MIB),
    ];
    let mut world = World::new(1500 * MIB, guests);
    world.seconds(200);
    world.guests[0].wants_pages = 50 * MIB;
    world.seconds(300);
    assert!(world.guests[1].view.resident_pages > 980 * MIB, "{world:?}");
    assert!(world.left_pages() <= world.capacity_pages);
    world.guests[0].wants_pages = 1000 * MIB;
    world.guests[1].wants_pages = 50 * MIB;
    world.seconds(300);
    assert!(world.guests[0].view.resident_pages > 980 * MIB, "{world:?}");
}

/// Three guests with drivers and one that refuses: the others are divided what it leaves, and it is
/// paged out.
#[test]
fn a_guest_that_refuses_harms_itself() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 150 * MIB, 50 * MIB)).into();
    let mut refuser = Guest::new("d", 400 * MIB, 400 * MIB, 50 * MIB);
    refuser.refuses = true;
    guests.push(refuser);
    let mut world = World::new(840 * MIB, guests);
    // Pages that are read back stay on swap in this world.
    world.swap_pages = 1_000_000 * MIB;
    let actions = world.seconds(300);
    assert_eq!(world.memory.refuses("d"), Some(true));
    assert_eq!(world.memory.refuses("a"), Some(false));
    assert_eq!(state_of(&world), [GuestState::Running; 4]);
    let paged: Vec<_> =
        actions.iter().filter(|a| matches!(a, Action::PageOut { .. })).map(Action::guest).collect();
    assert!(paged.iter().all(|g| *g == Some(3)), "{paged:?}");
    for guest in &world.guests[..3] {
        assert!(guest.view.resident_pages > 140 * MIB, "{guest:?}");
    }
    assert!(world.free_pages() > 0);
}

/// Guests without drivers that grow until nothing is left: first throttled, then suspended, then
/// stopped, the last one never.
#[test]
fn the_last_resorts_come_last() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 400 * MIB, 0)).into();
    for (priority, guest) in guests.iter_mut().enumerate() {
        guest.view.balloon = None;
        guest.view.priority = priority as u32;
    }
    let mut world = World::new(900 * MIB, guests);
    // The brake would be the first of all, and stay for so little that is free.
    world.knobs.brake_seconds = 0.0;
    let first = |actions: &[Action], is: fn(&Action) -> bool| actions.iter().position(is);
    let actions = world.seconds(2000);
    let throttled = first(&actions, |a| matches!(a, Action::Throttle { .. })).expect("a limit");
    let suspended = first(&actions, |a| matches!(a, Action::Suspend { .. })).expect("a suspension");
    let stopped = first(&actions, |a| matches!(a, Action::Stop { .. })).expect("a stop");
    assert!(throttled < suspended && suspended < stopped);
    assert_eq!(actions[suspended].guest(), Some(0), "the lowest priority");
    assert_eq!(actions[stopped].guest(), Some(0));
    let reason = Reason::NothingHelped { seconds: 60, free_pages: 0 };
    assert!(
        matches!(actions[stopped], Action::Stop { reason: Reason::NothingHelped { .. }, .. }),
        "{reason:?}"
    );
    // And then there is room for the other two.
    world.seconds(1000);
    assert_eq!(state_of(&world), [GuestState::Dead, GuestState::Running, GuestState::Running]);
    assert!(
        world.guests[1..]
            .iter()
            .all(|g| g.view.resident_pages == 400 * MIB && g.view.throttle_pages_per_second.is_none())
    );
    let mut kind =
        World { knobs: Knobs { may_stop: false, ..world.knobs }, memory: Memory::default(), ..world };
    kind.capacity_pages = 700 * MIB;
    kind.guests[0].view.state = GuestState::Running;
    assert!(!kind.seconds(1000).iter().any(|a| matches!(a, Action::Stop { .. })));
}

#[test]
fn stalls_alone_suspend_only_where_memory_is_short() {
    let guests = ["a", "b"].map(|n| Guest::new(n, 400 * MIB, 200 * MIB, 0));
    let mut world = World::new(4000 * MIB, guests.into());
    world.seconds(20);
    let views: Vec<_> = world.guests.iter().map(|g| g.view.clone()).collect();
    let psi = Some(Psi { some_avg10_percent: 100.0, full_avg10_percent: 100.0 });
    for second in 0..100 {
        let view = HostView { psi, now_seconds: 200.0 + f64::from(second), ..world.view() };
        let actions = step(&mut world.memory, &view, &views, &world.knobs);
        assert!(
            !actions.iter().any(|a| matches!(a, Action::Suspend { .. } | Action::PageOut { .. })),
            "{actions:?}"
        );
    }
}

#[test]
fn a_clock_that_jumps_does_nothing_mad() {
    for jump in [86_400.0, -86_400.0, f64::NAN, f64::INFINITY] {
        let guests = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 300 * MIB, 50 * MIB));
        let mut world = World::new(800 * MIB, guests.into());
        world.seconds(200);
        let before = world.left_pages();
        world.now_seconds += jump;
        let mut actions = world.second();
        world.now_seconds = if jump.is_finite() { world.now_seconds } else { 1e6 };
        actions.extend(world.seconds(100));
        assert_eq!((actions, world.left_pages()), (Vec::new(), before), "{jump}");
    }
}

/// A day that only the clock saw pass is no day: no guest refuses or was suspended for a day, and
/// no balloon moves by a day's worth.
#[test]
fn a_day_that_did_not_pass_is_not_counted() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 4000 * MIB, 4000 * MIB, 50 * MIB)).into();
    guests[0].refuses = true;
    guests[1].view.resident_pages = 3800 * MIB;
    guests[2].view.resident_pages = 3800 * MIB;
    let mut world = World::new(8000 * MIB, guests);
    world.second();
    world.now_seconds += 86_400.0;
    let most = 2 * world.knobs.inflate_pages_per_second + 10 * world.knobs.inflate_pages_per_second;
    world.second();
    let targets: Vec<_> =
        world.guests.iter().filter_map(|g| g.view.balloon.map(|b| b.target_pages)).collect();
    assert!(targets.iter().all(|t| (1..=most).contains(t)), "{targets:?}");
    assert_eq!(world.memory.refuses("a"), Some(false));
    world.seconds(20);
    assert_eq!(world.memory.refuses("a"), Some(true));
}

/// A guest whose minimum does not fit stays suspended until it does, or has its turn.
#[test]
fn a_suspended_guest_waits_for_room() {
    let mut guests: Vec<_> = ["a", "b"].map(|n| Guest::new(n, 850 * MIB, 850 * MIB, 200 * MIB)).into();
    guests[0].view.state = GuestState::Suspended;
    guests[1].view.balloon = None;
    guests[1].view.resident_pages = 850 * MIB;
    let mut world = World::new(1000 * MIB, guests);
    world.seconds(world.knobs.turn_seconds as usize - 10);
    assert_eq!(
        (state_of(&world)[0], world.memory.memory_state()),
        (GuestState::Suspended, MemoryState::High)
    );
    world.guests[1].view.resident_pages = 700 * MIB;
    world.guests[1].wants_pages = 700 * MIB;
    let actions = world.seconds(5);
    assert_eq!(state_of(&world), [GuestState::Running; 2], "{actions:?}");
}

/// A daemon's state is lost, or was kept as JSON: the next one goes on, and nothing moves.
#[test]
fn a_new_daemon_goes_on() {
    let guests = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 300 * MIB, 50 * MIB));
    let mut world = World::new(800 * MIB, guests.into());
    world.seconds(200);
    let text = serde_json::to_string(&world.memory).expect("JSON");
    for memory in [Memory::default(), serde_json::from_str(&text).expect("a memory")] {
        let mut next = World { memory, ..world.clone() };
        assert_eq!(next.seconds(200), []);
    }
    // A throttle and a suspension that it finds are lifted when there is room again.
    world.memory = Memory::default();
    world.guests[0].view.state = GuestState::Suspended;
    world.guests[1].view.throttle_pages_per_second = Some(7);
    world.capacity_pages = 4000 * MIB;
    world.seconds(300);
    assert_eq!(state_of(&world), [GuestState::Running; 3]);
    assert_eq!(world.guests[1].view.throttle_pages_per_second, None);
    assert_eq!(world.left_pages(), 1200 * MIB, "and balloons are empty");
}

#[test]
fn guests_are_known_by_their_names() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 400 * MIB, 50 * MIB)).into();
    guests[0].refuses = true;
    let mut world = World::new(800 * MIB, guests);
    world.seconds(100);
    world.guests.reverse();
    world.second();
    let refuses: Vec<_> = ["a", "b", "c"].map(|n| world.memory.refuses(n)).into();
    assert_eq!(refuses, [Some(true), Some(false), Some(false)]);
    world.guests.truncate(1);
    world.second();
    assert_eq!(world.memory.refuses("a"), None);
}

#[test]
fn a_paused_guest_is_left_alone() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 400 * MIB, 0)).into();
    guests[0].view.state = GuestState::Paused;
    guests[0].view.resident_pages = 400 * MIB;
    let mut world = World::new(800 * MIB, guests);
    world.swap_pages = 400 * MIB;
    assert!(world.seconds(500).iter().all(|a| a.guest() != Some(0)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// A constant load, of guests that follow and whose minimums fit: in the end nothing changes,
    /// for a thousand steps, and all that guests may have fits.
    #[test]
    fn a_constant_load_comes_to_rest(
        guests in prop::collection::vec(any_guest(), 0..8), promised_per_capacity in 0.3..3.0_f64,
    ) {
        let mut guests = named(guests);
        for guest in &mut guests {
            guest.view.balloon = Some(BalloonView::default());
            guest.refuses = false;
        }
        let promised: u64 = guests.iter().map(|g| g.view.promised_pages).sum();
        let capacity = (promised as f64 / promised_per_capacity) as u64 + 64 * MIB;
        let least: u64 = guests.iter().map(|g| g.view.floor_pages()).sum();
        prop_assume!(least as f64 <= 0.9 * capacity as f64);
        let mut world = World::new(capacity, guests);
        world.seconds(2500);
        let late = world.seconds(1000);
        prop_assert!(late.is_empty(), "{:?}\n{:#?}", &late[..late.len().min(5)], world);
        prop_assert!(world.guests.iter().all(|g| g.view.state == GuestState::Running));
        if promised > capacity && world.memory.memory_state() != MemoryState::High {
            prop_assert!(world.left_pages() <= capacity + capacity / 50);
        }
        // A busy guest has no less than an idle one of the same shares, minimum and memory would
        // have.
        prop_assert!(world.free_pages() > 0 || promised == 0);
    }

    /// Whatever guests do and report: no forbidden action is asked for (see `check`), and one of
    /// them runs on.
    #[test]
    fn nothing_forbidden_is_ever_asked_for(
        guests in prop::collection::vec(any_guest(), 1..8), capacity in 1_u64..3000, swap in 0_u64..500,
        wants in prop::collection::vec((0_usize..8, 0.0..=1.0_f64, -100.0..100_000.0_f64), 1..12),
    ) {
        let mut world = World::new(capacity * MIB, named(guests));
        world.swap_pages = swap * MIB;
        for (index, part, jump) in wants {
            let count = world.guests.len();
            let guest = &mut world.guests[index % count];
            guest.wants_pages = (guest.view.promised_pages as f64 * part) as u64;
            guest.refuses ^= part > 0.9;
            world.now_seconds += if (0.0..=50_000.0).contains(&jump) { 0.0 } else { jump };
            world.seconds(40);
        }
    }

    /// Views that cannot be true: no panic, nothing forbidden, all of it in order.
    #[test]
    fn lies_are_cut_to_what_is_possible(
        numbers in prop::collection::vec(prop::array::uniform9(prop_oneof![0_u64..5000, any::<u64>()]), 0..6),
        host in prop::array::uniform4(prop_oneof![0_u64..5000, any::<u64>()]), frames in prop_oneof![Just(f64::NAN), any::<f64>()],
        states in prop::collection::vec(0_usize..5, 6), some in any::<f64>(), full in any::<f64>(), steps in 1_usize..30,
    ) {
        let guests: Vec<_> = numbers.iter().enumerate().map(|(n, &[a, b, c, d, e, f, g, h, i])| GuestView {
            name: n.to_string(), promised_pages: a, balloon: (b % 3 > 0).then_some(BalloonView { target_pages: b, actual_pages: c }),
            resident_pages: d, frames, working_set_pages: (e % 2 == 0).then_some(e), spare_pages: (f % 2 == 0).then_some(f),
            touched_pages_per_second: frames, shares: g as u32, min_pages: h, max_pages: i, priority: a as u32,
            state: [GuestState::Running, GuestState::Suspended, GuestState::Paused, GuestState::Silent, GuestState::Dead][states[n]],
            throttle_pages_per_second: (g % 2 == 0).then_some(g), ..GuestView::default()
        }).collect();
        let mut memory = Memory::default();
        for n in 0..steps {
            let view = HostView {
                now_seconds: n as f64, capacity_pages: host[0], used_pages: host[1], free_pages: host[2].wrapping_mul(n as u64 + 1),
                swap_free_pages: host[3], psi: Some(Psi { some_avg10_percent: some, full_avg10_percent: full }), merging: n % 2 == 0,
                unnamed_image_pages: 0,
            };
            for action in step(&mut memory, &view, &guests, &Knobs::default()) {
                check(&action, &guests);
            }
        }
        prop_assert!(serde_json::to_string(&memory).is_ok());
    }
}
