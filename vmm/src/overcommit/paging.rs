//! Which guests' pages go to swap, when balloons are too slow.

use super::action::Action;
use super::policy::Scene;
use super::pressure::Pressure;
use super::view::{GuestState, GuestView};

/// The fewest pages worth a request.
const LEAST_PAGES: u64 = 64;

/// Pages out what is cold, those first who have most above their fair part. Returns how many pages could still be paged out.
pub(super) fn page_out(scene: &Scene, actions: &mut Vec<Action>) -> u64 {
    let (host, knobs) = (scene.host, scene.knobs);
    let swap = host.swap_free_pages.saturating_sub(knobs.swap_reserve_pages);
    if scene.pressure < Pressure::Hard || swap < LEAST_PAGES {
        return 0;
    }
    let fair = scene.fair_pages();
    let mut victims = Vec::new();
    for (i, guest) in scene.guests.iter().enumerate() {
        let pages = pageable(guest, scene.active_pages[i], fair[i]);
        if pages >= LEAST_PAGES {
            let excess = (guest.held_pages() as f64 - fair[i] as f64) / guest.weight();
            let runs = guest.state != GuestState::Suspended;
            victims.push((runs, scene.follows[i], -excess, i, pages));
        }
    }
    // Who is suspended has no use for it; who does not give by a balloon gives so.
    victims.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)).then(a.2.total_cmp(&b.2)).then(a.3.cmp(&b.3)));
    let enough = Pressure::Soft.threshold_pages(host, knobs) + scene.percent(knobs.margin_percent);
    let coming = if scene.pressure == Pressure::Hard { coming_pages(scene) } else { 0 };
    let pace = (knobs.page_out_pages_per_second as f64 * scene.passed_seconds) as u64;
    let mut needed = enough.saturating_sub(host.free_pages.saturating_add(coming)).min(pace).min(swap);
    for &(_, _, _, guest, pages) in &victims {
        let pages = pages.min(needed);
        if pages < LEAST_PAGES {
            break;
        }
        needed -= pages;
        actions.push(Action::PageOut { guest, pages });
    }
    victims.iter().map(|v| v.4).sum::<u64>().min(swap)
}

/// Pages that balloons are about to give.
pub(super) fn coming_pages(scene: &Scene) -> u64 {
    let pending =
        |i: usize| scene.guests[i].balloon.map_or(0, |b| b.target_pages.saturating_sub(b.actual_pages));
    scene.in_state(GuestState::Running).filter(|&i| scene.follows[i]).map(pending).sum()
}

/// What of a guest may go: what it does not use, and what it uses above its fair part; never below its minimum.
fn pageable(guest: &GuestView, active_pages: u64, fair_pages: u64) -> u64 {
    let kept = match guest.state {
        GuestState::Running => active_pages.min(fair_pages),
        GuestState::Suspended => 0,
        GuestState::Paused | GuestState::Dead => return 0,
    };
    guest.held_pages().saturating_sub(kept.max(guest.floor_pages()))
}
