//! Gives guest pages back to the host, so that they read as zeros when the guest touches them
//! again.
//!
//! What does that depends on what backs the page: dropping it from the page table (anonymous
//! memory, merged by the kernel or not), a hole in the file (memfd: dropping would bring the same
//! bytes back), or, for less than a whole huge page, nothing but writing the zeros.
#![expect(unsafe_code, reason = "drops many ranges of guest pages by one system call")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use devices::reclaim::Reclaim;
use rustix::process::PidfdFlags;

use super::merge_log::With;
use super::ram::{Backing, GuestRange, HUGE_PAGE_BYTES, Ram};
use super::resident::page_count;
use super::{Gpa, PAGE, PAGE_BYTES, PageNo, PageRange};

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
        let range = self.range_at(&range).ok_or(io::ErrorKind::InvalidInput)?;
        let discarded = self.discard_range(range);
        // Also where it failed: it may have done a part.
        self.count_discards(range.pages().pages());
        self.discard_log().add(range.pages());
        discarded
    }
}

impl Ram {
    /// What is given back at once.
    fn unit_bytes(&self) -> u64 {
        match self.backing() {
            Backing::Hugetlb => HUGE_PAGE_BYTES,
            Backing::Anonymous | Backing::Memfd => PAGE_BYTES,
        }
    }

    /// Of `ranges` what can be given back, and what cannot, because it is a part of a huge page of
    /// the pool.
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

    fn discard_range(&self, range: GuestRange<'_>) -> io::Result<()> {
        match self.backing() {
            Backing::Anonymous => {
                let mut placement = self.placement();
                // What is parked would come back after.
                placement.settle(range)?;
                if !placement.slabs {
                    return range.drop_frames();
                }
                // What is a slab's would come back if it were only dropped.
                range.map_fresh()?;
                self.advice_anew().for_each(|advice| _ = range.advise(advice));
                placement.slab_pages.remove_range(range.pages());
                self.merges().add(range.gpa(), range.pages().pages(), With::Fresh);
                Ok(())
            }
            Backing::Memfd => self.punch(range),
            Backing::Hugetlb => {
                let pages = range.pages();
                // Stretches begin with a huge page, in RAM as in this process.
                const UNIT: u64 = HUGE_PAGE_BYTES / PAGE_BYTES;
                let first = PageNo(pages.first().0.next_multiple_of(UNIT)).min(pages.end());
                let end = PageNo(pages.end().0 / UNIT * UNIT).max(first);
                let part = |first, end| range.part(PageRange::between(first, end));
                part(pages.first(), first).map_or(Ok(()), GuestRange::zero)?;
                part(first, end).map_or(Ok(()), GuestRange::drop_frames)?;
                part(end, pages.end()).map_or(Ok(()), GuestRange::zero)
            }
        }
    }

    /// Drops ranges with one system call, which flushes the processors' translations once for all
    /// of them and not once for each. Returns how many of them are done; 0 on a kernel that does
    /// not let a process advise itself so (before 6.13).
    fn drop_batch(&self, ranges: &[Range<Gpa>]) -> usize {
        let mut placement = self.placement();
        let (false, Some(process)) = (placement.slabs, own_process()) else { return 0 };
        let mut places = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        for (place, range) in places.iter_mut().zip(ranges) {
            // One that is not RAM ends the batch; by itself it gets the error it deserves.
            let Some(found) = self.range_at(range) else { break };
            if placement.settle(found).is_err() {
                break;
            }
            *place = libc::iovec { iov_base: found.as_ptr(), iov_len: found.bytes() };
            self.discard_log().add(found.pages());
        }
        let count = places.iter().take_while(|place| place.iov_len > 0).count();
        // SAFETY: each of the first `count` entries is a range of guest RAM, of which any contents
        // may become any others; the descriptor is this process's own.
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
        self.count_discards((left / PAGE) as u64);
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

#[cfg(test)]
mod tests;
