//! Sees how a fleet does, cheaply enough to be asked several times a second.
//!
//! The ledger is read every second, or so seldom that it takes a hundredth of one processor; page tables of guests that have changed are walked for as much again
//! ([`rolling`](measure::rolling)). In between the kernel's own count of each process's anonymous pages, which it keeps ready, says what has changed since.
//! Neither needs an answer of a VM: one that gives none is counted by what it was when it gave the last.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::asker::{Askers, Heard};
use super::ledger::{self, Budget, Look};
use super::policy_state::PolicyState;
use super::vm_handle::{Said, VmHandle, WORD_SECONDS};
use kernel_view::host::Host;
use kernel_view::smaps::ProcessPages;
use machine::working_set::WorkingSet;
use measure::rolling::Rolling;
use memory::PAGE_BYTES;
use os::lock;
use os::process::is_running;
use os::process::thread_time;
use overcommit::view::Psi;
use overcommit::view::{BalloonView, GuestState, GuestView, HostView};

/// How long a look waits for VMs that are asked, all of them together. One that is later is seen as it was.
pub(super) const ANSWER_WAIT: Duration = Duration::from_millis(100);
/// The ledger is read at most so often ...
const LEDGER_INTERVAL: Duration = Duration::from_secs(1);
/// ... and takes at most this part of one processor's time, walks of page tables not counted, which have their own limit.
const LEDGER_PART: u32 = 100;
/// How long it waits for walks that are due; what takes longer is in the next one.
const WALK_WAIT: Duration = Duration::from_millis(50);
/// How much of a new rate of first touches counts at once.
const RATE_WEIGHT: f64 = 0.5;

/// What was seen.
pub struct Observation {
    /// The host.
    pub host: HostView,
    /// The guests, in the order of their handles.
    pub guests: Vec<GuestView>,
    /// The ledger, if it was read this time.
    pub reading: Option<Look>,
}

/// Looks at a fleet.
#[derive(Default)]
pub struct Observer {
    /// What the fleet may use.
    pub budget: Budget,
    host: Host,
    askers: Arc<Mutex<Askers>>,
    last: Option<LastReading>,
    seen: HashMap<String, Seen>,
    cpu: Duration,
    rolling: Rolling,
}

struct LastReading {
    at: Instant,
    reading: Look,
    /// Anonymous pages of each process at that time.
    anonymous: HashMap<String, u64>,
}

/// A guest at the last look.
#[derive(Clone, Copy)]
struct Seen {
    at: Instant,
    anonymous: u64,
    touched_per_second: f64,
}

impl Observer {
    /// One that has VMs asked by `askers`.
    pub fn new(askers: Arc<Mutex<Askers>>) -> Self {
        Self { askers, ..Self::default() }
    }

    /// Looks at the guests at `handles`; `state` knows which paused ones the policy has suspended.
    pub fn observe(&mut self, handles: &[VmHandle], now_seconds: f64, state: &PolicyState) -> Observation {
        let begin = thread_time();
        let processes: Vec<Option<ProcessPages>> = handles
            .iter()
            .map(|handle| is_running(handle.pid).then(|| ProcessPages::of(handle.pid).ok()).flatten())
            .collect();
        self.attend(handles);
        let before_reading = thread_time();
        let reading = self.read_if_due(handles, &processes);
        let reading_took = thread_time().saturating_sub(before_reading);
        let mapped: u64 = processes.iter().flatten().map(|process| process.shared_memory).sum();
        let shared =
            self.budget.slab_frames().filter(|_| mapped > 0).map(|pages| pages as f64 / mapped as f64);
        let guests = handles
            .iter()
            .zip(&processes)
            .map(|(handle, process)| match process {
                Some(process) => self.guest(handle, process, shared.unwrap_or(1.0).min(1.0), state),
                None => {
                    self.seen.remove(&handle.guest);
                    GuestView { state: GuestState::Dead, ..usual(handle) }
                }
            })
            .collect();
        let used_pages = self.used_pages(&processes);
        let capacity_pages = self.budget.capacity;
        // Without /proc/meminfo nothing could be decided; capacity and use still are what they are.
        let readings = self.host.read().ok();
        let left = capacity_pages.saturating_sub(used_pages);
        let host = HostView {
            now_seconds,
            capacity_pages,
            used_pages,
            free_pages: readings.as_ref().map_or(left, |r| r.free_pages().min(left)),
            swap_free_pages: readings.as_ref().map_or(0, |r| r.swap_free_pages),
            psi: readings.and_then(|r| r.psi).map(|psi| Psi {
                some_avg10_percent: psi.some_avg10_percent,
                full_avg10_percent: psi.full_avg10_percent,
            }),
            merging: self.budget.merging,
            unnamed_image_pages: self.budget.unnamed_image_pages + self.budget.pool_pages,
        };
        self.cpu += thread_time().saturating_sub(begin + reading_took);
        Observation { host, guests, reading }
    }

