//! The result of a phase, over all hosts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::guest::Guest;
use overcommit::action::Action;
use overcommit::memory_state::MemoryState;

/// The most reasons that are kept; the others are only counted.
const MAX_REASONS: usize = 20;

/// A host after a step, for the time series.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Time since the start.
    pub seconds: f64,
    pub host: u64,
    pub memory_state: MemoryState,
    pub free_pages: f64,
    pub ballooned_pages: f64,
    pub swapped_pages: f64,
    /// Frames that sharing saves.
    pub saved_pages: f64,
    pub running: u64,
    /// Guests that are suspended.
    pub suspended: u64,
    /// Guests that their limit held back in this step. Most limits are never reached.
    pub throttled: u64,
    /// Actions of the policy in this step.
    pub actions: u64,
}

/// Sums over all steps of a phase, of all hosts.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    state_seconds: BTreeMap<MemoryState, f64>,
    seconds: f64,
    free_percent_seconds: f64,
    least_free_percent: Option<f64>,
    pub(super) balloon_moved_pages: f64,
    pub(super) swapped_out_pages: f64,
    pub(super) kernel_swapped_out_pages: f64,
    pub(super) swapped_in_pages: f64,
    pub(super) denied_pages: f64,
    pub(super) swings: u64,
    pub(super) kinds: Vec<KindTally>,
    throttled_seconds: f64,
    suspended_seconds: f64,
    suspends: u64,
    resumes: u64,
    stops: u64,
    minimum_violations: u64,
    actions: u64,
    last_action_seconds: Option<f64>,
    state_changes: u64,
    reasons: Vec<String>,
}

/// Sums over the guests of one kind.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct KindTally {
    progress_seconds: f64,
    busy_seconds: f64,
}

impl KindTally {
    /// A guest ran with this progress in a step.
    pub(super) fn count(&mut self, progress: f64, guest: &Guest, seconds: f64) {
        if guest.wants_pages > 0.0 {
            self.progress_seconds += progress * seconds;
            self.busy_seconds += seconds;
        }
    }

    /// A guest did not run.
    fn stood(&mut self, seconds: f64) {
        self.busy_seconds += seconds;
    }
}

/// The state of one kind of guest at the end of a phase, averaged over its living guests.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct KindReport {
    pub name: String,
    /// How many of them live.
    pub living: u64,
    /// Pages promised to each.
    pub promised_pages: u64,
    /// Pages that its balloon leaves it.
    pub left_pages: u64,
    /// Pages in memory.
    pub resident_pages: u64,
    /// Pages on swap.
    pub swapped_pages: u64,
    /// How many times longer its work took than with all the memory it wanted; suspension counts as
    /// no progress. 1 is full speed; null without any progress.
    pub slowdown: Option<f64>,
}

/// The result of a phase.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhaseReport {
    pub name: String,
    pub seconds: f64,
    /// Percent of the time in each state, over all hosts.
    pub state_percent: BTreeMap<&'static str, f64>,
    /// How often a host went from one state to another.
    pub state_changes: u64,
    /// The least free memory of any host in any step, in percent of its capacity.
    pub least_free_percent: f64,
    /// Free memory on the average.
    pub mean_free_percent: f64,
    /// Pages that went into or out of balloons.
    pub balloon_moved_pages: u64,
    /// Pages that the policy sent to swap.
    pub swapped_out_pages: u64,
    /// Pages that the host's kernel had to send there, because the policy was too slow.
    pub kernel_swapped_out_pages: u64,
    /// Pages that were read back.
    pub swapped_in_pages: u64,
    /// First touches for which there was no frame: on a real host a process would have been killed.
    pub denied_pages: u64,
    /// Seconds in which guests were held back by their limits, summed over guests.
    pub throttled_seconds: f64,
    /// Seconds that guests were suspended.
    pub suspended_seconds: f64,
    /// How often a guest was suspended.
    pub suspends: u64,
    /// How often a guest was resumed.
    pub resumes: u64,
    /// How many were stopped.
    pub stops: u64,
    /// Why guests were suspended or stopped; the first ones.
    pub reasons: Vec<String>,
    /// How often the policy would have left a guest less than its minimum. Must be 0.
    pub minimum_violations: u64,
    /// How often a balloon was sent one way and, within a minute, the other.
    pub swings: u64,
    /// Actions of the policy.
    pub actions: u64,
    /// How long at the end of the phase nothing was asked for on any host.
    pub quiet_seconds: f64,
    /// How many times longer work took than with all memory; over all guests.
    pub slowdown: Option<f64>,
    /// Each kind of guest.
    pub guests: Vec<KindReport>,
}

impl Tally {
    pub(super) fn new(kinds: usize) -> Self {
        Self { kinds: vec![KindTally::default(); kinds], ..Self::default() }
    }

