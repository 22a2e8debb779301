//! The policy against guests that do as they are told, or do not: nobody below its minimum, no more than there is, no swinging.

use proptest::prelude::*;

use super::*;
use crate::overcommit::action::Reason;
use crate::overcommit::view::{BalloonView, Psi};

/// Pages of a MiB.
const MIB: u64 = 256;

/// A guest in a small world: it touches up to what it wants at once, and its balloon follows at once unless it refuses.
#[derive(Clone, Debug)]
struct Guest {
    view: GuestView,
    wants_pages: u64,
    refuses: bool,
    paged_out: bool,
    /// Nothing is known of what it uses and could spare.
    mute: bool,
    suspended_seconds: u64,
}

/// A world without sharing or overhead.
#[derive(Clone, Debug)]
struct World {
    capacity_pages: u64,
    swap_pages: u64,
    now_seconds: f64,
    guests: Vec<Guest>,
    memory: Memory,
    knobs: Knobs,
}

impl World {
    fn new(capacity_pages: u64, guests: Vec<Guest>) -> Self {
        let (memory, knobs) = (Memory::default(), Knobs::default());
        Self { capacity_pages, swap_pages: 0, now_seconds: 100.0, guests, memory, knobs }
    }

    fn free_pages(&self) -> u64 {
        self.capacity_pages.saturating_sub(self.guests.iter().map(|g| g.view.resident_pages).sum())
    }

    fn view(&self) -> HostView {
        let free_pages = self.free_pages();
        HostView {
            now_seconds: self.now_seconds,
            capacity_pages: self.capacity_pages,
            used_pages: self.capacity_pages - free_pages,
            free_pages,
            swap_free_pages: self.swap_pages,
            psi: None,
            merging: true,
        }
    }

    /// A second of the guests' doing, and a step; sees that nothing forbidden is asked for.
    fn second(&mut self) -> Vec<Action> {
        for index in 0..self.guests.len() {
            let free = self.free_pages();
            self.guests[index].act(free);
        }
        self.now_seconds += 1.0;
        let views: Vec<GuestView> = self.guests.iter().map(|g| g.view.clone()).collect();
        let host = self.view();
        let actions = step(&mut self.memory, &host, &views, &self.knobs);
        for action in &actions {
            check(action, &views);
            self.carry_out(action);
        }
        assert!(
            views.is_empty() || self.guests.iter().any(|g| g.view.state == GuestState::Running),
            "{actions:?}"
        );
        for guest in &mut self.guests {
            let suspended = guest.view.state == GuestState::Suspended;
            guest.suspended_seconds = if suspended { guest.suspended_seconds + 1 } else { 0 };
        }
        actions
    }

    fn carry_out(&mut self, action: &Action) {
        let Some(guest) = action.guest().map(|i| &mut self.guests[i]) else { return };
        guest.paged_out |= matches!(action, Action::PageOut { .. });
        let guest = &mut guest.view;
        match *action {
            Action::Balloon { target_pages, .. } => {
                guest.balloon.as_mut().expect("a driver").target_pages = target_pages
            }
            Action::Throttle { pages_per_second, .. } => guest.throttle_pages_per_second = pages_per_second,
            Action::PageOut { pages, .. } => {
                guest.resident_pages -= pages;
                self.swap_pages -= pages;
            }
            Action::Suspend { .. } => guest.state = GuestState::Suspended,
            Action::Resume { .. } => guest.state = GuestState::Running,
            Action::Stop { .. } => (guest.state, guest.resident_pages) = (GuestState::Dead, 0),
            Action::Merge { .. } => {}
        }
    }

    fn seconds(&mut self, seconds: usize) -> Vec<Action> {
        (0..seconds).flat_map(|_| self.second()).collect()
    }

    /// Pages that guests may have by what their balloons were asked for.
    fn left_pages(&self) -> u64 {
        let left = |g: &Guest| g.view.promised_pages - g.view.balloon.map_or(0, |b| b.target_pages);
        self.guests.iter().map(left).sum()
    }
}

impl Guest {
    fn new(name: &str, promised_pages: u64, wants_pages: u64, min_pages: u64) -> Self {
        let view = GuestView {
            name: name.into(),
            promised_pages,
            max_pages: promised_pages,
            min_pages,
            shares: 1000,
            balloon: Some(BalloonView::default()),
            ..GuestView::default()
        };
        Self { view, wants_pages, refuses: false, paged_out: false, mute: false, suspended_seconds: 0 }
    }