    /// Processor time that looking took so far, the ledger not counted, which keeps its own limit.
    pub fn cpu_time(&self) -> Duration {
        self.cpu
    }

    /// How often the ledger is read, in seconds.
    pub fn ledger_interval_seconds(&self) -> f64 {
        self.ledger_interval().as_secs_f64()
    }

    /// Has these VMs asked from now on. Those that are new are waited for: nothing is known of them.
    fn attend(&self, handles: &[VmHandle]) {
        let mut askers = lock(&self.askers);
        askers.attend(handles);
        if handles.iter().any(|handle| askers.heard(&handle.guest).is_none()) {
            askers.wait(ANSWER_WAIT);
        }
    }

    fn ledger_interval(&self) -> Duration {
        let took = self.last.as_ref().map_or(0.0, |last| last.reading.own_seconds);
        LEDGER_INTERVAL.max(Duration::from_secs_f64(took) * LEDGER_PART)
    }

    fn read_if_due(&mut self, handles: &[VmHandle], processes: &[Option<ProcessPages>]) -> Option<Look> {
        let interval = self.ledger_interval();
        // A guest that has come or gone changes all sums.
        let known = |last: &LastReading| {
            let running = handles.iter().zip(processes).filter(|(_, process)| process.is_some());
            last.at.elapsed() < interval
                && running.clone().count() == last.anonymous.len()
                && running.into_iter().all(|(handle, _)| last.anonymous.contains_key(&handle.guest))
        };
        if self.last.as_ref().is_some_and(known) {
            return None;
        }
        let heard: Vec<Option<Said>> = {
            let mut askers = lock(&self.askers);
            askers.ask(true);
            askers.wait(ANSWER_WAIT);
            handles.iter().map(|handle| askers.said(&handle.guest)).collect()
        };
        let reading = ledger::look(handles, &heard, self.budget, &mut self.rolling, WALK_WAIT).ok()?;
        let anonymous = handles
            .iter()
            .zip(processes)
            .filter_map(|(handle, process)| Some((handle.guest.clone(), process.as_ref()?.anonymous)))
            .collect();
        self.last = Some(LastReading { at: Instant::now(), reading: reading.clone(), anonymous });
        Some(reading)
    }

    /// Frames that the fleet uses.
    ///
    /// With slabs that is what is anonymous, what page tables take, and the slabs. KSM's frames are as anonymous as any others, so there
    /// what the ledger said counts, and what has changed since.
    fn used_pages(&self, processes: &[Option<ProcessPages>]) -> u64 {
        let running = || processes.iter().flatten();
        match (self.budget.slab_frames(), &self.last) {
            (Some(slab_pages), _) => {
                let own = ProcessPages::of(std::process::id()).unwrap_or_default();
                let vms: u64 = running().map(|process| process.anonymous + process.page_tables).sum();
                vms + own.anonymous + own.file + own.page_tables + slab_pages + self.budget.pool_pages
            }
            (None, Some(last)) => {
                let now: u64 = running().map(|process| process.anonymous).sum();
                let then: u64 = last.anonymous.values().sum();
                last.reading.ledger.used.saturating_add_signed(now as i64 - then as i64)
            }
            (None, None) => running().map(|process| process.anonymous).sum(),
        }
    }

