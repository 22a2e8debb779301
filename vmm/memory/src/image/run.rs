//! What an image consists of.

use super::super::{PAGE, PageNo, PageRange, SlabPage};

/// Pages copied at a time.
pub(super) const PIECE_PAGES: u64 = 16;

/// Adjacent pages of guest RAM that are adjacent pages of a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageRun {
    /// The first page of RAM.
    pub page: PageNo,
    /// How many.
    pub pages: u64,
    /// Which of the image's slabs, from 0.
    pub slab: u32,
    /// The first page there.
    pub slab_page: SlabPage,
}

impl ImageRun {
    pub(super) fn range(&self) -> Option<PageRange> {
        PageRange::new(self.page, self.pages).filter(|range| !range.is_empty())
    }
}

/// What was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// By page, ascending.
    pub runs: Vec<ImageRun>,
    /// Pages that were copied, the zeros of bridged gaps among them.
    pub copied: u64,
    /// Pages that hold what was copied ahead.
    pub ahead: u64,
    /// Pages that were referenced where they lie.
    pub referenced: u64,
}

pub(super) fn is_zero(page: &[u8; PAGE]) -> bool {
    page.as_chunks::<8>().0.iter().all(|word| u64::from_ne_bytes(*word) == 0)
}
