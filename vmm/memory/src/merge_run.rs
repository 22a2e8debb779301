//! The merge step: replacing a run of private pages with pages of a sealed slab that hold the same.
//!
//! Whatever led here, a hash, another process, a mistake, the pages are compared byte by byte while nobody can write to
//! them. Freeze, look for pages in flight, compare, map, wake: in that order, and all of it here. In between there is no lock,
//! no message to another process, no allocation and no log, for the guest's vCPUs may be asleep.
#![expect(unsafe_code, reason = "compares and replaces guest pages")]

use std::ffi::c_void;
use std::io;

use rustix::mm::{MapFlags, ProtFlags};
use thiserror::Error;

use super::PAGE_BYTES;
use super::freeze::Freezer;
use super::in_flight::InFlight;
use super::slab::{Slab, StageError, Staged};

/// Pages of the longest run: longer ones gain little, and stall whoever writes.
pub const MAX_RUN_PAGES: u64 = 64;

/// Why a run was not merged. It is as it was.
#[derive(Debug, Error)]
pub enum Refusal {
    /// It cannot be: no pages or too many, outside RAM, or more than the slab has.
    #[error("the run is not one that can be merged")]
    Run,
    /// Nobody could be kept from writing.
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

/// How new guest memory is advised of: see [`super::ram::Ram::advise_anew`].
pub type Advise = Box<dyn Fn(usize, usize) + Send>;

/// What a run of zeros is compared with.
static ZEROS: [u8; (MAX_RUN_PAGES * PAGE_BYTES) as usize] = [0; (MAX_RUN_PAGES * PAGE_BYTES) as usize];

/// One stretch of private anonymous guest RAM in this process, and what merges its pages.
pub struct Mergeable {
    hva: usize,
    pages: u64,
    freezer: Freezer,
    advise: Advise,
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

impl Mergeable {
    /// The stretch of `bytes` at address `hva`.
    ///
    /// # Safety
    /// It must be private anonymous memory that is guest RAM and stays mapped for ever, and of which no reference (`&[u8]` and
    /// the like) is held by anybody: its pages are replaced by others with the same contents.
    pub unsafe fn new(hva: usize, bytes: u64, advise: Advise) -> io::Result<Self> {
        Ok(Self {
            hva,
            pages: bytes / PAGE_BYTES,
            freezer: Freezer::new()?,
            advise,
            #[cfg(test)]
            between: |_| {},
        })
    }

    /// Replaces `pages` pages from `page` on with those of `slab` from `slab_page` on, if they hold the same.
    pub fn merge(
        &mut self,
        (page, pages): (u64, u64),
        (slab, slab_page): (&Slab, u64),
        in_flight: &InFlight,
    ) -> Result<(), Refusal> {
        if !(1..=MAX_RUN_PAGES).contains(&pages) {
            return Err(Refusal::Run);
        }
        let staged = slab.stage(slab_page, pages).map_err(|error| match error {
            StageError::Range => Refusal::Run,
            StageError::Mappings => Refusal::Mappings,
            StageError::Kernel(error) => Refusal::Map(error),
        })?;
        (self.advise)(staged.hva(), staged.bytes().len());
        self.replace((page, pages), With::Slab(staged, slab, slab_page), in_flight)
    }

    /// Gives `pages` pages from `page` on back to the host, if all of them are zeros. They read as zeros after.
    pub fn drop_zeros(&mut self, (page, pages): (u64, u64), in_flight: &InFlight) -> Result<(), Refusal> {
        let zeros = ZEROS.get(..pages.saturating_mul(PAGE_BYTES) as usize).ok_or(Refusal::Run)?;
        self.replace((page, pages), With::Zeros(zeros), in_flight)
    }

    /// The step itself: the run is replaced by pages that hold the same, those of a slab or fresh ones.
    fn replace(
        &mut self,
        (page, pages): (u64, u64),
        with: With<'_>,
        in_flight: &InFlight,
    ) -> Result<(), Refusal> {
        let end = page.checked_add(pages).filter(|end| *end <= self.pages).ok_or(Refusal::Run)?;
        if !(1..=MAX_RUN_PAGES).contains(&pages) {
            return Err(Refusal::Run);
        }
        let (hva, bytes) = (self.hva + (page * PAGE_BYTES) as usize, (pages * PAGE_BYTES) as usize);

        let frozen = self.freezer.freeze(hva, bytes).map_err(Refusal::Freeze)?;
        #[cfg(test)]
        (self.between)(Step::Frozen);
        if in_flight.any(page..end) {
            return Err(Refusal::InFlight);
        }
        let same = with.bytes();
        // SAFETY: both ranges are mapped and that long. Nobody writes to the first: it is frozen, and no device has it. Even if
        // somebody did, this reads bytes and believes nothing of them.
        let differ =
            unsafe { libc::memcmp(hva as *const c_void, same.as_ptr().cast(), bytes.min(same.len())) };
        if differ != 0 || same.len() != bytes {
            return Err(Refusal::Differs);
        }
        #[cfg(test)]
        (self.between)(Step::Compared);
        let fresh = matches!(with, With::Zeros(_));
        // SAFETY: the range is guest RAM, to which nobody holds references (`Mergeable::new`), and what is mapped there instead has
        // the same contents.
        let mapped = unsafe { with.map_at(hva, bytes) };
        #[cfg(test)]
        (self.between)(Step::Mapped);
        match mapped {
            Ok(()) => frozen.replaced(),
            Err(rustix::io::Errno::NOMEM) => return Err(Refusal::Mappings),
            Err(error) => return Err(Refusal::Map(error.into())),
        }
        // The guest is awake. What was staged has been advised before.
        if fresh {
            (self.advise)(hva, bytes);
        }
        Ok(())
    }
}

/// What a run is replaced by.
enum With<'a> {
    /// Pages of a slab that are mapped already, elsewhere; and which those are.
    Slab(Staged, &'a Slab, u64),
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

    /// Maps it over `bytes` at `hva`, in one step for whoever looks. Where it fails, the old mapping stays.
    ///
    /// # Safety
    /// Nobody holds references to that memory.
    unsafe fn map_at(self, hva: usize, bytes: usize) -> Result<(), rustix::io::Errno> {
        let (at, prot) = (hva as *mut c_void, ProtFlags::READ | ProtFlags::WRITE);
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        match self {
            // SAFETY: as the caller promises.
            Self::Slab(staged, slab, page) => match unsafe { staged.move_to(hva) } {
                Ok(()) => Ok(()),
                // It may have left a hole, which is filled before anybody wakes. Where the old mapping is still there this
                // replaces it, or fails and leaves it.
                Err(_) => {
                    // SAFETY: as the caller promises.
                    unsafe { rustix::mm::mmap(at, bytes, prot, flags, slab, page * PAGE_BYTES) }.map(drop)
                }
            },
            // SAFETY: as the caller promises.
            Self::Zeros(_) => unsafe { rustix::mm::mmap_anonymous(at, bytes, prot, flags) }.map(drop),
        }
    }
}

#[cfg(test)]
mod tests;
