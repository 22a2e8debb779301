//! A pointer chase: reads of which each needs what the one before has read, so that the processor
//! can neither begin one early nor guess where it goes. What a read takes is then the caches' and
//! the TLB's.
//!
//! The order is that of a linear congruential generator with the full period of a power of two:
//! every node once, far from its neighbours. It needs no pointers in memory: pages that others
//! share stay so.

use core::hint::black_box;
use core::ops::Range;

use crate::protocol::{Chase, Chased};
use crate::tsc;
use crate::workload::{Pages, Workload};

/// Reads in a batch; also what is done before the caller may look at its input again. Where each
/// faults, that is some 100 ms.
const BATCH: u64 = 4096;
/// Batches that are timed, after every node has been read once.
const BATCHES: usize = 32;
/// Words of a line, and lines of a page.
const LINE_WORDS: u64 = 8;
const PAGE_LINES: u64 = 64;

/// 1 more than a multiple of 4, as the full period takes (Knuth, The Art of Computer Programming, 3.2.1.2).
const MULTIPLIER: u64 = 0x5851_f42d_4c95_7f2d;
/// Odd.
const INCREMENT: u64 = 0x1405_7b7e_f767_814f;

/// A chase on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chasing {
    first_page: u64,
    /// One less than their number, a power of two.
    mask: u64,
    packed: bool,
    at: u64,
    /// Reads until every node was read once.
    cold: u64,
    timed: usize,
    ticks: [u32; BATCHES],
}

impl Chasing {
    /// None if `held` has too few pages.
    pub(super) fn new(chase: Chase, held: &Range<u64>) -> Option<Self> {
        let pages = if chase.packed { chase.nodes.div_ceil(PAGE_LINES) } else { chase.nodes };
        (pages <= held.end - held.start).then_some(Self {
            first_page: held.start,
            mask: chase.nodes.wrapping_sub(1),
            packed: chase.packed,
            at: 0,
            cold: chase.nodes,
            timed: 0,
            ticks: [0; BATCHES],
        })
    }

    /// Does a batch. The result, after the last.
    pub(super) fn step<P: Pages>(&mut self, workload: &mut Workload<'_, P>) -> Option<Chased> {
        let began = tsc::fenced();
        self.read(workload);
        let took = tsc::fenced().saturating_sub(began);
        if self.cold > 0 {
            self.cold = self.cold.saturating_sub(BATCH);
            return None;
        }
        if let Some(ticks) = self.ticks.get_mut(self.timed) {
            *ticks = u32::try_from(took).unwrap_or(u32::MAX);
            self.timed += 1;
        }
        (self.timed == BATCHES).then(|| {
            self.ticks.sort_unstable();
            Chased {
                accesses: BATCH,
                batches: BATCHES as u64,
                best_ticks: self.ticks[0].into(),
                median_ticks: self.ticks[BATCHES / 2].into(),
            }
        })
    }

    /// Batches done, and all of them.
    pub(super) fn progress(&self) -> (u64, u64) {
        let cold = (self.mask / BATCH + 1) - self.cold.div_ceil(BATCH);
        (cold + self.timed as u64, self.mask / BATCH + 1 + BATCHES as u64)
    }

    fn read<P: Pages>(&mut self, workload: &mut Workload<'_, P>) {
        // Not known to the compiler: so the next address takes the value that was read.
        let nothing = black_box(0);
        let mut at = self.at;
        for _ in 0..BATCH {
            let (page, line) = match self.packed {
                true => (at / PAGE_LINES, at % PAGE_LINES),
                // Another line in each page, or all of them would be in a few sets of the caches.
                false => (at, at % PAGE_LINES),
            };
            let value = workload.read_word(self.first_page + page, (line * LINE_WORDS) as usize);
            at = (at.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT) ^ (value & nothing)) & self.mask;
        }
        self.at = at;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Class, Fill, Mix};
    use crate::workload::tests::TestPages;
    use std::collections::HashSet;

    #[test]
    fn every_node_is_read_before_one_is_read_again() {
        for power in 0..12 {
            let (mask, mut at, mut seen) = ((1 << power) - 1_u64, 0_u64, HashSet::new());
            while seen.insert(at) {
                at = at.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT) & mask;
            }
            assert_eq!((seen.len() as u64, at), (mask + 1, 0));
        }
    }

    #[test]
    fn it_reads_held_pages_and_changes_none() {
        let mut generations = [0; 200];
        let mut workload = Workload::new(TestPages::new(200), &mut generations);
        let mix = Mix::new(0, 50, 0, 50).unwrap();
        assert!(workload.begin_fill(Fill { seed: 1, common: 2, mix, pages: None }));
        workload.fill_step(200);
        let held = workload.held_range(Class::Unique);
        assert_eq!(held, 100..200);
        let chase = |nodes, packed| Chase { class: Class::Unique, nodes, packed };
        assert!(Chasing::new(chase(128, false), &held).is_none());
        for chase in [chase(64, false), chase(4096, true)] {
            let mut chasing = Chasing::new(chase, &held).unwrap();
            let mut steps = 0;
            let chased = loop {
                steps += 1;
                if let Some(chased) = chasing.step(&mut workload) {
                    break chased;
                }
            };
            assert_eq!((steps, chased.batches), (33, 32));
            assert!(chased.best_ticks > 0 && chased.median_ticks >= chased.best_ticks, "{chased:?}");
            assert_eq!(chasing.progress(), (33, 33));
        }
        assert_eq!(workload.report().generations, 0);
    }
}
