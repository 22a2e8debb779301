//! Which guests' pages go to swap, when balloons are too slow.

use super::action::Action;
use super::balloon_pacing::{dead_band_pages, wants_more};
use super::memory_state::MemoryState;
use super::scene::Scene;
use super::throttling;
use super::view::{GuestState, GuestView};

/// The fewest pages worth a request.
const LEAST_PAGES: u64 = 64;

/// Pages out what is cold, first of the guests that have most above their fair part; then what is
/// used above it, which would only be read back while others have memory that they do not use.
/// While memory is not short, it pages out only what others lack: for a suspended guest that waits
/// for memory, from any guest; else only from guests that do not give by a balloon. Returns the
/// number of pages that could still be paged out.
pub(super) fn page_out(scene: &Scene, actions: &mut Vec<Action>) -> u64 {
    let (host, knobs) = (scene.host, scene.knobs);
    let swap = host.swap_free_pages.saturating_sub(knobs.swap_reserve_pages);
    let short = scene.memory_state >= MemoryState::Hard;
    let waiting = scene.waits.contains(&true);
    if swap < LEAST_PAGES || !(short || waiting || lacks_for_others(scene)) {
        return 0;
    }
    let fair = scene.fair_pages();
    let mut victims = Vec::new();
    for (i, guest) in scene.guests.iter().enumerate() {
        let refuses = guest.balloon.is_some() && !scene.follows[i];
        let pages = match short || waiting {
            // Pages that it will need at once it would only read back.
            true if scene.waits[i] && !short => {
                pageable(guest, 0, 0).min(guest.held_pages().saturating_sub(scene.runs_with_pages(i, &fair)))
            }
            true => pageable(guest, scene.active_pages[i], fair[i]),
            // A guest that cannot give keeps what it uses; one that could and refuses does not.
            false if refuses => pageable(guest, 0, fair[i]).min(guest.held_pages().saturating_sub(fair[i])),
            false if guest.balloon.is_none() => guest
                .held_pages()
                .saturating_sub(fair[i].max(scene.active_pages[i]))
                .min(pageable(guest, 0, 0)),
            false => 0,
        };
        let excess = (guest.held_pages() as f64 - fair[i] as f64) / guest.weight();
        let runs = guest.state != GuestState::Suspended;
        let idle = pageable(guest, scene.active_pages[i], u64::MAX).min(pages);
        for (used, pages) in [(false, idle), (true, pages - idle)] {
            if pages >= LEAST_PAGES {
                victims.push(((runs, scene.follows[i], used), -excess, i, pages));
            }
        }
    }
    // A suspended guest has no use for it; one that does not give by a balloon gives in this way.
    victims.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
    let wanted = match scene.memory_state {
        MemoryState::High | MemoryState::Soft => lacking_pages(scene, &fair),
        MemoryState::Hard => enough_pages(scene).saturating_sub(coming_pages(scene)),
        MemoryState::Low => enough_pages(scene),
    }
    .max(lacking_to_run_pages(scene, &fair).saturating_sub(coming_pages(scene)));
    let pace = (knobs.page_out_pages_per_second as f64 * scene.passed_seconds) as u64;
    let mut needed = wanted.min(pace).min(swap);
    let mut taken = vec![0; fair.len()];
    for &(_, _, guest, pages) in &victims {
        let pages = pages.min(needed);
        if pages < LEAST_PAGES {
            break;
        }
        needed -= pages;
        taken[guest] += pages;
    }
    let asked = taken.into_iter().enumerate().filter(|(_, pages)| *pages > 0);
    actions.extend(asked.map(|(guest, pages)| Action::PageOut { guest, pages }));
    victims.iter().map(|v| v.3).fold(0, u64::saturating_add).min(swap)
}

/// Pages that are missing until the host is out of the hard state, and what guests may touch until
/// then: with less they would hold the host at the threshold, and their limits where they are, for
/// ever.
fn enough_pages(scene: &Scene) -> u64 {
    let soft = MemoryState::Soft.threshold_pages(scene.host, scene.knobs)
        + scene.percent(scene.knobs.margin_percent);
    let touched = (throttling::of_all(scene) * scene.knobs.hold_seconds) as u64;
    soft.saturating_add(touched).saturating_sub(scene.host.free_pages)
}

