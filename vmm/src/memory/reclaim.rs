//! Gives guest pages back to the host, so that they read as zeros when the guest touches them again.
//!
//! What does that depends on what backs the page: dropping it from the page table (anonymous memory, merged by the
//! kernel or not), a hole in the file (memfd: dropping would bring the same bytes back), or, for less than a
//! whole huge page, nothing but writing the zeros.
#![expect(unsafe_code, reason = "drops guest pages that a device has checked to be RAM")]

use std::io;
use std::ops::Range;

use devices::reclaim::{Gpa, Reclaim};

use super::PAGE_BYTES;
use super::ram::{Backing, HUGE_PAGE_BYTES, Ram};

impl Reclaim for Ram {
    fn discard(&self, range: Range<Gpa>) -> io::Result<()> {
        let place = self.place(&range).ok_or(io::ErrorKind::InvalidInput)?;
        match self.backing() {
            Backing::Anonymous => drop_pages(place.hva, place.bytes),
            Backing::Memfd => self.punch(place.file_offset, place.bytes),
            Backing::Hugetlb => {
                let end = place.hva + place.bytes;
                let whole =
                    place.hva.next_multiple_of(HUGE_PAGE_BYTES)..end / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
                if whole.start >= whole.end {
                    return write_zeros(place.hva, end);
                }
                write_zeros(place.hva, whole.start)?;
                drop_pages(whole.start, whole.end - whole.start)?;
                write_zeros(whole.end, end)
            }
        }
    }
}

fn drop_pages(hva: usize, bytes: usize) -> io::Result<()> {
    // SAFETY: `Ram::place` found the range inside guest RAM, which is never unmapped; the pages' contents are the guest's
    // to give up, and every access of ours to guest RAM bears any content.
    match unsafe { libc::madvise(hva as *mut libc::c_void, bytes, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Zeros [start, end), a part of one huge page, unless it has no frame: then it reads as zeros, and writing would get it one.
fn write_zeros(start: usize, end: usize) -> io::Result<()> {
    let mut resident = 0u8;
    for hva in (start..end).step_by(PAGE_BYTES as usize) {
        // SAFETY: one page of guest RAM is asked about, which takes one byte.
        if unsafe { libc::mincore(hva as *mut libc::c_void, PAGE_BYTES as usize, &mut resident) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if resident & 1 != 0 {
            // SAFETY: the page is guest RAM, mapped writable for the life of the process. The guest may write to it at the same
            // time; it has given the page up, so either content will do.
            unsafe { std::ptr::write_bytes(hva as *mut u8, 0, PAGE_BYTES as usize) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