    fn act(&mut self, free_pages: u64) {
        let view = &mut self.view;
        if view.state != GuestState::Running {
            return;
        }
        if let Some(balloon) = view.balloon.as_mut().filter(|_| !self.refuses) {
            balloon.actual_pages = balloon.target_pages;
        }
        let usable = view.promised_pages - view.ballooned_pages();
        let before = view.resident_pages.min(usable);
        // It touches what it wants at most at 64 MiB a second, and has it read from swap at 16.
        let speed = if self.paged_out { 16 * MIB } else { 64 * MIB };
        let rate = view.throttle_pages_per_second.unwrap_or(u64::MAX).min(speed);
        let touched = self.wants_pages.min(usable).saturating_sub(before).min(rate).min(free_pages);
        view.resident_pages = before + touched;
        view.frames = view.resident_pages as f64;
        view.touched_pages_per_second = touched as f64;
        view.working_set_pages = Some(self.wants_pages.min(view.resident_pages));
        view.spare_pages = Some(usable.saturating_sub(self.wants_pages));
        if self.mute {
            (view.working_set_pages, view.spare_pages) = (None, None);
        }
    }
}

/// What must hold of every action, whatever the views are.
#[track_caller]
fn check(action: &Action, guests: &[GuestView]) {
    let Some(guest) = action.guest().map(|i| &guests[i]) else { return };
    let state = match action {
        Action::Resume { .. } => GuestState::Suspended,
        _ => GuestState::Running,
    };
    let may_stand = matches!(action, Action::PageOut { .. } | Action::Stop { .. } | Action::Throttle { .. });
    assert!(
        guest.state == state || may_stand && guest.state == GuestState::Suspended,
        "{action:?} of {guest:?}"
    );
    match *action {
        Action::Balloon { target_pages, .. } => {
            let balloon = guest.balloon.expect("only who has a driver is asked");
            assert!(target_pages <= guest.promised_pages - guest.floor_pages(), "{action:?} of {guest:?}");
            assert!(target_pages != balloon.target_pages, "{action:?} of {guest:?}");
        }
        Action::PageOut { pages, .. } => {
            assert!(
                pages > 0 && guest.held_pages() >= guest.floor_pages() + pages,
                "{action:?} of {guest:?}"
            );
        }
        Action::Throttle { pages_per_second, .. } => assert!(pages_per_second != Some(0)),
        _ => {}
    }
}

fn state_of(world: &World) -> Vec<GuestState> {
    world.guests.iter().map(|g| g.view.state).collect()
}

