//! Page frame numbers as a driver lists them, made into runs of pages.
//!
//! Pure: no memory, no device. A discard costs a system call and a flush of every vCPU's TLB, so
//! what stands together in memory should go together, in whatever order the driver found it.
//! Drivers list pages as their allocator yields them, which is mostly up or down by one; only what
//! is neither is sorted.

use std::ops::Range;

/// Replaces `runs` by the pages that `pfns` names: ascending, apart from each other, each page
/// once.
///
/// The ends are page numbers too, and wider than a PFN because the last page's end does not fit
/// into one.
pub(super) fn coalesce(pfns: impl IntoIterator<Item = u32>, runs: &mut Vec<Range<u64>>) {
    runs.clear();
    let mut pfns = pfns.into_iter().map(u64::from);
    let Some(first) = pfns.next() else { return };

    let (mut ascending, mut descending) = (true, true);
    let mut close = |run: Range<u64>| {
        if let Some(last) = runs.last() {
            ascending &= last.end < run.start;
            descending &= run.end < last.start;
        }
        runs.push(run);
    };
    let mut run = first..first + 1;
    for pfn in pfns {
        if pfn == run.end {
            run.end += 1;
        } else if pfn + 1 == run.start {
            run.start = pfn;
        } else if !run.contains(&pfn) {
            close(std::mem::replace(&mut run, pfn..pfn + 1));
        }
    }
    close(run);

    if ascending {
        return;
    }
    if descending {
        return runs.reverse();
    }
    runs.sort_unstable_by_key(|run| run.start);
    runs.dedup_by(|run, kept| {
        let joins = run.start <= kept.end;
        if joins {
            kept.end = kept.end.max(run.end);
        }
        joins
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn runs(pfns: &[u32]) -> Vec<Range<u64>> {
        // What was there before must not matter.
        let mut runs = vec![7..9, 11..12];
        coalesce(pfns.iter().copied(), &mut runs);
        runs
    }

    fn pages(runs: &[Range<u64>]) -> BTreeSet<u64> {
        runs.iter().cloned().flatten().collect()
    }

    /// The start and the end of each run.
    fn ends(pfns: &[u32]) -> Vec<(u64, u64)> {
        runs(pfns).iter().map(|run| (run.start, run.end)).collect()
    }

    #[test]
    fn up_down_and_repeated() {
        assert_eq!(ends(&[]), []);
        assert_eq!(ends(&[5]), [(5, 6)]);
        assert_eq!(ends(&[5, 6, 7]), [(5, 8)]);
        assert_eq!(ends(&[7, 6, 5]), [(5, 8)]);
        assert_eq!(ends(&[5, 5, 6, 5]), [(5, 7)]);
        assert_eq!(ends(&[1, 2, 8, 9]), [(1, 3), (8, 10)]);
        assert_eq!(ends(&[9, 8, 2, 1]), [(1, 3), (8, 10)]);
        assert_eq!(ends(&[9, 1, 5]), [(1, 2), (5, 6), (9, 10)]);
        assert_eq!(ends(&[u32::MAX, 0]), [(0, 1), (0xffff_ffff, 0x1_0000_0000)]);
    }

    #[test]
    fn runs_that_grow_together_become_one() {
        assert_eq!(ends(&[1, 5, 4, 3, 2]), [(1, 6)]);
        assert_eq!(ends(&[5, 1, 2, 3, 4]), [(1, 6)]);
        assert_eq!(ends(&[1, 5, 4, 3, 2, 1, 0]), [(0, 6)]);
        assert_eq!(ends(&[5, 1, 2, 3, 4, 5, 6]), [(1, 7)]);
    }

    fn pfn() -> impl Strategy<Value = u32> {
        prop_oneof![0u32..64, 0u32..5000, (u32::MAX - 20)..=u32::MAX, any::<u32>()]
    }

    /// What an allocator yields: stretches up or down, here and there.
    fn stretch() -> impl Strategy<Value = Vec<u32>> {
        (0u32..400, 1u32..40, any::<bool>()).prop_map(|(start, len, up)| {
            let range = start..start + len;
            if up { range.collect() } else { range.rev().collect() }
        })
    }

    fn list() -> impl Strategy<Value = Vec<u32>> {
        prop_oneof![
            prop::collection::vec(pfn(), 0..300),
            prop::collection::vec(stretch(), 0..12).prop_map(|stretches| stretches.concat()),
        ]
    }

    proptest! {
        #[test]
        fn the_runs_are_the_set_of_pages(pfns in list()) {
            let runs = runs(&pfns);
            let set: BTreeSet<u64> = pfns.iter().map(|&pfn| u64::from(pfn)).collect();
            prop_assert_eq!(pages(&runs), set);
            prop_assert!(runs.iter().all(|run| !run.is_empty()));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", runs);
        }

        #[test]
        fn the_order_does_not_matter(
            (pfns, shuffled) in list().prop_flat_map(|pfns| (Just(pfns.clone()), Just(pfns).prop_shuffle())),
        ) {
            prop_assert_eq!(runs(&pfns), runs(&shuffled));
        }
    }
}
