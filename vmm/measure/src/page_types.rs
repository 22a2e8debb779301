//! What a guest's kernel uses each page of its memory for: from what its agent says, or from a copy
//! of its `/proc/kpageflags`.

use std::io::{BufReader, Read};
use std::path::Path;

use guest::page_type::PageType;
use guest::protocol::frame_runs;
use serde::{Deserialize, Serialize};

pub use super::error::PageTypesError;
use super::{MeasureError, Space};
use memory::PAGE_BYTES;
use memory::layout::HOLE_END;
use os::named_file;

/// How many types there are.
pub const TYPES: usize = PageType::ALL.len();
/// Bytes of an entry of /proc/kpageflags.
const ENTRY: usize = 8;
/// If more than this part of a guest's RAM is holes in its map, the map is another guest's, or RAM
/// lies elsewhere.
const MOST_HOLES: u64 = 16;

/// A stretch of a guest's RAM: its place in guest-physical memory, in frames. Stretches are in the
/// order in which their pages are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram {
    /// Its first guest frame.
    pub first: u64,
    pub pages: u64,
}

/// RAM as PC machines have it: `low_bytes` of it from 0 on, the rest from 4 GiB on. `stretches` are
/// the lengths in bytes of the stretches of memory in which it is found, in the order in which they
/// are measured; if there are several, the low memory is one of them, and the others follow each
/// other as they stand.
///
/// # Errors
/// None of several is as long as the low memory.
pub fn pc_ram(who: &str, stretches: &[u64], low_bytes: u64) -> Result<Vec<Ram>, PageTypesError> {
    let total: u64 = stretches.iter().sum();
    let (low, mut next) = (low_bytes / PAGE_BYTES, HOLE_END / PAGE_BYTES);
    if let [_] = stretches {
        let pages = total / PAGE_BYTES;
        let below = Ram { first: 0, pages: pages.min(low) };
        let above = Ram { first: next, pages: pages - below.pages };
        return Ok([below, above].into_iter().filter(|ram| ram.pages > 0).collect());
    }
    let Some(at) = stretches.iter().position(|bytes| *bytes == low_bytes) else {
        return Err(PageTypesError::Order { who: who.into(), stretches: stretches.len(), low_bytes });
    };
    let place = |(n, bytes): (usize, &u64)| {
        let pages = bytes / PAGE_BYTES;
        let first = if n == at { 0 } else { next };
        next += if n == at { 0 } else { pages };
        Ram { first, pages }
    };
    Ok(stretches.iter().enumerate().map(place).collect())
}

/// The type of each page, in the order in which they are measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageTypes(Vec<PageType>);

impl PageTypes {
    /// The type of page number `page`.
    pub fn of(&self, page: u64) -> PageType {
        self.0.get(page as usize).copied().unwrap_or(PageType::Hole)
    }

    /// Pages of each type.
    pub fn pages(&self) -> [u64; TYPES] {
        self.0.iter().fold([0; TYPES], |mut pages, kind| {
            pages[kind.code()] += 1;
            pages
        })
    }

    /// From the runs of frames, beginning with guest frame 0, that a guest's agent reports. Frames
    /// that it does not report are holes.
    ///
    /// # Errors
    /// They are not understood.
    pub fn of_runs(guest: &str, runs: &str, ram: &[Ram]) -> Result<Self, PageTypesError> {
        let mut types = Self::holes(ram);
        let mut frame = 0u64;
        for run in frame_runs(runs) {
            let (kind, frames) =
                run.map_err(|source| PageTypesError::Said { guest: guest.into(), source })?;
            types.set(ram, frame, frame.saturating_add(frames.into()), kind);
            frame = frame.saturating_add(frames.into());
        }
        Ok(types)
    }

