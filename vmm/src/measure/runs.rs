//! Runs of cross duplicates: how much of what guests share lies in long stretches.
//!
//! Merging costs by run more than by page, so this says what it will cost.

use serde::{Deserialize, Serialize};

/// Runs of cross duplicates: neighbours in their guest whose first holders are neighbours in theirs.
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
        if pages == 0 {
            return;
        }
        self.runs += 1;
        self.pages_in_8 += if pages >= 8 { pages } else { 0 };
        self.pages_in_64 += if pages >= 64 { pages } else { 0 };
        self.longest = self.longest.max(pages);
    }
}

/// Follows runs page by page.
#[derive(Debug, Default)]
pub(super) struct RunFollower {
    /// The runs that have ended.
    pub(super) found: Runs,
    /// The last page of the run being followed, and its holder.
    last: Option<(u32, (u16, u32))>,
    pages: u64,
}

impl RunFollower {
    /// The next page of the guest; `holder` is the guest and page that had its content first, if that is
    /// another guest.
    pub(super) fn step(&mut self, page: u32, holder: Option<(u16, u32)>) {
        let Some((guest, held)) = holder else {
            return self.end();
        };
        let continues = self.last.is_some_and(|(last, (last_guest, last_held))| {
            last.checked_add(1) == Some(page) && last_guest == guest && last_held.checked_add(1) == Some(held)
        });
        if !continues {
            self.end();
        }
        self.last = Some((page, (guest, held)));
        self.pages += 1;
    }

    /// Ends the run, as at the end of a guest.
    pub(super) fn end(&mut self) {
        self.found.add(self.pages);
        self.last = None;
        self.pages = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_where_either_side_jumps() {
        let mut runs = RunFollower::default();
        (0..9).for_each(|page| runs.step(page, Some((0, page + 100))));
        // The guest jumps, then the holder, then the holder's guest; then a page of its own.
        runs.step(20, Some((0, 109)));
        runs.step(21, Some((0, 200)));
        runs.step(22, Some((1, 201)));
        runs.step(23, None);
        runs.step(24, Some((1, 202)));
        runs.end();
        assert_eq!(runs.found, Runs { runs: 5, pages_in_8: 9, pages_in_64: 0, longest: 9 });
    }
}
