//! How much merging is worth in a domain: less while most of what is merged there is broken again
//! soon.

use std::time::Duration;

/// From one judgement to the next.
const STEP: Duration = Duration::from_secs(1);
/// So few merges tell nothing.
const FEW_PAGES: u64 = 512;
/// What a guest may have watched a second at the first level; half as much at each further one.
const FIRST_PAGES: u64 = 1 << 14;
/// The last level: 512 pages, 2 MiB, a second. It is never nothing, for only by merging does it
/// show that merges last again.
const MAX_LEVEL: u32 = 6;

/// See the module's description.
///
/// Once a second it is looked at the merges of the last seconds, each of which counts for half of
/// the one after it. If more than half as many were broken soon, merging becomes a level slower;
/// with less than a quarter, or next to no merges, a level faster. So it is at its slowest after 6
/// s of nothing but breaks, and at full speed again within 20 s of the last of them.
#[derive(Debug, Default)]
pub struct Credit {
    level: u32,
    judged: Option<Duration>,
    merged: u64,
    broken: u64,
}

impl Credit {
    /// Counts pages that were merged, and pages that were broken soon.
    pub fn add(&mut self, merged: u64, broken: u64) {
        self.merged = self.merged.saturating_add(merged);
        self.broken = self.broken.saturating_add(broken);
    }

    /// Judges, if it is time, by any clock that never goes back. Whether that has changed
    /// [`Self::watch_pages`].
    pub fn judge(&mut self, now: Duration) -> bool {
        let judged = *self.judged.get_or_insert(now);
        if now.saturating_sub(judged) < STEP {
            return false;
        }
        self.judged = Some(now);
        let (before, few) = (self.level, self.merged.max(self.broken) < FEW_PAGES);
        if !few && self.broken > self.merged / 2 {
            self.level = (before + 1).min(MAX_LEVEL);
        } else if few || self.broken < self.merged / 4 {
            self.level = before.saturating_sub(1);
        }
        (self.merged, self.broken) = (self.merged / 2, self.broken / 2);
        self.level != before
    }

    /// Pages that each guest may have watched a second; 0: as many as there are.
    pub fn watch_pages(&self) -> u64 {
        self.level.checked_sub(1).map_or(0, |halvings| FIRST_PAGES >> halvings)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lets `seconds` pass, in each of which pages are merged and broken.
    fn pass(credit: &mut Credit, now: &mut Duration, seconds: u64, merged: u64, broken: u64) {
        for _ in 0..seconds {
            credit.add(merged, broken);
            *now += STEP;
            credit.judge(*now);
        }
    }

    #[test]
    fn a_storm_slows_merging_and_its_end_ends_that() {
        let (mut credit, mut now) = (Credit::default(), Duration::from_secs(77));
        credit.judge(now);
        pass(&mut credit, &mut now, 5, 30_000, 0);
        assert_eq!(credit.watch_pages(), 0);
        pass(&mut credit, &mut now, 12, 30_000, 29_000);
        assert_eq!(credit.watch_pages(), 512);
        credit.add(1 << 40, 1 << 40);
        assert!(!credit.judge(now + STEP / 2), "not more than once a second");
        let mut credit = Credit { level: MAX_LEVEL, judged: Some(now), merged: 2048, broken: 2048 };
        // As many as it may merge now, and they last.
        pass(&mut credit, &mut now, 6 + 6, 512, 0);
        assert_eq!(credit.watch_pages(), 0);
    }

    proptest! {
        #[test]
        fn it_recovers_from_anything_once_merges_last_or_end(
            past in prop::collection::vec((0u64..1 << 20, 0u64..1 << 20), 0..50),
            merged in 0u64..1 << 16,
        ) {
            let (mut credit, mut now) = (Credit::default(), Duration::ZERO);
            for (merged, broken) in past {
                pass(&mut credit, &mut now, 1, merged, broken);
                prop_assert!(credit.watch_pages() == 0 || (512..=FIRST_PAGES).contains(&credit.watch_pages()));
            }
            pass(&mut credit, &mut now, 20, merged, 0);
            prop_assert_eq!(credit.watch_pages(), 0);
        }
    }
}
