//! One step of the policy: from the state of the host and its guests, and what is remembered, to
//! the actions to take.
//!
//! Actions add up from state to state ([`MemoryState`]), the gentlest first: *high* gives balloons,
//! limits and suspended guests back; *soft* lets go of images that have no name, merges at urgent priority and inflates balloons; *hard*
//! also throttles first touches and pages out what is cold; *low* also suspends guests and, when
//! nothing else has helped, stops one. In every state memory is gathered for a guest that has been
//! suspended for a while, and when that brings nothing, it gets its turn.
//!
//! Nothing is taken from a guest below its minimum. A guest that refuses or lies is counted with
//! what it has, so that only the rest is divided among the others; it is the first to be paged out.
//! A step is right with an empty [`Memory`] too: balloons, limits and suspensions are seen in the
//! views.

use serde::{Deserialize, Serialize};

use super::action::Action;
use super::balloon_pacing::{Pacing, dead_band_pages, next_target, wants_more};
use super::knobs::Knobs;
use super::memory_state::{Because, MemoryGauge, MemoryState};
use super::scene::Scene;
use super::suspension::{LastResort, Suspension};
use super::view::{GuestState, GuestView, HostView};
use super::{paging, suspension, throttling};

/// No step is taken for longer than this, however far the clock went.
const MAX_STEP_SECONDS: f64 = 10.0;
/// The first step is taken for as long as this.
const FIRST_STEP_SECONDS: f64 = 1.0;
/// How long the rate at which free memory changes is averaged over.
const SLOPE_SECONDS: f64 = 3.0;

/// The state that a step leaves for the next one. It can be kept as JSON, so that a daemon goes on
/// where another one ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// How short of memory the host is.
    pub gauge: MemoryGauge,
    /// The clock at the last step.
    last_seconds: Option<f64>,
    /// Free memory at the last step.
    last_free_pages: u64,
    /// The rate of change of free memory, averaged over a few seconds; negative when it falls.
    free_pages_per_second: f64,
    /// The same in the last step alone.
    free_pages_per_second_now: f64,
    /// Whether engines were asked to merge at urgent priority.
    #[serde(alias = "eager")]
    urgent: bool,
    /// The state of suspensions and stops.
    last_resort: LastResort,
    /// Each guest's, in the order of the last step's guests.
    guests: Vec<GuestMemory>,
}

/// The state of one guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct GuestMemory {
    name: String,
    /// Pages that it used, forgotten slowly.
    active_pages: f64,
    pacing: Pacing,
    suspension: Suspension,
}

/// Decides the actions to take now. A host without capacity gets none.
pub fn step(memory: &mut Memory, host: &HostView, guests: &[GuestView], knobs: &Knobs) -> Vec<Action> {
    if host.capacity_pages == 0 {
        return Vec::new();
    }
    let passed_seconds = memory.pass(host);
    memory.recognise(guests);
    let falling_pages_per_second = memory.falling_pages_per_second();
    let memory_state = memory.gauge.advance(host, falling_pages_per_second, passed_seconds, knobs);
    for (known, guest) in memory.guests.iter_mut().zip(guests) {
        known.watch(guest, passed_seconds, knobs);
    }
    let scene = Scene {
        host,
        guests,
        knobs,
        memory_state,
        passed_seconds,
        falling_pages_per_second,
        active_pages: memory.guests.iter().zip(guests).map(|(k, g)| k.used_pages(g)).collect(),
        follows: memory
            .guests
            .iter()
            .zip(guests)
            .map(|(k, g)| g.balloon.is_some() && !k.pacing.refuses())
            .collect(),
        waits: memory
            .guests
            .iter()
            .zip(guests)
            .map(|(k, g)| g.state == GuestState::Suspended && k.suspension.waits(knobs))
            .collect(),
    };
    let mut actions = Vec::new();
    let urgent = host.merging && memory_state != MemoryState::High;
    if urgent != memory.urgent {
        memory.urgent = urgent;
        if host.merging {
            actions.push(Action::SetPriority { urgent });
        }
    }
    // Nothing runs slower without them.
    if memory_state != MemoryState::High && host.unnamed_image_pages > 0 {
        actions.insert(0, Action::DropImages { pages: host.unnamed_image_pages });
    }
    balloon(&scene, &mut memory.guests, &mut actions);
    let (mut paged_out, mut changes) = (Vec::new(), Vec::new());
    let cold_pages = paging::page_out(&scene, &mut paged_out);
    let suspensions: Vec<_> = memory.guests.iter().map(|known| &known.suspension).collect();
    suspension::act(&scene, &mut memory.last_resort, &suspensions, cold_pages, &mut changes);
    throttling::limit(&scene, &changes, &mut actions);
    actions.extend(paged_out);
    actions.extend(changes);
    actions
}