    /// From a copy of the guest's `/proc/kpageflags`, with RAM as [`pc_ram`] says for `low_bytes`.
    ///
    /// # Errors
    /// It is no such copy, or does not fit: it ends too early, has memory in use where the guest
    /// has no RAM, or none where it has.
    pub fn of_flags(path: &Path, ram: &[Ram], low_bytes: u64) -> Result<Self, PageTypesError> {
        let read = |source| PageTypesError::Read { path: path.into(), source };
        let (file, _) = named_file::regular(path).map_err(read)?;
        let bytes = file.metadata().map_err(read)?.len();
        if !bytes.is_multiple_of(ENTRY as u64) {
            return Err(PageTypesError::Unaligned { path: path.into(), bytes });
        }
        let (frames, end) =
            (bytes / ENTRY as u64, ram.iter().map(|ram| ram.first + ram.pages).max().unwrap_or(0));
        if frames < end {
            return Err(PageTypesError::Short { path: path.into(), frames, end, low_bytes });
        }
        let mut types = Self::holes(ram);
        let mut entries = BufReader::with_capacity(1 << 19, file);
        for frame in 0..frames {
            let mut entry = [0; ENTRY];
            entries.read_exact(&mut entry).map_err(read)?;
            let kind = PageType::from_flags(u64::from_le_bytes(entry));
            // Reserved frames may be anywhere: firmware, devices, the rest of a section of the
            // kernel's map.
            let is_used = !matches!(kind, PageType::Hole | PageType::Kernel);
            if !types.set(ram, frame, frame + 1, kind) && is_used {
                return Err(PageTypesError::Outside { path: path.into(), frame, kind, low_bytes });
            }
        }
        let (holes, pages) = (types.pages()[PageType::Hole.code()], types.0.len() as u64);
        if holes * MOST_HOLES > pages {
            return Err(PageTypesError::Holes { path: path.into(), holes, pages, low_bytes });
        }
        Ok(types)
    }

    fn holes(ram: &[Ram]) -> Self {
        Self(vec![PageType::Hole; ram.iter().map(|ram| ram.pages).sum::<u64>() as usize])
    }

    /// Sets the type of those pages that are frames `from..to`; says whether there are any.
    fn set(&mut self, ram: &[Ram], from: u64, to: u64, kind: PageType) -> bool {
        let (mut before, mut any) = (0, false);
        for Ram { first, pages } in ram {
            let (start, end) = (from.clamp(*first, first + pages), to.clamp(*first, first + pages));
            let here = (before + start - first) as usize..(before + end - first) as usize;
            any |= !here.is_empty();
            if let Some(pages) = self.0.get_mut(here) {
                pages.fill(kind);
            }
            before += pages;
        }
        any
    }

    /// Pages of each type that are not alone on their frame, those on the zero frame among them: by
    /// the page table of the process that has them.
    ///
    /// # Errors
    /// The process is gone.
    pub fn shared(&self, space: &Space) -> Result<[u64; TYPES], MeasureError> {
        let (mut shared, mut page) = ([0; TYPES], 0);
        space.each_entry(|_, entry| {
            if entry.present() && !entry.exclusive() {
                shared[self.of(page).code()] += 1;
            }
            page += 1;
        })?;
        Ok(shared)
    }
}

/// The contents of the pages of one type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypeCounts {
    /// Pages of this type, in memory or not.
    pub pages: u64,
    /// Of those that were read: pages of zeros.
    pub zero: u64,
    /// Pages whose content stands earlier in the same guest.
    pub self_duplicates: u64,
    /// Pages whose content was first seen in another guest, and not before in this one.
    pub cross_duplicates: u64,
    /// Pages that had their content first.
    pub distinct: u64,
    /// Pages that are not alone on their frame now; 0 for files.
    pub shared_now: u64,
}

/// Whether a page holds a content that was seen before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The first page with its content.
    First,
    /// It stands earlier in the same guest.
    Within,
    /// It stands in another guest, and not earlier in this one.
    Between,
}

impl TypeCounts {
    /// Counts a page that is not of zeros.
    pub fn count(&mut self, seen: Seen) {
        match seen {
            Seen::First => self.distinct += 1,
            Seen::Within => self.self_duplicates += 1,
            Seen::Between => self.cross_duplicates += 1,
        }
    }

    /// Pages that were read.
    pub fn present(&self) -> u64 {
        self.zero + self.self_duplicates + self.cross_duplicates + self.distinct
    }

    /// Adds those of another guest.
    pub fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.self_duplicates += other.self_duplicates;
        self.cross_duplicates += other.cross_duplicates;
        self.distinct += other.distinct;
        self.shared_now += other.shared_now;
    }
}

#[cfg(test)]
#[path = "page_types_tests.rs"]
mod tests;
