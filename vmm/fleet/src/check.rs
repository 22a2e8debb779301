//! The host's own check of what guests filled their memory with: every page is read from outside
//! and compared with what its place and generation say it must hold. The guests must be paused
//! meanwhile.

use guest::content::{PAGE_SIZE, PageKey, check_page, identify, page_from_bytes};
use guest::layout::{self, Layout};
use guest::protocol::{Fill, Report};

use super::check_error::CheckError;
use super::guest::Guest;
use kernel_view::pagemap::{Pagemap, PagemapEntry};
use memory::layout::{HOLE_END, HOLE_START};
use memory::page_buffer::PageBuffer;
use memory::remote::{RemoteMemory, RemoteRange};
use memory::{Extent, Gpa, PAGE_BYTES};

/// Pages read at a time.
const BATCH_PAGES: usize = 256;

/// How many of the guest's pages are wrong, or missing, by what the host sees. `report` is the
/// guest's own account of them. 0 for a guest that was not filled.
pub fn wrong_pages(guest: &Guest, report: &Report) -> Result<u64, CheckError> {
    let (Some(ready), Some(fill), Ok(space)) = (guest.ready(), guest.filled(), guest.space()) else {
        return Ok(0);
    };
    let mut tally = Tally::new(fill, ready.pages);
    if guest.is_built_in() {
        for (first, run) in placed(&space.extents, ready.base, report.filled) {
            each_page(space.pid, run, |n, page| tally.expect(first + n, page))?;
        }
        return Ok(tally.wrong_at_places(report));
    }
    // A Linux guest puts its pages where it likes. Each says what it is, so they can be counted.
    for extent in &space.extents {
        each_page(space.pid, *extent, |_, page| tally.recognise(page))?;
    }
    let written: u64 = report.classes[1..].iter().sum();
    Ok(written.saturating_sub(tally.good))
}

/// What was seen of one guest.
struct Tally<'a> {
    fill: &'a Fill,
    layout: Layout,
    good: u64,
    wrong: u64,
    generations: u64,
}

impl<'a> Tally<'a> {
    fn new(fill: &'a Fill, spare_pages: u64) -> Self {
        let pages = fill.pages.unwrap_or(spare_pages).min(spare_pages);
        Self { fill, layout: Layout::new(fill.mix, pages), good: 0, wrong: 0, generations: 0 }
    }

    /// Page number `n` of the workload must be here, in whatever generation.
    fn expect(&mut self, n: u64, bytes: &[u8; PAGE_SIZE]) {
        let page = page_from_bytes(bytes);
        let seen = identify(&page);
        let generation = seen.map_or(0, |key| key.generation);
        self.generations += u64::from(generation);
        match layout::key(self.fill, &self.layout, n, generation) {
            Some(key) if check_page(&page, key) => self.good += 1,
            _ => self.wrong += 1,
        }
    }

    /// Whatever is here, it counts if it is a whole page of this guest's work.
    fn recognise(&mut self, bytes: &[u8; PAGE_SIZE]) {
        let page = page_from_bytes(bytes);
        let ours = |key: &PageKey| key.seed == self.fill.seed || key.seed == self.fill.common;
        if identify(&page).filter(ours).is_some_and(|key| check_page(&page, key)) {
            self.good += 1;
        }
    }

    fn wrong_at_places(&self, report: &Report) -> u64 {
        // A guest that churns may have been stopped in the middle of one page.
        let torn = u64::from(report.churned > 0);
        // Fewer generations than the guest counted: a write is lost, and an older page is back.
        let lost = u64::from(self.generations < report.generations);
        // A page that is absent (dropped, for it was zero) reads as zeros and was not seen here.
        let absent = report.filled.saturating_sub(self.good + self.wrong);
        let missing = absent.saturating_sub(report.classes[0]);
        self.wrong.saturating_sub(torn) + lost + missing
    }
}

/// Where `pages` workload pages lie that begin at guest-physical `base` and step over the device
/// hole: the number of the first page of each run, and the run in the VM's process.
fn placed(extents: &[Extent], base: u64, pages: u64) -> Vec<(u64, Extent)> {
    let below = (HOLE_START.saturating_sub(base) / PAGE_BYTES).min(pages);
    let mut runs = Vec::new();
    for (first, gpa, count) in [(0, base, below), (below, HOLE_END, pages - below)] {
        let inside = extents.iter().find(|e| e.gpas().contains(&Gpa(gpa)));
        if let (1.., Some(e)) = (count, inside) {
            let from = gpa - e.gpa.0;
            let bytes = (count * PAGE_BYTES).min(e.bytes - from);
            runs.push((first, Extent { gpa: Gpa(gpa), hva: e.hva + from, bytes }));
        }
    }
    runs
}

