//! The merge step: replacing a run of private pages with pages of a sealed slab that hold the same.
//!
//! Whatever led here, a hash, another process, a mistake, the pages are compared byte by byte while
//! they cannot be written to. Freeze, look for pages in flight, compare, map, wake: in that order,
//! and all of it here. In between there is no lock, no message to another process, no allocation
//! and no log, for the guest's vCPUs may be asleep.
#![expect(unsafe_code, reason = "compares and replaces guest pages")]

use std::io;

use rustix::mm::{MapFlags, ProtFlags};
use thiserror::Error;

use super::freeze::Freezer;
use super::page::to_usize;
use super::ram::{Backing, GuestRange, Ram};
use super::slab::{Slab, StageError, Staged};
use super::{PAGE_BYTES, PageRange, SlabPage};

/// Pages of the longest run: longer ones gain little, and stall the guest's writes.
pub const MAX_RUN_PAGES: u64 = 64;

/// Why a run was not merged. It is as it was.
#[derive(Debug, Error)]
pub enum Refusal {
    /// It cannot be: no pages or too many, outside RAM, or more than the slab has.
    #[error("the run is not one that can be merged")]
    Run,
    /// The run could not be write-protected.
    #[error("cannot freeze pages of guest RAM")]
    Freeze(#[source] io::Error),
    /// A device writes to it, or is about to.
    #[error("a device may be writing to the pages")]
    InFlight,
    /// The pages hold something else.
    #[error("the pages differ from those of the slab")]
    Differs,
    /// The process may have no more mappings (vm.max_map_count).
    #[error("no mapping is left: raise vm.max_map_count")]
    Mappings,
    /// The kernel would not map the slab.
    #[error("cannot map pages of a slab")]
    Map(#[source] io::Error),
}

/// Bytes of the longest run.
const MAX_RUN_BYTES: usize = to_usize(MAX_RUN_PAGES * PAGE_BYTES);

/// What a run of zeros is compared with.
static ZEROS: [u8; MAX_RUN_BYTES] = [0; MAX_RUN_BYTES];

/// One VM's RAM, private anonymous memory, and what merges its pages.
pub struct RamRegion {
    ram: Ram,
    freezer: Freezer,
    /// Called between the steps, so that tests can do there what the worst moment has in store.
    #[cfg(test)]
    pub(super) between: fn(Step),
}

/// Where a merge has got to.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Frozen,
    Compared,
    Mapped,
}

impl RamRegion {
    /// Merges pages of `ram`, which must be anonymous memory.
    pub fn new(ram: &Ram) -> io::Result<Self> {
        if ram.backing() != Backing::Anonymous {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "guest RAM is not anonymous memory"));
        }
        Ok(Self {
            ram: ram.clone(),
            freezer: Freezer::new()?,
            #[cfg(test)]
            between: |_| {},
        })
    }

    /// Replaces a run with as many pages of `slab` from `first` on, if they hold the same.
    pub fn merge(&mut self, run: PageRange, (slab, first): (&Slab, SlabPage)) -> Result<(), Refusal> {
        if !(1..=MAX_RUN_PAGES).contains(&run.pages()) {
            return Err(Refusal::Run);
        }
        let staged = slab.stage(first, run.pages()).map_err(|error| match error {
            StageError::Range => Refusal::Run,
            StageError::Mappings => Refusal::Mappings,
            StageError::Kernel(error) => Refusal::Map(error),
        })?;
        // Failure costs a mapping that does not join its neighbours.
        self.ram.advice_anew().for_each(|advice| _ = staged.advise(advice));
        self.replace(run, With::Slab(staged, slab, first))
    }

    /// Gives a run back to the host, if all of it is zeros. It reads as zeros after.
    pub fn drop_zeros(&mut self, run: PageRange) -> Result<(), Refusal> {
        let zeros = usize::try_from(run.bytes()).ok().and_then(|bytes| ZEROS.get(..bytes));
        self.replace(run, With::Zeros(zeros.ok_or(Refusal::Run)?))
    }

    /// The step itself: the run is replaced by pages that hold the same, those of a slab or fresh
    /// ones.
    fn replace(&mut self, run: PageRange, with: With<'_>) -> Result<(), Refusal> {
        let run = self.ram.range(run).filter(|run| run.pages().pages() <= MAX_RUN_PAGES);
        let run = run.ok_or(Refusal::Run)?;

        let frozen = self.freezer.freeze(run).map_err(Refusal::Freeze)?;
        #[cfg(test)]
        (self.between)(Step::Frozen);
        if self.ram.in_flight().any(run.pages()) {
            return Err(Refusal::InFlight);
        }
        let same = with.bytes();
        // SAFETY: both ranges are mapped and that long. The first is not written to: it is frozen,
        // and no device has it. Even if it were, this reads bytes and believes nothing of them.
        let differ = unsafe { libc::memcmp(run.as_ptr(), same.as_ptr().cast(), run.bytes().min(same.len())) };
        if differ != 0 || same.len() != run.bytes() {
            return Err(Refusal::Differs);
        }
        #[cfg(test)]
        (self.between)(Step::Compared);
        let fresh = matches!(with, With::Zeros(_));
        let mapped = with.map_over(run);
        #[cfg(test)]
        (self.between)(Step::Mapped);
        match mapped {
            Ok(()) => frozen.replaced(),
            Err(rustix::io::Errno::NOMEM) => return Err(Refusal::Mappings),
            Err(error) => return Err(Refusal::Map(error.into())),
        }
        // The guest is awake. What was staged has been advised before.
        if fresh {
            self.ram.advice_anew().for_each(|advice| _ = run.advise(advice));
        }
        Ok(())
    }
}

/// What a run is replaced by.
enum With<'a> {
    /// Pages of a slab that are mapped already, elsewhere; and which those are.
    Slab(Staged, &'a Slab, SlabPage),
    /// Fresh memory, which is these zeros.
    Zeros(&'a [u8]),
}

impl With<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Slab(staged, ..) => staged.bytes(),
            Self::Zeros(zeros) => zeros,
        }
    }

    /// Maps it over a run that holds the same, atomically. Where it fails, the old mapping stays.
    fn map_over(self, run: GuestRange<'_>) -> Result<(), rustix::io::Errno> {
        match self {
            Self::Slab(staged, slab, first) => match staged.move_to(run) {
                Ok(()) => Ok(()),
                // It may have left a hole, which is filled before a sleeper wakes. Where the old
                // mapping is still there this replaces it, or fails and leaves it.
                Err(_) => {
                    let prot = ProtFlags::READ | ProtFlags::WRITE;
                    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
                    // SAFETY: a range of guest RAM, of which any contents may become any others.
                    unsafe { rustix::mm::mmap(run.as_ptr(), run.bytes(), prot, flags, slab, first.offset()) }
                        .map(drop)
                }
            },
            Self::Zeros(_) => run.map_fresh(),
        }
    }
}

#[cfg(test)]
mod tests;
