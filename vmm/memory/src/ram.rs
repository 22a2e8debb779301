//! A VM's RAM: demand-paged, with guard pages around it.
#![expect(unsafe_code, reason = "maps and advises guest RAM")]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::GuestMemory;
use devices::reclaim::Gpa;
use rustix::fs::{FallocateFlags, MemfdFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::Extent;
use super::in_flight::InFlight;
use super::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES, Stretch, stretches};
use super::merge_log::MergeLog;
use super::merge_run::Mergeable;
use super::parking::Parking;
use super::written::WORD_PAGES;

/// Alignment of each mapping, so that the host can use 2 MiB pages; also the size of each guard.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Private anonymous memory, never reserved. The host kernel can merge it, and back it with huge pages by itself.
    #[default]
    Anonymous,
    /// A memfd, never reserved: memory that another process can map.
    Memfd,
    /// 2 MiB pages of the host's pool (`vm.nr_hugepages`), reserved from the start.
    Hugetlb,
}

/// Why guest RAM could not be set up.
#[derive(Debug, Error)]
pub enum RamError {
    /// The size is not one a guest can have.
    #[error(
        "memory of {bytes} bytes is not possible: expected {} MiB to {} GiB in whole 4 KiB pages",
        MIN_RAM_BYTES >> 20,
        MAX_RAM_BYTES >> 30
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The host refused the mapping.
    #[error("cannot map {} MiB of guest RAM: check `ulimit -v` and vm.overcommit_memory", bytes >> 20)]
    Map {
        /// Length of the stretch.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The pool of huge pages is too small.
    #[error(
        "cannot map {} MiB of guest RAM in 2 MiB pages: set vm.nr_hugepages to at least {} free ones",
        bytes >> 20,
        bytes >> 21
    )]
    HugePages {
        /// Length of the stretch.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Huge pages come whole.
    #[error("memory of {bytes} bytes is not possible in 2 MiB pages: expected a multiple of 2 MiB")]
    NotHuge {
        /// What was asked for.
        bytes: u64,
    },
    /// Only anonymous memory can be merged by the kernel, or get huge pages by its own choice.
    #[error("cannot {what} for guest RAM that is not anonymous memory: leave out `--backing`")]
    NotAnonymous {
        /// What was asked of the kernel.
        what: &'static str,
    },
    /// The host refused the advice.
    #[error("cannot {what} for guest RAM")]
    Advise {
        /// What was asked of the kernel.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The stretches overlap, which `layout` never makes.
    #[error("guest RAM regions do not fit together")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
}

/// Guest RAM. It stays mapped until the process ends, for a VM lives in a process of its own and
/// devices keep references to it; unless its last handle is used to [`Ram::unmap`] it.
#[derive(Clone)]
pub struct Ram {
    memory: Arc<GuestMemory>,
    reservations: Arc<ManuallyDrop<Vec<Reservation>>>,
    backing: Backing,
    /// Behind all of RAM in guest-physical order without the hole, with [`Backing::Memfd`].
    file: Option<Arc<File>>,
    placement: Arc<Mutex<Placement>>,
    /// For each stretch the pages that a device may be having written.
    in_flight: Arc<[InFlight]>,
    merges: MergeLog,
    /// See [`Ram::discards`].
    discards: Arc<AtomicU64>,
    /// What was advised of huge pages (MADV_HUGEPAGE, MADV_NOHUGEPAGE), for memory that is mapped anew; 0 is nothing.
    huge_pages: Arc<AtomicI32>,
}

/// What may be in the place of pages of guest RAM; locked by whoever replaces or moves pages.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// Some may be those of slabs.
    pub(super) slabs: bool,
    /// A bit for each page, as [`super::written`] has them, that lies in a mapping of a slab: also once it was written to, and is a copy of
    /// the guest's own in there. Empty as long as none does.
    slab_pages: Vec<u64>,
    /// Some are elsewhere for a while.
    pub(super) parking: Parking,
}

impl Placement {
    /// Says whether `pages` pages from page number `page` on are in mappings of slabs now.
    pub(super) fn set_slab(&mut self, page: u64, pages: u64, is: bool) {
        for page in page..page.saturating_add(pages) {
            let (word, bit) = ((page / WORD_PAGES) as usize, 1 << (page % WORD_PAGES));
            match (self.slab_pages.get_mut(word), is) {
                (Some(word), true) => *word |= bit,
                (Some(word), false) => *word &= !bit,
                (None, true) => {
                    self.slab_pages.resize(word + 1, 0);
                    self.slab_pages[word] = bit;
                }
                // Nor is any page after it.
                (None, false) => return,
            }
        }
    }

