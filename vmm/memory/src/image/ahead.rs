//! Copies of pages that were made while the guest ran. Each is good as long as the page holds the
//! same.

use super::super::page::to_usize;
use super::super::slab::Slab;
use super::super::{PAGE_BYTES, PageRange, PageSet, SlabPage};
use super::run::{ImageRun, PIECE_PAGES, Taken, is_zero};

/// The copies; none, if nothing was copied ahead.
#[derive(Debug, Default)]
pub struct Ahead {
    /// By page, ascending; what is in none was zeros.
    all: Vec<ImageRun>,
    /// Those of them that are copies.
    runs: Vec<ImageRun>,
    /// The slabs they are in, by number, ascending.
    slabs: Vec<(u32, Slab)>,
}

impl Ahead {
    /// Of what was taken, those `runs`, the copies are in `slabs`.
    pub(super) fn new(all: Vec<ImageRun>, mut slabs: Vec<(u32, Slab)>) -> Self {
        slabs.sort_unstable_by_key(|(number, _)| *number);
        // With entries in the page table: they are compared while the guest is paused.
        for (_, slab) in &slabs {
            let bytes = slab.bytes(SlabPage(0), slab.pages()).unwrap_or_default();
            bytes
                .iter()
                .step_by(to_usize(PIECE_PAGES * PAGE_BYTES))
                .for_each(|byte| _ = std::hint::black_box(*byte));
        }
        let mut ahead = Self { all, runs: Vec::new(), slabs };
        ahead.runs = ahead.all.iter().filter(|run| ahead.slab(run.slab).is_some()).copied().collect();
        ahead
    }

    /// Adds what was taken of pages that are not `written` since, to what was taken of those.
    pub(super) fn add_unwritten(&self, taken: &mut Taken, written: &PageSet) {
        for run in &self.all {
            let whole = PageRange::between(run.page, run.page + run.pages);
            for (part, _) in written.runs(whole).filter(|(_, is_written)| !is_written) {
                let slab_page = run.slab_page + (part.first() - run.page);
                let (page, pages) = (part.first(), part.pages());
                taken.runs.push(ImageRun { page, pages, slab: run.slab, slab_page });
                *(if self.slab(run.slab).is_some() { &mut taken.ahead } else { &mut taken.referenced }) +=
                    pages;
            }
        }
        taken.runs.sort_unstable_by_key(|run| run.page);
    }

    fn slab(&self, number: u32) -> Option<&Slab> {
        let at = self.slabs.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        Some(&self.slabs[at].1)
    }

    /// Where a copy of all of `pages` is that holds `bytes`: the number of its slab, and the first
    /// page there.
    pub(super) fn place(&self, pages: PageRange, bytes: &[u8]) -> Option<(u32, SlabPage)> {
        let behind = self.runs.partition_point(|run| run.page <= pages.first());
        let run = self.runs.get(behind.checked_sub(1)?)?;
        let offset = pages.first() - run.page;
        if offset + pages.pages() > run.pages {
            return None;
        }
        let slab_page = run.slab_page + offset;
        (self.slab(run.slab)?.bytes(slab_page, pages.pages())? == bytes).then_some((run.slab, slab_page))
    }

    /// Whether `pages` pages of slab `number` from `page` on are zeros; of no pages that is so.
    pub(super) fn has_zeros(&self, number: u32, page: SlabPage, pages: u64) -> bool {
        let bytes = self.slab(number).and_then(|slab| slab.bytes(page, pages));
        bytes.is_some_and(|bytes| bytes.as_chunks().0.iter().all(is_zero))
    }
}
