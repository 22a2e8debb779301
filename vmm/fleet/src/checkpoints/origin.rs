//! Where the pages of a slab lie in a store.

use std::path::{Path, PathBuf};

use memory::image::ImageRun;
use store::{Run, SlabMap};

/// What is known of a slab that was saved, or read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The store.
    store: PathBuf,
    /// Where its pages are; those that were looked at and are in no run are zeros.
    map: SlabMap,
    looked_at: Spans,
}

/// Pages of a slab: spans of (first, end), apart and in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans(Vec<(u32, u32)>);

impl Spans {
    /// The pages of each of so many slabs that `runs` have.
    pub fn of_slabs(runs: &[ImageRun], slabs: usize) -> Vec<Self> {
        let mut used = vec![Vec::new(); slabs];
        for run in runs {
            let end = u64::from(run.slab_page.0).saturating_add(run.pages);
            if let (Some(spans), Ok(end)) = (used.get_mut(run.slab as usize), u32::try_from(end)) {
                spans.push((run.slab_page.0, end));
            }
        }
        used.into_iter().map(Self::of).collect()
    }

    /// Of these, which may overlap.
    pub fn of(mut spans: Vec<(u32, u32)>) -> Self {
        spans.sort_unstable();
        let mut joined: Vec<(u32, u32)> = Vec::with_capacity(spans.len());
        for (first, end) in spans {
            match joined.last_mut() {
                Some(last) if first <= last.1 => last.1 = last.1.max(end),
                _ => joined.push((first, end)),
            }
        }
        Self(joined)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + Clone {
        self.0.iter().copied()
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.iter().map(|(first, end)| u64::from(end - first)).sum()
    }

    fn has_all(&self, others: &Self) -> bool {
        others.iter().all(|(first, end)| self.iter().any(|own| own.0 <= first && end <= own.1))
    }
}

impl Origin {
    /// Of a slab, of which those pages were looked at.
    pub fn new(store: &Path, map: SlabMap, looked_at: Spans) -> Self {
        Self { store: store.into(), map, looked_at }
    }

    /// The runs in the `wanted` pages, if all of these were looked at, and lie in that store.
    pub fn runs(&self, store: &Path, wanted: &Spans) -> Option<Vec<Run>> {
        if self.store != store || !self.looked_at.has_all(wanted) {
            return None;
        }
        let mut runs = Vec::new();
        // Both are in order.
        let mut spans = wanted.iter().peekable();
        for run in &self.map.runs {
            let run_end = run.page + run.pages;
            while spans.next_if(|span| span.1 <= run.page).is_some() {}
            let mut ahead = spans.clone();
            while let Some((first, end)) = ahead.next_if(|span| span.0 < run_end) {
                let (from, to) = (first.max(run.page), end.min(run_end));
                let place = store::Place { page: run.place.page + (from - run.page), ..run.place };
                runs.push(Run { page: from, pages: to - from, place });
            }
        }
        Some(runs)
    }

    /// Whether the slab has in the `wanted` pages what `map` says.
    pub fn is(&self, store: &Path, map: &SlabMap, wanted: &Spans) -> bool {
        self.map.pages == map.pages && self.runs(store, wanted).is_some_and(|runs| runs == map.runs)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use store::Place;

    use super::*;

    #[test]
    fn spans_are_joined_in_order() {
        let spans = Spans::of(vec![(5, 7), (1, 3), (3, 4), (6, 9), (9, 9)]);
        assert_eq!((spans.iter().collect::<Vec<_>>(), spans.pages()), (vec![(1, 4), (5, 9)], 7));
    }

    proptest! {
        #[test]
        fn runs_are_those_of_the_pages_asked_for(
            present in prop::collection::vec(any::<bool>(), 1..60), looked in prop::collection::vec((0u32..60, 1u32..20), 0..6),
            wanted in prop::collection::vec((0u32..60, 1u32..9), 0..6),
        ) {
            let end = present.len() as u32;
            let spans = |of: &[(u32, u32)]| Spans::of(of.iter().map(|(at, n)| (*at.min(&end), (at + n).min(end))).filter(|(a, b)| a < b).collect());
            let (looked_at, wanted) = (spans(&looked), spans(&wanted));
            let is_in = |spans: &Spans, page: u32| spans.iter().any(|(first, end)| (first..end).contains(&page));
            let place = |page: u32| Place { pack: u64::from(page / 16), page: page + 100 };
            let mut map = SlabMap { pages: end, runs: Vec::new() };
            for page in (0..end).filter(|page| present[*page as usize] && is_in(&looked_at, *page)) {
                map.push(Run { page, pages: 1, place: place(page) });
            }
            let origin = Origin::new(Path::new("/s"), map, looked_at.clone());
            prop_assert_eq!(origin.runs(Path::new("/t"), &wanted), None);
            let all = (0..end).filter(|page| is_in(&wanted, *page)).all(|page| is_in(&looked_at, page));
            match origin.runs(Path::new("/s"), &wanted) {
                Some(runs) => {
                    prop_assert!(all);
                    let found: Vec<(u32, Place)> = runs.iter().flat_map(|run| (0..run.pages).map(|n| {
                        (run.page + n, Place { page: run.place.page + n, ..run.place })
                    })).collect();
                    let expected: Vec<(u32, Place)> = (0..end)
                        .filter(|page| present[*page as usize] && is_in(&wanted, *page)).map(|page| (page, place(page))).collect();
                    prop_assert_eq!(found, expected);
                }
                None => prop_assert!(!all),
            }
        }
    }
}