    /// Whether page number `page` is in a mapping of a slab.
    pub(super) fn is_slab(&self, page: u64) -> bool {
        let word = self.slab_pages.get((page / WORD_PAGES) as usize).copied().unwrap_or(0);
        word >> (page % WORD_PAGES) & 1 != 0
    }

    /// Has parked pages of the range brought back: to be called before anything is done to it, and if it fails nothing may be.
    pub(super) fn settle(&mut self, hva: usize, bytes: usize) -> io::Result<()> {
        self.parking.withdraw(hva..hva.saturating_add(bytes))
    }
}

/// Where a range of guest RAM lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its address in this process.
    pub hva: usize,
    /// Its offset in the file, if there is one.
    pub file_offset: u64,
    /// Its length.
    pub bytes: usize,
}

impl Ram {
    /// Maps `bytes` of RAM in the layout of [`stretches`].
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, RamError> {
        if !(MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&bytes) || !bytes.is_multiple_of(super::PAGE_BYTES) {
            return Err(RamError::Size { bytes });
        }
        if backing == Backing::Hugetlb && !bytes.is_multiple_of(HUGE_PAGE_BYTES as u64) {
            return Err(RamError::NotHuge { bytes });
        }
        let file = match backing {
            Backing::Memfd => Some(memfd(bytes).map_err(|source| RamError::Map { bytes, source })?),
            Backing::Anonymous | Backing::Hugetlb => None,
        };
        let (mut reservations, mut regions, mut file_offset) = (Vec::new(), Vec::new(), 0);
        for stretch in stretches(bytes) {
            let (reservation, region) = map(stretch, backing, file.as_ref().map(|file| (file, file_offset)))?;
            // If the next one fails, this one is given back.
            reservations.push(reservation);
            regions.extend(region);
            file_offset += stretch.bytes;
        }
        Ok(Self {
            memory: Arc::new(GuestMemory::from_regions(regions)?),
            reservations: Arc::new(ManuallyDrop::new(reservations)),
            backing,
            file: file.map(Arc::new),
            placement: Arc::default(),
            in_flight: stretches(bytes).iter().map(|stretch| InFlight::new(stretch.bytes)).collect(),
            merges: MergeLog::default(),
            discards: Arc::default(),
            huge_pages: Arc::default(),
        })
    }

    /// Gives everything back, frames, huge pages that were reserved, and the range of addresses: for a VM that was not started after
    /// all. Only the last handle can; else RAM stays as it is, and the handle comes back.
    pub fn unmap(mut self) -> Result<(), Self> {
        // Handles are cloned whole, and devices have the memory alone: so its count tells of all.
        if Arc::get_mut(&mut self.memory).is_none() {
            return Err(self);
        }
        match Arc::try_unwrap(self.reservations) {
            Ok(reservations) => {
                drop(self.memory);
                drop(ManuallyDrop::into_inner(reservations));
                Ok(())
            }
            Err(reservations) => Err(Self { reservations, ..self }),
        }
    }

    /// What RAM is made of.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The memory, for devices and loaders.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Where each stretch lies in this process.
    pub fn extents(&self) -> Vec<Extent> {
        self.memory
            .iter()
            .map(|r| Extent { gpa: r.start_addr().0, hva: r.as_ptr() as u64, bytes: r.len() })
            .collect()
    }

    /// What may be in the place of its pages. Until the guard is dropped nobody else replaces or moves pages. Who has it touches no guest
    /// RAM but what he had brought back under it: see [`super::parking`].
    pub(super) fn placement(&self) -> MutexGuard<'_, Placement> {
        self.placement.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The marks of devices, for each of [`Self::extents`]. See [`InFlight::mark`].
    pub(super) fn in_flight(&self) -> &[InFlight] {
        &self.in_flight
    }

    /// Whether a device may be having the page at an address of this process written behind the page table.
    pub(super) fn is_in_flight(&self, hva: usize) -> bool {
        self.extents().iter().zip(self.in_flight()).any(|(extent, in_flight)| {
            let offset = (hva as u64).checked_sub(extent.hva).filter(|offset| *offset < extent.bytes);
            let page = offset.map(|offset| offset / super::PAGE_BYTES);
            page.is_some_and(|page| in_flight.any(page..page + 1))
        })
    }

    /// Pages that are parked now: whoever looks into the page table from outside does not see them where they belong.
    pub fn parked_pages(&self) -> u64 {
        self.placement().parking.pages()
    }

    /// Brings back all parked pages, and has none parked until [`Self::allow_parking`].
    pub fn forbid_parking(&self) {
        self.placement().parking.close();
    }

    /// Undoes [`Self::forbid_parking`].
    pub fn allow_parking(&self) {
        self.placement().parking.open();
    }

    /// Which of its pages were replaced last.
    pub fn merges(&self) -> &MergeLog {
        &self.merges
    }

