//! What may be done to guest RAM, and to which of it: the calls that take no promise of their
//! caller, for a [`GuestRange`] is one.
#![expect(unsafe_code, reason = "advises, replaces and zeroes guest pages")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};

use super::super::page::{Gpa, Hva, PAGE, PAGE_BYTES, PageRange, to_usize};
use super::map::{Found, RamMap};

/// Adjacent pages of guest RAM in this process.
///
/// [`Ram`](super::Ram) alone makes them, from what it has mapped itself. Wherever there is one,
/// this holds:
///
/// - all its bytes are mapped readable and writable in one stretch of RAM, at least a page, and
///   whole ones;
/// - they stay so while it lives: it borrows a handle of the RAM, which is unmapped by its last one
///   only;
/// - no Rust reference to any of them exists. The guest writes to them at any time, so this process
///   reaches them by raw pointers, volatile accesses, and system calls, and believes nothing of
///   what it reads.
///
/// So pages may be frozen, moved, given other frames or other contents: to every observer, the
/// guest might have written that.
///
/// RAM of which there is one cannot be unmapped:
///
/// ```compile_fail,E0505
/// use memory::ram::{Backing, Ram};
/// use memory::{PageNo, PageRange};
///
/// let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
/// let page = ram.range(PageRange::one(PageNo(0))).unwrap();
/// let _ = ram.unmap();
/// page.hva();
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange<'a> {
    at: Found,
    ram: PhantomData<&'a RamMap>,
}

/// What the kernel is advised of, of all of which no byte changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advice {
    Mergeable,
    Unmergeable,
    HugePages,
    NoHugePages,
    NoDump,
    PageOut,
}

impl Advice {
    fn number(self) -> libc::c_int {
        match self {
            Self::Mergeable => libc::MADV_MERGEABLE,
            Self::Unmergeable => libc::MADV_UNMERGEABLE,
            Self::HugePages => libc::MADV_HUGEPAGE,
            Self::NoHugePages => libc::MADV_NOHUGEPAGE,
            Self::NoDump => libc::MADV_DONTDUMP,
            Self::PageOut => libc::MADV_PAGEOUT,
        }
    }

    /// Advises of `bytes` bytes at `start`.
    ///
    /// # Safety
    /// All of them are mapped.
    pub(crate) unsafe fn of(self, start: *mut c_void, bytes: usize) -> io::Result<()> {
        // SAFETY: the caller's mapping; none of these advices changes a byte of it or unmaps it.
        succeeded(unsafe { libc::madvise(start, bytes, self.number()) })
    }
}

impl<'a> GuestRange<'a> {
    /// What [`Ram`](super::Ram) has found in its own map.
    ///
    /// # Safety
    /// It is of the RAM whose handle is borrowed for `'a`.
    pub(super) unsafe fn new(at: Found) -> Self {
        Self { at, ram: PhantomData }
    }

    /// Which pages these are.
    pub fn pages(self) -> PageRange {
        self.at.pages
    }

    /// Where the guest has the first of them.
    pub fn gpa(self) -> Gpa {
        self.at.gpa
    }

    /// Where this process has it.
    pub fn hva(self) -> Hva {
        self.at.hva
    }

    /// Where this process has all of them.
    pub fn hvas(self) -> Range<Hva> {
        self.at.hva.span(self.at.pages.bytes())
    }

    /// Their length; never 0.
    pub fn bytes(self) -> usize {
        to_usize(self.at.pages.bytes())
    }

    /// Those of them that are among `pages`; None, if that is none.
    pub fn part(self, pages: PageRange) -> Option<Self> {
        let part = self.at.pages.intersection(pages);
        let from = (!part.is_empty()).then(|| (part.first() - self.at.pages.first()) * PAGE_BYTES)?;
        let at = Found { pages: part, gpa: Gpa(self.at.gpa.0 + from), hva: self.at.hva + from };
        Some(Self { at, ..self })
    }

    /// The first byte, for system calls.
    pub(crate) fn as_ptr(self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(to_usize(self.at.hva.0))
    }

    /// Advises the kernel of them.
    pub(crate) fn advise(self, advice: Advice) -> io::Result<()> {
        // SAFETY: a range of guest RAM is mapped.
        unsafe { advice.of(self.as_ptr(), self.bytes()) }
    }

    /// Drops them from the page table: anonymous ones read as zeros after.
    pub(crate) fn drop_frames(self) -> io::Result<()> {
        // SAFETY: a range of guest RAM, of which any contents may become any others.
        succeeded(unsafe { libc::madvise(self.as_ptr(), self.bytes(), libc::MADV_DONTNEED) })
    }

