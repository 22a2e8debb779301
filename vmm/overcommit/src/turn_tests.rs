//! A suspended guest does not stay suspended for ever: memory is gathered for it, and without any
//! it gets its turn.

use proptest::prelude::*;

use super::world::{Guest, MIB, World, any_guest, named, state_of};
use super::*;
use crate::suspension::longest_wait_seconds;

/// Three guests whose balloons refuse, one of them suspended, the others idle: they use nothing,
/// which is not known. There is swap.
#[test]
fn idle_guests_are_paged_out_for_a_suspended_one() {
    let guests = [("a", 192, 80), ("b", 0, 179), ("c", 0, 179)].map(|(name, wants, has)| {
        let mut guest = Guest::new(name, 192 * MIB, wants * MIB, 64 * MIB);
        (guest.refuses, guest.mute, guest.view.resident_pages) = (true, true, has * MIB);
        guest
    });
    let mut world = World::new(448 * MIB, guests.into());
    world.guests[0].view.state = GuestState::Suspended;
    world.swap_pages = 384 * MIB;
    let hold = world.knobs.resume_hold_seconds as usize;
    let actions = world.seconds(hold + 30);
    assert_eq!(state_of(&world), [GuestState::Running; 3], "{actions:?}");
    assert!(!actions.iter().any(|a| matches!(a, Action::Suspend { .. })), "{actions:?}");
    world.seconds(100);
    assert!(world.guests[0].view.resident_pages > 120 * MIB, "{world:?}");
}

/// Nothing is available: neither balloons nor swap, and all use all they have. They take turns; one
/// of a higher priority gives way later.
#[test]
fn without_available_memory_guests_take_turns() {
    let longest = |priorities: [u32; 3]| {
        let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 400 * MIB, 0)).into();
        for (guest, priority) in guests.iter_mut().zip(priorities) {
            guest.view.balloon = None;
            guest.view.priority = priority;
        }
        let mut world = World::new(700 * MIB, guests);
        world.knobs.may_stop = false;
        let mut longest = [0; 3];
        for _ in 0..4000 {
            world.second();
            for (longest, guest) in longest.iter_mut().zip(&world.guests) {
                *longest = guest.suspended_seconds.max(*longest);
            }
        }
        longest
    };
    let knobs = Knobs::default();
    let turn = (knobs.turn_seconds + 3.0 * (knobs.turn_run_seconds + 1.0)) as u64;
    let equal = longest([0; 3]);
    assert!(equal.iter().all(|s| (1..=turn).contains(s)), "{equal:?}");
    let [low, middle, high] = longest([0, 1, 2]);
    let all = longest_wait_seconds(3, &knobs);
    assert!(low.max(middle) as f64 <= all && low > turn && high <= turn, "{low} {middle} {high}");
}

/// The last one that ran has ended, or is paused by its owner, or does not answer: suspended guests
/// do not stay so.
#[test]
fn when_no_guest_runs_one_is_resumed() {
    for state in [GuestState::Dead, GuestState::Paused, GuestState::Silent] {
        let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 400 * MIB, 0)).into();
        for guest in &mut guests {
            guest.view.state = GuestState::Suspended;
            guest.view.resident_pages = 350 * MIB;
        }
        guests[2].view.state = state;
        guests[1].view.priority = 1;
        let views: Vec<_> = guests.iter().map(|g| g.view.clone()).collect();
        let world = World::new(1060 * MIB, guests);
        let (mut memory, mut actions) = (Memory::default(), Vec::new());
        for second in 0..world.knobs.suspend_hold_seconds as u32 {
            let view = HostView { now_seconds: second.into(), ..world.view() };
            assert!(!actions.iter().any(|a| matches!(a, Action::Resume { .. })), "{state:?}: {actions:?}");
            actions = step(&mut memory, &view, &views, &world.knobs);
        }
        assert!(actions.contains(&Action::Resume { guest: 1 }), "{state:?}: {actions:?}");
    }
}

/// The only one that runs is of the lowest priority, and nothing has helped: it is stopped, and
/// another runs from the same moment.
#[test]
fn when_the_only_one_that_runs_is_stopped_another_is_resumed() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 400 * MIB, 0)).into();
    for (guest, priority) in guests.iter_mut().zip([0, 1, 2]) {
        guest.view.balloon = None;
        guest.view.priority = priority;
        guest.view.resident_pages = 200 * MIB;
        guest.view.state = if priority == 0 { GuestState::Running } else { GuestState::Suspended };
    }
    let mut world = World::new(600 * MIB, guests);
    // No guest's turn comes before.
    (world.knobs.turn_seconds, world.knobs.may_stop) = (3600.0, true);
    let actions = world.seconds(world.knobs.stop_after_seconds as usize + 30);
    let stop = actions.iter().position(|a| matches!(a, Action::Stop { guest: 0, .. }));
    let stop = stop.unwrap_or_else(|| panic!("{actions:?}"));
    assert_eq!(actions.get(stop + 1), Some(&Action::Resume { guest: 2 }), "{actions:?}");
}

/// A guest that does not answer is asked for nothing, and when it answers again it has been
/// suspended for as long as before.
#[test]
fn a_silent_guest_is_left_alone_and_not_forgotten() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 400 * MIB, 0)).into();
    guests[0].view.state = GuestState::Silent;
    guests[0].view.resident_pages = 400 * MIB;
    let mut world = World::new(800 * MIB, guests);
    world.swap_pages = 400 * MIB;
    assert!(world.seconds(500).iter().all(|a| a.guest() != Some(0)));

    let mut suspended = Suspension::default();
    let knobs = Knobs::default();
    let mut watch = |state, seconds: usize| {
        (0..seconds).for_each(|_| suspended.watch(state, 1.0, &knobs));
        suspended.waits(&knobs)
    };
    assert!(!watch(GuestState::Suspended, 20));
    assert!(!watch(GuestState::Silent, 10));
    assert!(watch(GuestState::Suspended, 10));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever guests do: none is suspended at a stretch for longer than promised.
    #[test]
    fn no_guest_is_suspended_for_ever(
        guests in prop::collection::vec(any_guest(), 1..8), capacity in 1_u64..3000, swap in 0_u64..500,
        wants in prop::collection::vec((0_usize..8, 0.0..=1.0_f64), 1..12), equal in any::<bool>(),
    ) {
        let mut world = World::new(capacity * MIB, named(guests));
        world.swap_pages = swap * MIB;
        if equal {
            world.guests.iter_mut().for_each(|g| g.view.priority = 0);
        }
        let count = world.guests.len();
        let all = longest_wait_seconds(count, &world.knobs);
        let knobs = world.knobs;
        // No guest is of a higher priority: each waits for its first turn only.
        let longest = if equal { all - knobs.turn_seconds * 3.0 } else { all } + count as f64;
        for (index, part) in wants {
            let guest = &mut world.guests[index % count];
            guest.wants_pages = (guest.view.promised_pages as f64 * part) as u64;
            for _ in 0..120 {
                world.second();
                let longest_now = world.guests.iter().map(|g| g.suspended_seconds).max().unwrap_or(0);
                prop_assert!(longest_now as f64 <= longest, "{longest_now} of {longest}\n{world:#?}");
            }
        }
    }
}