    /// Pages that were given back so far, each as often as it was. No write log tells of them: they read as zeros and nobody wrote
    /// those. Like a page's bit there, the number goes up when the pages are gone, not before; so whoever has seen it go up
    /// and looks then, sees them gone.
    pub fn discards(&self) -> u64 {
        self.discards.load(Ordering::Acquire)
    }

    /// Counts pages that have just been given back.
    pub(super) fn count_discards(&self, pages: u64) {
        self.discards.fetch_add(pages, Ordering::Release);
    }

    /// What merges the pages of one of its [`Ram::extents`].
    pub(super) fn mergeable(&self, extent: &Extent) -> io::Result<Mergeable> {
        let ram = self.clone();
        let advise = Box::new(move |hva, bytes| ram.advise_anew(hva, bytes));
        // SAFETY: RAM is private anonymous memory (the caller has looked) that stays mapped for ever, and every access of ours to it
        // is by raw pointers.
        unsafe { Mergeable::new(extent.hva as usize, extent.bytes, advise) }
    }

    /// The number of the page at an address of this process, counted through RAM in guest-physical order without the hole. None outside.
    pub(super) fn page_number(&self, hva: usize) -> Option<u64> {
        let mut first = 0;
        for region in self.memory.iter() {
            let start = region.as_ptr() as usize;
            match hva.checked_sub(start).map(|offset| offset as u64) {
                Some(offset) if offset < region.len() => return Some(first + offset / super::PAGE_BYTES),
                _ => first += region.len() / super::PAGE_BYTES,
            }
        }
        None
    }

    /// Total bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Where `range`, whole pages in one stretch of RAM, lies. None for any other range.
    pub fn place(&self, range: &Range<Gpa>) -> Option<Place> {
        let (start, bytes) = (range.start.0, range.end.0.checked_sub(range.start.0)?);
        if bytes == 0 || !start.is_multiple_of(super::PAGE_BYTES) || !bytes.is_multiple_of(super::PAGE_BYTES)
        {
            return None;
        }
        let mut file_offset = 0;
        for region in self.memory.iter() {
            let first = region.start_addr().0;
            if start >= first && range.end.0 <= first + region.len() {
                let offset = start - first;
                let hva = region.as_ptr() as usize + offset as usize;
                return Some(Place { hva, file_offset: file_offset + offset, bytes: bytes as usize });
            }
            file_offset += region.len();
        }
        None
    }

    /// Frees the frames of a part of the file behind RAM.
    pub(super) fn punch(&self, offset: u64, bytes: usize) -> io::Result<()> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, how, offset, bytes as u64)?)
    }

    /// Opts all of RAM in to (or out of) the host kernel's samepage merging. Opting out breaks every merge.
    pub fn set_mergeable(&self, on: bool) -> Result<(), RamError> {
        match on {
            true => self.advise(libc::MADV_MERGEABLE, "allow samepage merging (MADV_MERGEABLE)"),
            false => self.advise(libc::MADV_UNMERGEABLE, "undo samepage merging (MADV_UNMERGEABLE)"),
        }
    }

    /// Lets the host back RAM with 2 MiB pages where it can, or forbids it.
    pub fn set_huge_pages(&self, on: bool) -> Result<(), RamError> {
        let (advice, what) = match on {
            true => (libc::MADV_HUGEPAGE, "allow huge pages (MADV_HUGEPAGE)"),
            false => (libc::MADV_NOHUGEPAGE, "forbid huge pages (MADV_NOHUGEPAGE)"),
        };
        self.advise(advice, what)?;
        self.huge_pages.store(advice, Ordering::Relaxed);
        Ok(())
    }

    /// Advises the kernel of guest memory that has just been mapped anew as it was advised of the old: else what guests keep would be in
    /// core dumps, and the mapping would not join its neighbours. Failure costs no more than that.
    pub(super) fn advise_anew(&self, hva: usize, bytes: usize) {
        for advice in [libc::MADV_DONTDUMP, self.huge_pages.load(Ordering::Relaxed)] {
            if advice != 0 {
                // SAFETY: the range is guest RAM, which is never unmapped; the advices used keep its contents.
                unsafe { libc::madvise(hva as *mut libc::c_void, bytes, advice) };
            }
        }
    }

    fn advise(&self, advice: i32, what: &'static str) -> Result<(), RamError> {
        if self.backing != Backing::Anonymous {
            return Err(RamError::NotAnonymous { what });
        }
        // What is parked is to be advised, too.
        let mut placement = self.placement();
        for s in self.extents() {
            placement
                .settle(s.hva as usize, s.bytes as usize)
                .map_err(|source| RamError::Advise { what, source })?;
            // SAFETY: the range is a mapping this Ram made and never unmaps; the advices used keep its contents.
            let done = unsafe { libc::madvise(s.hva as *mut libc::c_void, s.bytes as usize, advice) };
            if done != 0 {
                return Err(RamError::Advise { what, source: io::Error::last_os_error() });
            }
        }
        Ok(())
    }
}