    /// Maps fresh memory in their place, atomically: they read as zeros after. Where it fails, the
    /// old mapping stays.
    pub(crate) fn map_fresh(self) -> Result<(), Errno> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a range of guest RAM, of which any contents may become any others, and which is
        // mapped all the time, and as before.
        unsafe { rustix::mm::mmap_anonymous(self.as_ptr(), self.bytes(), prot, flags | MapFlags::FIXED) }
            .map(drop)
    }

    /// Maps what a flat file has in their place, for this process alone. Where it fails, the old
    /// mapping stays.
    pub(crate) fn map_file(self, file: &File) -> Result<(), Errno> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let offset = self.at.pages.first().0 * PAGE_BYTES;
        // SAFETY: a range of guest RAM, of which any contents may become any others, and which is
        // mapped all the time, and as before.
        unsafe { rustix::mm::mmap(self.as_ptr(), self.bytes(), prot, flags, file, offset) }.map(drop)
    }

    /// Puts a copy of them in their place, in fresh memory. Nothing writes to them meanwhile. Where
    /// it fails there may be a hole.
    pub(crate) fn copy_in_place(self) -> Result<(), Errno> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping where the kernel likes.
        let copy = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), self.bytes(), prot, flags) }?;
        // SAFETY: both are mapped, as long as the other, and apart; nothing writes to the one, as
        // the caller promises, and nothing else has the other.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().cast::<u8>(), copy.cast::<u8>(), self.bytes()) };
        let how = MremapFlags::MAYMOVE;
        // SAFETY: the source is ours, and is no more after that. What it replaces is a range of
        // guest RAM that holds the same.
        let moved = unsafe { rustix::mm::mremap_fixed(copy, self.bytes(), self.bytes(), how, self.as_ptr()) };
        moved.map(drop).inspect_err(|_| {
            // SAFETY: it was not moved, and nothing has it.
            let _ = unsafe { rustix::mm::munmap(copy, self.bytes()) };
        })
    }

    /// Writes zeros to those of them that have a frame: others read as zeros already, and writing
    /// would get them one. The guest may write at the same time; then either is there.
    pub(crate) fn zero(self) -> io::Result<()> {
        for page in self.at.pages.iter().filter_map(|page| self.part(PageRange::one(page))) {
            let mut resident = 0u8;
            // SAFETY: one page of guest RAM is asked about, which takes one byte.
            succeeded(unsafe { libc::mincore(page.as_ptr(), PAGE, &mut resident) })?;
            if resident & 1 != 0 {
                let words = page.as_ptr().cast::<u64>();
                for n in 0..PAGE / size_of::<u64>() {
                    // SAFETY: an aligned word of a page of guest RAM. Volatile, for the guest may
                    // be writing to it.
                    unsafe { words.add(n).write_volatile(0) };
                }
            }
        }
        Ok(())
    }
}

fn succeeded(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::super::{Backing, Ram};
    use super::*;
    use crate::page::PageNo;
    use vm_memory::{Bytes, GuestAddress};

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::new(PageNo(first), pages).unwrap()
    }

    #[test]
    fn a_part_is_where_it_is_in_the_whole() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let whole = ram.range(range(100, 10)).unwrap();
        assert_eq!(whole.part(range(95, 8)), ram.range(range(100, 3)));
        assert_eq!(whole.part(range(103, 100)), ram.range(range(103, 7)));
        assert!(whole.part(range(110, 5)).is_none() && whole.part(range(105, 0)).is_none());
        assert_eq!((whole.hvas().end, whole.bytes()), (whole.hva() + 10 * PAGE_BYTES, 10 * PAGE));
        assert!(ram.range(range(4090, 7)).is_none() && ram.range(range(5, 0)).is_none());
    }

    #[test]
    fn pages_are_zeroed_one_by_one_and_no_others() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        for page in [4, 5, 7, 8] {
            ram.memory().write_slice(&[7; PAGE], GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        ram.range(range(5, 3)).unwrap().zero().unwrap();
        let byte = |page: u64| {
            ram.memory().read_obj::<u8>(GuestAddress(page * PAGE_BYTES + PAGE_BYTES - 1)).unwrap()
        };
        assert_eq!([4, 5, 7, 8].map(byte), [7, 0, 0, 7]);
        let mut entries = Vec::new();
        let six = ram.range(range(6, 1)).unwrap();
        kernel_view::pagemap::Pagemap::open_self().unwrap().read(six.hva(), 1, &mut entries).unwrap();
        assert!(!entries[0].present(), "it was absent, and got a frame");
    }

    /// Among writers: whatever a thread writes at the same time, the page has that or zeros, and
    /// the writer's next write is there.
    #[test]
    fn zeroing_races_with_the_guest_and_loses_nothing_after() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let at = GuestAddress(3 * PAGE_BYTES + 800);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for value in 1..20_000u64 {
                    ram.memory().store(value, at, std::sync::atomic::Ordering::Relaxed).unwrap();
                    let seen: u64 = ram.memory().load(at, std::sync::atomic::Ordering::Relaxed).unwrap();
                    assert!(seen == value || seen == 0, "{seen:#x}");
                }
            });
            while !writer.is_finished() {
                ram.range(range(3, 1)).unwrap().zero().unwrap();
            }
            writer.join().unwrap();
        });
        ram.memory().store(7u64, at, std::sync::atomic::Ordering::Relaxed).unwrap();
        assert_eq!(ram.memory().load::<u64>(at, std::sync::atomic::Ordering::Relaxed).unwrap(), 7);
    }
}
