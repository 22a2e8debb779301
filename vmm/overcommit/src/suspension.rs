//! The last resorts: which guest is suspended, when it runs again, and which one is stopped when
//! nothing else has helped.
//!
//! No guest is suspended for ever. Memory is gathered for a suspended guest ([`paging`], balloons),
//! and it is resumed when there is room. Where that brings nothing it gets its turn: it changes
//! places with a guest that runs, which then waits for its own turn. So of `n` guests none is
//! suspended at a stretch for longer than [`longest_wait_seconds`].

use std::cmp::{Ordering, Reverse};

use serde::{Deserialize, Serialize};

use super::action::{Action, Reason};
use super::knobs::Knobs;
use super::memory_state::MemoryState;
use super::paging;
use super::scene::Scene;
use super::view::GuestState;

/// With less than this part of its capacity free a host has nothing left to lose.
const NOTHING_LEFT: u64 = 1000;
/// Throttling and paging come this long before the first suspension.
const GENTLER_SECONDS: f64 = 3.0;
/// In the soft state a suspended guest waits this many times as long.
const SOFT_WAIT: f64 = 4.0;
/// For a turn in the place of a guest of a higher priority it waits this many times as long; for
/// one of a lower priority, 1 / this.
const PRIORITY_TIMES: f64 = 4.0;

/// The longest that one of `guests` guests is suspended at a stretch, whatever the others do: until
/// its turn in the place of any other one, when all others are served before. Each change of places
/// takes a step of the policy, too.
pub fn longest_wait_seconds(guests: usize, knobs: &Knobs) -> f64 {
    knobs.turn_seconds * PRIORITY_TIMES
        + guests as f64 * (knobs.turn_run_seconds + knobs.suspend_hold_seconds)
}

/// The state of one guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Suspension {
    /// How often it was suspended lately.
    times: u32,
    /// How long it has been suspended, or running since.
    seconds: f64,
    suspended: bool,
}

impl Suspension {
    pub(super) fn watch(&mut self, state: GuestState, passed_seconds: f64, knobs: &Knobs) {
        self.seconds += passed_seconds;
        // A guest that does not answer stays as it was.
        let suspended = match state {
            GuestState::Silent => self.suspended,
            state => state == GuestState::Suspended,
        };
        if suspended != self.suspended {
            self.suspended = suspended;
            self.seconds = 0.0;
            self.times = self.times.saturating_add(u32::from(suspended));
        } else if !suspended && self.seconds >= knobs.resume_most_seconds {
            self.times = 0;
        }
    }

    /// Whether it was suspended long enough ago for memory to be gathered for it.
    pub(super) fn waits(&self, knobs: &Knobs) -> bool {
        self.suspended && self.seconds >= self.wait_seconds(knobs)
    }

    /// Whether it has been suspended for long enough to run when there is room.
    fn is_over(&self, scene: &Scene) -> bool {
        let times = if scene.memory_state == MemoryState::High { 1.0 } else { SOFT_WAIT };
        let over =
            scene.memory_state <= MemoryState::Soft && self.seconds >= times * self.wait_seconds(scene.knobs);
        self.suspended && (over || self.seconds >= scene.knobs.turn_seconds)
    }

    /// How long it stays suspended at least.
    fn wait_seconds(&self, knobs: &Knobs) -> f64 {
        let doubled = 2_f64.powi(self.times.clamp(1, 30) as i32 - 1);
        (knobs.resume_hold_seconds * doubled).min(knobs.resume_most_seconds).min(knobs.turn_seconds)
    }
}

/// The state of all guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LastResort {
    /// Since a guest was suspended; None if that is long ago.
    since_suspended_seconds: Option<f64>,
    /// How long guests have been throttled and paged out.
    since_resumed_seconds: Option<f64>,
    /// For how long guests have been throttled and paged out.
    restrained_seconds: f64,
    /// For how long nothing has helped.
    helpless_seconds: f64,
    /// How long no guest has run.
    idle_seconds: f64,
}

impl LastResort {
    fn pass(&mut self, passed_seconds: f64, knobs: &Knobs) {
        let hold = |since: &mut Option<f64>, least: f64| {
            *since = since.map(|s| s + passed_seconds).filter(|s| *s < least);
        };
        hold(&mut self.since_suspended_seconds, knobs.suspend_hold_seconds);
        hold(&mut self.since_resumed_seconds, knobs.hold_seconds);
    }
}

