//! Which slabs are put together: those of which so little is used that the frames which that gives
//! back are worth it.
//!
//! What is moved costs every guest that uses it one more fault a page, some 30 us. So a slab that
//! goes on losing pages waits until half of it is dead, which costs one page moved for each that
//! comes back; one that has not lost any for a while is cleaned at a sixteenth, once. And what is
//! moved in a second is limited.

use std::collections::HashMap;
use std::time::Duration;

use super::matchmaker::{DRAFT_PAGES, SlabPlace};
use super::wire::Live;

/// Slabs of no more pages are compacted: each is a descriptor in every process.
const SMALL_PAGES: u64 = 256;
/// A slab that has lost no page for this time is not expected to lose more.
const STILL: Duration = Duration::from_secs(4);
/// Of such a slab one page in this many may be dead.
const DEAD_PART: u64 = 16;
/// Pages that putting slabs together must give back, or slabs that it must save: what it costs the
/// guests is worth no less.
const WORTH_PAGES: u64 = 64;
const WORTH_SLABS: usize = 16;
/// Slabs that are filled at a time.
pub const MOST_DRAFTS: usize = 4;
/// Pages that may be moved at once after a rest, and in each second.
const BURST_PAGES: u64 = (MOST_DRAFTS * DRAFT_PAGES) as u64;
const PAGES_A_SECOND: u64 = 512;

/// How much of a slab is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Pages of it that some guest uses, as last counted.
    pub used: u64,
    /// Since when that has been so.
    pub since: Duration,
}

impl Usage {
    /// Sets how many pages are used now.
    pub fn count(&mut self, used: u64, now: Duration) {
        if used != self.used {
            *self = Self { used, since: now };
        }
    }

    /// What is to become of a slab of `pages` pages.
    pub fn judge(self, pages: u64, now: Duration) -> Verdict {
        let dead = pages.saturating_sub(self.used);
        match () {
            () if dead * 2 >= pages || pages <= SMALL_PAGES => Verdict::Clean,
            () if dead * DEAD_PART < pages => Verdict::Leave,
            () if now.saturating_sub(self.since) >= STILL => Verdict::Clean,
            () => Verdict::Wait,
        }
    }
}

/// See [`Usage::judge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is fine.
    Leave,
    /// It is not, but may lose more: it is to be judged again in a while.
    Wait,
    /// It is to be put together with others.
    Clean,
}

/// A slab that is to be put together with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sparse {
    /// Its number.
    pub slab: u32,
    /// Pages of it that are used.
    pub used: u64,
    /// How many it has.
    pub pages: u64,
}

/// Pages that may be moved.
#[derive(Debug)]
pub struct Allowance {
    pages: u64,
    at: Duration,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { pages: BURST_PAGES, at: Duration::ZERO }
    }
}

impl Allowance {
    /// How many there are now.
    pub fn pages(&mut self, now: Duration) -> u64 {
        let more = (now.saturating_sub(self.at).as_secs_f64() * PAGES_A_SECOND as f64) as u64;
        if more > 0 {
            self.at = now;
            self.pages = self.pages.saturating_add(more).min(BURST_PAGES);
        }
        self.pages
    }

    /// Takes the pages that are moved.
    pub fn take(&mut self, pages: u64) {
        self.pages = self.pages.saturating_sub(pages);
    }
}

