//! The frames of our own VMs, counted by kind instead of one by one: what [`frames::measure`] says,
//! in a tenth of the time.
//!
//! The kernel says for whole ranges which pages are there and of what kind they are (PAGEMAP_SCAN).
//! That is enough for guest memory in which only slabs are shared:
//!
//! - an anonymous page is its guest's alone: a VM process does not fork, and KSM says of each
//!   process how many pages it has merged there;
//! - a page of a slab is known by the slab's file and its place in it, and shared by those that map
//!   it.
//!
//! Everything else is read entry by entry: guests in which KSM has merged, mappings of other files,
//! pages on swap (a range cannot tell them from markers), and huge pages of which the kernel does
//! not say whether they are its zero page. Where the kernel has no PAGEMAP_SCAN (before 6.7),
//! everything is.

use std::ops::Range;

use super::frames::{self, Census, Frames};
use super::slab_runs::SlabRun;
use super::{MeasureError, Space, check};
use kernel_view::ksm_stat::KsmStat;
use memory::maps::{Maps, SlabMapping};
use memory::page_scan::{PageScan, Pages};
use memory::{Extent, Gpa, Hva, PAGE_BYTES};

/// The pages of one guest.
#[derive(Debug, Default)]
pub(super) struct Found {
    guest: usize,
    /// Anonymous pages with a frame of their own.
    pub(super) private: u64,
    /// Pages on the zero page.
    pub(super) zero: u64,
    /// Pages in mappings of slabs that have no entry in the page table.
    pub(super) image: u64,
    /// Pages of slabs.
    pub(super) slabs: Vec<SlabRun>,
    /// Extents whose entries must be read one by one.
    pub(super) by_entry: Vec<Extent>,
}

/// Classifies every page of `spaces`, which are our VM processes: as [`frames::measure`], which it
/// calls where ranges do not suffice.
///
/// # Errors
///
/// As [`frames::measure`].
pub fn measure(spaces: &[Space]) -> Result<Frames, MeasureError> {
    check(spaces)?;
    let mut census = Census::new(spaces);
    for (guest, space) in spaces.iter().enumerate() {
        let merged = KsmStat::of(space.pid).map_or(1, |stat| stat.merging_pages + stat.zero_pages);
        let found = if merged == 0 { Found::of(guest, space) } else { None };
        // A guest that must be read frame by frame may share its frames with any other.
        let Some(found) = found else { return frames::measure(spaces) };
        let slabs: u64 = found.slabs.iter().map(|run| run.pages).sum();
        let mut classified = found.private + found.zero + found.image + slabs;
        let by_entry = Space { extents: found.by_entry, ..space.clone() };
        let maps = &Maps::default();
        by_entry.each_entry(|hva, entry| census.count(guest, hva, entry, &maps))?;
        classified += by_entry.pages();
        let absent = space.pages().saturating_sub(classified);
        census.add(guest, found.private, found.zero, (found.image, absent));
        census.slab_runs.extend(found.slabs);
    }
    census.finish(spaces)
}

impl Found {
    /// None if the memory is of a kind that ranges do not classify, or the kernel does not show it.
    pub(super) fn of(guest: usize, space: &Space) -> Option<Self> {
        let (mut scan, maps) = (PageScan::open(space.pid).ok()?, Maps::of(space.pid).ok()?);
        let mut found = Self { guest, ..Self::default() };
        for extent in &space.extents {
            let all = extent.hva..extent.hva + extent.bytes;
            if maps.files.iter().any(|file| file.start < all.end && all.start < file.end) {
                return None;
            }
            // Between slabs there is anonymous memory.
            let mut at = all.start;
            let from = maps.slabs.partition_point(|slab| slab.hvas.end <= all.start);
            for slab in maps.slabs[from..].iter().take_while(|slab| slab.hvas.start < all.end) {
                let within = slab.hvas.start.max(all.start)..slab.hvas.end.min(all.end);
                found.anonymous(&mut scan, at..within.start)?;
                found.slab(&mut scan, slab, within.clone())?;
                at = within.end;
            }
            found.anonymous(&mut scan, at..all.end)?;
        }
        Some(found)
    }

    fn anonymous(&mut self, scan: &mut PageScan, hvas: Range<Hva>) -> Option<()> {
        let each = |pages: Pages| {
            let kind = pages.categories;
            match kind.swapped() || kind.huge() && !kind.zero() {
                true => self.by_entry.push(extent(pages)),
                false => self.add(pages),
            }
        };
        if hvas.is_empty() { Some(()) } else { scan.anonymous_memory(hvas, each).ok() }
    }

    /// A slab's mapping: its pages, and those that the guest has written to, of which it has
    /// copies.
    fn slab(&mut self, scan: &mut PageScan, slab: &SlabMapping, hvas: Range<Hva>) -> Option<()> {
        let mut seen = 0;
        let all = (hvas.end - hvas.start) / PAGE_BYTES;
        let each = |pages: Pages| {
            let kind = pages.categories;
            seen += pages.pages;
            if kind.swapped() {
                self.by_entry.push(extent(pages));
            } else if kind.file() {
                let (inode, first, guest) = (slab.inode, u64::from(slab.slab_page(pages.hva).0), self.guest);
                self.slabs.push(SlabRun { inode, first, pages: pages.pages, guest });
            } else {
                self.add(pages);
            }
        };
        scan.walk(hvas, each).ok()?;
        self.image += all.saturating_sub(seen);
        Some(())
    }

    fn add(&mut self, pages: Pages) {
        match pages.categories.zero() {
            true => self.zero += pages.pages,
            false => self.private += pages.pages,
        }
    }
}

fn extent(pages: Pages) -> Extent {
    Extent { gpa: Gpa(0), hva: pages.hva, bytes: pages.pages * PAGE_BYTES }
}