/// Suspends, resumes, stops. `cold_pages` could yet be paged out.
pub(super) fn act(
    scene: &Scene,
    last: &mut LastResort,
    known: &[&Suspension],
    cold_pages: u64,
    actions: &mut Vec<Action>,
) {
    last.pass(scene.passed_seconds, scene.knobs);
    let running = scene.in_state(GuestState::Running).count();
    last.restrained_seconds = if scene.memory_state >= MemoryState::Hard {
        last.restrained_seconds + scene.passed_seconds
    } else {
        0.0
    };
    // The gentler measures come first and need time: a limit takes effect in the next step only.
    let need = match scene.memory_state {
        MemoryState::Low if last.restrained_seconds >= GENTLER_SECONDS => need(scene, cold_pages),
        _ => None,
    };
    let helpless =
        need.is_some_and(|r| matches!(r, Reason::FreeMemory { .. })) && running <= 1 && cold_pages == 0;
    last.helpless_seconds = if helpless { last.helpless_seconds + scene.passed_seconds } else { 0.0 };
    last.idle_seconds = if running == 0 { last.idle_seconds + scene.passed_seconds } else { 0.0 };
    if running == 0 {
        // Nothing would ever change: guests that hold memory and do not run give none. But one that
        // is late to answer may run.
        if last.idle_seconds >= scene.knobs.suspend_hold_seconds {
            start_one(scene, last, actions);
        }
    } else if let Some(reason) = need {
        if running > 1 && last.since_suspended_seconds.is_none() {
            suspend(scene, last, known, reason, actions);
        } else if scene.knobs.may_stop && last.helpless_seconds >= scene.knobs.stop_after_seconds {
            stop(scene, last, actions);
        } else {
            take_turn(scene, known, actions);
        }
    } else if last.since_resumed_seconds.is_some() || !resume(scene, last, known, actions) {
        take_turn(scene, known, actions);
    }
}

/// Resumes the suspended guest of the highest priority.
fn start_one(scene: &Scene, last: &mut LastResort, actions: &mut Vec<Action>) {
    let first = |i: &usize| (Reverse(scene.guests[*i].priority), *i);
    if let Some(guest) = scene.in_state(GuestState::Suspended).min_by_key(first) {
        last.since_resumed_seconds = Some(0.0);
        actions.push(Action::Resume { guest });
    }
}

/// Makes the guest that has been suspended for longest change places with one that runs. The number
/// that run stays the same, and so does the limit on what they may touch.
fn take_turn(scene: &Scene, known: &[&Suspension], actions: &mut Vec<Action>) {
    let (guests, knobs) = (scene.guests, scene.knobs);
    let seconds = |i: usize| known[i].seconds;
    let waits_for = |waiting: usize, runs: usize| match guests[waiting].priority.cmp(&guests[runs].priority) {
        Ordering::Greater => knobs.turn_seconds / PRIORITY_TIMES,
        Ordering::Equal => knobs.turn_seconds,
        Ordering::Less => knobs.turn_seconds * PRIORITY_TIMES,
    };
    let gives_way = |waiting: usize| {
        scene
            .in_state(GuestState::Running)
            .filter(|&i| seconds(i) >= knobs.turn_run_seconds && seconds(waiting) >= waits_for(waiting, i))
            .min_by(|&a, &b| {
                let longest = || seconds(b).total_cmp(&seconds(a));
                guests[a].priority.cmp(&guests[b].priority).then_with(longest)
            })
    };
    let mut waiting: Vec<usize> = scene.in_state(GuestState::Suspended).filter(|&i| scene.waits[i]).collect();
    waiting.sort_by(|&a, &b| seconds(b).total_cmp(&seconds(a)));
    let Some((resumed, suspended)) = waiting.into_iter().find_map(|i| Some((i, gives_way(i)?))) else {
        return;
    };
    let waited_seconds = seconds(resumed) as u64;
    actions.push(Action::Suspend { guest: suspended, reason: Reason::Turn { waited_seconds } });
    actions.push(Action::Resume { guest: resumed });
}

