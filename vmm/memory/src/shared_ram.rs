//! Guest RAM whose pages may be those of slabs: what merges them, and what keeps merging and giving
//! back apart.

use std::io;

use super::maps::{Maps, SlabMapping};
use super::merge_log::With;
use super::page_scan::{PageScan, Pages};
use super::page_set::PageSet;
use super::ram::Ram;
use super::replace::{RamRegion, Refusal};
use super::slab::Slab;
use super::{Gpa, PAGE_BYTES, PageNo, PageRange, SlabPage};

/// Mappings that are left to the rest of the process.
const SPARE_MAPPINGS: u64 = 8192;

/// All of a VM's RAM.
pub struct SharedRam {
    ram: Ram,
    region: RamRegion,
    scan: PageScan,
    /// How many mappings there may be, and how many more.
    most: u64,
    left: u64,
    slab_mappings: u64,
}

impl SharedRam {
    /// Makes `ram` mergeable; it must be anonymous memory.
    pub fn new(ram: &Ram) -> io::Result<Self> {
        let (region, most) = (RamRegion::new(ram)?, most()?);
        let (scan, left) = (PageScan::open_self()?, most.saturating_sub(Maps::own()?.count));
        Ok(Self { ram: ram.clone(), region, scan, most, left, slab_mappings: 0 })
    }

    /// Where in guest-physical memory a page is.
    pub fn gpa(&self, page: PageNo) -> Option<Gpa> {
        self.ram.gpa(page)
    }

    /// See [`RamRegion::merge`].
    pub fn merge(&mut self, run: PageRange, from: (&Slab, SlabPage)) -> Result<(), Refusal> {
        self.remap(run, With::Slab { first: from.1 }, |region| region.merge(run, from))
    }

    /// See [`RamRegion::drop_zeros`].
    pub fn drop_zeros(&mut self, run: PageRange) -> Result<(), Refusal> {
        self.remap(run, With::Zeros, |region| region.drop_zeros(run))
    }

    fn remap(
        &mut self,
        run: PageRange,
        with: With,
        work: impl FnOnce(&mut RamRegion) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let Self { ram, region, left, .. } = self;
        let range = ram.range(run).ok_or(Refusal::Run)?;
        // At worst the run is a mapping of its own, and what was around it is two.
        *left = left.checked_sub(2).ok_or(Refusal::Mappings)?;
        // Taken before anything is frozen. A device that gives pages back waits here: else it could
        // drop them between our looking and our mapping, and what it dropped would come back.
        let mut placement = ram.placement();
        if !placement.slabs {
            (placement.slabs, placement.slab_pages) = (true, PageSet::none(ram.pages().pages()));
        }
        // It is compared with the lock in our hand, and frozen by another userfaultfd.
        let settled = placement.settle(range);
        // What was refused is mapped as before.
        settled.map_err(Refusal::Freeze).and_then(|()| work(region)).inspect_err(|_| *left += 2)?;
        match with {
            With::Slab { .. } => placement.slab_pages.insert_range(run),
            With::Zeros | With::Fresh => placement.slab_pages.remove_range(run),
        }
        ram.merges().add(range.gpa(), run.pages(), with);
        Ok(())
    }

    /// Adds to `found` those of `pages` that have frames which are this guest's alone, adjacent
    /// ones together. `mixed` says that some of them may be those of slabs: to tell takes longer.
    pub fn private(&mut self, pages: PageRange, mixed: bool, found: &mut Vec<Private>) -> io::Result<()> {
        let Self { ram, scan, .. } = self;
        for part in ram.parts(pages) {
            let each = |run: Pages| {
                let first = part.pages().first() + (run.hva - part.hva()) / PAGE_BYTES;
                let pages = PageRange::between(first, first + run.pages);
                found.push(Private { pages, huge: run.categories.huge() });
            };
            match mixed {
                true => scan.anonymous(part.hvas(), each)?,
                false => scan.frames(part.hvas(), each)?,
            }
        }
        Ok(())
    }

    /// All pages that are those of slabs now, ascending. Also counts anew how many mappings there
    /// may be. It takes as long as there are mappings and pages of slabs: to be called now and
    /// then.
    pub fn mapped(&mut self) -> io::Result<Vec<Mapped>> {
        let maps = Maps::own()?;
        self.left = self.most.saturating_sub(maps.count);
        let Self { ram, scan, .. } = self;
        let mut found = Vec::new();
        self.slab_mappings = 0;
        for stretch in ram.stretches() {
            // What is outside is a slab's own view of itself.
            let inside = |m: &&SlabMapping| stretch.hvas().contains(&m.hvas.start);
            let mut mappings =
                maps.slabs.iter().filter(inside).inspect(|_| self.slab_mappings += 1).peekable();
            // One walk for all of them: they may be many, and what is found in one piece may be of
            // several.
            scan.files(stretch.hvas(), |run| {
                let (mut hva, run_end) = (run.hva, run.end());
                while hva < run_end {
                    while mappings.next_if(|m| m.hvas.end <= hva).is_some() {}
                    let Some(mapping) = mappings.peek().filter(|m| m.hvas.start < run_end) else { return };
                    hva = hva.max(mapping.hvas.start);
                    let piece_end = run_end.min(mapping.hvas.end);
                    let first = stretch.pages().first() + (hva - stretch.hva()) / PAGE_BYTES;
                    found.push(Mapped {
                        inode: mapping.inode,
                        slab_page: mapping.slab_page(hva),
                        pages: PageRange::between(first, first + (piece_end - hva) / PAGE_BYTES),
                    });
                    hva = piece_end;
                }
            })?;
            mappings.for_each(drop);
        }
        Ok(found)
    }

    /// How many mappings of slabs there were when [`Self::mapped`] last looked.
    pub fn slab_mappings(&self) -> u64 {
        self.slab_mappings
    }

    /// How many mappings there may be more, and how many there might be in all.
    pub fn mappings_left(&self) -> (u64, u64) {
        (self.left, self.most)
    }
}

/// Adjacent pages that are a guest's alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Private {
    /// Which.
    pub pages: PageRange,
    /// The host has them in a huge page.
    pub huge: bool,
}

/// Adjacent pages that are adjacent pages of a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The slab's file.
    pub inode: u64,
    /// The first of its pages.
    pub slab_page: SlabPage,
    /// The guest's.
    pub pages: PageRange,
}

/// Mappings that may be used for slabs.
fn most() -> io::Result<u64> {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count")?.trim().parse().unwrap_or(0);
    Ok(u64::saturating_sub(most, SPARE_MAPPINGS))
}

#[cfg(test)]
mod tests;
