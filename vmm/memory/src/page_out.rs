//! Pushes pages of guest RAM out to the host's swap (MADV_PAGEOUT), round and round as a clock's hand goes.
#![expect(unsafe_code, reason = "advises the kernel about guest RAM")]

use std::io;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::PAGE_BYTES;
use super::pagemap::{Pagemap, PagemapError};
use super::ram::{Backing, Ram};
use super::scan::{PageScan, Pages};
use super::written::WORD_PAGES;

/// Pages looked at, and pushed out, with the lock taken once: whoever gives pages back or merges them waits so long.
const BATCH_PAGES: u64 = 256;

/// Why no pages were pushed out.
#[derive(Debug, Error)]
pub enum PageOutError {
    /// There is nowhere to push them.
    #[error(
        "no page can be pushed out: this host has no active swap (`swapon --show`); make some, on zram for instance"
    )]
    NoSwap,
    /// It is full.
    #[error("no page can be pushed out: all {} MiB of this host's swap are used", kib >> 10)]
    SwapFull {
        /// How much there is, in KiB.
        kib: u64,
    },
    /// What there is could not be read.
    #[error("/proc/swaps cannot be read")]
    Swaps(#[source] io::Error),
    /// Only anonymous memory is looked after.
    #[error("guest RAM is not anonymous memory: leave out `--backing`")]
    NotAnonymous,
    /// The page table could not be read.
    #[error("cannot see which pages of guest RAM have frames")]
    Scan(#[source] io::Error),
    /// Nor after.
    #[error("cannot see which pages of guest RAM are on swap")]
    Pagemap(#[from] PagemapError),
}

/// What came of it. Pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagedOut {
    /// Pages that the kernel was advised to push out.
    pub advised_pages: u64,
    /// Those of them that were on swap right after.
    pub swapped_pages: u64,
    /// Pages passed over because they were written lately, or are in the balloon.
    pub kept_pages: u64,
    /// All of RAM was looked at; else time was up or there were enough.
    pub full_round: bool,
}

/// Whether this host has swap with room in it.
pub fn has_swap() -> Result<(), PageOutError> {
    let swaps = std::fs::read_to_string("/proc/swaps").map_err(PageOutError::Swaps)?;
    match swap_kib(&swaps) {
        (0, _) => Err(PageOutError::NoSwap),
        (kib, used) if used >= kib => Err(PageOutError::SwapFull { kib }),
        _ => Ok(()),
    }
}

/// How much swap there is, and how much of it is used, from the text of `/proc/swaps`.
fn swap_kib(swaps: &str) -> (u64, u64) {
    let sizes = swaps.lines().skip(1).filter_map(|line| {
        // A file's name may have spaces in it (as \040, but who knows); the numbers are at the end.
        let mut fields = line.split_ascii_whitespace().rev();
        let (used, size) = (fields.nth(1)?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
        Some((size, used))
    });
    sizes.fold((0, 0), |(size, used), one| (size + one.0, used + one.1))
}

/// Where the hand of one VM's clock is.
#[derive(Debug, Default)]
pub struct Clock {
    next_page: u64,
}

impl Clock {
    /// Pushes out up to `pages` pages of `ram` from the hand on, once round at the most and not after `until`. Pages whose bit is set in
    /// `keep`, a bitmap as [`super::written::WriteLog::read`] gives it, are passed over. Neither pages of slabs nor parked ones are touched,
    /// for they are not found: what is found and replaced waits for the same lock.
    pub fn page_out(
        &mut self,
        ram: &Ram,
        pages: u64,
        keep: &[u64],
        until: Instant,
    ) -> Result<PagedOut, PageOutError> {
        if ram.backing() != Backing::Anonymous {
            return Err(PageOutError::NotAnonymous);
        }
        has_swap()?;
        let mut scan = PageScan::open_self().map_err(PageOutError::Scan)?;
        let (mut pagemap, mut entries) = (Pagemap::open_self()?, Vec::new());
        let all = ram.bytes() / PAGE_BYTES;
        let (mut done, mut looked) = (PagedOut::default(), 0);
        while done.advised_pages < pages && looked < all && Instant::now() < until {
            let first = self.next_page % all;
            let Some((hva, left)) = place(ram, first) else { break };
            let count = left.min(BATCH_PAGES).min(all - looked);
            let mut runs: Vec<Pages> = Vec::new();
            let placement = ram.placement();
            scan.anonymous(hva..hva + count * PAGE_BYTES, |run| runs.push(run))
                .map_err(PageOutError::Scan)?;
            let (mut wanted, mut end) = (pages - done.advised_pages, first + count);
            'batch: for run in runs {
                let page = first + (run.hva - hva) / PAGE_BYTES;
                for (from, count, kept) in stretches(keep, page, run.pages) {
                    if kept {
                        done.kept_pages += count;
                        continue;
                    }
                    if wanted == 0 {
                        end = from;
                        break 'batch;
                    }
                    let (hva, count) = (hva + (from - first) * PAGE_BYTES, count.min(wanted));
                    advise(hva, count);
                    pagemap.read(hva, count as usize, &mut entries)?;
                    done.advised_pages += count;
                    done.swapped_pages += entries.iter().filter(|entry| entry.swapped()).count() as u64;
                    wanted -= count;
                    end = if wanted == 0 { from + count } else { end };
                }
            }
            drop(placement);
            looked += end - first;
            self.next_page = end;
        }
        done.full_round = looked >= all;
        Ok(done)
    }
}

/// Where page number `page` of RAM is, and how many follow it in its stretch, itself included.
fn place(ram: &Ram, page: u64) -> Option<(u64, u64)> {
    let mut first = 0;
    for extent in ram.extents() {
        let pages = extent.bytes / PAGE_BYTES;
        if page < first + pages {
            return Some((extent.hva + (page - first) * PAGE_BYTES, first + pages - page));
        }
        first += pages;
    }
    None
}

/// Divides pages into stretches of those whose bit is set and those whose is not: the first of each, how many, and which.
fn stretches(bits: &[u64], page: u64, pages: u64) -> Vec<(u64, u64, bool)> {
    let is_set = |page: u64| {
        let word = bits.get((page / WORD_PAGES) as usize).copied().unwrap_or(0);
        word >> (page % WORD_PAGES) & 1 != 0
    };
    let mut found: Vec<(u64, u64, bool)> = Vec::new();
    for page in page..page + pages {
        match found.last_mut() {
            Some((_, count, set)) if *set == is_set(page) => *count += 1,
            _ => found.push((page, 1, is_set(page))),
        }
    }
    found
}

/// Sets the bits of the pages of `ram` in the range of guest-physical addresses, which are whole pages.
pub fn keep_range(ram: &Ram, keep: &mut [u64], gpas: std::ops::Range<u64>) {
    let mut first = 0;
    for extent in ram.extents() {
        let (start, end) = (gpas.start.max(extent.gpa), gpas.end.min(extent.gpa + extent.bytes));
        for gpa in (start..end.max(start)).step_by(PAGE_BYTES as usize) {
            let page = first + (gpa - extent.gpa) / PAGE_BYTES;
            if let Some(word) = keep.get_mut((page / WORD_PAGES) as usize) {
                *word |= 1 << (page % WORD_PAGES);
            }
        }
        first += extent.bytes / PAGE_BYTES;
    }
}

fn advise(hva: u64, pages: u64) {
    // SAFETY: the range is guest RAM, which is never unmapped; the advice keeps its contents. What it did the page table tells.
    unsafe { libc::madvise(hva as *mut libc::c_void, (pages * PAGE_BYTES) as usize, libc::MADV_PAGEOUT) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_added_up() {
        let none = "Filename\tType\tSize\tUsed\tPriority\n";
        assert_eq!(swap_kib(none), (0, 0));
        let two =
            format!("{none}/dev/zram0   partition\t262140\t\t512\t\t100\n/a\\040b  file\t1000\t\t0\t\t-2\n");
        assert_eq!(swap_kib(&two), (263_140, 512));
    }

    #[test]
    fn pages_to_keep_are_told_from_others() {
        let ram = Ram::new((3 << 30) + (16 << 20), Backing::Anonymous).unwrap();
        let mut keep = vec![0; (ram.bytes() / PAGE_BYTES / WORD_PAGES) as usize];
        keep_range(&ram, &mut keep, 0x3000..0x5000);
        keep_range(&ram, &mut keep, (4 << 30)..(4 << 30) + 0x1000);
        assert_eq!(stretches(&keep, 1, 5), [(1, 2, false), (3, 2, true), (5, 1, false)]);
        let above = 3 << 18;
        assert_eq!(
            stretches(&keep, above - 1, 3),
            [(above - 1, 1, false), (above, 1, true), (above + 1, 1, false)]
        );
        assert_eq!(stretches(&[], 7, 2), [(7, 2, false)]);
        assert_eq!(place(&ram, above).map(|(_, left)| left), Some(4096));
        assert!(place(&ram, above + 4096).is_none());
    }

    #[test]
    fn without_swap_it_says_so() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let until = Instant::now() + std::time::Duration::from_secs(1);
        match has_swap() {
            Ok(()) => assert!(Clock::default().page_out(&ram, 1, &[], until).is_ok()),
            Err(_) => {
                let error = Clock::default().page_out(&ram, 1, &[], until).unwrap_err();
                assert!(error.to_string().contains("swap"), "{error}");
            }
        }
    }
}
