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
pub mod findings;
pub mod frames;
pub mod freeze;
pub mod html;
mod index;
mod layout;
mod marks;
mod ordered_queue;
pub mod page_types;
mod reducer;
pub mod report;
pub mod rolling;
pub mod runs;
pub mod sample;
pub mod scan;
mod sets;
pub mod source;
pub mod tag;
pub mod volatile;
mod walks;
pub mod watch;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use kernel_view::pagemap::{Pagemap, PagemapEntry, PagemapError};
pub use memory::Extent;
use memory::remote::RemoteError;
use memory::{Hva, PAGE_BYTES};
use page_types::PageTypesError;
use source::file::ImageError;
use source::mappings::MappingError;

/// Bytes of a page, for arrays.
pub const PAGE: usize = PAGE_BYTES as usize;

/// Guests that one measurement takes: their number is packed into 16 bits of an index entry.
pub const MAX_SPACES: usize = 1 << 16;

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

/// Errors of measuring.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The page table of a guest could not be read.
    #[error("cannot see the pages of guest {guest:?} (pid {pid})")]
    Pages {
        guest: String,
        pid: u32,
        #[source]
        source: PagemapError,
    },
    /// The memory of a guest could not be read.
    #[error("cannot read the memory of guest {guest:?} (pid {pid})")]
    Memory {
        guest: String,
        pid: u32,
        #[source]
        source: RemoteError,
    },
    /// The kernel's books of a process could not be read.
    #[error("cannot read the kernel's counters of guest {guest:?} (/proc/{pid}/smaps)")]
    Books {
        guest: String,
        pid: u32,
        #[source]
        source: std::io::Error,
    },
    /// The host's frame table could not be read.
    #[error("cannot read the host's frame table")]
    FrameTable(#[source] PagemapError),
    /// An extent is not made of whole pages.
    #[error(
        "extent at {hva} of {bytes} bytes of guest {guest:?} is not made of whole pages of {PAGE_BYTES} bytes"
    )]
    Unaligned { guest: String, hva: Hva, bytes: u64 },
    /// A guest has more pages than an index entry can number.
    #[error(
        "with the {pages} pages of guest {guest:?} there are too many: one measurement takes at most {}",
        u32::MAX
    )]
    TooLarge { guest: String, pages: u64 },
    /// A file cannot be measured.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The use of a guest's pages cannot be determined.
    #[error(transparent)]
    PageTypes(#[from] PageTypesError),
    /// There is nothing to measure in a process.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The kernel has no random bytes for a key.
    #[error("cannot draw a key")]
    Random {
        #[source]
        source: std::io::Error,
    },
    /// A thread of the measurement ended by itself: a fault in Samepage.
    #[error("a thread that reads memory has failed; this is a fault in Samepage, please report it")]
    Worker,
    /// The caller asked to stop.
    #[error("interrupted; nothing was changed")]
    Interrupted,
    /// There are more guests than an index entry can number.
    #[error("{guests} guests were given; one measurement takes at most {MAX_SPACES}")]
    TooMany { guests: usize },
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