/// Reads what there is of an extent of another process and hands out its pages, numbered from 0.
/// What is on swap comes back to memory for that; absent pages stay untouched and are not handed
/// out.
fn each_page(
    pid: u32,
    extent: Extent,
    mut work: impl FnMut(u64, &[u8; PAGE_SIZE]),
) -> Result<(), CheckError> {
    let (mut pagemap, memory) = (Pagemap::open(pid)?, RemoteMemory::open(pid)?);
    let (mut entries, mut buffer) = (Vec::new(), PageBuffer::new(BATCH_PAGES));
    let pages = extent.bytes / PAGE_BYTES;
    for at in (0..pages).step_by(BATCH_PAGES) {
        let count = BATCH_PAGES.min((pages - at) as usize);
        pagemap.read(extent.hva + at * PAGE_BYTES, count, &mut entries)?;
        let mut from = at;
        let is_there = |entry: &PagemapEntry| entry.present() || entry.swapped();
        for run in entries.chunk_by(|a, b| is_there(a) == is_there(b)) {
            if run.first().is_some_and(is_there) {
                let bytes = run.len() * PAGE_SIZE;
                memory.read(&[RemoteRange { hva: extent.hva + from * PAGE_BYTES, bytes }], &mut buffer)?;
                for (n, page) in (from..).zip(buffer[..bytes].as_chunks::<PAGE_SIZE>().0) {
                    work(n, page);
                }
            }
            from += run.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest::content::fill_page;
    use guest::protocol::Mix;
    use memory::Hva;

    fn bytes(page: &[u64; 512]) -> [u8; PAGE_SIZE] {
        let mut out = [0; PAGE_SIZE];
        for (b, w) in out.chunks_exact_mut(8).zip(page) {
            b.copy_from_slice(&w.to_le_bytes());
        }
        out
    }

    #[test]
    fn a_right_page_at_the_wrong_place_or_of_a_lost_generation_is_wrong() {
        let mix = Mix::new(0, 0, 0, 100).unwrap();
        let fill = Fill { seed: 1, common: 2, mix, pages: Some(2) };
        let layout = Layout::new(mix, 2);
        let mut page = [0u64; 512];
        let mut of = |n, generation| {
            fill_page(&mut page, layout::key(&fill, &layout, n, generation).unwrap());
            bytes(&page)
        };
        let (first, second, second_later) = (of(0, 0), of(1, 0), of(1, 3));
        let tally = |pages: [&[u8; PAGE_SIZE]; 2]| {
            let mut tally = Tally::new(&fill, 2);
            tally.expect(0, pages[0]);
            tally.expect(1, pages[1]);
            tally
        };
        let report = |generations| Report { filled: 2, generations, ..Default::default() };
        assert_eq!(tally([&first, &second]).wrong_at_places(&report(0)), 0);
        assert_eq!(tally([&second, &first]).wrong_at_places(&report(0)), 2);
        assert_eq!(tally([&first, &second_later]).wrong_at_places(&report(3)), 0);
        assert_eq!(tally([&first, &second]).wrong_at_places(&report(3)), 1);
        let mut flipped = first;
        flipped[4000] ^= 1;
        assert_eq!(tally([&flipped, &second]).wrong_at_places(&report(0)), 1);
    }

    #[test]
    fn runs_step_over_the_hole() {
        let extents = [
            Extent { gpa: Gpa(0), hva: Hva(0x10_0000_0000), bytes: HOLE_START },
            Extent { gpa: Gpa(HOLE_END), hva: Hva(0x20_0000_0000), bytes: 1 << 30 },
        ];
        let runs = placed(&extents, HOLE_START - 8192, 5);
        assert_eq!(runs.len(), 2);
        assert_eq!((runs[0].0, runs[0].1.bytes), (0, 8192));
        assert_eq!((runs[1].0, runs[1].1.hva, runs[1].1.bytes), (2, Hva(0x20_0000_0000), 3 * 4096));
    }
}