/// Whether a guest has to stop running, and why: free memory will not last, or all tasks wait.
fn need(scene: &Scene, cold_pages: u64) -> Option<Reason> {
    let (host, knobs) = (scene.host, scene.knobs);
    let threshold_pages = MemoryState::Low.threshold_pages(host, knobs);
    let falling = scene.falling_pages_per_second;
    let coming = cold_pages > 0 || paging::coming_pages(scene) > 0;
    let gone = host.free_pages <= host.capacity_pages / NOTHING_LEFT && !coming;
    let will_be_gone = host.free_pages < threshold_pages
        && falling >= 1.0
        && host.free_pages as f64 / falling < knobs.suspend_hold_seconds;
    if gone || will_be_gone {
        let falling_pages_per_second = falling as u64;
        return Some(Reason::FreeMemory {
            free_pages: host.free_pages,
            threshold_pages,
            falling_pages_per_second,
        });
    }
    let full_avg10_percent = host.psi.map_or(0.0, |psi| psi.full_avg10_percent);
    let stalled = full_avg10_percent >= knobs.psi_low_percent;
    stalled.then_some(Reason::Stalled { full_avg10_percent, threshold_percent: knobs.psi_low_percent })
}

/// Suspends the guest of the lowest priority; among equals not one whose turn has only begun, and
/// then the one that grows fastest.
fn suspend(
    scene: &Scene,
    last: &mut LastResort,
    known: &[&Suspension],
    reason: Reason,
    actions: &mut Vec<Action>,
) {
    let order = |i: &usize| {
        let guest = &scene.guests[*i];
        let suspension = known[*i];
        let begun = suspension.times > 0 && suspension.seconds < scene.knobs.turn_run_seconds;
        let grows = guest.touched_pages_per_second.max(0.0) as u64;
        (guest.priority, begun, Reverse(grows), Reverse(guest.held_frames() as u64), *i)
    };
    if let Some(guest) = scene.in_state(GuestState::Running).min_by_key(order) {
        last.since_suspended_seconds = Some(0.0);
        actions.push(Action::Suspend { guest, reason });
    }
}

/// Stops the guest of the lowest priority; among equals one that does not run, and then the
/// largest. Never the last one.
fn stop(scene: &Scene, last: &mut LastResort, actions: &mut Vec<Action>) {
    let order = |i: &usize| {
        let guest = &scene.guests[*i];
        (guest.priority, guest.state == GuestState::Running, Reverse(guest.held_frames() as u64), *i)
    };
    let candidates = || scene.in_state(GuestState::Running).chain(scene.in_state(GuestState::Suspended));
    if candidates().count() > 1
        && let Some(guest) = candidates().min_by_key(order)
    {
        let seconds = last.helpless_seconds as u64;
        last.helpless_seconds = 0.0;
        let reason = Reason::NothingHelped { seconds, free_pages: scene.host.free_pages };
        actions.push(Action::Stop { guest, reason });
        // Nothing has helped while at most one ran. If the victim is that one, another takes its
        // place at once.
        if scene.guests[guest].state == GuestState::Running {
            start_one(scene, last, actions);
        }
    }
}

/// Resumes the suspended guest of the highest priority for which there is room. Returns whether
/// there was one.
fn resume(scene: &Scene, last: &mut LastResort, known: &[&Suspension], actions: &mut Vec<Action>) -> bool {
    let knobs = scene.knobs;
    let kept = scene.memory_state.min(MemoryState::Soft).threshold_pages(scene.host, knobs)
        + scene.percent(knobs.margin_percent);
    let mut fair = None;
    let mut ready = |i: &usize| {
        let lacks = |fair: &mut Option<Vec<u64>>| {
            scene.lacks_to_run_pages(*i, fair.get_or_insert_with(|| scene.fair_pages()))
        };
        known[*i].is_over(scene) && scene.host.free_pages >= kept.saturating_add(lacks(&mut fair))
    };
    let first = |i: &usize| (Reverse(scene.guests[*i].priority), *i);
    if let Some(guest) = scene.in_state(GuestState::Suspended).filter(|i| ready(i)).min_by_key(first) {
        last.since_resumed_seconds = Some(0.0);
        actions.push(Action::Resume { guest });
        return true;
    }
    false
}
