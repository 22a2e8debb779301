//! A VM's RAM: demand-paged, with guard pages around it.
#![expect(unsafe_code, reason = "maps and advises guest RAM")]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use devices::GuestMemory;
use rustix::fs::{FallocateFlags, MemfdFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::discard_log::DiscardLog;
use super::in_flight::InFlight;
use super::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES, Stretch, stretches};
use super::merge_log::MergeLog;
use super::page::to_usize;
use super::page_set::PageSet;
use super::parking::Parking;
use super::{Extent, Gpa, Hva, PageNo, PageRange};

mod map;
mod range;

use map::RamMap;
pub(crate) use range::Advice;
pub use range::GuestRange;

/// Alignment of each mapping, so that the host can use 2 MiB pages; also the size of each guard.
pub(super) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Private anonymous memory, never reserved. The host kernel can merge it, and back it with
    /// huge pages by itself.
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
    map: RamMap,
    reservations: Arc<ManuallyDrop<Vec<Reservation>>>,
    backing: Backing,
    /// Behind all of RAM in guest-physical order without the hole, with [`Backing::Memfd`].
    file: Option<Arc<File>>,
    placement: Arc<Mutex<Placement>>,
    /// The pages that a device may be having written.
    in_flight: Arc<InFlight>,
    merges: MergeLog,
    /// See [`Ram::discards`].
    discards: Arc<AtomicU64>,
    discard_log: DiscardLog,
    /// See [`Ram::fill_by_handler`].
    filled_by_handler: Arc<AtomicBool>,
    /// See [`Ram::map_flat`].
    pub(super) maps_file: Arc<AtomicBool>,
    /// What was advised of huge pages, for memory that is mapped anew: one of [`HUGE`].
    huge_pages: Arc<AtomicU8>,
}

/// What may have been advised of huge pages.
const HUGE: [Option<Advice>; 3] = [None, Some(Advice::HugePages), Some(Advice::NoHugePages)];

/// What may be in the place of pages of guest RAM; locked while pages are replaced or moved.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// Some may be those of slabs.
    pub(super) slabs: bool,
    /// The pages that lie in mappings of slabs: also once they were written to, and are copies of
    /// the guest's own in there. Without room for any as long as none does.
    pub(super) slab_pages: PageSet,
    /// Some are elsewhere for a while.
    pub(super) parking: Parking,
}

impl Placement {
    /// Has parked pages of the range brought back: to be called before anything is done to it, and
    /// if it fails nothing may be.
    pub(super) fn settle(&mut self, range: GuestRange<'_>) -> io::Result<()> {
        self.parking.unpark_range(range.pages())
    }
}

