//! Runs of cross duplicates: how many shared pages lie in long stretches.
//!
//! Merging costs by run more than by page, so this says what it will cost.

use serde::{Deserialize, Serialize};

/// Runs of cross duplicates: neighbours in their guest whose first holders are neighbours in
/// theirs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    /// Number of runs, of any length.
    pub runs: u64,
    /// Pages in runs of 8 pages or more.
    pub pages_in_8: u64,
    /// Pages in runs of 64 pages or more.
    pub pages_in_64: u64,
    /// Pages of the longest run.
    pub longest: u64,
}

impl Runs {
    /// Adds those of other guests.
    pub(super) fn join(&mut self, other: &Self) {
        self.runs += other.runs;
        self.pages_in_8 += other.pages_in_8;
        self.pages_in_64 += other.pages_in_64;
        self.longest = self.longest.max(other.longest);
    }

    fn add(&mut self, pages: u64) {
        self.runs += 1;
        self.pages_in_8 += if pages >= 8 { pages } else { 0 };
        self.pages_in_64 += if pages >= 64 { pages } else { 0 };
        self.longest = self.longest.max(pages);
    }
}

/// Runs of N pages up to 2 N - 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunLengths {
    /// Pages of the shortest of these runs: a power of two.
    pub from_pages: u64,
    /// How many there are.
    pub runs: u64,
    /// Pages in them.
    pub pages: u64,
}

/// Follows runs page by page.
#[derive(Debug, Default)]
pub(super) struct RunFollower {
    /// The runs that have ended.
    pub(super) found: Runs,
    /// The same by their lengths' binary logarithm.
    lengths: Vec<RunLengths>,
    /// The last page of the run being followed, and its holder.
    last: Option<(u32, u32)>,
    pages: u64,
}

impl RunFollower {
    /// The next page; `holder` is the page that had its content first, if that is another guest's.
    /// Pages of different extents are never neighbours.
    pub(super) fn step(&mut self, page: u32, holder: Option<u32>) {
        let Some(held) = holder else {
            return self.end();
        };
        let continues = self.last.is_some_and(|(last, last_held)| {
            last.checked_add(1) == Some(page) && last_held.checked_add(1) == Some(held)
        });
        if !continues {
            self.end();
        }
        self.last = Some((page, held));
        self.pages += 1;
    }

    /// Ends the run, as at the end of all pages.
    pub(super) fn end(&mut self) {
        self.last = None;
        let pages = std::mem::take(&mut self.pages);
        if pages == 0 {
            return;
        }
        self.found.add(pages);
        let class = pages.ilog2() as usize;
        while self.lengths.len() <= class {
            let from_pages = 1 << self.lengths.len();
            self.lengths.push(RunLengths { from_pages, ..RunLengths::default() });
        }
        self.lengths[class].runs += 1;
        self.lengths[class].pages += pages;
    }

    /// The runs, and the same by length.
    pub(super) fn finish(mut self) -> (Runs, Vec<RunLengths>) {
        self.end();
        (self.found, self.lengths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_where_either_side_jumps() {
        let mut runs = RunFollower::default();
        (0..9).for_each(|page| runs.step(page, Some(page + 100)));
        // The guest jumps, then the holder, then the holder again; then a page of its own.
        runs.step(20, Some(109));
        runs.step(21, Some(200));
        runs.step(22, Some(301));
        runs.step(23, None);
        runs.step(24, Some(302));
        let (found, lengths) = runs.finish();
        assert_eq!(found, Runs { runs: 5, pages_in_8: 9, pages_in_64: 0, longest: 9 });
        let by_length: Vec<_> = lengths.iter().map(|l| (l.from_pages, l.runs, l.pages)).collect();
        assert_eq!(by_length, [(1, 4, 4), (2, 0, 0), (4, 0, 0), (8, 1, 9)]);
    }
}
