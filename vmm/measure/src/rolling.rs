//! The frames of our own VMs, read again and again at a bounded cost.
//!
//! Walking page tables takes milliseconds a GiB, so what
//! [`by_kind::measure`](super::by_kind::measure) does is too much for every second of a large host.
//! Here each guest's walk is kept. Those guests are walked again that have changed, all of them at
//! once, so seldom that it takes a hundredth of one processor in the long run; in between the
//! kernel's own counters, which it keeps ready, say how much there is:
//!
//! - anonymous pages, pages of slabs and pages on swap are those of the process, less what it had
//!   besides its guest at the last walk;
//! - as many of the rest as the last walk found are on the zero frame, and the others absent;
//! - of the pages of slabs the part is shared that was, with as many others.
//!
//! If no counter has moved since (page faults are one), all is as the walks found it. Each guest is
//! walked again after [`REFRESH`] all the same, for zeros that are given back move none. Each
//! guest's numbers say how old its walk is, and whether counters have moved since.
//!
//! Walks are done by a thread of their own: a reader waits only for guests of which nothing is
//! known, and for others up to its own limit.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::frames::{GuestFrames, Pages};
pub use super::walks::Subject;
use super::walks::{Besides, Counters, Round, Split, Walks};
use super::{MeasureError, Space, check};
use kernel_view::ksm_stat::{self, KsmStat};
use kernel_view::smaps::ProcessPages;

/// Walks take at most one part in `WALK_PART` of one processor's time, in the long run.
pub const WALK_PART: u32 = 100;
/// The most that is saved up for walks, in seconds of a processor. They begin when there is any,
/// and what they take more is waited for afterwards.
const MOST_SAVED: f64 = 0.02;
/// A guest is walked again after this time even if no counter has changed, if the budget allows it.
pub const REFRESH: Duration = Duration::from_secs(600);

#[derive(Clone, Debug)]
pub struct Recent {
    /// By class.
    pub frames: GuestFrames,
    /// What its process had when these were counted.
    pub process: ProcessPages,
    /// The same of KSM.
    pub ksm: KsmStat,
    /// How old the walk is that they are from: of two the older one, while the sharing of the pages
    /// that the last one found is not known yet.
    pub walk_age: Duration,
    /// Counters have changed since, its own or those of guests that may share its pages: the frames
    /// are from these, or from a newer walk, and only their split is from that one.
    pub by_counters: bool,
    /// Zero pages are distinguished from others by estimate.
    pub estimated: bool,
    /// Pages of slabs that no other process maps, which are among the private ones.
    single: u64,
}

#[derive(Clone, Debug)]
pub struct Reading {
    /// In the order in which they were given.
    pub guests: Vec<Recent>,
    /// Different frames under them, the zero frame not counted.
    pub frames: u64,
    /// How many of them are pages of slabs.
    pub slab_frames: u64,
    /// Processor time that walks took which ended since the last reading.
    pub walks: Duration,
}

/// Reads frames again and again.
#[derive(Debug)]
pub struct Rolling {
    /// None while they are done.
    walks: Option<Walks>,
    running: Option<Receiver<Round>>,
    splits: HashMap<u32, Split>,
    /// Seconds of a processor that may be spent; negative where a walk took longer.
    saved: f64,
    filled: Instant,
    part: u32,
    refresh: Duration,
    /// Spent, and not reported yet.
    spent: Duration,
}

impl Default for Rolling {
    fn default() -> Self {
        Self::new(WALK_PART, REFRESH)
    }
}

impl Rolling {
    /// Walks take at most one part in `part` of one processor's time; a guest that seems unchanged
    /// is walked again after `refresh`.
    pub fn new(part: u32, refresh: Duration) -> Self {
        Self {
            walks: Some(Walks::default()),
            running: None,
            splits: HashMap::new(),
            saved: 0.0,
            filled: Instant::now(),
            part,
            refresh,
            spent: Duration::ZERO,
        }
    }