fn memfd(bytes: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create("samepage-ram", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(fd.into())
}

/// A range of addresses with a stretch of RAM in it. Dropping it unmaps all of it: for the one who knows that nothing uses it any more.
#[derive(Debug)]
struct Reservation {
    base: usize,
    bytes: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, nothing else ever maps in it, and it is dropped only before anything had it or by the
        // last handle of the RAM.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.bytes) };
    }
}

/// Reserves the stretch with a guard before and behind it, then makes the inside usable: from `file`, at an offset, where
/// there is one.
fn map(
    stretch: Stretch,
    backing: Backing,
    file: Option<(&File, u64)>,
) -> Result<(Reservation, Option<GuestRegionMmap<AtomicBitmap>>), RamError> {
    let len = stretch.bytes as usize;
    let failed = |source| match backing {
        Backing::Hugetlb => RamError::HugePages { bytes: stretch.bytes, source },
        Backing::Anonymous | Backing::Memfd => RamError::Map { bytes: stretch.bytes, source },
    };
    // The guards take up the slack of the alignment: at least one page each.
    let reserve = len + 2 * HUGE_PAGE_BYTES;
    // SAFETY: a fresh reservation at an address of the kernel's choice touches no other mapping.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            reserve,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    let reservation = Reservation { base: base as usize, bytes: reserve };
    let start = (base as usize + 1).next_multiple_of(HUGE_PAGE_BYTES);
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = match backing {
        Backing::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        Backing::Memfd => libc::MAP_SHARED | libc::MAP_NORESERVE,
        // Reserved, for a pool that runs dry is a SIGBUS in the middle of the guest's work.
        Backing::Hugetlb => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
    };
    let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset as libc::off_t));
    // SAFETY: [start, start + len) lies inside the reservation made above, which nothing else uses yet.
    let inside =
        unsafe { libc::mmap(start as *mut libc::c_void, len, prot, flags | libc::MAP_FIXED, fd, offset) };
    if inside == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    // Dumps of the VMM must not hold what guests keep in memory. Failure costs nothing but dump size.
    // SAFETY: the range is the mapping just made; the advice changes no contents.
    unsafe { libc::madvise(inside, len, libc::MADV_DONTDUMP) };
    // SAFETY: the mapping has this address, length and protection, and outlives the region: see `Ram::unmap`.
    let region = unsafe { MmapRegion::build_raw(inside.cast(), len, prot, flags) }
        .map_err(|e| failed(io::Error::other(e)))?;
    Ok((reservation, GuestRegionMmap::new(region, GuestAddress(stretch.gpa))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn a_guest_above_the_hole_has_two_stretches_and_costs_nothing_until_touched() {
        let ram = Ram::new(8 << 30, Backing::Anonymous).unwrap();
        assert_eq!(ram.bytes(), 8 << 30);
        assert_eq!(ram.extents().len(), 2);
        assert!(ram.extents().iter().all(|m| m.hva.is_multiple_of(HUGE_PAGE_BYTES as u64)));
        ram.memory().write_obj(7u64, GuestAddress((9 << 30) - 8)).unwrap();
        assert!(ram.memory().write_obj(7u64, GuestAddress((3 << 30) - 4)).is_err());
    }

    #[test]
    fn the_last_handle_gives_everything_back() {
        let ram = Ram::new((3 << 30) + (16 << 20), Backing::Anonymous).unwrap();
        ram.memory().write_obj(7u64, GuestAddress(4 << 30)).unwrap();
        let hva = ram.extents()[1].hva as usize;
        let is_mapped = || {
            let mut resident = 0u8;
            // SAFETY: one page is asked about, which takes one byte; what is not mapped is an error.
            unsafe { libc::mincore(hva as *mut libc::c_void, 4096, &mut resident) == 0 }
        };
        let keeps = ram.memory().clone();
        let other = ram.clone().unmap().err().unwrap();
        assert!(other.unmap().is_err() && is_mapped(), "something still has it");
        drop(keeps);
        ram.unmap().ok().unwrap();
        assert!(!is_mapped());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [0, 4096, (16 << 20) + 1, MAX_RAM_BYTES + 4096] {
            assert!(matches!(Ram::new(bytes, Backing::Anonymous), Err(RamError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn merging_can_be_allowed_and_undone_where_the_kernel_has_it() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        if std::path::Path::new("/sys/kernel/mm/ksm").exists() {
            ram.set_mergeable(true).unwrap();
            ram.set_mergeable(false).unwrap();
        }
    }
}