impl Memory {
    /// How short of memory the host was at the last step.
    pub fn memory_state(&self) -> MemoryState {
        self.gauge.memory_state
    }

    /// Why it was in that state.
    pub fn because(&self) -> Because {
        self.gauge.because
    }

    /// Whether a guest's balloon does not follow; None if there was no such guest at the last step.
    pub fn refuses(&self, name: &str) -> Option<bool> {
        self.guests.iter().find(|g| g.name == name).map(|g| g.pacing.refuses())
    }

    /// How fast free memory falls: only if it has for a while and still does.
    fn falling_pages_per_second(&self) -> f64 {
        (-self.free_pages_per_second).min(-self.free_pages_per_second_now).max(0.0)
    }

    /// Records the time and free memory. Returns the time passed, whatever the clock did.
    fn pass(&mut self, host: &HostView) -> f64 {
        let passed = match self.last_seconds {
            Some(last) => host.now_seconds - last,
            None => FIRST_STEP_SECONDS,
        };
        let sane = if passed.is_finite() { passed.clamp(0.0, MAX_STEP_SECONDS) } else { 0.0 };
        if self.last_seconds.is_some() && sane > 0.0 {
            let change = (host.free_pages as f64 - self.last_free_pages as f64) / sane;
            let weight = (sane / SLOPE_SECONDS).min(1.0);
            self.free_pages_per_second_now = change;
            self.free_pages_per_second += weight * (change - self.free_pages_per_second);
        }
        // A clock that is no number is not stored: every later one would be no distance from it.
        if host.now_seconds.is_finite() {
            self.last_seconds = Some(host.now_seconds);
        }
        self.last_free_pages = host.free_pages;
        sane
    }

    /// Puts what is remembered into the order of `guests`. New guests are added, those gone are
    /// removed.
    fn recognise(&mut self, guests: &[GuestView]) {
        let same = self.guests.len() == guests.len()
            && self.guests.iter().zip(guests).all(|(known, guest)| known.name == guest.name);
        if same {
            return;
        }
        let mut known: std::collections::HashMap<String, GuestMemory> =
            self.guests.drain(..).map(|g| (g.name.clone(), g)).collect();
        let met = |g: &GuestView| GuestMemory { name: g.name.clone(), ..GuestMemory::default() };
        self.guests = guests.iter().map(|g| known.remove(&g.name).unwrap_or_else(|| met(g))).collect();
    }
}

impl GuestMemory {
    fn watch(&mut self, guest: &GuestView, passed_seconds: f64, knobs: &Knobs) {
        let active = guest.active_pages() as f64;
        if guest.state == GuestState::Running {
            // An increase counts at once, a decrease only slowly: the larger of a fast and a slow
            // average. Of a suspended guest what it used is kept: it will want that again.
            let kept = (-passed_seconds / knobs.forget_seconds.max(1e-3)).exp();
            self.active_pages = active.max(active + (self.active_pages - active) * kept);
            self.pacing.watch(guest, passed_seconds, knobs);
        }
        self.suspension.watch(guest.state, passed_seconds, knobs);
    }

    /// What the guest uses, by what it did lately: never more than it was promised.
    fn used_pages(&self, guest: &GuestView) -> u64 {
        let used = (self.active_pages as u64).max(guest.active_pages()).min(guest.promised_pages);
        // It may have used it until a moment ago: what it can spare now, by its own report, it does
        // not use.
        if guest.spare_pages.is_some() { used.min(guest.not_spare_pages()) } else { used }
    }
}

