//! Guest RAM whose pages may be those of slabs: what merges them, and what keeps merging and giving back apart.

use std::io;
use std::ops::Range;

use super::PAGE_BYTES;
use super::in_flight::InFlight;
use super::maps::{Maps, SlabMapping};
use super::merge_log::With;
use super::merge_run::{Mergeable, Refusal};
use super::ram::{Backing, Ram};
use super::scan::{PageScan, Pages};
use super::slab::Slab;

/// Mappings that are left to the rest of the process.
const SPARE_MAPPINGS: u64 = 8192;

/// All of a VM's RAM. Its pages are counted through the stretches in guest-physical order.
pub struct Slabbed {
    ram: Ram,
    stretches: Vec<Stretch>,
    scan: PageScan,
    /// How many mappings there may be, and how many more.
    most: u64,
    left: u64,
    slab_mappings: u64,
}

struct Stretch {
    first: u64,
    pages: u64,
    gpa: u64,
    hva: u64,
    mergeable: Mergeable,
    /// Its number among [`Ram::in_flight`].
    number: usize,
}

impl Slabbed {
    /// Makes `ram` mergeable; it must be anonymous memory.
    pub fn new(ram: &Ram) -> io::Result<Self> {
        if ram.backing() != Backing::Anonymous {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "guest RAM is not anonymous memory"));
        }
        let (mut stretches, mut first) = (Vec::new(), 0);
        for (number, extent) in ram.extents().into_iter().enumerate() {
            let pages = extent.bytes / PAGE_BYTES;
            stretches.push(Stretch {
                first,
                pages,
                gpa: extent.gpa,
                hva: extent.hva,
                mergeable: ram.mergeable(&extent)?,
                number,
            });
            first += pages;
        }
        let most = most()?;
        let (scan, left) = (PageScan::open_self()?, most.saturating_sub(Maps::own()?.count));
        Ok(Self { ram: ram.clone(), stretches, scan, most, left, slab_mappings: 0 })
    }

    /// Where in guest-physical memory page number `page` is.
    pub fn gpa(&self, page: u64) -> Option<u64> {
        let stretch = self.stretches.iter().find(|s| (s.first..s.first + s.pages).contains(&page))?;
        Some(stretch.gpa + (page - stretch.first) * PAGE_BYTES)
    }

    /// See [`Mergeable::merge`].
    pub fn merge(&mut self, run: (u64, u64), from: (&Slab, u64)) -> Result<(), Refusal> {
        let with = With::Slab { first: from.1 };
        self.remap(run, with, |stretch, run, in_flight| stretch.mergeable.merge(run, from, in_flight))
    }

    /// See [`Mergeable::drop_zeros`].
    pub fn drop_zeros(&mut self, page: u64, pages: u64) -> Result<(), Refusal> {
        self.remap((page, pages), With::Zeros, |stretch, run, in_flight| {
            stretch.mergeable.drop_zeros(run, in_flight)
        })
    }

    fn remap(
        &mut self,
        (page, pages): (u64, u64),
        with: With,
        work: impl FnOnce(&mut Stretch, (u64, u64), &InFlight) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let Self { ram, stretches, left, .. } = self;
        let stretch = stretches.iter_mut().find(|s| (s.first..s.first + s.pages).contains(&page));
        let stretch = stretch.ok_or(Refusal::Run)?;
        let in_flight = ram.in_flight().get(stretch.number).ok_or(Refusal::Run)?;
        // At worst the run is a mapping of its own, and what was around it is two.
        *left = left.checked_sub(2).ok_or(Refusal::Mappings)?;
        // Taken before anything is frozen. A device that gives pages back waits here: else it could drop them between our looking
        // and our mapping, and what it dropped would come back.
        let mut placement = ram.placement();
        placement.slabs = true;
        let run = (page - stretch.first, pages);
        // It is compared with the lock in our hand, and frozen by another userfaultfd.
        let hva = stretch.hva + run.0.saturating_mul(PAGE_BYTES);
        let settled = placement.settle(hva as usize, pages.saturating_mul(PAGE_BYTES) as usize);
        // What was refused is mapped as before.
        settled
            .map_err(Refusal::Freeze)
            .and_then(|()| work(stretch, run, in_flight))
            .inspect_err(|_| *left += 2)?;
        placement.set_slab(page, pages, matches!(with, With::Slab { .. }));
        ram.merges().add(stretch.gpa + run.0 * PAGE_BYTES, pages, with);
        Ok(())
    }

    /// Adds to `found` those of `pages` that have frames which are this guest's alone, adjacent ones together. `mixed`
    /// says that some of them may be those of slabs: to tell takes longer.
    pub fn private(&mut self, pages: Range<u64>, mixed: bool, found: &mut Vec<Private>) -> io::Result<()> {
        let Self { stretches, scan, .. } = self;
        for stretch in stretches.iter() {
            let (first, end) = (pages.start.max(stretch.first), pages.end.min(stretch.first + stretch.pages));
            if first < end {
                let hva = |page: u64| stretch.hva + (page - stretch.first) * PAGE_BYTES;
                let hvas = hva(first)..hva(end);
                let each = |run: Pages| {
                    let page = stretch.first + (run.hva - stretch.hva) / PAGE_BYTES;
                    found.push(Private { page, pages: run.pages, huge: run.categories.huge() });
                };
                match mixed {
                    true => scan.anonymous(hvas, each)?,
                    false => scan.frames(hvas, each)?,
                }
            }
        }
        Ok(())
    }

    /// All pages that are those of slabs now, ascending. Also counts anew how many mappings there may be. It takes as long as there are
    /// mappings and pages of slabs: to be called now and then.
    pub fn mapped(&mut self) -> io::Result<Vec<Mapped>> {
        let maps = Maps::own()?;
        self.left = self.most.saturating_sub(maps.count);
        let Self { stretches, scan, .. } = self;
        let mut found = Vec::new();
        self.slab_mappings = 0;
        for stretch in stretches.iter() {
            let end = stretch.hva + stretch.pages * PAGE_BYTES;
            // What is outside is a slab's own view of itself.
            let inside = |m: &&SlabMapping| (stretch.hva..end).contains(&m.hvas.start);
            let mut mappings =
                maps.slabs.iter().filter(inside).inspect(|_| self.slab_mappings += 1).peekable();
            // One walk for all of them: they may be many, and what is found in one piece may be of several.
            scan.files(stretch.hva..end, |run| {
                let (mut hva, run_end) = (run.hva, run.hva + run.pages * PAGE_BYTES);
                while hva < run_end {
                    while mappings.next_if(|m| m.hvas.end <= hva).is_some() {}
                    let Some(mapping) = mappings.peek().filter(|m| m.hvas.start < run_end) else { return };
                    hva = hva.max(mapping.hvas.start);
                    let piece_end = run_end.min(mapping.hvas.end);
                    found.push(Mapped {
                        inode: mapping.inode,
                        slab_page: mapping.slab_page(hva),
                        page: stretch.first + (hva - stretch.hva) / PAGE_BYTES,
                        pages: (piece_end - hva) / PAGE_BYTES,
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
    /// The first.
    pub page: u64,
    /// How many.
    pub pages: u64,
    /// The host has them in a huge page.
    pub huge: bool,
}

/// Adjacent pages that are adjacent pages of a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The slab's file.
    pub inode: u64,
    /// The first of its pages.
    pub slab_page: u64,
    /// The first of the guest's.
    pub page: u64,
    /// How many.
    pub pages: u64,
}

/// Mappings that may be used for slabs.
fn most() -> io::Result<u64> {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count")?.trim().parse().unwrap_or(0);
    Ok(u64::saturating_sub(most, SPARE_MAPPINGS))
}

#[cfg(test)]
mod tests;
