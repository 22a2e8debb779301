//! What walks of guests' page tables have found, kept: the part of [`super::rolling`] that takes
//! time, apart from the readers of the numbers.

use os::process::thread_time;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::Space;
use super::by_kind::Found;
use super::frames;
use super::slab_runs::{SlabCounts, SlabRun};
use kernel_view::ksm_stat::KsmStat;
use kernel_view::smaps::{self, ProcessPages};

/// A guest whose frames are counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Its process and memory.
    pub space: Space,
    /// Pages of it that its VM has put elsewhere to see whether they are touched: absent in its
    /// page table, but with frames.
    pub parked_pages: u64,
    /// Pages that its VM says were given back.
    pub given_back_pages: u64,
}

/// A guest's counters, which need no walk of its page table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) process: ProcessPages,
    pub(super) ksm: KsmStat,
    pub(super) faults: u64,
    pub(super) parked: u64,
    pub(super) given_back: u64,
}

impl Counters {
    /// None if the process is gone, or the kernel does not say. With `ksm` false KSM is known to
    /// have none of its pages.
    pub(super) fn of(subject: &Subject, ksm: bool) -> Option<Self> {
        let pid = subject.space.pid;
        Some(Self {
            process: ProcessPages::of(pid).ok()?,
            ksm: if ksm { KsmStat::of(pid).ok()? } else { KsmStat::default() },
            faults: smaps::faults(pid).ok()?,
            parked: subject.parked_pages,
            given_back: subject.given_back_pages,
        })
    }

    /// Whether guest memory may have changed. Pages of files and page tables that come and go say
    /// nothing of it.
    pub(super) fn differ(&self, other: &Self) -> bool {
        let telling = |c: &Self| {
            let ProcessPages { anonymous, shared_memory, swapped, .. } = c.process;
            let ksm = (c.ksm.merging_pages, c.ksm.zero_pages);
            (anonymous, shared_memory, swapped, ksm, c.faults, c.parked, c.given_back)
        };
        telling(self) != telling(other)
    }

    /// Whether KSM has merged here: then frames must be read one by one.
    pub(super) fn is_merged_by_ksm(&self) -> bool {
        self.ksm.merging_pages + self.ksm.zero_pages > 0
    }
}

/// The result of the last walk of a guest's page table.
#[derive(Clone, Debug)]
pub(super) struct Split {
    pub(super) space: Space,
    /// When the walk began, and what was counted then.
    pub(super) at: Instant,
    pub(super) counters: Counters,
    /// Anonymous pages on frames of their own.
    pub(super) private: u64,
    /// Pages on the zero frame.
    pub(super) zero: u64,
    /// Pages on swap.
    pub(super) swapped: u64,
    /// Pages of an image that have not been touched.
    pub(super) image: u64,
    /// Pages of slabs.
    pub(super) slab: u64,
    /// How they are shared.
    pub(super) shares: Shares,
    /// When the walk began that found these; not the last one if others that had changed were not
    /// walked with it.
    pub(super) shares_at: Option<Instant>,
    /// Memory of the process that is not the guest's.
    pub(super) besides: Besides,
    /// Zero pages are distinguished from others by estimate.
    pub(super) estimated: bool,
}

/// The average page of a slab.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shares {
    /// The part of them that no other process maps.
    pub(super) single: f64,
    /// Its part of a frame.
    pub(super) frames: f64,
}

impl Shares {
    /// Where nothing is known yet: each with one other.
    const UNKNOWN: Self = Self { single: 0.0, frames: 0.5 };
}

/// Pages of a VM process that are not its guest's. Parked ones are the guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Besides {
    pub(super) anonymous: u64,
    pub(super) shared_memory: u64,
    pub(super) swapped: u64,
}

/// Pages of a slab: the first, and how many. There are many, and they stay.
type Runs = Vec<(u32, u32)>;

/// The walks of all guests, by process.
#[derive(Debug, Default)]
pub(super) struct Walks {
    splits: HashMap<u32, Split>,
    /// By process and slab.
    slabs: HashMap<u32, HashMap<u64, Runs>>,
}

/// The result of a round of walks.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) walks: Walks,
    /// Processor time that it took.
    pub(super) cpu: Duration,
    /// The part of that for guests that were walked for the first time.
    pub(super) first: Duration,
    /// Whether a guest cannot be classified by range.
    pub(super) unclassified: bool,
}

impl Walks {
    pub(super) fn splits(&self) -> &HashMap<u32, Split> {
        &self.splits
    }

