//! Pages guest RAM out to the host's swap (MADV_PAGEOUT), in the order of a clock's hand.

use std::io;
use std::time::Instant;

use kernel_view::pagemap::{Pagemap, PagemapError};
use kernel_view::swaps::Swaps;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::page::to_usize;
use super::page_scan::{PageScan, Pages};
use super::page_set::PageSet;
use super::ram::{Advice, Backing, Ram};
use super::{PAGE_BYTES, PageNo, PageRange};

/// Pages looked at, and paged out, with the lock taken once: giving back and merging wait for it.
const BATCH_PAGES: u64 = 256;

/// Why no pages were paged out.
#[derive(Debug, Error)]
pub enum PageOutError {
    /// There is nowhere to push them.
    #[error(
        "no page can be paged out: this host has no active swap (`swapon --show`); make some, on zram for instance"
    )]
    NoSwap,
    /// It is full.
    #[error("no page can be paged out: all {} MiB of this host's swap are used", kib >> 10)]
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
    /// Pages that the kernel was advised to page out.
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
    match Swaps::read().map_err(PageOutError::Swaps)? {
        Swaps { kib: 0, .. } => Err(PageOutError::NoSwap),
        Swaps { kib, used_kib } if used_kib >= kib => Err(PageOutError::SwapFull { kib }),
        _ => Ok(()),
    }
}

/// Where the hand of one VM's clock is.
#[derive(Debug, Default)]
pub struct Clock {
    next: PageNo,
}

impl Clock {
    /// Pushes out up to `pages` pages of `ram` from the hand on, once round at the most and not
    /// after `until`. Pages that are in `keep` are passed over. Neither pages of slabs nor parked
    /// ones are touched, for they are not found: what is found and replaced waits for the same
    /// lock.
    pub fn page_out(
        &mut self,
        ram: &Ram,
        pages: u64,
        keep: &PageSet,
        until: Instant,
    ) -> Result<PagedOut, PageOutError> {
        if ram.backing() != Backing::Anonymous {
            return Err(PageOutError::NotAnonymous);
        }
        has_swap()?;
        let mut scan = PageScan::open_self().map_err(PageOutError::Scan)?;
        let (mut pagemap, mut entries) = (Pagemap::open_self()?, Vec::new());
        let all = ram.pages();
        let (mut done, mut looked) = (PagedOut::default(), 0);
        while done.advised_pages < pages && looked < all.pages() && Instant::now() < until {
            let from = if all.contains(self.next) { self.next } else { all.first() };
            // What is left of the stretch that the hand is in.
            let Some(here) = ram.parts(PageRange::between(from, all.end())).next() else { break };
            let (batch, _) = here.pages().split(BATCH_PAGES.min(all.pages() - looked));
            let Some(here) = here.part(batch) else { break };
            let mut runs: Vec<Pages> = Vec::new();
            let placement = ram.placement();
            scan.anonymous(here.hvas(), |run| runs.push(run)).map_err(PageOutError::Scan)?;
            let (mut wanted, mut end) = (pages - done.advised_pages, batch.end());
            'batch: for run in runs {
                let first = batch.first() + (run.hva - here.hva()) / PAGE_BYTES;
                for (run, kept) in keep.runs(PageRange::between(first, first + run.pages)) {
                    if kept {
                        done.kept_pages += run.pages();
                        continue;
                    }
                    if wanted == 0 {
                        end = run.first();
                        break 'batch;
                    }
                    let (run, _) = run.split(wanted);
                    let Some(out) = here.part(run) else { continue };
                    // What it did the page table tells.
                    let _ = out.advise(Advice::PageOut);
                    pagemap.read(out.hva(), to_usize(run.pages()), &mut entries)?;
                    done.advised_pages += run.pages();
                    done.swapped_pages += entries.iter().filter(|entry| entry.swapped()).count() as u64;
                    wanted -= run.pages();
                    end = if wanted == 0 { run.end() } else { end };
                }
            }
            drop(placement);
            looked += end - batch.first();
            self.next = end;
        }
        done.full_round = looked >= all.pages();
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_swap_it_says_so() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let until = Instant::now() + std::time::Duration::from_secs(1);
        match has_swap() {
            Ok(()) => assert!(Clock::default().page_out(&ram, 1, &PageSet::default(), until).is_ok()),
            Err(_) => {
                let error = Clock::default().page_out(&ram, 1, &PageSet::default(), until).unwrap_err();
                assert!(error.to_string().contains("swap"), "{error}");
            }
        }
    }
}