    /// The frames of `subjects` now; waits up to `patience` for walks that are due. `slab_pages`
    /// are those of all slabs, if known: there are no more frames than these. None if a guest
    /// cannot be classified by range (see [`super::by_kind`]), or has ended: then all have to be
    /// counted frame by frame.
    ///
    /// # Errors
    /// There are too many, or they have memory that is not of whole pages.
    pub fn read(
        &mut self,
        subjects: &[Subject],
        slab_pages: Option<u64>,
        patience: Duration,
    ) -> Result<Option<Reading>, MeasureError> {
        let spaces: Vec<Space> = subjects.iter().map(|subject| subject.space.clone()).collect();
        check(&spaces)?;
        self.save();
        let counted = Instant::now();
        let ksm = ksm_stat::has_pages();
        let counters = subjects.iter().map(|subject| Counters::of(subject, ksm));
        let Some(counters) = counters.collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        if counters.iter().any(Counters::is_merged_by_ksm) {
            return Ok(None);
        }
        // Collects a round that ended meanwhile; then starts one, and waits for it if a guest is
        // unknown.
        let mut classified = self.collect(Duration::ZERO);
        for _ in 0..2 {
            let ours = self.running.is_none();
            if ours {
                self.begin(subjects, &counters);
            }
            let known = subjects.iter().all(|subject| self.knows(subject));
            classified &= self.collect(if known { patience } else { Duration::MAX });
            if ours || known {
                break;
            }
        }
        if !classified || !subjects.iter().all(|subject| self.knows(subject)) {
            return Ok(None);
        }
        let mut guests: Vec<Recent> = subjects
            .iter()
            .zip(&counters)
            .filter_map(|(subject, now)| Some(self.splits.get(&subject.space.pid)?.recent(now, counted)))
            .collect();
        mark(&mut guests);
        bound(&mut guests, slab_pages);
        let frames = guests.iter().map(|guest| guest.frames.frames).sum::<f64>().round() as u64;
        let own = |guest: &Recent| (guest.frames.pages.private - guest.single) as f64;
        let slab_frames = guests.iter().map(|guest| guest.frames.frames - own(guest)).sum::<f64>();
        let slab_frames = slab_frames.max(0.0).round() as u64;
        Ok(Some(Reading { guests, frames, slab_frames, walks: std::mem::take(&mut self.spent) }))
    }

    fn knows(&self, subject: &Subject) -> bool {
        self.splits.get(&subject.space.pid).is_some_and(|split| split.space == subject.space)
    }

    fn save(&mut self) {
        let seconds = self.filled.elapsed().as_secs_f64();
        self.filled = Instant::now();
        self.saved = (self.saved + seconds / f64::from(self.part)).min(MOST_SAVED);
    }

    /// Starts a walk of the guests of which nothing is known and, if the budget allows it, of all
    /// that have changed, at once: walks of different times do not show which guests share a page.
    fn begin(&mut self, subjects: &[Subject], counters: &[Counters]) {
        let (mut due, mut known, mut changed) = (Vec::new(), Vec::new(), false);
        for (subject, now) in subjects.iter().zip(counters) {
            match self.splits.get(&subject.space.pid).filter(|split| split.space == subject.space) {
                None => due.push(subject.clone()),
                Some(split) => {
                    let moved = now.differ(&split.counters) || !split.is_put_together();
                    changed |= moved;
                    if moved || split.at.elapsed() >= self.refresh {
                        known.push(subject.clone());
                    }
                }
            }
        }
        let new = due.len();
        if self.saved > 0.0 {
            due.append(&mut known);
            changed = false;
        }
        let gone = self.splits.len() + new != subjects.len();
        if due.is_empty() && !gone {
            return;
        }
        let all: HashSet<u32> = subjects.iter().map(|subject| subject.space.pid).collect();
        let walks = self.walks.take().unwrap_or_default();
        let (sender, receiver) = channel();
        // If the thread cannot be started, nothing is received from it, and all is begun anew.
        let started = thread::Builder::new().name("walks".into()).spawn(move || {
            let _ = sender.send(walks.round(&all, &due, new, !changed));
        });
        self.running = started.ok().map(|_| receiver);
    }

