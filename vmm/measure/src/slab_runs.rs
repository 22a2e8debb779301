//! Pages of slabs that guests map, and how many guests' pages each is.

use std::collections::HashMap;

/// Pages of a slab that a guest has mapped and not written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlabRun {
    pub(super) inode: u64,
    /// The first of them in the slab.
    pub(super) first: u64,
    pub(super) pages: u64,
    /// The guest that maps them.
    pub(super) guest: usize,
}

/// How many guests' pages each page of each slab is.
#[derive(Default)]
pub(super) struct SlabCounts(HashMap<u64, Vec<u32>>);

impl SlabCounts {
    pub(super) fn of(runs: &[SlabRun]) -> Self {
        let mut counts = Self::default();
        runs.iter().for_each(|run| counts.add(run));
        counts
    }

    pub(super) fn add(&mut self, run: &SlabRun) {
        let pages = self.0.entry(run.inode).or_default();
        let end = (run.first + run.pages) as usize;
        if pages.len() < end {
            pages.resize(end, 0);
        }
        pages[run.first as usize..end].iter_mut().for_each(|count| *count += 1);
    }

    /// Those of a run.
    pub(super) fn within(&self, run: &SlabRun) -> &[u32] {
        let pages = self.0.get(&run.inode).map_or(&[][..], Vec::as_slice);
        pages.get(run.first as usize..(run.first + run.pages) as usize).unwrap_or_default()
    }

    /// The counts of all pages that at least one guest maps.
    pub(super) fn all(&self) -> impl Iterator<Item = u32> {
        self.0.values().flatten().copied().filter(|count| *count > 0)
    }
}