/// A guest whose balloon holds memory that it wants.
fn wants_back(scene: &Scene, i: usize) -> bool {
    let guest = &scene.guests[i];
    let asked = guest.state == GuestState::Running && guest.balloon.is_some_and(|b| b.target_pages > 0);
    asked && scene.follows[i] && wants_more(guest, scene.active_pages[i], scene.knobs)
}

/// Whether a guest wants memory back while another does not give.
fn lacks_for_others(scene: &Scene) -> bool {
    let keeps = |i: usize| scene.guests[i].state == GuestState::Running && !scene.follows[i];
    let all = 0..scene.guests.len();
    all.clone().any(keeps) && all.into_iter().any(|i| wants_back(scene, i))
}

/// Pages by which the guests that want memory back are left less than if all followed.
fn lacking_pages(scene: &Scene, fair: &[u64]) -> u64 {
    let lacks = |i: usize| {
        let guest = &scene.guests[i];
        let left = guest.promised_pages.saturating_sub(guest.balloon.map_or(0, |b| b.target_pages));
        Some(fair[i].saturating_sub(left)).filter(|l| *l > dead_band_pages(guest, scene.knobs)).unwrap_or(0)
    };
    (0..fair.len()).filter(|&i| wants_back(scene, i)).map(lacks).fold(0, u64::saturating_add)
}

/// Pages that are missing until the guests that wait for memory run again: they are resumed when
/// enough stays free besides.
fn lacking_to_run_pages(scene: &Scene, fair: &[u64]) -> u64 {
    let waiting = (0..fair.len()).filter(|&i| scene.waits[i]);
    let Some(lacks) = waiting.map(|i| scene.lacks_to_run_pages(i, fair)).reduce(u64::saturating_add) else {
        return 0;
    };
    // The same as balloons leave free: above the margin, or the host would not reach the high
    // state.
    let percent = scene.knobs.high_percent + 2.0 * scene.knobs.margin_percent;
    let kept = scene.percent(percent);
    kept.saturating_add(lacks).saturating_sub(scene.host.free_pages)
}

/// Pages that balloons are about to give.
pub(super) fn coming_pages(scene: &Scene) -> u64 {
    let pending =
        |i: usize| scene.guests[i].balloon.map_or(0, |b| b.target_pages.saturating_sub(b.actual_pages));
    scene
        .in_state(GuestState::Running)
        .filter(|&i| scene.follows[i])
        .map(pending)
        .fold(0, u64::saturating_add)
}

/// Pages of a guest that may be paged out: what it does not use, and what it uses above its fair
/// part; never below its minimum.
fn pageable(guest: &GuestView, active_pages: u64, fair_pages: u64) -> u64 {
    let kept = match guest.state {
        GuestState::Running => active_pages.min(fair_pages),
        GuestState::Suspended => 0,
        GuestState::Paused | GuestState::Silent | GuestState::Dead => return 0,
    };
    guest.held_pages().saturating_sub(kept.max(guest.floor_pages()))
}

#[cfg(test)]
mod tests {
    use crate::action::Action;
    use crate::knobs::Knobs;
    use crate::policy::{Memory, step};
    use crate::view::{GuestView, HostView};

    const MIB: u64 = 256;

    /// One uses all that it has and has most above its part, another has memory that it does not
    /// use: that goes first, and only what is missing then is taken from what is used.
    #[test]
    fn what_is_used_goes_after_all_that_is_not() {
        let view = |name: &str, held: u64, used: u64| GuestView {
            name: name.into(),
            promised_pages: 1000 * MIB,
            max_pages: 1000 * MIB,
            resident_pages: held * MIB,
            frames: (held * MIB) as f64,
            working_set_pages: Some(used * MIB),
            ..GuestView::default()
        };
        let paged_out = |used| {
            let guests = [view("busy", 600, 600), view("idle", 100, used), view("small", 300, 300)];
            let (capacity_pages, swap_free_pages) = (1000 * MIB, 1000 * MIB);
            let host = HostView { capacity_pages, swap_free_pages, ..HostView::default() };
            let actions = step(&mut Memory::default(), &host, &guests, &Knobs::default());
            let of = |i: usize| {
                let pages = |a: &Action| match a {
                    Action::PageOut { guest, pages } if *guest == i => Some(*pages / MIB),
                    _ => None,
                };
                actions.iter().filter_map(pages).sum::<u64>()
            };
            [of(0), of(1), of(2)]
        };
        // 4.5 % of the capacity are missing.
        assert_eq!(paged_out(50), [0, 45, 0]);
        assert_eq!(paged_out(80), [25, 20, 0]);
    }
}
