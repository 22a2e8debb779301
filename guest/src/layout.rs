//! Maps pages of a workload to keys: shared by the guests and the host's checker.
//!
//! The pages of a guest are four contiguous segments in the order of [`Class::ALL`]: zero, common,
//! dup, unique. A segment ends where the sum of the percentages so far says, rounded down, so that
//! rounding never loses a page.
//!
//! Within a segment the index of a page is its position, except among dups: there the groups stand
//! in order, then all groups once more, until each has [`COPIES`] copies (the last round may be
//! short). So copies lie in runs, as duplicates in real guests do, and not side by side.

use core::ops::Range;

use crate::content::PageKey;
use crate::protocol::{Class, Fill, Mix};

/// How many copies a duplicated page has, itself included.
pub const COPIES: u64 = 4;

/// The classes of `pages` pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The end of each segment.
    ends: [u64; 4],
}

impl Layout {
    /// The layout of `pages` pages in the proportions of `mix`.
    pub fn new(mix: Mix, pages: u64) -> Self {
        let mut percent = 0;
        let ends = Class::ALL.map(|class| {
            percent += u128::from(mix.percent(class));
            (u128::from(pages) * percent / 100) as u64
        });
        Self { ends }
    }

    /// How many pages there are in all.
    pub const fn pages(&self) -> u64 {
        self.ends[3]
    }

    /// The pages of `class`.
    pub fn segment(&self, class: Class) -> Range<u64> {
        let slot = usize::from(class.code());
        let start = if slot == 0 { 0 } else { self.ends[slot - 1] };
        start..self.ends[slot]
    }

    /// How many different pages the dup segment has.
    pub fn groups(&self) -> u64 {
        let dup = self.segment(Class::Dup);
        (dup.end - dup.start).div_ceil(COPIES)
    }

    /// The class of page `page` and its index within it; `None` beyond the last.
    pub fn place(&self, page: u64) -> Option<(Class, u64)> {
        let class = Class::ALL.into_iter().find(|class| page < self.segment(*class).end)?;
        let position = page - self.segment(class).start;
        let index = if class == Class::Dup { position % self.groups() } else { position };
        Some((class, index))
    }
}

/// The key of page `page` after a `fill` with this layout, in this generation.
pub fn key(fill: &Fill, layout: &Layout, page: u64, generation: u32) -> Option<PageKey> {
    let (class, index) = layout.place(page)?;
    let seed = if class == Class::Common { fill.common } else { fill.seed };
    Some(PageKey { seed, class, index, generation })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn mix() -> impl Strategy<Value = Mix> {
        (0_u8..=100, 0_u8..=100, 0_u8..=100).prop_map(|(a, b, c)| {
            let mut cuts = [a, b, c];
            cuts.sort_unstable();
            Mix::new(cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], 100 - cuts[2]).unwrap()
        })
    }

    proptest! {
        #[test]
        fn every_page_has_one_place(mix in mix(), pages in 0_u64..3000) {
            let layout = Layout::new(mix, pages);
            prop_assert_eq!(layout.pages(), pages);
            prop_assert_eq!(layout.place(pages), None);
            let mut copies = HashMap::new();
            for page in 0..pages {
                let (class, index) = layout.place(page).unwrap();
                prop_assert!(layout.segment(class).contains(&page));
                *copies.entry((class, index)).or_insert(0_u64) += 1;
            }
            for class in Class::ALL {
                let segment = layout.segment(class);
                let exact = pages as f64 * f64::from(mix.percent(class)) / 100.0;
                prop_assert!(((segment.end - segment.start) as f64 - exact).abs() <= 1.0);
            }
            for ((class, _), count) in copies {
                prop_assert!(count == 1 || class == Class::Dup && count <= COPIES);
            }
        }

        #[test]
        fn dups_are_duplicated(mix in mix(), pages in 0_u64..3000) {
            let layout = Layout::new(mix, pages);
            let dup = layout.segment(Class::Dup);
            let length = dup.end - dup.start;
            prop_assume!(length > 1);
            prop_assert_eq!(layout.groups(), length.div_ceil(COPIES));
            prop_assert!(length / layout.groups() >= 2);
        }

        #[test]
        fn huge_counts_do_not_overflow(mix in mix(), pages: u64, page: u64) {
            let layout = Layout::new(mix, pages);
            prop_assert_eq!(layout.pages(), pages);
            prop_assert_eq!(layout.place(page).is_some(), page < pages);
        }
    }

    #[test]
    fn common_pages_carry_the_shared_seed() {
        let fill = Fill { seed: 1, common: 2, mix: Mix::new(25, 25, 25, 25).unwrap(), pages: None };
        let layout = Layout::new(fill.mix, 16);
        let keys: [PageKey; 16] = core::array::from_fn(|page| key(&fill, &layout, page as u64, 0).unwrap());
        assert_eq!(keys[4], PageKey { seed: 2, class: Class::Common, index: 0, generation: 0 });
        assert!(keys[8..12].iter().all(|key| *key == keys[8]));
        assert_eq!(keys[15], PageKey { seed: 1, class: Class::Unique, index: 3, generation: 0 });
    }
}