    /// Collects the result of a round, waiting up to `patience`. False if there is none, or a guest
    /// cannot be classified by range.
    fn collect(&mut self, patience: Duration) -> bool {
        let Some(running) = &self.running else { return self.walks.is_some() };
        let round = match patience {
            Duration::MAX => running.recv().map_err(|_| RecvTimeoutError::Disconnected),
            patience => running.recv_timeout(patience),
        };
        match round {
            Ok(Round { walks, cpu, first, unclassified }) => {
                self.running = None;
                self.splits = walks.splits().clone();
                self.walks = Some(walks);
                self.saved -= cpu.saturating_sub(first).as_secs_f64();
                self.spent += cpu;
                !unclassified
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => {
                *self = Self::new(self.part, self.refresh);
                false
            }
        }
    }
}

impl Split {
    /// Whether the sharing of the pages that the last walk found is known.
    fn is_put_together(&self) -> bool {
        self.slab == 0 || self.shares_at == Some(self.at)
    }

    /// Its guest's frames by `now`, which was counted at `counted`.
    fn recent(&self, now: &Counters, counted: Instant) -> Recent {
        let total = self.space.pages();
        let moved = self.at < counted && now.differ(&self.counters);
        let by_counters = moved || !self.is_put_together();
        // A walk since then is newer.
        let now = if self.at < counted { now } else { &self.counters };
        let (mut private, mut slab, mut swapped) = (self.private, self.slab, self.swapped);
        if moved {
            let Besides { anonymous, shared_memory, swapped: besides } = self.besides;
            private = now.process.anonymous.saturating_sub(anonymous + now.parked);
            slab = now.process.shared_memory.saturating_sub(shared_memory);
            swapped = now.process.swapped.saturating_sub(besides);
        }
        // Counters are not of one moment: no more than there is.
        let mut left = total;
        let mut take = |pages: u64| {
            let taken = pages.min(left);
            left -= taken;
            taken
        };
        let (private, slab, swapped, zero) = (take(private), take(slab), take(swapped), take(self.zero));
        // What was touched since is among those of slabs now.
        let image = take(self.image.saturating_sub(slab.saturating_sub(self.slab)));
        let single = (slab as f64 * self.shares.single).round() as u64;
        let slab_frames = slab as f64 * self.shares.frames;
        let pages = Pages {
            total,
            absent: left,
            image,
            zero,
            private: private + single,
            shared: slab - single,
            swapped,
        };
        let frames = GuestFrames {
            name: self.space.name.clone(),
            pid: self.space.pid,
            pages,
            frames: private as f64 + slab_frames,
            anonymous: private + zero,
        };
        let walk_age = counted.saturating_duration_since(self.shares_at.unwrap_or(self.at));
        let (process, ksm, estimated) = (now.process, now.ksm, self.estimated);
        Recent { frames, process, ksm, walk_age, by_counters, estimated, single }
    }
}

/// If a guest with pages of slabs has changed, so may the sharing of all others.
fn mark(guests: &mut [Recent]) {
    let has_slabs = |guest: &Recent| guest.frames.pages.shared + guest.single > 0;
    if guests.iter().any(|guest| guest.by_counters) {
        guests.iter_mut().filter(|guest| has_slabs(guest)).for_each(|guest| guest.by_counters = true);
    }
}

/// Bounds the frames of slabs by the pages their files have, where they come from counters: walks
/// of different times count more, because a page that one guest was seen to have may since be
/// another's.
fn bound(guests: &mut [Recent], slab_pages: Option<u64>) {
    let own = |guest: &Recent| (guest.frames.pages.private - guest.single) as f64;
    let slabs = |guests: &[Recent], by_counters: bool| -> f64 {
        let some = guests.iter().filter(|guest| guest.by_counters == by_counters);
        some.map(|guest| guest.frames.frames - own(guest)).sum()
    };
    let Some(held) = slab_pages else { return };
    // Walks are more exact than counters.
    let (counted, most) = (slabs(guests, true), (held as f64 - slabs(guests, false)).max(0.0));
    if counted <= most {
        return;
    }
    let part = most / counted;
    for guest in guests.iter_mut().filter(|guest| guest.by_counters) {
        let own = own(guest);
        guest.frames.frames = own + (guest.frames.frames - own) * part;
        let single = (guest.single as f64 * part) as u64;
        let pages = &mut guest.frames.pages;
        (pages.private, pages.shared) =
            (pages.private - guest.single + single, pages.shared + guest.single - single);
        guest.single = single;
    }
}

#[cfg(test)]
#[path = "rolling_tests.rs"]
mod tests;