    /// A guest. Of a page of a slab it has this part of a frame.
    fn guest(
        &mut self,
        handle: &VmHandle,
        process: &ProcessPages,
        shared: f64,
        state: &PolicyState,
    ) -> GuestView {
        let now = Instant::now();
        let anonymous = process.anonymous;
        let rate = match self.seen.get(&handle.guest) {
            Some(before) => {
                let seconds = now.duration_since(before.at).as_secs_f64().max(1e-3);
                let touched = anonymous.saturating_sub(before.anonymous) as f64 / seconds;
                before.touched_per_second + RATE_WEIGHT * (touched - before.touched_per_second)
            }
            None => 0.0,
        };
        self.seen.insert(handle.guest.clone(), Seen { at: now, anonymous, touched_per_second: rate });
        let mut view = GuestView { touched_pages_per_second: rate, ..usual(handle) };
        if let Some(last) = &self.last {
            let ledger = &last.reading.ledger;
            if let Some(account) = ledger.guests.iter().find(|account| account.name == handle.guest) {
                (view.resident_pages, view.frames) = match self.budget.slab_pages {
                    Some(_) => {
                        let private = anonymous.saturating_sub(account.overhead.vmm);
                        let of_slabs = process.shared_memory;
                        (private + of_slabs, private as f64 + of_slabs as f64 * shared)
                    }
                    None => {
                        let at_reading = last.anonymous.get(&handle.guest).copied().unwrap_or(anonymous);
                        let more = anonymous as i64 - at_reading as i64;
                        let frames = (account.frames + more as f64).max(0.0);
                        (account.resident.saturating_add_signed(more), frames)
                    }
                };
            }
        }
        let (heard, silent) = {
            let askers = lock(&self.askers);
            (askers.heard(&handle.guest), askers.silent(&handle.guest))
        };
        view.silent_seconds = silent.map(|silent| silent.as_secs_f64());
        if let Some(Heard { said, size, working_set, was_held, .. }) = heard {
            if said.status.paused {
                view.state = state.of_paused(&handle.guest);
            }
            view.age_seconds = said.age_seconds();
            // Of a paused one it is as true as it was.
            let holds = said.status.paused || view.age_seconds.is_some_and(|age| age <= WORD_SECONDS);
            view.spare_pages = said.spare_pages().filter(|_| holds);
            view.throttle_pages_per_second = said.status.throttle.pages_per_second;
            view.held = was_held;
            view.working_set_pages = working_set.map(|part| active_pages(&part, view.resident_pages));
            view.working_set_error_pages = working_set.map(|part| error_pages(&part, view.resident_pages));
            view.balloon = size.filter(|size| size.driver).map(|size| BalloonView {
                target_pages: size.target_pages.into(),
                actual_pages: size.actual_pages.into(),
            });
        }
        if silent.is_some() {
            view.state = GuestState::Silent;
        }
        view
    }
}

/// A guest of which nothing is known yet.
fn usual(handle: &VmHandle) -> GuestView {
    GuestView {
        name: handle.guest.clone(),
        promised_pages: handle.promised_pages(),
        shares: handle.reservation.shares,
        min_pages: handle.reservation.min_bytes / PAGE_BYTES,
        max_pages: handle.reservation.max_bytes / PAGE_BYTES,
        priority: handle.reservation.priority,
        ..GuestView::default()
    }
}

/// How far [`active_pages`] may be off: as much more than the sample's own error as it stands for more pages.
fn error_pages(sample: &WorkingSet, resident_pages: u64) -> u64 {
    let small = resident_pages.saturating_sub(sample.huge_pages);
    (sample.error_pages as f64 * small as f64 / sample.sampled_pages.max(1) as f64).min(small as f64) as u64
}

/// What a guest of `pages` pages uses, by a sample of those that are small and its own: the others are taken to be used as much, and those
/// in huge pages, of which there is no sample, to be used all.
fn active_pages(sample: &WorkingSet, resident_pages: u64) -> u64 {
    let huge = sample.huge_pages.min(resident_pages);
    let part = sample.estimated_pages as f64 / sample.sampled_pages.max(1) as f64;
    huge + ((resident_pages - huge) as f64 * part.min(1.0)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_sample_was_taken_of_counts_as_the_rest_does_or_as_used() {
        let sample = |sampled_pages, estimated_pages, huge_pages| WorkingSet {
            sampled_pages,
            estimated_pages,
            huge_pages,
            ..WorkingSet::default()
        };
        assert_eq!(active_pages(&sample(100, 25, 0), 400), 100);
        assert_eq!(active_pages(&sample(100, 25, 200), 400), 250);
        assert_eq!(active_pages(&sample(0, 0, 1000), 400), 400);
        let with_error = |sample| error_pages(&WorkingSet { error_pages: 10, ..sample }, 400);
        assert_eq!([with_error(sample(100, 25, 0)), with_error(sample(100, 25, 200))], [40, 20]);
        assert_eq!([with_error(sample(0, 0, 0)), with_error(sample(0, 0, 1000))], [400, 0]);
    }
}
