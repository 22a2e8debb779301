//! Where the pages of RAM are: by number, by guest-physical address, by address in this process.

use std::ops::Range;
use std::sync::Arc;

use super::super::layout::Stretch;
use super::super::page::{Gpa, Hva, PageNo, PageRange};
use super::super::{Extent, PAGE_BYTES};

/// One contiguous stretch of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapped {
    pages: PageRange,
    gpa: Gpa,
    hva: Hva,
}

/// All of one VM's RAM, in rising order. Says where pages are, not what may be done to them.
#[derive(Clone, Debug)]
pub(super) struct RamMap(Arc<[Mapped]>);

/// Where pages of one stretch are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) pages: PageRange,
    pub(super) gpa: Gpa,
    pub(super) hva: Hva,
}

impl RamMap {
    /// Of these stretches, mapped at these addresses.
    pub(super) fn new(stretches: impl IntoIterator<Item = (Stretch, Hva)>) -> Self {
        let mut first = PageNo(0);
        let mapped = stretches.into_iter().map(|(stretch, hva)| {
            let pages = PageRange::between(first, first + stretch.bytes / PAGE_BYTES);
            first = pages.end();
            Mapped { pages, gpa: Gpa(stretch.gpa), hva }
        });
        Self(mapped.collect())
    }

    /// All pages.
    pub(super) fn pages(&self) -> PageRange {
        PageRange::between(PageNo(0), self.0.last().map_or(PageNo(0), |last| last.pages.end()))
    }

    /// The stretches, as other crates see them.
    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> {
        self.0.iter().map(|s| Extent { gpa: s.gpa, hva: s.hva, bytes: s.pages.bytes() })
    }

    /// Where `pages`, at least one and all in one stretch, are.
    pub(super) fn find(&self, pages: PageRange) -> Option<Found> {
        let stretch = self.0.iter().find(|s| s.pages.covers(pages) && !pages.is_empty())?;
        let from = (pages.first() - stretch.pages.first()) * PAGE_BYTES;
        Some(Found { pages, gpa: Gpa(stretch.gpa.0 + from), hva: stretch.hva + from })
    }

    /// What of `pages` is in each stretch.
    pub(super) fn parts(&self, pages: PageRange) -> impl Iterator<Item = Found> {
        let parts = self.0.iter().map(move |stretch| stretch.pages.intersection(pages));
        parts.filter_map(|part| self.find(part))
    }

    /// The pages, in each stretch, of which some byte is at these guest-physical addresses.
    pub(super) fn touched_by(&self, gpas: Range<Gpa>) -> impl Iterator<Item = PageRange> {
        self.0.iter().filter_map(move |stretch| {
            let (start, end) = (stretch.gpa.0, stretch.gpa.0 + stretch.pages.bytes());
            let (from, to) = (gpas.start.0.max(start), gpas.end.0.min(end));
            let page = |bytes: u64| stretch.pages.first() + bytes;
            (from < to).then(|| {
                PageRange::between(page((from - start) / PAGE_BYTES), page((to - start).div_ceil(PAGE_BYTES)))
            })
        })
    }

    /// The pages at these guest-physical addresses, if those are whole pages of one stretch, at
    /// least one.
    pub(super) fn at(&self, gpas: &Range<Gpa>) -> Option<Found> {
        let mut whole = self.touched_by(gpas.clone());
        let found = self.find(whole.next()?)?;
        let is_all = found.gpa == gpas.start && gpas.end.0.checked_sub(found.gpa.0)? == found.pages.bytes();
        is_all.then_some(found)
    }

    /// The page at an address of this process.
    pub(super) fn page_at(&self, hva: Hva) -> Option<PageNo> {
        let within = |s: &&Mapped| hva.0.checked_sub(s.hva.0).is_some_and(|offset| offset < s.pages.bytes());
        self.0.iter().find(within).map(|s| s.pages.first() + (hva - s.hva) / PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::layout::{HOLE_END, HOLE_START, stretches};
    use super::*;
    use proptest::prelude::*;

    const LOW: u64 = HOLE_START / PAGE_BYTES;
    const HIGH: u64 = 1000;

    fn map() -> RamMap {
        let hvas = [Hva(0x7f00_0000_0000), Hva(0x7e00_0000_0000)];
        RamMap::new(stretches((LOW + HIGH) * PAGE_BYTES).into_iter().zip(hvas))
    }

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::new(PageNo(first), pages).unwrap()
    }

    #[test]
    fn what_is_no_run_of_pages_of_one_stretch_is_nowhere() {
        let map = map();
        assert_eq!(map.pages(), range(0, LOW + HIGH));
        for nowhere in
            [range(5, 0), range(LOW - 1, 2), range(LOW + HIGH, 1), range(LOW, HIGH + 1), range(0, u64::MAX)]
        {
            assert_eq!(map.find(nowhere), None, "{nowhere:?}");
        }
        let gpa = |start: u64, end: u64| Gpa(start)..Gpa(end);
        for nowhere in [
            gpa(0, 0),
            gpa(1, 4096),
            gpa(0, 4095),
            gpa(8192, 4096),
            gpa(HOLE_START - 4096, HOLE_END + 4096),
            gpa(HOLE_START, HOLE_START + 4096),
            gpa(!4095, 0),
            gpa(HOLE_END, HOLE_END + (HIGH + 1) * 4096),
            gpa(0, u64::MAX),
        ] {
            assert_eq!(map.at(&nowhere), None, "{nowhere:?}");
        }
        assert!(
            [Hva(0), Hva(0x7f00_0000_0000 - 1), Hva(u64::MAX)].iter().all(|hva| map.page_at(*hva).is_none())
        );
        // A part of a page touches it, and both sides of the hole are touched by what goes across.
        assert_eq!(map.touched_by(gpa(4095, 4097)).collect::<Vec<_>>(), [range(0, 2)]);
        assert_eq!(
            map.touched_by(gpa(HOLE_START - 1, HOLE_END + 1)).collect::<Vec<_>>(),
            [range(LOW - 1, 1), range(LOW, 1)]
        );
        let both: Vec<_> = map.parts(range(LOW - 2, 5)).map(|part| (part.pages, part.gpa)).collect();
        assert_eq!(both, [(range(LOW - 2, 2), Gpa(HOLE_START - 8192)), (range(LOW, 3), Gpa(HOLE_END))]);
    }

    proptest! {
        #[test]
        fn number_and_addresses_name_the_same_page(page in 0..LOW + HIGH, pages in 1u64..2000, byte in 0..PAGE_BYTES) {
            let map = map();
            let run = range(page, pages);
            let fits = page + pages <= LOW || (page >= LOW && page + pages <= LOW + HIGH);
            prop_assert_eq!(map.find(run).is_some(), fits);
            let Found { gpa, hva, .. } = map.find(range(page, 1)).unwrap();
            prop_assert_eq!(gpa.0, if page < LOW { page * PAGE_BYTES } else { HOLE_END + (page - LOW) * PAGE_BYTES });
            prop_assert_eq!(map.page_at(hva + byte), Some(PageNo(page)));
            prop_assert_eq!(map.touched_by(Gpa(gpa.0 + byte)..Gpa(gpa.0 + byte + 1)).collect::<Vec<_>>(), [range(page, 1)]);
            let end = Gpa(gpa.0 + pages * PAGE_BYTES);
            prop_assert_eq!(map.at(&(gpa..end)), if fits { map.find(run) } else { None });
        }
    }
}
