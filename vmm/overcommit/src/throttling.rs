//! Limits the rate of first touches, to gain time for everything that frees memory.

use super::action::Action;
use super::memory_state::MemoryState;
use super::scene::Scene;
use super::view::{GuestState, GuestView};

/// A limit is tightened when the new one is less than this part of the old one ...
const TIGHTENED: f64 = 0.75;
/// ... and eased when it is more than this many times the old one.
const EASED: f64 = 1.5;
/// A limit above this is none: 256 MiB a second.
const NO_LIMIT_PAGES_PER_SECOND: f64 = 65_536.0;

/// Sets, changes and lifts limits, for the guests that run after `changes`: a resumed guest has its
/// limit before it runs.
pub(super) fn limit(scene: &Scene, changes: &[Action], actions: &mut Vec<Action>) {
    let mut runs: Vec<bool> = scene.guests.iter().map(|g| g.state == GuestState::Running).collect();
    for change in changes {
        match *change {
            Action::Resume { guest } => runs[guest] = true,
            Action::Suspend { guest, .. } | Action::Stop { guest, .. } => runs[guest] = false,
            _ => {}
        }
    }
    let running = || (0..runs.len()).filter(|&i| runs[i]);
    let all = of_all(scene);
    let weights: f64 = running().map(|i| scene.guests[i].weight()).sum();
    let rate_of = |i: usize| all * scene.guests[i].weight() / weights;
    // Limits that are a little too high add up: together they are never left above the brake.
    let limit_of = |i: usize| scene.guests[i].throttle_pages_per_second.map_or(rate_of(i), |l| l as f64);
    let beyond_brake = running().map(limit_of).sum::<f64>() > brake(scene);
    for i in running() {
        let guest = &scene.guests[i];
        let now = guest.throttle_pages_per_second;
        let rate = rate_of(i);
        let wanted = match (guest_limit(guest, rate, scene), now) {
            // In the soft state a limit is eased by steps, as there was a reason for it.
            (wanted, Some(now)) if scene.memory_state == MemoryState::Soft => soften(now, wanted, scene),
            // A limit that would be set again at once is not lifted.
            (None, Some(now)) if rate < EASED * NO_LIMIT_PAGES_PER_SECOND => Some(now),
            (wanted, _) => wanted,
        };
        let changes = match (now, wanted) {
            (Some(now), Some(wanted)) => {
                let times = wanted as f64 / now.max(1) as f64;
                // Where limits are eased by steps, a difference of one page is a change.
                !(TIGHTENED..=EASED).contains(&times)
                    || beyond_brake && wanted < now
                    || scene.memory_state == MemoryState::Soft && wanted > now
            }
            (now, wanted) => now != wanted,
        };
        if changes {
            actions.push(Action::Throttle { guest: i, pages_per_second: wanted });
        }
    }
}

/// What all guests together may touch each second.
pub(super) fn of_all(scene: &Scene) -> f64 {
    match scene.memory_state {
        MemoryState::High | MemoryState::Soft => brake(scene),
        MemoryState::Hard | MemoryState::Low => pages_per_second(scene).min(brake(scene)),
    }
}

/// The most that all guests together may ever touch each second. Between two looks they can touch a
/// good part of a small host's memory, and must not take all that is free at once.
fn brake(scene: &Scene) -> f64 {
    scene.host.free_pages as f64 / scene.knobs.brake_seconds.max(1e-3)
}

/// A limit of `now` that becomes twice as much every few seconds, up to `wanted`.
fn soften(now: u64, wanted: Option<u64>, scene: &Scene) -> Option<u64> {
    let times = 2_f64.powf(scene.passed_seconds / scene.knobs.hold_seconds.max(1.0));
    let eased = ((now.max(1) as f64 * times) as u64).max(now.saturating_add(u64::from(times > 1.0)));
    match wanted {
        Some(wanted) => Some(eased.min(wanted)),
        None => ((eased as f64) < NO_LIMIT_PAGES_PER_SECOND).then_some(eased),
    }
}

/// What all guests together may touch each second: what is free above half of the low threshold,
/// over the horizon.
fn pages_per_second(scene: &Scene) -> f64 {
    let kept = MemoryState::Low.threshold_pages(scene.host, scene.knobs) / 2;
    scene.host.free_pages.saturating_sub(kept) as f64 / scene.knobs.throttle_horizon_seconds
}

/// A guest's part of it; never 0, and never too little for a guest below its minimum. None is no
/// limit.
fn guest_limit(guest: &GuestView, rate: f64, scene: &Scene) -> Option<u64> {
    let least = if guest.held_pages() < guest.floor_pages() {
        scene.knobs.throttle_floor_pages_per_second
    } else {
        1
    };
    (rate < NO_LIMIT_PAGES_PER_SECOND).then_some((rate as u64).max(least))
}

#[cfg(test)]
mod tests {
    use crate::action::Action;
    use crate::knobs::Knobs;
    use crate::policy::{Memory, step};
    use crate::view::{GuestView, HostView};

    const MIB: u64 = 256;

    /// However much is free, guests cannot use it up between two looks; and on a host with much to
    /// spare nothing is limited.
    #[test]
    fn the_brake_is_on_before_memory_is_short() {
        let view = |name: &str| GuestView {
            name: name.into(),
            promised_pages: 1000 * MIB,
            max_pages: 1000 * MIB,
            shares: 1,
            ..GuestView::default()
        };
        let guests = [view("a"), view("b")];
        let host = |free_pages| HostView { capacity_pages: free_pages, free_pages, ..HostView::default() };
        let rates = |free_pages| {
            let actions = step(&mut Memory::default(), &host(free_pages), &guests, &Knobs::default());
            actions
                .iter()
                .filter_map(|a| match a {
                    Action::Throttle { pages_per_second, .. } => *pages_per_second,
                    _ => None,
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(rates(100 * MIB), [50 * MIB, 50 * MIB]);
        assert!(rates(10_000 * MIB).is_empty());
    }

    /// Limits that were right a moment ago and are a little too high now would let guests take more
    /// than all that is free.
    #[test]
    fn limits_are_never_left_above_the_brake() {
        let view = |name: &str, limit| GuestView {
            name: name.into(),
            promised_pages: 1000 * MIB,
            max_pages: 1000 * MIB,
            throttle_pages_per_second: limit,
            ..GuestView::default()
        };
        let rates_after = |limits: [Option<u64>; 2]| {
            let guests = [view("a", limits[0]), view("b", limits[1])];
            let host = HostView { capacity_pages: 100 * MIB, free_pages: 100 * MIB, ..HostView::default() };
            let mut rates = limits;
            for action in step(&mut Memory::default(), &host, &guests, &Knobs::default()) {
                if let Action::Throttle { guest, pages_per_second } = action {
                    rates[guest] = pages_per_second;
                }
            }
            rates.map(|rate| rate.map(|pages| pages / MIB))
        };
        assert_eq!(rates_after([Some(55 * MIB), Some(55 * MIB)]), [Some(50), Some(50)]);
        assert_eq!(rates_after([Some(55 * MIB), None]), [Some(50), Some(50)]);
        // One may be above its part while together they are not.
        assert_eq!(rates_after([Some(55 * MIB), Some(45 * MIB)]), [Some(55), Some(45)]);
    }
}
