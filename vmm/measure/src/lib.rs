//! Measuring memory from outside: what could be shared, which pages map which frame, and the
//! reports of both.
//!
//! It works on any process whose guest memory is known, and on files. It must not stop or change
//! what it measures, unless asked to ([`freeze`]): reading by pinning would undo what KSM has
//! shared. The numbers of a running guest are those of a moment that lasts as long as the reading.
//!
//! Begin with [`scan`] (every page read once, known by its tag from then on), then [`frames`] (each
//! page in one class by its frame), [`source`] (what can be read, and which memory of a process is
//! a guest's) and [`report`]. `resources/docs/internals/measuring.md` says why tags suffice.

pub mod audit;
pub mod beyond;
pub mod by_kind;
pub mod content;
mod delta;
mod error;
pub mod findings;
pub mod frames;
pub mod freeze;
pub mod html;
mod index;
mod layout;
mod marks;
mod options;
mod ordered_queue;
pub mod page_types;
mod reducer;
pub mod report;
pub mod rolling;
pub mod runs;
pub mod sample;
pub mod scan;
mod sets;
mod slab_runs;
pub mod source;
pub mod tag;
pub mod volatile;
mod walks;
pub mod watch;

use serde::{Deserialize, Serialize};

pub use error::MeasureError;
pub use index::MAX_SPACES;
use kernel_view::pagemap::{Pagemap, PagemapEntry};
pub use memory::Extent;
use memory::{Hva, PAGE_BYTES};

/// Bytes of a page, for arrays.
pub const PAGE: usize = PAGE_BYTES as usize;

/// The guest memory of one VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// The guest's name, for reports and errors.
    pub name: String,
    /// The process that maps the guest's memory.
    pub pid: u32,
    /// Where it maps it. Extents do not overlap.
    pub extents: Vec<Extent>,
}

impl Space {
    /// The pages of all extents.
    pub fn pages(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes / PAGE_BYTES).sum()
    }

    /// Hands out every page, in the order of the extents: its address and its page table entry.
    ///
    /// # Errors
    /// The process is gone, or may not be read.
    pub fn each_entry(&self, mut each: impl FnMut(Hva, PagemapEntry)) -> Result<(), MeasureError> {
        let walked = Pagemap::open(self.pid).and_then(|mut pagemap| {
            pagemap.each(self.extents.iter().map(Extent::hvas), |hva, entry| {
                each(hva, entry);
                Ok(())
            })
        });
        walked.map_err(|source| MeasureError::Pages { guest: self.name.clone(), pid: self.pid, source })
    }
}

/// Refuses what the counters below could not represent.
fn check(spaces: &[Space]) -> Result<(), MeasureError> {
    if spaces.len() > MAX_SPACES {
        return Err(MeasureError::TooMany { guests: spaces.len() });
    }
    for space in spaces {
        for extent in &space.extents {
            if !extent.hva.is_page() || extent.bytes % PAGE_BYTES != 0 {
                let (hva, bytes) = (extent.hva, extent.bytes);
                return Err(MeasureError::Unaligned { guest: space.name.clone(), hva, bytes });
            }
        }
        let pages =
            space.extents.iter().fold(0u64, |sum, extent| sum.saturating_add(extent.bytes / PAGE_BYTES));
        // One number is left free after each extent, so that no run crosses into the next.
        if pages.saturating_add(space.extents.len() as u64) > u64::from(u32::MAX) {
            return Err(MeasureError::TooLarge { guest: space.name.clone(), pages });
        }
    }
    Ok(())
}