fn balloon(scene: &Scene, known: &mut [GuestMemory], actions: &mut Vec<Action>) {
    let (guests, knobs) = (scene.guests, scene.knobs);
    let asked = |g: &GuestView| g.balloon.is_some_and(|b| b.target_pages > 0);
    let waiting = scene.waits.contains(&true);
    if scene.memory_state == MemoryState::High && !waiting && !guests.iter().any(asked) {
        return;
    }
    // Room is made for suspended guests too: nothing else would give one its part back.
    let takes_part = |i: usize| match guests[i].state {
        GuestState::Running => scene.follows[i],
        GuestState::Suspended => true,
        GuestState::Paused | GuestState::Silent | GuestState::Dead => false,
    };
    let left = scene.divided(takes_part);
    let all_fit =
        left.iter().zip(guests).enumerate().all(|(i, (l, g))| !takes_part(i) || *l >= g.ceiling_pages());
    let wants = |i: usize| scene.follows[i] && wants_more(&guests[i], scene.active_pages[i], knobs);
    let owed = |i: usize| {
        let balloon = guests[i].balloon.filter(|_| guests[i].state == GuestState::Running);
        let wanted = (guests[i].promised_pages - left[i]).saturating_add(dead_band_pages(&guests[i], knobs));
        balloon.is_some_and(|b| wanted < b.target_pages) && wants(i)
    };
    // While enough is free nothing is taken, except for a guest that wants what another one has
    // above its part.
    let takes = scene.memory_state > MemoryState::High || waiting || (0..guests.len()).any(owed);
    let mut releases = Vec::new();
    for (i, guest) in guests.iter().enumerate() {
        let Some(balloon) = guest.balloon.filter(|_| guest.state == GuestState::Running) else { continue };
        let Some(target_pages) = target(scene, &mut known[i], i, left[i]) else { continue };
        if target_pages > balloon.target_pages {
            if takes {
                actions.push(Action::Balloon { guest: i, target_pages });
            }
        } else if balloon.target_pages > guest.promised_pages - guest.floor_pages() {
            actions.push(Action::Balloon { guest: i, target_pages });
        } else if wants(i) || all_fit || scene.memory_state > MemoryState::High {
            releases.push((!wants(i), i, balloon.target_pages, target_pages));
        }
    }
    // Memory that is given back may be touched at once: give no more than keeps the host in its
    // state, first to the guests that want it.
    let kept = scene.memory_state.min(MemoryState::Soft).threshold_pages(scene.host, knobs)
        + scene.percent(knobs.margin_percent);
    let mut spare = scene.host.free_pages.saturating_sub(kept);
    releases.sort_unstable();
    for (_, guest, from, to) in releases {
        let back = (from - to).min(spare);
        spare -= back;
        if back > 0 {
            actions.push(Action::Balloon { guest, target_pages: from - back });
        }
    }
}

/// The target of a running guest's balloon, if the guest is left `left_pages`; None if it stays.
fn target(scene: &Scene, known: &mut GuestMemory, index: usize, left_pages: u64) -> Option<u64> {
    let guest = &scene.guests[index];
    if scene.follows[index] {
        return next_target(guest, guest.promised_pages - left_pages, scene.passed_seconds, scene.knobs);
    }
    if known.pacing.asks_again(scene.knobs) {
        // It is asked for what it would have to give if it followed, but it is not counted on.
        let fair = scene.fair_pages()[index].min(guest.promised_pages);
        let passed = scene.passed_seconds.max(FIRST_STEP_SECONDS);
        return next_target(guest, guest.promised_pages - fair, passed, scene.knobs);
    }
    // Its minimum is kept even so.
    next_target(guest, guest.balloon?.target_pages, 0.0, scene.knobs)
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "turn_tests.rs"]
mod turn_tests;
#[cfg(test)]
#[path = "policy_world.rs"]
mod world;