impl Ram {
    /// Maps `bytes` of RAM in the layout of [`stretches`].
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, RamError> {
        if !(MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&bytes) || !bytes.is_multiple_of(super::PAGE_BYTES) {
            return Err(RamError::Size { bytes });
        }
        if backing == Backing::Hugetlb && !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(RamError::NotHuge { bytes });
        }
        let file = match backing {
            Backing::Memfd => Some(memfd(bytes).map_err(|source| RamError::Map { bytes, source })?),
            Backing::Anonymous | Backing::Hugetlb => None,
        };
        let (mut reservations, mut regions, mut file_offset) = (Vec::new(), Vec::new(), 0);
        let mut mapped = Vec::new();
        for stretch in stretches(bytes) {
            let (reservation, region) = map(stretch, backing, file.as_ref().map(|file| (file, file_offset)))?;
            // If the next one fails, this one is given back.
            reservations.push(reservation);
            mapped.extend(region.as_ref().map(|region| (stretch, Hva::of(region.as_ptr()))));
            regions.extend(region);
            file_offset += stretch.bytes;
        }
        Ok(Self {
            memory: Arc::new(GuestMemory::from_regions(regions)?),
            map: RamMap::new(mapped),
            reservations: Arc::new(ManuallyDrop::new(reservations)),
            backing,
            file: file.map(Arc::new),
            placement: Arc::default(),
            in_flight: Arc::new(InFlight::new(bytes / super::PAGE_BYTES)),
            merges: MergeLog::default(),
            discards: Arc::default(),
            discard_log: DiscardLog::default(),
            filled_by_handler: Arc::default(),
            maps_file: Arc::default(),
            huge_pages: Arc::default(),
        })
    }

    /// Gives everything back, frames, huge pages that were reserved, and the range of addresses:
    /// for a VM that was not started after all. Only the last handle can; else RAM stays as it is,
    /// and the handle comes back.
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
        self.map.extents().collect()
    }

    /// All of its pages.
    pub fn pages(&self) -> PageRange {
        self.map.pages()
    }

    /// `pages`, if they are at least one and all in one stretch of RAM.
    pub fn range(&self, pages: PageRange) -> Option<GuestRange<'_>> {
        // SAFETY: it was found in the map of this RAM, which the range borrows.
        self.map.find(pages).map(|found| unsafe { GuestRange::new(found) })
    }

    /// What is at these guest-physical addresses, if those are whole pages, at least one, all in
    /// one stretch of RAM.
    pub fn range_at(&self, gpas: &Range<Gpa>) -> Option<GuestRange<'_>> {
        // SAFETY: as in `range`.
        self.map.at(gpas).map(|found| unsafe { GuestRange::new(found) })
    }

    /// What of `pages` is in each stretch of RAM.
    pub fn parts(&self, pages: PageRange) -> impl Iterator<Item = GuestRange<'_>> {
        // SAFETY: as in `range`.
        self.map.parts(pages).map(|found| unsafe { GuestRange::new(found) })
    }

    /// All of it, stretch by stretch.
    pub fn stretches(&self) -> impl Iterator<Item = GuestRange<'_>> {
        self.parts(self.pages())
    }

    /// The pages, in each stretch, of which some byte is at these guest-physical addresses.
    pub fn pages_at(&self, gpas: Range<Gpa>) -> impl Iterator<Item = PageRange> {
        self.map.touched_by(gpas)
    }

    /// The page at an address of this process.
    pub fn page_at(&self, hva: Hva) -> Option<PageNo> {
        self.map.page_at(hva)
    }

    /// Where the guest has a page.
    pub fn gpa(&self, page: PageNo) -> Option<Gpa> {
        self.map.find(PageRange::one(page)).map(|found| found.gpa)
    }

    /// What may be in the place of its pages. While the guard lives nothing else replaces or moves
    /// pages. Its holder touches no guest RAM but what it has unparked under it: see
    /// [`super::parking`].
    pub(super) fn placement(&self) -> MutexGuard<'_, Placement> {
        os::lock(&self.placement)
    }

    /// The marks of devices. See [`InFlight::mark`].
    pub(super) fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    /// Pages that are parked now: in the page table they are not where they belong.
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

    /// Pages that were given back so far, each as often as it was. No write log has them: they read
    /// as zeros that were never written. Like a page's bit there, the number goes up after the
    /// pages are gone: once it has gone up, they are seen to be.
    pub fn discards(&self) -> u64 {
        self.discards.load(Ordering::Acquire)
    }

    /// Which of its pages were given back.
    pub fn discard_log(&self) -> &DiscardLog {
        &self.discard_log
    }

    /// Whether another process fills it: [`Ram::fill_by_handler`].
    pub fn is_filled_by_handler(&self) -> bool {
        self.filled_by_handler.load(Ordering::Relaxed)
    }

    pub(super) fn is_filled_by_handler_from_now_on(&self) {
        self.filled_by_handler.store(true, Ordering::Relaxed);
    }

    /// Counts pages that have just been given back.
    pub(super) fn count_discards(&self, pages: u64) {
        self.discards.fetch_add(pages, Ordering::Release);
    }

    /// Total bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Frees the frames of a part of the file behind RAM.
    pub(super) fn punch(&self, range: GuestRange<'_>) -> io::Result<()> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // In the file RAM is in one piece.
        let offset = range.pages().first().0 * super::PAGE_BYTES;
        Ok(rustix::fs::fallocate(file, how, offset, range.pages().bytes())?)
    }

    /// Opts all of RAM in to (or out of) the host kernel's samepage merging. Opting out breaks
    /// every merge.
    pub fn set_mergeable(&self, on: bool) -> Result<(), RamError> {
        match on {
            true => self.advise(Advice::Mergeable, "allow samepage merging (MADV_MERGEABLE)"),
            false => self.advise(Advice::Unmergeable, "undo samepage merging (MADV_UNMERGEABLE)"),
        }
    }

    /// Lets the host back RAM with 2 MiB pages where it can, or forbids it.
    pub fn set_huge_pages(&self, on: bool) -> Result<(), RamError> {
        let (state, what) = match on {
            true => (1, "allow huge pages (MADV_HUGEPAGE)"),
            false => (2, "forbid huge pages (MADV_NOHUGEPAGE)"),
        };
        if let Some(advice) = HUGE[usize::from(state)] {
            self.advise(advice, what)?;
        }
        self.huge_pages.store(state, Ordering::Relaxed);
        Ok(())
    }

    /// What the kernel is to be advised of guest memory that is mapped anew, as it was advised of
    /// the old: else what guests keep would be in core dumps, and the mapping would not join its
    /// neighbours. Failure costs no more than that.
    pub(super) fn advice_anew(&self) -> impl Iterator<Item = Advice> + use<> {
        let huge = HUGE.get(usize::from(self.huge_pages.load(Ordering::Relaxed))).copied().flatten();
        std::iter::once(Advice::NoDump).chain(huge)
    }

    fn advise(&self, advice: Advice, what: &'static str) -> Result<(), RamError> {
        if self.backing != Backing::Anonymous {
            return Err(RamError::NotAnonymous { what });
        }
        // What is parked is to be advised, too.
        let mut placement = self.placement();
        for stretch in self.stretches() {
            let advised = placement.settle(stretch).and_then(|()| stretch.advise(advice));
            advised.map_err(|source| RamError::Advise { what, source })?;
        }
        Ok(())
    }
}

