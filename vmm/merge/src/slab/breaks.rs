//! Which merges did not last: pages that the guest wrote to soon after they had been merged, or
//! given back as zeros.

use std::time::Duration;

use memory::{PageNo, PageRange, PageSet};

/// A merge that is broken in the period in which it was made, or in the next one, was broken soon:
/// within 5 to 10 s. What merging costs agent and guest, some 60 us a page, then is more than the
/// frame was worth for that time.
const PERIOD: Duration = Duration::from_secs(5);

/// See the module's description.
///
/// *Memory:* 4 bits for each page.
pub struct Breaks {
    /// Pages merged in this period, and in the one before.
    fresh: [PageSet; 2],
    period: u64,
    /// Those that were broken since this was asked last: soon, and later.
    soon: PageSet,
    late: PageSet,
}

impl Breaks {
    /// Nothing of `pages` pages has been merged yet.
    pub fn new(pages: u64) -> Self {
        let none = || PageSet::none(pages);
        Self { fresh: [none(), none()], period: 0, soon: none(), late: none() }
    }

    /// It is so late by any clock that never goes back. Whether a period has ended: then it may be
    /// asked what has [`Self::lasted`].
    pub fn tick(&mut self, now: Duration) -> bool {
        let period = now.as_secs() / PERIOD.as_secs();
        let ended = period.saturating_sub(self.period);
        for _ in 0..ended.min(2) {
            self.fresh.swap(0, 1);
            self.fresh[0].clear();
        }
        self.period = period.max(self.period);
        ended > 0
    }

    /// The page has been merged.
    pub fn merged(&mut self, page: PageNo) {
        self.fresh[0].insert(page);
    }

    /// All of these have been given back as zeros.
    pub fn dropped(&mut self, pages: PageRange) {
        self.fresh[0].insert_range(pages);
    }

    /// The guest has written to these of the pages of word `n`, of which `shared` were merged.
    /// Returns which were broken soon.
    pub fn written(&mut self, n: usize, written: u64, shared: u64) -> u64 {
        let mut soon = 0;
        for fresh in &mut self.fresh {
            if let Some(fresh) = fresh.words_mut().get_mut(n) {
                soon |= *fresh & written;
                *fresh &= !written;
            }
        }
        if let (Some(to_soon), Some(to_late)) =
            (self.soon.words_mut().get_mut(n), self.late.words_mut().get_mut(n))
        {
            *to_soon |= soon;
            *to_late |= shared & written & !soon;
        }
        soon
    }

    /// The guest has written to a page that was merged. Whether it was broken soon.
    pub fn written_one(&mut self, page: PageNo) -> bool {
        let soon = self.fresh.iter().any(|fresh| fresh.has(page));
        self.fresh.iter_mut().for_each(|fresh| fresh.remove(page));
        let broken = if soon { &mut self.soon } else { &mut self.late };
        broken.insert(page);
        soon
    }

    /// The pages that were broken soon, and later, since [`Self::forget`].
    pub fn broken(&self) -> (&PageSet, &PageSet) {
        (&self.soon, &self.late)
    }

    /// What was broken is known.
    pub fn forget(&mut self) {
        self.soon.clear();
        self.late.clear();
    }

    /// Of the pages of word `n` that are merged (`shared`), those for which that has lasted.
    pub fn lasted(&self, n: usize, shared: u64) -> u64 {
        self.fresh
            .iter()
            .filter_map(|fresh| fresh.words().get(n))
            .fold(shared, |lasted, fresh| lasted & !fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soon_is_within_two_periods() {
        let mut breaks = Breaks::new(128);
        for page in [3, 4, 70] {
            breaks.merged(PageNo(page));
        }
        assert!(!breaks.tick(PERIOD - Duration::from_millis(1)) && breaks.tick(PERIOD));
        assert_eq!(breaks.written(0, 1 << 3 | 1 << 9, 1 << 3 | 1 << 4), 1 << 3, "page 9 was not merged");
        assert_eq!(breaks.written(0, 1 << 3, 0), 0, "it is counted once");
        assert_eq!((breaks.lasted(0, 1 << 4), breaks.lasted(1, 1 << 6)), (0, 0));
        assert!(breaks.tick(PERIOD * 2));
        assert_eq!((breaks.lasted(0, 1 << 4), breaks.lasted(1, 1 << 6)), (1 << 4, 1 << 6));
        assert_eq!(breaks.written(0, 1 << 4, 1 << 4), 0);
        let words = |breaks: &Breaks| {
            let (soon, late) = breaks.broken();
            [soon, late].map(|set| set.words().to_vec())
        };
        assert_eq!(words(&breaks), [[1 << 3, 0], [1 << 4, 0]]);
        breaks.forget();
        assert_eq!(words(&breaks), [[0, 0], [0, 0]]);
        // However long ago the last look was.
        breaks.merged(PageNo(5));
        assert!(breaks.tick(PERIOD * 1000));
        assert_eq!(breaks.written(0, 1 << 5, 1 << 5), 0);
        // Nor do pages that are not there do any harm.
        breaks.merged(PageNo(9999));
        assert_eq!(breaks.written(9999, 1, 1), 0);
    }
}