    /// Walks all of `due`, the first `new` of them for the first time; forgets guests that are not
    /// among `all`. `complete` says that all that have changed are due: then walks are put
    /// together. If some were old and others new, pages that one guest has left since would be
    /// taken to be another one's alone.
    pub(super) fn round(mut self, all: &HashSet<u32>, due: &[Subject], new: usize, complete: bool) -> Round {
        let begin = thread_time();
        let took = || thread_time().saturating_sub(begin);
        self.splits.retain(|pid, _| all.contains(pid));
        self.slabs.retain(|pid, _| all.contains(pid));
        let (new, known) = due.split_at(new.min(due.len()));
        let mut unclassified = false;
        for subject in new {
            unclassified |= self.walk(subject).is_none();
        }
        let first = took();
        for subject in known {
            unclassified |= self.walk(subject).is_none();
        }
        if complete {
            self.put_together();
        }
        Round { walks: self, cpu: took(), first, unclassified }
    }

    /// None if the guest cannot be classified by range, or is gone.
    fn walk(&mut self, subject: &Subject) -> Option<()> {
        let (space, pid) = (&subject.space, subject.space.pid);
        let known = self.splits.remove(&pid).filter(|split| split.space == *space);
        self.slabs.remove(&pid);
        let (at, counters) = (Instant::now(), Counters::of(subject, true)?);
        if counters.is_merged_by_ksm() {
            return None;
        }
        let mut found = Found::of(0, space)?;
        let by_entry = Space { extents: std::mem::take(&mut found.by_entry), ..space.clone() };
        let (mut swapped, mut estimated) = (0, false);
        if !by_entry.extents.is_empty() {
            let read = frames::measure(&[by_entry]).ok()?;
            if read.pages.shared > 0 {
                return None;
            }
            found.private += read.pages.private;
            found.zero += read.pages.zero;
            (swapped, estimated) = (read.pages.swapped, read.estimated);
        }
        let mut slabs: HashMap<u64, Runs> = HashMap::new();
        let mut slab = 0;
        for SlabRun { inode, first, pages, .. } in found.slabs {
            // A slab is a few MiB.
            let run = (u32::try_from(first).ok()?, u32::try_from(pages).ok()?);
            slabs.entry(inode).or_default().push(run);
            slab += pages;
        }
        let after = Counters::of(subject, true)?;
        let besides = |process: ProcessPages| Besides {
            anonymous: process.anonymous.saturating_sub(found.private + subject.parked_pages),
            shared_memory: process.shared_memory.saturating_sub(slab),
            swapped: process.swapped.saturating_sub(swapped),
        };
        let (shares, shares_at) =
            known.as_ref().map_or((Shares::UNKNOWN, None), |known| (known.shares, known.shares_at));
        let besides = match known {
            // A guest that runs is counted at one moment and walked at another: the earlier value
            // is nearer.
            Some(known) if after.differ(&counters) => known.besides,
            None if after.differ(&counters) => {
                let (a, b) = (besides(counters.process), besides(after.process));
                Besides {
                    anonymous: a.anonymous.min(b.anonymous),
                    shared_memory: a.shared_memory.min(b.shared_memory),
                    swapped: a.swapped.min(b.swapped),
                }
            }
            _ => besides(counters.process),
        };
        slabs.values_mut().for_each(Vec::shrink_to_fit);
        self.slabs.insert(pid, slabs);
        let split = Split {
            space: space.clone(),
            at,
            counters,
            private: found.private,
            zero: found.zero,
            swapped,
            image: found.image,
            slab,
            shares,
            shares_at,
            besides,
            estimated,
        };
        self.splits.insert(pid, split);
        Some(())
    }

    /// Shares each page of the slabs among those that map it.
    fn put_together(&mut self) {
        let runs = |slabs: &HashMap<u64, Runs>, each: &mut dyn FnMut(&SlabRun)| {
            for (&inode, runs) in slabs {
                for &(first, pages) in runs {
                    each(&SlabRun { inode, first: first.into(), pages: pages.into(), guest: 0 });
                }
            }
        };
        let mut counts = SlabCounts::default();
        self.slabs.values().for_each(|slabs| runs(slabs, &mut |run| counts.add(run)));
        for (pid, slabs) in &self.slabs {
            let Some(split) = self.splits.get_mut(pid) else { continue };
            let (mut single, mut frames) = (0u64, 0.0);
            runs(slabs, &mut |run| {
                for &mapped in counts.within(run) {
                    single += u64::from(mapped == 1);
                    frames += 1.0 / f64::from(mapped);
                }
            });
            let part = |of: f64| of / split.slab as f64;
            split.shares = match split.slab {
                0 => Shares::UNKNOWN,
                _ => Shares { single: part(single as f64), frames: part(frames) },
            };
            split.shares_at = Some(split.at);
        }
    }
}
