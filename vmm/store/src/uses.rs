//! Which pages of packs checkpoints use.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::pack::MAX_PACK_PAGES;

/// Pages of a pack.
#[derive(Clone, Default)]
pub struct PackPages(Vec<u64>);

impl PackPages {
    /// Adds one. False if it is there.
    pub fn insert(&mut self, page: u32) -> bool {
        let (word, bit) = (page as usize / 64, 1 << (page % 64));
        if page >= MAX_PACK_PAGES {
            return false;
        }
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }

    pub fn has(&self, page: u32) -> bool {
        self.0.get(page as usize / 64).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        (0..self.0.len() as u32 * 64).filter(|page| self.has(*page))
    }
}

/// Pages by pack.
#[derive(Clone, Default)]
pub struct Uses(pub BTreeMap<u64, PackPages>);

impl Uses {
    /// Those of a checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let mut uses = Self::default();
        uses.add(checkpoint);
        uses
    }

    /// Adds those of a checkpoint.
    pub fn add(&mut self, checkpoint: &Checkpoint) {
        for run in checkpoint.slabs.iter().flat_map(|slab| &slab.runs) {
            let pages = self.0.entry(run.place.pack).or_default();
            (run.place.page..run.place.page + run.pages).for_each(|page| _ = pages.insert(page));
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        self.0.iter().flat_map(|(pack, pages)| pages.iter().map(|page| (*pack, page)))
    }

    pub fn has(&self, pack: u64, page: u32) -> bool {
        self.0.get(&pack).is_some_and(|pages| pages.has(page))
    }
}
