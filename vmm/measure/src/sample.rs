//! Samples: contents for a closer look, pages for a second one; and estimates of the whole from a
//! sample.

use std::collections::BinaryHeap;

use serde::{Deserialize, Serialize};

use super::tag::Tag;

/// A share of something, estimated from a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean over the sample.
    pub mean: f64,
    /// Half the width of the interval that holds the true mean in 95 of 100 samples.
    pub error_95: f64,
}

impl Estimate {
    /// From the values of a sample of `values.len()` out of `all`; exact if that is all of them.
    pub fn of(values: &[f64], all: u64) -> Self {
        let n = values.len() as f64;
        if values.is_empty() {
            return Self::default();
        }
        let mean = values.iter().sum::<f64>() / n;
        if values.len() as u64 >= all {
            return Self { mean, error_95: 0.0 };
        }
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        // Drawn without replacement; and where all values are equal, the rule of three bounds what
        // was not seen.
        let left = 1.0 - n / all as f64;
        let error_95 = if variance == 0.0 { 3.0 / n } else { 1.96 * (variance / n).sqrt() * left.sqrt() };
        Self { mean, error_95 }
    }
}

/// Some contents, each as likely as any other: those with the lowest tags, which are as good as
/// random.
#[derive(Debug)]
pub(super) struct Contents {
    lowest: BinaryHeap<(u64, u64, u32)>,
    most: usize,
}

impl Contents {
    pub(super) fn new(most: usize) -> Self {
        Self { lowest: BinaryHeap::new(), most }
    }

    /// A content that was not offered before, and the page that has it.
    #[inline]
    pub(super) fn offer(&mut self, Tag([first, second]): Tag, page: u32) {
        if self.lowest.len() < self.most {
            self.lowest.push((first, second, page));
        } else if self.lowest.peek().is_some_and(|highest| first < highest.0) {
            self.lowest.pop();
            self.lowest.push((first, second, page));
        }
    }

    /// Forgets those that `keep` does not keep.
    pub(super) fn retain(&mut self, keep: impl Fn(Tag) -> bool) {
        self.lowest.retain(|(first, second, _)| keep(Tag([*first, *second])));
    }

    /// Tag and page of each, by page.
    pub(super) fn into_pages(self) -> Vec<(Tag, u32)> {
        let mut pages: Vec<_> = self.lowest.into_iter().map(|(a, b, page)| (Tag([a, b]), page)).collect();
        pages.sort_unstable_by_key(|(_, page)| *page);
        pages
    }
}

/// Which pages are read again: all, or one in N by a hash of its number.
#[derive(Clone, Copy, Debug)]
pub(super) struct SecondLook {
    below: u64,
}

impl SecondLook {
    /// About `wanted` of `pages`.
    pub(super) fn new(wanted: u64, pages: u64) -> Self {
        let below = if wanted >= pages { 1 << 32 } else { (wanted << 32) / pages };
        Self { below }
    }

    pub(super) fn wants(self, number: u32) -> bool {
        // Fibonacci hashing, twice, so that neighbours are not alike.
        let mixed = (u64::from(number) ^ 0x5851_f42d).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) < self.below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_holds_the_truth_nearly_always() {
        let all: Vec<f64> = (0..10_000u32).map(|n| f64::from(n % 7)).collect();
        let truth = all.iter().sum::<f64>() / all.len() as f64;
        let mut held = 0;
        for start in 0..200u32 {
            let looker = SecondLook::new(400, all.len() as u64);
            let some: Vec<f64> = (0..10_000u32)
                .filter(|n| looker.wants(n + start * 10_000))
                .map(|n| all[n as usize])
                .collect();
            let estimate = Estimate::of(&some, all.len() as u64);
            held += u32::from((estimate.mean - truth).abs() <= estimate.error_95);
        }
        assert!((180..=200).contains(&held), "{held} of 200");
        assert_eq!(Estimate::of(&all, 10_000), Estimate { mean: truth, error_95: 0.0 });
        assert_eq!(Estimate::of(&[], 5), Estimate::default());
        assert!(Estimate::of(&[1.0; 30], 1000).error_95 > 0.09, "what was not seen may be there");
    }

    #[test]
    fn a_second_look_takes_about_as_many_as_it_should() {
        let some = SecondLook::new(1000, 100_000);
        let taken = (0..100_000).filter(|n| some.wants(*n)).count();
        assert!((850..1150).contains(&taken), "{taken}");
        assert!((0..1000).all(|n| SecondLook::new(1000, 1000).wants(n)));
        assert!((0..1000).all(|n| !SecondLook::new(0, 1000).wants(n)));
    }

    #[test]
    fn the_lowest_tags_are_kept() {
        let mut contents = Contents::new(3);
        for n in [9, 4, 7, 1, 8, 2, 6] {
            contents.offer(Tag([n, 0]), n as u32);
        }
        contents.retain(|tag| tag.0[0] != 1);
        let pages: Vec<u32> = contents.into_pages().iter().map(|(_, page)| *page).collect();
        assert_eq!(pages, [2, 4]);
    }
}
