//! Checks the count of frames by other means: the kernel's own books of each process, and every
//! frame looked at again.
//!
//! [`super::frames`] counts page table entries by class. Here the same pages are counted by
//! `/proc/PID/smaps`, which the kernel adds up by itself; and the frames under them are listed one
//! by one and held against `/proc/kpagecount`. What the two ways disagree on is the residue.
//! Running guests change between two reads, so theirs is not 0 for that reason alone.

use serde::{Deserialize, Serialize};

use super::frames::{Frames, Pages};
use super::{MeasureError, Space, frames};
use kernel_view::pagemap::{FrameTable, Pfn};
use kernel_view::smaps::RangePages;
use memory::Extent;

/// Reads until nothing changes between two of them; the last of these reads counts anyway.
const MAX_LOOKS: u32 = 10;
/// Between two reads, so that merging in flight completes while guests are paused.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
/// Frames looked up at a time.
const CHUNK_FRAMES: usize = 16 * 1024;

/// The result of an audit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    pub guests: Vec<GuestAudit>,
    /// Frames as the ledger has them.
    pub frames: u64,
    /// Frames listed one by one. None: this user may not see frame numbers.
    pub frames_listed: Option<u64>,
    /// Frames that the kernel counts fewer mappings of than are found here.
    pub miscounted_frames: u64,
    /// Everything that does not agree, in pages.
    pub residue_pages: u64,
    /// Looks that were needed until nothing moved.
    pub looks: u32,
    /// Nothing moved during the last look.
    pub still: bool,
}

/// One guest, by both ways of counting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAudit {
    pub name: String,
    /// Pages on frames, by the page table. The zero frame does not count.
    pub resident: u64,
    /// The same, by the kernel's books.
    pub resident_by_kernel: u64,
    /// Pages on swap, by the page table.
    pub swapped: u64,
    /// The same, by the kernel's books.
    pub swapped_by_kernel: u64,
    /// Their difference.
    pub residue_pages: u64,
}

/// Audits `spaces`; returns the count it audited, too.
pub fn audit(spaces: &[Space]) -> Result<(Frames, Audit), MeasureError> {
    let mut before = frames::measure(spaces)?;
    let mut look = 0;
    loop {
        look += 1;
        let books = spaces.iter().map(by_kernel).collect::<Result<Vec<_>, _>>()?;
        let listed = list(spaces)?;
        let after = frames::measure(spaces)?;
        let still = classes(&before) == classes(&after) && before.frames == after.frames;
        if still || look == MAX_LOOKS {
            let audit = compare(&after, &books, listed.as_ref(), look, still);
            return Ok((after, audit));
        }
        before = after;
        std::thread::sleep(PAUSE);
    }
}

fn classes(frames: &Frames) -> Vec<Pages> {
    frames.guests.iter().map(|guest| guest.pages).collect()
}

fn compare(frames: &Frames, books: &[RangePages], listed: Option<&Listed>, looks: u32, still: bool) -> Audit {
    let mut audit = Audit {
        frames: frames.frames,
        frames_listed: listed.map(|l| l.frames),
        miscounted_frames: listed.map_or(0, |l| l.miscounted),
        looks,
        still,
        ..Audit::default()
    };
    for (guest, books) in frames.guests.iter().zip(books) {
        let resident = guest.pages.private + guest.pages.shared;
        let swapped = guest.pages.swapped;
        let residue_pages = resident.abs_diff(books.resident) + swapped.abs_diff(books.swapped);
        audit.residue_pages += residue_pages;
        audit.guests.push(GuestAudit {
            name: guest.name.clone(),
            resident,
            resident_by_kernel: books.resident,
            swapped,
            swapped_by_kernel: books.swapped,
            residue_pages,
        });
    }
    audit.residue_pages += audit.frames_listed.map_or(0, |listed| listed.abs_diff(frames.frames));
    audit.residue_pages += audit.miscounted_frames;
    audit
}

fn by_kernel(space: &Space) -> Result<RangePages, MeasureError> {
    let ranges: Vec<_> = space.extents.iter().map(Extent::hvas).collect();
    RangePages::of(space.pid, &ranges).map_err(|source| MeasureError::Books {
        guest: space.name.clone(),
        pid: space.pid,
        source,
    })
}

/// The frames under all present pages.
struct Listed {
    frames: u64,
    miscounted: u64,
}

/// None where frame numbers are hidden.
fn list(spaces: &[Space]) -> Result<Option<Listed>, MeasureError> {
    let Ok(mut table) = FrameTable::open() else { return Ok(None) };
    let (mut all, mut are_hidden) = (Vec::new(), false);
    for space in spaces {
        space.each_entry(|_, entry| match entry.pfn() {
            Some(frame) => all.push(frame),
            None => are_hidden |= entry.present(),
        })?;
        if are_hidden {
            return Ok(None);
        }
    }
    all.sort_unstable();
    let mut listed = Listed { frames: 0, miscounted: 0 };
    let (mut flags, mut counts) = (Vec::new(), Vec::new());
    // A group of equal numbers is one frame; frames are looked up in batches.
    let groups: Vec<&[Pfn]> = all.chunk_by(|a, b| a == b).collect();
    for batch in groups.chunks(CHUNK_FRAMES) {
        let frames: Vec<Pfn> = batch.iter().map(|group| group[0]).collect();
        table.flags(&frames, &mut flags).map_err(MeasureError::FrameTable)?;
        table.counts(&frames, &mut counts).map_err(MeasureError::FrameTable)?;
        for ((group, flags), count) in batch.iter().zip(&flags).zip(&counts) {
            if !flags.zero() {
                listed.frames += 1;
                listed.miscounted += u64::from(*count < group.len() as u64);
            }
        }
    }
    Ok(Some(listed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::GuestFrames;
    use memory::PAGE_BYTES;

    fn frames(private: u64, shared: u64, swapped: u64, frames: u64) -> Frames {
        let pages = Pages { total: 100, private, shared, swapped, ..Pages::default() };
        let guest = GuestFrames { name: "a".into(), pid: 1, pages, frames: 0.0, anonymous: private };
        Frames { guests: vec![guest], pages, frames, ..Frames::default() }
    }

    #[test]
    fn whatever_disagrees_is_residue() {
        let books = [RangePages { resident: 50, swapped: 3 }];
        let listed = |frames, miscounted| Some(Listed { frames, miscounted });
        let residue = |frames: &Frames, listed: Option<Listed>| {
            compare(frames, &books, listed.as_ref(), 1, true).residue_pages
        };
        assert_eq!(residue(&frames(40, 10, 3, 45), listed(45, 0)), 0);
        assert_eq!(residue(&frames(40, 10, 3, 45), None), 0);
        assert_eq!(residue(&frames(40, 12, 3, 45), None), 2);
        assert_eq!(residue(&frames(40, 10, 0, 45), None), 3);
        assert_eq!(residue(&frames(40, 10, 3, 45), listed(44, 2)), 3);
    }

    #[test]
    fn our_own_memory_agrees() {
        let bytes = 32 << 20;
        let area = memory::ram::Ram::new(bytes, memory::ram::Backing::Anonymous).unwrap();
        let extents = area.extents();
        let guest = area.memory();
        use vm_memory::{Bytes, GuestAddress};
        for page in 0..100u64 {
            guest.write_obj(page, GuestAddress(page * 3 * PAGE_BYTES)).unwrap();
        }
        let space = Space { name: "us".into(), pid: std::process::id(), extents };
        let (_, audit) = audit(&[space]).unwrap();
        assert_eq!((audit.residue_pages, audit.guests[0].resident >= 100, audit.still), (0, true, true));
    }
}