#[test]
fn nothing_is_done_for_nobody() {
    assert_eq!(World::new(1000 * MIB, Vec::new()).seconds(10), []);
    let mut without = World::new(0, vec![Guest::new("a", 64 * MIB, 64 * MIB, 0)]);
    assert_eq!(without.seconds(10), []);
    let mut dead = Guest::new("a", 64 * MIB, 64 * MIB, 0);
    dead.view.state = GuestState::Dead;
    let views = [dead.view];
    assert_eq!(step(&mut Memory::default(), &without.view(), &views, &Knobs::default()), []);
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

/// Three guests with drivers and one that refuses: the others are divided what it leaves, and it is paged out.
#[test]
fn who_refuses_harms_itself() {
    let mut guests: Vec<_> = ["a", "b", "c"].map(|n| Guest::new(n, 400 * MIB, 150 * MIB, 50 * MIB)).into();
    let mut refuser = Guest::new("d", 400 * MIB, 400 * MIB, 50 * MIB);
    refuser.refuses = true;
    guests.push(refuser);
    let mut world = World::new(840 * MIB, guests);
    // What is read back stays on swap in this world.
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

/// Guests without drivers that grow until nothing is left: first throttled, then suspended, the last one never, then stopped.
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

/// A day that only the clock saw pass is no day: nobody refuses or was suspended for so long, and no balloon moves by so much.
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

/// A guest whose minimum does not fit stays suspended until it does.
#[test]
fn who_is_suspended_waits_for_room() {
    let mut guests: Vec<_> = ["a", "b"].map(|n| Guest::new(n, 850 * MIB, 850 * MIB, 200 * MIB)).into();
    guests[0].view.state = GuestState::Suspended;
    guests[1].view.balloon = None;
    guests[1].view.resident_pages = 850 * MIB;
    let mut world = World::new(1000 * MIB, guests);
    world.seconds(500);
    assert_eq!((state_of(&world)[0], world.memory.pressure()), (GuestState::Suspended, Pressure::High));
    world.guests[1].view.resident_pages = 700 * MIB;
    world.guests[1].wants_pages = 700 * MIB;
    world.seconds(500);
    assert_eq!(state_of(&world)[0], GuestState::Running);
}

/// What a daemon knew is lost, or was kept as JSON: the next one goes on, and nothing moves.
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

/// Three guests whose balloons refuse, one of them suspended, the others idle: they use nothing, but nobody knows that. There is swap.
#[test]
fn who_is_suspended_is_made_room_for_by_paging_out_the_idle() {
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

/// Nothing can be had: neither balloons nor swap, and all use all they have. They take turns; one of a higher priority gives way later.
#[test]
fn where_nothing_is_to_be_had_guests_take_turns() {
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
    assert!(low as f64 <= crate::overcommit::suspension::longest_wait_seconds(3, &knobs), "{low}");
    assert!(low > turn && middle.max(high) <= turn, "{low} {middle} {high}");
}

/// The last one that ran has ended, or is held by its owner, or does not answer: those that are suspended are not left so.
#[test]
fn when_nobody_runs_one_is_resumed() {
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
        for second in 0..=world.knobs.suspend_hold_seconds as u32 {
            let view = HostView { now_seconds: second.into(), ..world.view() };
            assert_eq!(actions, [], "{state:?}");
            actions = step(&mut memory, &view, &views, &world.knobs);
        }
        assert!(actions.contains(&Action::Resume { guest: 1 }), "{state:?}: {actions:?}");
    }
}

/// A guest that does not answer is asked for nothing, and when it answers again it has been suspended for as long as before.
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

prop_compose! {
    fn any_guest()(
        promised in 0_u64..1000, wants in 0.0..=1.0_f64, least in 0.0..0.3_f64, shares in 0_u32..4000,
        priority in 0_u32..3, driver in prop::bool::weighted(0.85), refuses in prop::bool::weighted(0.1),
    ) -> Guest {
        let pages = promised * MIB;
        let part = |of: f64| (pages as f64 * of) as u64;
        let mut guest = Guest::new("", pages, part(wants), part(least));
        (guest.view.shares, guest.view.priority, guest.refuses) = (shares, priority, refuses);
        guest.view.balloon = driver.then(BalloonView::default);
        guest
    }
}

fn named(mut guests: Vec<Guest>) -> Vec<Guest> {
    for (n, guest) in guests.iter_mut().enumerate() {
        guest.view.name = n.to_string();
    }
    guests
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// A load that stays as it is, of guests that follow and whose minimums fit: in the end nothing moves, for a thousand steps,
    /// and all that guests may have fits.
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
        if promised > capacity && world.memory.pressure() != Pressure::High {
            prop_assert!(world.left_pages() <= capacity + capacity / 50);
        }
        // A busy guest has no less than an idle one of the same shares, minimum and memory would have.
        prop_assert!(world.free_pages() > 0 || promised == 0);
    }

    /// Whatever guests do, are and say: nothing forbidden is asked for (see `check`), and one of them runs on.
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

    /// Whatever guests do: none is suspended at a stretch for longer than is promised.
    #[test]
    fn nobody_is_suspended_for_ever(
        guests in prop::collection::vec(any_guest(), 1..8), capacity in 1_u64..3000, swap in 0_u64..500,
        wants in prop::collection::vec((0_usize..8, 0.0..=1.0_f64), 1..12), equal in any::<bool>(),
    ) {
        let mut world = World::new(capacity * MIB, named(guests));
        world.swap_pages = swap * MIB;
        if equal {
            world.guests.iter_mut().for_each(|g| g.view.priority = 0);
        }
        let count = world.guests.len();
        let all = crate::overcommit::suspension::longest_wait_seconds(count, &world.knobs);
        let knobs = world.knobs;
        // Nobody is of a higher priority: each waits for its first turn only.
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
            };
            for action in step(&mut memory, &view, &guests, &Knobs::default()) {
                check(&action, &guests);
            }
        }
        prop_assert!(serde_json::to_string(&memory).is_ok());
    }
}
