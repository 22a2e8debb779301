//! Gives guest pages back to the host, so that they read as zeros when the guest touches them again.
//!
//! What does that depends on what backs the page: dropping it from the page table (anonymous memory, merged by the
//! kernel or not), a hole in the file (memfd: dropping would bring the same bytes back), or, for less than a
//! whole huge page, nothing but writing the zeros.
#![expect(unsafe_code, reason = "drops guest pages that a device has checked to be RAM")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use devices::reclaim::{Gpa, Reclaim};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::PidfdFlags;

use super::PAGE_BYTES;
use super::merge_log::With;
use super::ram::{Backing, HUGE_PAGE_BYTES, Place, Ram};
use super::resident::page_count;

/// Ranges in one system call (UIO_MAXIOV).
const BATCH: usize = 1024;

impl Reclaim for Ram {
    fn granule_bytes(&self) -> u64 {
        self.unit_bytes()
    }

    fn framed_bytes(&self, ranges: &[Range<Gpa>]) -> u64 {
        let all = ranges.iter().map(|range| range.end.0 - range.start.0).sum();
        match self.backing() {
            // Here it is a number that the pool shows, too.
            Backing::Hugetlb => {
                self.resident(ranges).map_or(all, |resident| page_count(&resident) * PAGE_BYTES)
            }
            Backing::Anonymous | Backing::Memfd => all,
        }
    }

    fn discard_all(&self, ranges: &[Range<Gpa>], failed: &mut dyn FnMut(&Range<Gpa>, io::Error)) {
        for batch in ranges.chunks(BATCH) {
            let dropped = match batch.len() {
                // One is as cheap by itself.
                2.. if self.backing() == Backing::Anonymous => self.drop_batch(batch),
                _ => 0,
            };
            for range in &batch[dropped..] {
                if let Err(error) = self.discard(range.clone()) {
                    failed(range, error);
                }
            }
        }
    }

    fn discard(&self, range: Range<Gpa>) -> io::Result<()> {
        let place = self.place(&range).ok_or(io::ErrorKind::InvalidInput)?;
        let discarded = self.discard_place(range.start, place);
        // Also where it failed: it may have done a part.
        self.count_discards(place.bytes as u64 / PAGE_BYTES);
        discarded
    }
}

impl Ram {
    /// What is given back at once.
    fn unit_bytes(&self) -> u64 {
        match self.backing() {
            Backing::Hugetlb => HUGE_PAGE_BYTES as u64,
            Backing::Anonymous | Backing::Memfd => PAGE_BYTES,
        }
    }

    /// Of `ranges` what can be given back, and what cannot, because it is a part of a huge page of the pool.
    pub fn units(&self, ranges: &[Range<Gpa>]) -> (Vec<Range<Gpa>>, Vec<Range<Gpa>>) {
        let unit = self.unit_bytes();
        let (mut whole, mut parts) = (Vec::new(), Vec::new());
        for range in ranges {
            let first = Gpa(range.start.0.next_multiple_of(unit)).min(range.end);
            let last = Gpa(range.end.0 / unit * unit).max(first);
            whole.push(first..last);
            parts.extend([range.start..first, last..range.end]);
        }
        whole.retain(|range| !range.is_empty());
        parts.retain(|range| !range.is_empty());
        (whole, parts)
    }

    fn discard_place(&self, gpa: Gpa, place: Place) -> io::Result<()> {
        match self.backing() {
            Backing::Anonymous => {
                let mut placement = self.placement();
                // What is parked would come back after.
                placement.settle(place.hva, place.bytes)?;
                if !placement.slabs {
                    return drop_pages(place.hva, place.bytes);
                }
                map_fresh(self, place.hva, place.bytes)?;
                if let Some(page) = self.page_number(place.hva) {
                    placement.set_slab(page, place.bytes as u64 / PAGE_BYTES, false);
                }
                self.merges().add(gpa.0, place.bytes as u64 / PAGE_BYTES, With::Fresh);
                Ok(())
            }
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

    /// Drops ranges with one system call, which flushes the processors' translations once for all of them and not
    /// once for each. Returns how many of them are done; 0 on a kernel that does not let a process advise itself so
    /// (before 6.13).
    fn drop_batch(&self, ranges: &[Range<Gpa>]) -> usize {
        let mut placement = self.placement();
        let (false, Some(process)) = (placement.slabs, own_process()) else { return 0 };
        let mut places = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        for (place, range) in places.iter_mut().zip(ranges) {
            // One that is not RAM ends the batch; by itself it gets the error it deserves.
            let Some(found) = self.place(range) else { break };
            if placement.settle(found.hva, found.bytes).is_err() {
                break;
            }
            *place = libc::iovec { iov_base: found.hva as *mut libc::c_void, iov_len: found.bytes };
        }
        let count = places.iter().take_while(|place| place.iov_len > 0).count();
        // SAFETY: as in `drop_pages`, for each of the first `count` entries, which are all initialised; the descriptor is this
        // process's own.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_raw_fd(),
                places.as_ptr(),
                count,
                libc::MADV_DONTNEED,
                0,
            )
        };
        // What it returns is how many bytes it got through, from the beginning.
        let Ok(mut left) = usize::try_from(done) else { return 0 };
        self.count_discards(left as u64 / PAGE_BYTES);
        let whole = |place: &&libc::iovec| {
            let fits = place.iov_len <= left;
            left = left.saturating_sub(place.iov_len);
            fits
        };
        places[..count].iter().take_while(whole).count()
    }
}

/// This process, as process_madvise names it.
fn own_process() -> Option<&'static OwnedFd> {
    static PROCESS: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let open = || rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).ok();
    PROCESS.get_or_init(open).as_ref()
}

fn drop_pages(hva: usize, bytes: usize) -> io::Result<()> {
    // SAFETY: `Ram::place` found the range inside guest RAM, which is never unmapped; the pages' contents are the guest's
    // to give up, and every access of ours to guest RAM bears any content.
    match unsafe { libc::madvise(hva as *mut libc::c_void, bytes, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts fresh memory in the place of pages that may be those of a slab, which would come back if they were only dropped.
fn map_fresh(ram: &Ram, hva: usize, bytes: usize) -> io::Result<()> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: as in `drop_pages`; the range is mapped all the time, and as it was before.
    unsafe { rustix::mm::mmap_anonymous(hva as *mut libc::c_void, bytes, prot, flags | MapFlags::FIXED)? };
    ram.advise_anew(hva, bytes);
    Ok(())
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
