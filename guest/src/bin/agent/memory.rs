//! The array of pages that the workload gets in a Linux guest: one anonymous mapping.

use core::ops::Range;

use guest::content::{PAGE_SIZE, Page};
use guest::workload::Pages;

use crate::sys::{self, Access, Errno, Fd};

/// The part of `MemAvailable` that may be filled: the rest keeps the kernel itself alive.
const USABLE_PERCENT: u64 = 60;

/// What /proc/meminfo says, in pages.
#[derive(Clone, Copy)]
pub(crate) struct MemInfo {
    pub(crate) total: u64,
    pub(crate) available: u64,
}

impl MemInfo {
    /// Asks the kernel. Missing values are 0.
    pub(crate) fn read() -> Result<Self, Errno> {
        let mut buffer = [0; 4096];
        let file = Fd::open(c"/proc/meminfo", Access::Read)?;
        let len = file.read_all(&mut buffer);
        file.close();
        let text = str::from_utf8(&buffer[..len?]).unwrap_or_default();
        let pages = |name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
            Some(kib / (PAGE_SIZE as u64 / 1024))
        };
        Ok(Self { total: pages("MemTotal:").unwrap_or(0), available: pages("MemAvailable:").unwrap_or(0) })
    }

    /// How many pages a workload may have.
    pub(crate) fn usable(self) -> u64 {
        self.available * USABLE_PERCENT / 100
    }
}

/// Pages of an anonymous mapping. They take no memory before they are filled.
pub(crate) struct MappedPages {
    pages: &'static mut [Page],
}

impl MappedPages {
    /// Maps `count` pages, or fewer if the address space is limited; and a generation for each.
    pub(crate) fn new(count: u64) -> (Self, &'static mut [u32]) {
        let mut count = count as usize;
        loop {
            if let (Ok(pages), Ok(generations)) = (sys::map(count), sys::map(count)) {
                return (Self { pages }, generations);
            }
            // Ends at 0, which needs no mapping.
            count /= 2;
        }
    }
}

impl Pages for MappedPages {
    fn count(&self) -> u64 {
        self.pages.len() as u64
    }

    fn page(&mut self, index: u64) -> &mut Page {
        &mut self.pages[index as usize]
    }

    fn release(&mut self, pages: Range<u64>) {
        sys::discard(&mut self.pages[pages.start as usize..pages.end as usize]);
    }
}
