//! The memory that is measured.

use kernel_view::pagemap::{Pagemap, PagemapEntry};
use memory::{Extent, Hva, PAGE_BYTES};
use serde::{Deserialize, Serialize};

use super::error::MeasureError;
use super::limits::MAX_SPACES;

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
pub(crate) fn check(spaces: &[Space]) -> Result<(), MeasureError> {
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
