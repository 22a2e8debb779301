//! The pages that the driver has given and not taken back: one bit for each page of RAM.

use std::ops::Range;

use super::ram::{Part, Ram, addresses};
use crate::reclaim::Gpa;

/// The set of held pages.
#[derive(Debug)]
pub(super) struct Held {
    regions: Vec<Region>,
    pages: u64,
}

#[derive(Debug)]
struct Region {
    first: u64,
    /// Bit `i % 64` of word `i / 64` is page `first + i`. The bits behind the last page are never
    /// set.
    bits: Vec<u64>,
}

impl Held {
    /// No page of `ram`.
    pub(super) fn new(ram: &Ram) -> Self {
        let region = |pages: &Range<u64>| Region {
            first: pages.start,
            bits: vec![0; (pages.end - pages.start).div_ceil(64) as usize],
        };
        Self { regions: ram.regions().iter().map(region).collect(), pages: 0 }
    }

    /// How many pages.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds pages, some of which may be in it.
    pub(super) fn insert(&mut self, part: &Part) {
        self.pages += self.regions[part.region].change(&part.pages, |word, mask| word | mask);
    }

    /// Whether all of these are in it.
    pub(super) fn contains_all(&self, part: &Part) -> bool {
        let region = &self.regions[part.region];
        let end = (part.pages.end - region.first) as usize;
        region.find((part.pages.start - region.first) as usize, u64::MAX).is_none_or(|absent| absent >= end)
    }

    /// Takes pages out, some of which may not be in it.
    pub(super) fn remove(&mut self, part: &Part) {
        self.pages -= self.regions[part.region].change(&part.pages, |word, mask| word & !mask);
    }

    /// Takes all out.
    pub(super) fn clear(&mut self) {
        if self.pages > 0 {
            self.regions.iter_mut().for_each(|region| region.bits.fill(0));
            self.pages = 0;
        }
    }

    /// The pages as ranges of addresses, ascending, each inside one region.
    pub(super) fn ranges(&self) -> Vec<Range<Gpa>> {
        let mut ranges = Vec::new();
        for region in &self.regions {
            let mut from = 0;
            while let Some(start) = region.find(from, 0) {
                let end = region.find(start, u64::MAX).unwrap_or(region.bits.len() * 64);
                ranges.push(addresses(&(region.first + start as u64..region.first + end as u64)));
                from = end;
            }
        }
        ranges
    }
}

impl Region {
    /// Applies `change` to the words that hold `pages`, with a mask of those pages. Returns how
    /// many bits changed.
    fn change(&mut self, pages: &Range<u64>, change: impl Fn(u64, u64) -> u64) -> u64 {
        let (start, end) = ((pages.start - self.first) as usize, (pages.end - self.first) as usize);
        let mut changed = 0;
        for index in start / 64..end.div_ceil(64) {
            let mut mask = u64::MAX;
            if index == start / 64 {
                mask &= u64::MAX << (start % 64);
            }
            if index == end / 64 {
                mask &= !(u64::MAX << (end % 64));
            }
            let word = &mut self.bits[index];
            let before = *word;
            *word = change(before, mask);
            changed += u64::from((before ^ *word).count_ones());
        }
        changed
    }

    /// The first bit at or after `from` that differs from those of `skip`.
    fn find(&self, from: usize, skip: u64) -> Option<usize> {
        let mut mask = u64::MAX << (from % 64);
        for (index, word) in self.bits.iter().enumerate().skip(from / 64) {
            let found = (word ^ skip) & mask;
            if found != 0 {
                return Some(index * 64 + found.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::GuestMemory;
    use crate::reclaim::PAGE_BYTES;

    /// A region that ends in the middle of a word, a hole, one of exactly two words, and one that
    /// touches it.
    fn ram() -> Ram {
        let pages = [0..100, 200..328, 328..331];
        let regions =
            pages.map(|p| (GuestAddress(p.start * PAGE_BYTES), ((p.end - p.start) * PAGE_BYTES) as usize));
        Ram::new(&GuestMemory::from_ranges(&regions).unwrap())
    }

    fn pages(held: &Held) -> BTreeSet<u64> {
        let ranges = held.ranges();
        assert!(ranges.iter().all(|range| range.start < range.end));
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        ranges.iter().flat_map(|range| range.start.0 / PAGE_BYTES..range.end.0 / PAGE_BYTES).collect()
    }

    #[test]
    fn a_full_and_an_empty_one() {
        let ram = ram();
        let mut held = Held::new(&ram);
        assert_eq!((held.pages(), held.ranges()), (0, Vec::new()));
        ram.parts(0..1000).for_each(|part| held.insert(&part));
        assert_eq!(held.pages(), 100 + 128 + 3);
        let range = |start, end| addresses(&(start..end));
        assert_eq!(held.ranges(), [range(0, 100), range(200, 328), range(328, 331)]);
        held.clear();
        assert_eq!((held.pages(), held.ranges()), (0, Vec::new()));
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_pages(
            changes in prop::collection::vec((any::<bool>(), 0u64..340, 0u64..150), 0..40),
        ) {
            let ram = ram();
            let (mut held, mut model) = (Held::new(&ram), BTreeSet::new());
            for (insert, start, len) in changes {
                for part in ram.parts(start..start + len) {
                    if insert { held.insert(&part) } else { held.remove(&part) }
                }
                let inside = (start..start + len).filter(|&page| ram.contains(page));
                if insert { model.extend(inside) } else { inside.for_each(|page| _ = model.remove(&page)) }
                prop_assert_eq!(held.pages(), model.len() as u64);
                for part in ram.parts(start..start + len) {
                    let all = part.pages.clone().all(|page| model.contains(&page));
                    prop_assert_eq!(held.contains_all(&part), all);
                }
                prop_assert_eq!(&pages(&held), &model);
            }
        }
    }
}