    /// A step of a host is over.
    pub(super) fn count(&mut self, sample: &Sample, capacity_pages: f64, seconds: f64) {
        let free = 100.0 * sample.free_pages / capacity_pages;
        *self.state_seconds.entry(sample.memory_state).or_default() += seconds;
        self.seconds += seconds;
        self.free_percent_seconds += free * seconds;
        self.least_free_percent = Some(self.least_free_percent.map_or(free, |least| least.min(free)));
        self.throttled_seconds += sample.throttled as f64 * seconds;
        self.suspended_seconds += sample.suspended as f64 * seconds;
        self.actions += sample.actions;
        if sample.actions > 0 {
            let last = self.last_action_seconds.unwrap_or(0.0);
            self.last_action_seconds = Some(last.max(sample.seconds));
        }
    }

    /// A host is in another state than in the step before.
    pub(super) fn state_changed(&mut self) {
        self.state_changes += 1;
    }

    /// A guest is suspended in this step.
    pub(super) fn stood(&mut self, kind: usize, seconds: f64) {
        self.kinds[kind].stood(seconds);
    }

    /// The policy asked for an action on one guest, which is not carried out yet.
    pub(super) fn note(&mut self, action: &Action, guest: &Guest, now_seconds: f64) {
        let least = guest.view.floor_pages();
        let violates = match *action {
            Action::Balloon { target_pages, .. } => target_pages > guest.view.promised_pages - least,
            Action::PageOut { pages, .. } => guest.view.resident_pages < least.saturating_add(pages),
            _ => false,
        };
        self.minimum_violations += u64::from(violates);
        match action {
            Action::Suspend { .. } => self.suspends += 1,
            Action::Resume { .. } => self.resumes += 1,
            Action::Stop { .. } => self.stops += 1,
            _ => return,
        }
        let is_reason = !matches!(action, Action::Resume { .. });
        if is_reason && self.reasons.len() < MAX_REASONS {
            self.reasons.push(format!("{now_seconds:.0} s: {}: {action}", guest.view.name));
        }
    }

    /// The report. `guests` are all that exist now, and `ended_seconds` is when the phase ended.
    pub(super) fn report<'a>(
        &self,
        name: &str,
        kinds: &[&str],
        phase: (f64, f64),
        guests: impl Iterator<Item = &'a Guest>,
    ) -> PhaseReport {
        let (seconds, ended_seconds) = phase;
        let began_seconds = ended_seconds - seconds;
        let whole = self.seconds.max(f64::MIN_POSITIVE);
        let percent = |p: MemoryState| 100.0 * self.state_seconds.get(&p).copied().unwrap_or(0.0) / whole;
        let slowdown =
            |k: &KindTally| (k.progress_seconds > 0.0).then(|| k.busy_seconds / k.progress_seconds);
        let all = self.kinds.iter().fold(KindTally::default(), |a, b| KindTally {
            progress_seconds: a.progress_seconds + b.progress_seconds,
            busy_seconds: a.busy_seconds + b.busy_seconds,
        });
        PhaseReport {
            name: name.into(),
            seconds,
            state_percent: MemoryState::ALL.iter().map(|p| (p.name(), percent(*p))).collect(),
            state_changes: self.state_changes,
            least_free_percent: self.least_free_percent.unwrap_or(0.0),
            mean_free_percent: self.free_percent_seconds / whole,
            balloon_moved_pages: self.balloon_moved_pages as u64,
            swapped_out_pages: self.swapped_out_pages as u64,
            kernel_swapped_out_pages: self.kernel_swapped_out_pages as u64,
            swapped_in_pages: self.swapped_in_pages as u64,
            denied_pages: self.denied_pages as u64,
            throttled_seconds: self.throttled_seconds,
            suspended_seconds: self.suspended_seconds,
            suspends: self.suspends,
            resumes: self.resumes,
            stops: self.stops,
            reasons: self.reasons.clone(),
            minimum_violations: self.minimum_violations,
            swings: self.swings,
            actions: self.actions,
            quiet_seconds: (ended_seconds - self.last_action_seconds.unwrap_or(began_seconds)).max(0.0),
            slowdown: slowdown(&all),
            guests: kind_reports(kinds, &self.kinds.iter().map(slowdown).collect::<Vec<_>>(), guests),
        }
    }
}

fn kind_reports<'a>(
    kinds: &[&str],
    slowdowns: &[Option<f64>],
    guests: impl Iterator<Item = &'a Guest>,
) -> Vec<KindReport> {
    let mut sums = vec![(0_u64, [0.0_f64; 4]); kinds.len()];
    for guest in guests.filter(|g| g.lives()) {
        let (living, pages) = &mut sums[guest.kind];
        *living += 1;
        let has = [guest.promised_pages(), guest.usable_pages(), guest.resident_pages, guest.swapped_pages];
        for (sum, pages) in pages.iter_mut().zip(has) {
            *sum += pages;
        }
    }
    let mut reports = Vec::with_capacity(kinds.len());
    for ((name, slowdown), (living, pages)) in kinds.iter().zip(slowdowns).zip(sums) {
        let [promised_pages, left_pages, resident_pages, swapped_pages] =
            pages.map(|sum| (sum / living.max(1) as f64).round() as u64);
        let (name, slowdown) = ((*name).into(), *slowdown);
        let report =
            KindReport { name, living, promised_pages, left_pages, resident_pages, swapped_pages, slowdown };
        reports.push(report);
    }
    reports
}