fn memfd(bytes: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create("samepage-ram", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(fd.into())
}

/// A range of addresses with a stretch of RAM in it. Dropping it unmaps all of it: its owner must
/// know that nothing uses it any more.
#[derive(Debug)]
struct Reservation {
    base: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: it is an address that nothing is reached by; what is done with it, once, any thread may
// do.
unsafe impl Send for Reservation {}
// SAFETY: as above.
unsafe impl Sync for Reservation {}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, nothing else ever maps in it, and it is dropped
        // only before anything had it or by the last handle of the RAM.
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}

/// Reserves the stretch with a guard before and behind it, then makes the inside usable: from
/// `file`, at an offset, where there is one.
fn map(
    stretch: Stretch,
    backing: Backing,
    file: Option<(&File, u64)>,
) -> Result<(Reservation, Option<GuestRegionMmap<AtomicBitmap>>), RamError> {
    let len = to_usize(stretch.bytes);
    let failed = |source| match backing {
        Backing::Hugetlb => RamError::HugePages { bytes: stretch.bytes, source },
        Backing::Anonymous | Backing::Memfd => RamError::Map { bytes: stretch.bytes, source },
    };
    // The guards take up the slack of the alignment: at least one page each.
    let huge = to_usize(HUGE_PAGE_BYTES);
    let reserve = len + 2 * huge;
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
    let reservation = Reservation { base, bytes: reserve };
    let first = base.addr();
    // The guard before it is at least a page, as the kernel gives whole pages.
    let start = base.wrapping_byte_add((first + 1).next_multiple_of(huge) - first);
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = match backing {
        Backing::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        Backing::Memfd => libc::MAP_SHARED | libc::MAP_NORESERVE,
        // Reserved, for a pool that runs dry is a SIGBUS in the middle of the guest's work.
        Backing::Hugetlb => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
    };
    // At most 1 TiB: RAM has no more.
    let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset.cast_signed()));
    // SAFETY: [start, start + len) lies inside the reservation made above, which nothing else uses
    // yet.
    let inside = unsafe { libc::mmap(start, len, prot, flags | libc::MAP_FIXED, fd, offset) };
    if inside == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    // Dumps of the VMM must not hold what guests keep in memory. Failure costs nothing but dump
    // size. SAFETY: the range is the mapping just made; the advice changes no contents.
    unsafe { libc::madvise(inside, len, libc::MADV_DONTDUMP) };
    // SAFETY: the mapping has this address, length and protection, and outlives the region: see
    // `Ram::unmap`.
    let region = unsafe { MmapRegion::build_raw(inside.cast(), len, prot, flags) }
        .map_err(|e| failed(io::Error::other(e)))?;
    Ok((reservation, GuestRegionMmap::new(region, GuestAddress(stretch.gpa))))
}

impl devices::in_flight::InFlight for Ram {
    fn during(&self, range: Range<Gpa>, transfer: &mut dyn FnMut()) {
        let _marks: Vec<_> = self.pages_at(range).map(|pages| self.in_flight().mark(pages)).collect();
        transfer();
    }
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
        assert!(ram.extents().iter().all(|m| m.hva.0.is_multiple_of(HUGE_PAGE_BYTES)));
        ram.memory().write_obj(7u64, GuestAddress((9 << 30) - 8)).unwrap();
        assert!(ram.memory().write_obj(7u64, GuestAddress((3 << 30) - 4)).is_err());
    }

    #[test]
    fn the_last_handle_gives_everything_back() {
        let ram = Ram::new((3 << 30) + (16 << 20), Backing::Anonymous).unwrap();
        ram.memory().write_obj(7u64, GuestAddress(4 << 30)).unwrap();
        let start = ram.stretches().nth(1).unwrap().as_ptr();
        let is_mapped = || {
            let mut resident = 0u8;
            // SAFETY: one page is asked about, which takes one byte; what is not mapped is an
            // error.
            unsafe { libc::mincore(start, 4096, &mut resident) == 0 }
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
