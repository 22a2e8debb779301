//! Chooses random pages of guest RAM, parks them ([`super::parking`]), and brings back those that
//! are touched.
//!
//! One thread uses it, and for as long as a page is parked that thread does nothing that could wait
//! for an access to guest RAM.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};

use super::page_scan::{PageScan, Pages};
use super::parking::Parked;
use super::ram::{Backing, Ram};
use super::userfault;
use super::{Hva, PAGE_BYTES, PageNo, PageRange};
use kernel_view::pagemap::{Pagemap, PagemapEntry};

/// `UFFD_EVENT_PAGEFAULT`.
const PAGEFAULT: u8 = 0x12;
/// Bytes of `struct uffd_msg`, and where the address of a fault is.
const MESSAGE_BYTES: usize = 32;
const ADDRESS: std::ops::Range<usize> = 16..24;
/// Messages read in one call.
const MESSAGES: usize = 16;

/// The pages that a sample is taken of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Population {
    /// Present pages of 4096 bytes that are this guest's alone.
    pub pages: u64,
    /// Besides, those that are mapped as parts of huge pages: to park one would break the huge page
    /// up.
    pub huge_pages: u64,
}

/// Parks pages of one VM's RAM. There is one for each.
pub struct Parker {
    ram: Ram,
    /// A file, that is, for reading.
    descriptor: File,
    scan: PageScan,
    pagemap: Pagemap,
    entries: Vec<PagemapEntry>,
}

impl Parker {
    /// For `ram`, which must be anonymous memory. Needs a userfaultfd that handles faults of the
    /// kernel (KVM's are such).
    pub fn new(ram: &Ram) -> io::Result<Self> {
        if ram.backing() != Backing::Anonymous {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "guest RAM is not anonymous memory"));
        }
        let descriptor = userfault::open(&[])?;
        fcntl_setfl(&descriptor, OFlags::NONBLOCK)?;
        let scan = PageScan::open_self()?;
        let pagemap = Pagemap::open_self().map_err(io::Error::other)?;
        let served: Arc<OwnedFd> = Arc::new(descriptor.try_clone()?);
        ram.placement().parking.serve_by(served);
        Ok(Self { ram: ram.clone(), descriptor: descriptor.into(), scan, pagemap, entries: Vec::new() })
    }

    /// Counts the pages that may be sampled. None may be parked.
    pub fn population(&mut self) -> io::Result<Population> {
        let mut population = Population::default();
        self.each_run(|_, run| match run.categories.huge() {
            true => population.huge_pages += run.pages,
            false => population.pages += run.pages,
        })?;
        Ok(population)
    }

    /// Those of the pages whose numbers among the population are `ranks`, which ascend. None may be
    /// parked.
    pub fn choose(&mut self, ranks: &[u64]) -> io::Result<Vec<PageNo>> {
        let (mut chosen, mut first, mut ranks) = (Vec::new(), 0, ranks.iter().copied().peekable());
        self.each_run(|page, run| {
            if !run.categories.huge() {
                while let Some(rank) = ranks.next_if(|rank| *rank < first + run.pages) {
                    chosen.push(page + (rank - first));
                }
                first += run.pages;
            }
        })?;
        Ok(chosen)
    }

    /// Calls `each` with the runs of anonymous pages, and the first page of each.
    fn each_run(&mut self, mut each: impl FnMut(PageNo, Pages)) -> io::Result<()> {
        for all in self.ram.stretches() {
            let page = |run: &Pages| all.pages().first() + (run.hva - all.hva()) / PAGE_BYTES;
            self.scan.anonymous(all.hvas(), |run| each(page(&run), run))?;
        }
        Ok(())
    }

    /// Parks those of `pages` that are still this guest's alone. Returns how many. Touches are
    /// served meanwhile.
    pub fn park(&mut self, pages: &[PageNo]) -> io::Result<u64> {
        let mut parked = 0;
        self.ram.placement().parking.begin();
        for page in pages {
            let Some(here) = self.ram.range(PageRange::one(*page)) else { continue };
            {
                let mut placement = self.ram.placement();
                self.pagemap.read(here.hva(), 1, &mut self.entries).map_err(io::Error::other)?;
                // A page of the kernel's merging that others have too would be unmerged by being
                // moved.
                let alone = |e: &&PagemapEntry| e.present() && e.exclusive() && !e.file_or_shared();
                // A copy that the guest has made of a slab's page is in the slab's mapping still:
                // were it moved away, the next touch would not be reported but find the slab's
                // page, as it was before the guest wrote.
                let apart = !placement.slab_pages.has(*page);
                if apart && self.entries.first().filter(alone).is_some() {
                    match placement.parking.park(here) {
                        // A device marks before it pins: so either we see the mark here, or it
                        // finds the page missing and waits for it.
                        Ok(true) if self.ram.in_flight().any(here.pages()) => placement.settle(here)?,
                        Ok(is) => parked += u64::from(is),
                        Err(error) => {
                            // No mapping is left for more, most likely.
                            tracing::debug!("a sample of {parked} pages only: {error}");
                            return Ok(parked);
                        }
                    }
                }
            }
            self.serve()?;
        }
        Ok(parked)
    }

    /// Brings back what is touched, for this time.
    pub fn watch(&mut self, time: Duration) -> io::Result<()> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
            let timeout = Timespec { tv_sec: seconds, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Ok(()),
                Ok(_) => self.serve()?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if left.is_zero() {
                return Ok(());
            }
        }
    }

    /// Brings back all that is parked. Returns what became of each since [`Self::park`]; None if a
    /// page cannot be brought back yet.
    pub fn end(&mut self) -> Option<Parked> {
        // A page at a time, for others want the lock.
        while self.ram.placement().parking.unpark_next() {}
        let placement = self.ram.placement();
        (placement.parking.pages() == 0).then(|| placement.parking.so_far())
    }

    /// Brings back what was touched by now.
    fn serve(&mut self) -> io::Result<()> {
        let mut messages = [0u8; MESSAGES * MESSAGE_BYTES];
        loop {
            let read = match self.descriptor.read(&mut messages) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for message in messages[..read].chunks_exact(MESSAGE_BYTES) {
                if message[0] == PAGEFAULT
                    && let Some(Ok(address)) = message.get(ADDRESS).map(<[u8; 8]>::try_from)
                {
                    let hva = Hva(u64::from_ne_bytes(address)).page();
                    let page = self.ram.page_at(hva);
                    self.ram.placement().parking.touched(page, hva);
                }
            }
            if read < messages.len() {
                return Ok(());
            }
        }
    }
}

impl Drop for Parker {
    /// No thread serves faults any more, so nothing may stay parked.
    fn drop(&mut self) {
        self.ram.placement().parking.retire();
    }
}

#[cfg(test)]
mod tests;