/// What is to be in each of at most `most` new slabs: the pages that are used of those of `sparse`
/// that are worth it, the emptiest first, and no more pages than `allowed`. The pages of a slab are
/// all in the same one.
pub fn together(
    mut sparse: Vec<Sparse>,
    live: &HashMap<u32, Live>,
    (most, allowed): (usize, u64),
) -> Vec<Vec<SlabPlace>> {
    // By the share that is used; equal ones by number, so that neighbours stay neighbours.
    sparse.sort_unstable_by_key(|s| (s.used * 1024 / s.pages.max(1), s.slab));
    let (mut drafts, mut left) = (Vec::new(), allowed);
    let mut slabs = sparse.as_slice();
    while drafts.len() < most {
        let mut sum = 0;
        let fits = |s: &&Sparse| {
            sum += s.used;
            sum <= left.min(DRAFT_PAGES as u64)
        };
        let (these, rest) = slabs.split_at(slabs.iter().take_while(fits).count());
        let used: u64 = these.iter().map(|s| s.used).sum();
        let freed: u64 = these.iter().map(|s| s.pages - s.used.min(s.pages)).sum();
        let is_worth = freed >= WORTH_PAGES && freed * DEAD_PART >= used || these.len() >= WORTH_SLABS;
        if these.is_empty() {
            break;
        }
        if !is_worth {
            // It may be for the next one, which did not fit.
            slabs = &slabs[1..];
            continue;
        }
        let pages_of = |s: &Sparse| {
            let used = live.get(&s.slab).into_iter().flat_map(|set| set.iter());
            used.map(|page| SlabPlace { slab: s.slab, page }).collect::<Vec<_>>()
        };
        drafts.push(these.iter().flat_map(pages_of).collect());
        left -= used.min(left);
        slabs = rest;
    }
    drafts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use memory::SlabPage;

    fn live(pages: std::ops::Range<u64>) -> Live {
        let mut set = Live::none(DRAFT_PAGES as u64);
        pages.for_each(|page| set.insert(SlabPage(page as u32)));
        set
    }

    fn sparse(slab: u32, used: u64, pages: u64) -> Sparse {
        Sparse { slab, used, pages }
    }

    const ALL: (usize, u64) = (MOST_DRAFTS, u64::MAX);

    #[test]
    fn only_what_is_worth_it_is_put_together() {
        let sets = HashMap::from([(1, live(0..10)), (2, live(5..100)), (3, live(0..2000))]);
        let both = together(vec![sparse(1, 10, 2048), sparse(2, 95, 300)], &sets, ALL);
        assert_eq!((both.len(), both[0].len()), (1, 105));
        let (first, last) =
            (SlabPlace { slab: 1, page: SlabPage(0) }, SlabPlace { slab: 2, page: SlabPage(99) });
        assert_eq!((both[0][0], both[0][104]), (first, last));
        assert!(together(vec![sparse(1, 10, 70)], &sets, ALL).is_empty(), "too little is freed");
        assert!(together(vec![sparse(3, 2000, 2048)], &sets, ALL).is_empty(), "too much is moved for it");
        let lengths =
            |sparse, limits| -> Vec<usize> { together(sparse, &sets, limits).iter().map(Vec::len).collect() };
        assert_eq!(lengths(vec![sparse(1, 10, 2048), sparse(3, 2000, 2048)], ALL), [2010]);
        assert_eq!(lengths(vec![sparse(2, 95, 2048), sparse(3, 2000, 2148)], ALL), [95, 2000]);
        assert_eq!(lengths(vec![sparse(2, 95, 2048), sparse(3, 2000, 2148)], (1, u64::MAX)), [95]);
        assert_eq!(lengths(vec![sparse(2, 95, 2048), sparse(3, 2000, 2148)], (4, 2000)), [95]);
        let small = (0..16).map(|slab| sparse(slab, 1, 1)).collect();
        let sets = (0..16).map(|slab| (slab, live(0..1))).collect();
        assert_eq!(together(small, &sets, ALL)[0].len(), 16);
    }

    #[test]
    fn a_slab_that_loses_pages_waits_and_one_that_does_not_is_cleaned() {
        let second = Duration::from_secs(1);
        let mut usage = Usage::default();
        for n in 0..20 {
            usage.count(2048 - n * 40, second * n as u32);
            let verdict = if n * 40 * 16 < 2048 { Verdict::Leave } else { Verdict::Wait };
            assert_eq!(usage.judge(2048, second * n as u32), verdict, "{n}");
        }
        assert_eq!(usage.judge(2048, second * 22), Verdict::Wait);
        assert_eq!(usage.judge(2048, second * 23), Verdict::Clean);
        usage.count(1024, second * 23);
        assert_eq!(usage.judge(2048, second * 23), Verdict::Clean, "half of it is dead");
        usage.count(256, second * 24);
        assert_eq!(usage.judge(256, second * 24), Verdict::Clean, "it is small");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Slabs that lose pages at random for a minute, and are put together as soon as they may.
        #[test]
        fn little_is_dead_in_the_end_and_little_was_moved_for_it(
            slabs in 1u32..24,
            deaths in prop::collection::vec((0u32..24, 0u64..400), 0..60),
        ) {
            let mut all: HashMap<u32, (Usage, u64)> =
                (0..slabs).map(|n| (n, (Usage { used: 2048, since: Duration::ZERO }, 2048))).collect();
            const SECONDS: u64 = 180;
            let (mut next, mut allowance, mut moved) = (slabs, Allowance::default(), 0u64);
            for second in 0..SECONDS {
                let now = Duration::from_secs(second);
                if let Some((slab, died)) = deaths.get(second as usize)
                    && let Some((usage, _)) = all.get_mut(slab)
                {
                    usage.count(usage.used.saturating_sub(*died), now);
                }
                all.retain(|_, (usage, _)| usage.used > 0);
                let clean = all.iter().filter(|(_, (usage, pages))| usage.judge(*pages, now) == Verdict::Clean);
                let sparse: Vec<_> =
                    clean.map(|(slab, (usage, pages))| sparse(*slab, usage.used, *pages)).collect();
                let sets = all.iter().map(|(slab, (usage, _))| (*slab, live(0..usage.used))).collect();
                for draft in together(sparse, &sets, (MOST_DRAFTS, allowance.pages(now))) {
                    prop_assert!((1..=DRAFT_PAGES).contains(&draft.len()));
                    let used = draft.len() as u64;
                    for page in draft {
                        all.remove(&page.slab);
                    }
                    all.insert(next, (Usage { used, since: now }, used));
                    (next, moved) = (next + 1, moved + used);
                    allowance.take(used);
                }
            }
            prop_assert!(moved <= BURST_PAGES + SECONDS * PAGES_A_SECOND);
            let died: u64 = deaths.iter().map(|(_, died)| died).sum();
            // At most `DEAD_PART` are moved for each that is given back; and small slabs, a few at
            // a time.
            prop_assert!(moved <= died * DEAD_PART + SECONDS * SMALL_PAGES, "{moved} for {died}");
            let dead: u64 = all.values().map(|(usage, pages)| pages - usage.used).sum();
            let pages: u64 = all.values().map(|(_, pages)| pages).sum();
            // What is worth it: a sixteenth of each, or less than that of the last few.
            prop_assert!(dead * DEAD_PART <= pages + DEAD_PART * WORTH_PAGES * 2, "{dead} of {pages}");
        }
    }
}
