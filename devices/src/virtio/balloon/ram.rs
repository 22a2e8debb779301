//! Guest RAM as stretches of whole pages, so that what a guest names can be cut to what there is.

use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::GuestMemory;
use crate::reclaim::{Gpa, PAGE_BYTES};

// So it is in every interface of the balloon, whatever the guest's own pages are:
// VIRTIO_BALLOON_PFN_SHIFT.
const _: () = assert!(PAGE_BYTES == 1 << 12);

/// The page numbers (address / 4096) of each region of RAM, ascending.
#[derive(Debug)]
pub(super) struct Ram(Vec<Range<u64>>);

/// Pages that lie in one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Which region, counted from the lowest address.
    pub(super) region: usize,
    /// Page numbers, at least one.
    pub(super) pages: Range<u64>,
}

impl Ram {
    pub(super) fn new(memory: &GuestMemory) -> Self {
        let whole_pages = |start: u64, len: u64| inner_pages(start, start.saturating_add(len));
        Self(memory.iter().map(|region| whole_pages(region.start_addr().0, region.len())).collect())
    }

    /// The regions, lowest first.
    pub(super) fn regions(&self) -> &[Range<u64>] {
        &self.0
    }

    /// What of `pages` is RAM, ascending, cut at the ends of regions.
    pub(super) fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = Part> {
        let first = self.0.partition_point(|region| region.end <= pages.start);
        let cut = move |region: &Range<u64>| region.start.max(pages.start)..region.end.min(pages.end);
        let cuts = self.0.iter().map(cut).enumerate().skip(first);
        cuts.map(|(region, pages)| Part { region, pages }).filter(|part| !part.pages.is_empty())
    }

    /// Cuts `part` at the ends of granules of `pages` pages: each piece with its granule; None
    /// where that is not all RAM.
    pub(super) fn granules(&self, part: &Part, pages: u64) -> impl Iterator<Item = (Part, Option<Part>)> {
        let (region, whole) = (part.region, part.pages.clone());
        let inside = self.0.get(region).cloned().unwrap_or(0..0);
        (whole.start / pages..whole.end.div_ceil(pages)).map(move |granule| {
            let all = granule * pages..(granule + 1) * pages;
            let piece = all.start.max(whole.start)..all.end.min(whole.end);
            let is_ram = inside.start <= all.start && all.end <= inside.end;
            (Part { region, pages: piece }, is_ram.then_some(Part { region, pages: all }))
        })
    }

    /// Whether the page is RAM.
    pub(super) fn contains(&self, page: u64) -> bool {
        self.0.iter().any(|region| region.contains(&page))
    }
}

impl Part {
    /// How many pages.
    pub(super) fn len(&self) -> u64 {
        self.pages.end - self.pages.start
    }
}

/// The pages that lie wholly between two addresses; empty if there is none.
pub(super) fn inner_pages(start: u64, end: u64) -> Range<u64> {
    let first = start.div_ceil(PAGE_BYTES);
    first..(end / PAGE_BYTES).max(first)
}

/// The addresses of `pages`. Cannot overflow: the pages are RAM.
pub(super) fn addresses(pages: &Range<u64>) -> Range<Gpa> {
    Gpa(pages.start * PAGE_BYTES)..Gpa(pages.end * PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{HIGH_RAM_END, HIGH_RAM_START, LOW_RAM, ram};

    const LOW: Range<u64> = 0..LOW_RAM / PAGE_BYTES;
    const HIGH: Range<u64> = HIGH_RAM_START / PAGE_BYTES..HIGH_RAM_END / PAGE_BYTES;

    fn parts(pages: Range<u64>) -> Vec<(usize, Range<u64>)> {
        Ram::new(&ram()).parts(pages).map(|part| (part.region, part.pages)).collect()
    }

    #[test]
    fn granules_are_whole_or_not_ram() {
        let ram = Ram(std::iter::once(3..20).collect());
        let part = Part { region: 0, pages: 4..18 };
        let found: Vec<_> = ram
            .granules(&part, 8)
            .map(|(piece, whole)| (piece.pages, whole.map(|part| part.pages)))
            .collect();
        assert_eq!(found, [(4..8, None), (8..16, Some(8..16)), (16..18, None)]);
        let pages: Vec<_> = ram.granules(&part, 1).map(|(piece, whole)| whole == Some(piece)).collect();
        assert_eq!(pages, [true; 14]);
    }

    #[test]
    fn what_is_named_is_cut_to_what_there_is() {
        assert_eq!(Ram::new(&ram()).regions(), [LOW, HIGH]);
        assert_eq!(parts(0..u64::MAX), [(0, LOW), (1, HIGH)]);
        assert_eq!(parts(3..4), [(0, 3..4)]);
        assert_eq!(parts(3..3), []);
        assert_eq!(
            parts(LOW.end - 1..HIGH.start + 1),
            [(0, LOW.end - 1..LOW.end), (1, HIGH.start..HIGH.start + 1)]
        );
        assert_eq!(parts(LOW.end..HIGH.start), []);
        assert_eq!(parts(HIGH.end..u64::MAX), []);
        let ram = Ram::new(&ram());
        for (page, inside) in
            [(0, true), (LOW.end - 1, true), (LOW.end, false), (HIGH.start, true), (HIGH.end, false)]
        {
            assert_eq!(ram.contains(page), inside, "{page:#x}");
        }
    }

    #[test]
    fn regions_that_touch_stay_apart() {
        let base = vm_memory::GuestAddress;
        let memory = GuestMemory::from_ranges(&[(base(0), 0x3000), (base(0x3000), 0x2000)]).unwrap();
        let parts: Vec<_> = Ram::new(&memory).parts(1..9).map(|part| part.pages).collect();
        assert_eq!(parts, [1..3, 3..5]);
    }

    #[test]
    fn only_whole_pages_count() {
        assert_eq!(inner_pages(0x1000, 0x3000), 1..3);
        assert_eq!(inner_pages(0x1001, 0x3fff), 2..3);
        assert!(inner_pages(0x1001, 0x1fff).is_empty());
        assert!(inner_pages(0x1001, 0x2fff).is_empty());
        assert!(inner_pages(u64::MAX, u64::MAX).is_empty());
    }
}
