//! A small world that the policy is tried in: guests that touch what they want at once, and
//! balloons that follow at once or refuse.

use proptest::prelude::*;

use super::*;
use crate::view::BalloonView;

/// Pages of a MiB.
pub(super) const MIB: u64 = 256;

/// A guest in a small world: it touches up to what it wants at once, and its balloon follows at
/// once unless it refuses.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) view: GuestView,
    pub(super) wants_pages: u64,
    pub(super) refuses: bool,
    pub(super) paged_out: bool,
    /// Nothing is known of what it uses and could spare.
    pub(super) mute: bool,
    pub(super) suspended_seconds: u64,
}

/// A world without sharing or overhead.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) capacity_pages: u64,
    pub(super) swap_pages: u64,
    pub(super) now_seconds: f64,
    pub(super) guests: Vec<Guest>,
    pub(super) memory: Memory,
    pub(super) knobs: Knobs,
}

impl World {
    pub(super) fn new(capacity_pages: u64, guests: Vec<Guest>) -> Self {
        let (memory, knobs) = (Memory::default(), Knobs::default());
        Self { capacity_pages, swap_pages: 0, now_seconds: 100.0, guests, memory, knobs }
    }

    pub(super) fn free_pages(&self) -> u64 {
        self.capacity_pages.saturating_sub(self.guests.iter().map(|g| g.view.resident_pages).sum())
    }

    pub(super) fn view(&self) -> HostView {
        let free_pages = self.free_pages();
        HostView {
            now_seconds: self.now_seconds,
            capacity_pages: self.capacity_pages,
            used_pages: self.capacity_pages - free_pages,
            free_pages,
            swap_free_pages: self.swap_pages,
            psi: None,
            merging: true,
            unnamed_image_pages: 0,
        }
    }

    /// A second of guest activity, and a step; checks that no forbidden action is asked for.
    pub(super) fn second(&mut self) -> Vec<Action> {
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
            Action::SetPriority { .. } | Action::DropImages { .. } => {}
        }
    }

    pub(super) fn seconds(&mut self, seconds: usize) -> Vec<Action> {
        (0..seconds).flat_map(|_| self.second()).collect()
    }

    /// Pages that guests may have by what their balloons were asked for.
    pub(super) fn left_pages(&self) -> u64 {
        let left = |g: &Guest| g.view.promised_pages - g.view.balloon.map_or(0, |b| b.target_pages);
        self.guests.iter().map(left).sum()
    }
}

impl Guest {
    pub(super) fn new(name: &str, promised_pages: u64, wants_pages: u64, min_pages: u64) -> Self {
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
pub(super) fn check(action: &Action, guests: &[GuestView]) {
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
            let balloon = guest.balloon.expect("only a guest with a driver is asked");
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

pub(super) fn state_of(world: &World) -> Vec<GuestState> {
    world.guests.iter().map(|g| g.view.state).collect()
}

prop_compose! {
    pub(super) fn any_guest()(
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

pub(super) fn named(mut guests: Vec<Guest>) -> Vec<Guest> {
    for (n, guest) in guests.iter_mut().enumerate() {
        guest.view.name = n.to_string();
    }
    guests
}
