//! Guest RAM whose pages may be those of slabs: what merges them, and what keeps merging and giving back apart.

use std::io;

use super::PAGE_BYTES;
use super::in_flight::InFlight;
use super::merge_log::With;
use super::merge_run::{Mergeable, Refusal};
use super::pagemap::Pagemap;
use super::ram::{Backing, Ram};
use super::slab::Slab;

/// Mappings that are left to the rest of the process.
const SPARE_MAPPINGS: u64 = 8192;

/// All of a VM's RAM. Its pages are counted through the stretches in guest-physical order.
pub struct Slabbed {
    ram: Ram,
    stretches: Vec<Stretch>,
    /// How many mappings more there may be.
    mappings: u64,
}

struct Stretch {
    first: u64,
    pages: u64,
    gpa: u64,
    mergeable: Mergeable,
    /// No device of ours pins guest pages; one that does gets this to mark them in.
    in_flight: InFlight,
}

impl Slabbed {
    /// Makes `ram` mergeable; it must be anonymous memory.
    pub fn new(ram: &Ram) -> io::Result<Self> {
        if ram.backing() != Backing::Anonymous {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "guest RAM is not anonymous memory"));
        }
        let (mut stretches, mut first) = (Vec::new(), 0);
        for extent in ram.extents() {
            let pages = extent.bytes / PAGE_BYTES;
            stretches.push(Stretch {
                first,
                pages,
                gpa: extent.gpa,
                mergeable: ram.mergeable(&extent)?,
                in_flight: InFlight::new(extent.bytes),
            });
            first += pages;
        }
        Ok(Self { ram: ram.clone(), stretches, mappings: budget()? })
    }

    /// Where in guest-physical memory page number `page` is.
    pub fn gpa(&self, page: u64) -> Option<u64> {
        let stretch = self.stretches.iter().find(|s| (s.first..s.first + s.pages).contains(&page))?;
        Some(stretch.gpa + (page - stretch.first) * PAGE_BYTES)
    }

    /// See [`Mergeable::merge`].
    pub fn merge(&mut self, run: (u64, u64), from: (&Slab, u64)) -> Result<(), Refusal> {
        let with = With::Slab { first: from.1 };
        self.remap(run, with, |stretch, run| stretch.mergeable.merge(run, from, &stretch.in_flight))
    }

    /// See [`Mergeable::drop_zeros`].
    pub fn drop_zeros(&mut self, page: u64, pages: u64) -> Result<(), Refusal> {
        self.remap((page, pages), With::Zeros, |stretch, run| {
            stretch.mergeable.drop_zeros(run, &stretch.in_flight)
        })
    }

    fn remap(
        &mut self,
        (page, pages): (u64, u64),
        with: With,
        work: impl FnOnce(&mut Stretch, (u64, u64)) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let Self { ram, stretches, mappings } = self;
        let stretch = stretches.iter_mut().find(|s| (s.first..s.first + s.pages).contains(&page));
        let stretch = stretch.ok_or(Refusal::Run)?;
        // At worst the run is a mapping of its own, and what was around it is two.
        *mappings = mappings.checked_sub(2).ok_or(Refusal::Mappings)?;
        // Taken before anything is frozen. A device that gives pages back waits here: else it could drop them between our looking
        // and our mapping, and what it dropped would come back.
        let mut slabs = ram.slabs();
        *slabs = true;
        let run = (page - stretch.first, pages);
        work(stretch, run)?;
        ram.merges().add(stretch.gpa + run.0 * PAGE_BYTES, pages, with);
        Ok(())
    }

    /// How many pages are those of slabs now. Also counts anew how many mappings there may be.
    pub fn pages(&mut self) -> io::Result<u64> {
        self.mappings = budget()?;
        let (mut pagemap, mut entries) = (Pagemap::open_self().map_err(io::Error::other)?, Vec::new());
        let mut pages = 0;
        for extent in self.ram.extents() {
            let count = (extent.bytes / PAGE_BYTES) as usize;
            pagemap.read(extent.hva, count, &mut entries).map_err(io::Error::other)?;
            pages += entries.iter().filter(|entry| entry.file_or_shared()).count() as u64;
        }
        Ok(pages)
    }
}

/// Mappings that this process may have and does not need for anything else.
fn budget() -> io::Result<u64> {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count")?.trim().parse().unwrap_or(0);
    let used = std::fs::read_to_string("/proc/self/maps")?.lines().count() as u64;
    Ok(u64::saturating_sub(most, used + SPARE_MAPPINGS))
}

#[cfg(test)]
mod tests;
