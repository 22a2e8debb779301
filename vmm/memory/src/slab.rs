//! Sealed slabs: memory files of page contents that no process can change any more, not even their
//! maker.
//!
//! A shared page lives in one. A process that receives a slab checks the seals, and the size,
//! before it believes anything of it; after that the bytes it reads are the bytes there will ever
//! be.
#![expect(unsafe_code, reason = "maps a sealed file for reading")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};
use thiserror::Error;

use super::page::to_usize;
use super::ram::{Advice, GuestRange};
use super::{PAGE, PAGE_BYTES, SlabPage};

/// Pages a slab may have: 1 GiB.
pub const MAX_SLAB_PAGES: u64 = 1 << 18;
/// `f_type` of the file system of memfds that are not made of huge pages (TMPFS_MAGIC).
const TMPFS: i64 = 0x0102_1994;
/// Bytes, aligned, that the kernel maps around a page of a file that is read (fault_around_bytes),
/// unless it was told otherwise.
const FAULT_AROUND: usize = 64 << 10;
/// What the kernel calls the file of a slab in lists of mappings.
pub const SLAB_NAME: &str = "/memfd:samepage-slab";
/// What must be sealed, no more and no less: contents, size, mode, and the seals.
const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::GROW)
    .union(SealFlags::SHRINK)
    .union(SealFlags::SEAL)
    .union(SealFlags::EXEC);

/// Why there is no slab.
#[derive(Debug, Error)]
pub enum SlabError {
    /// The number of pages is out of range.
    #[error("a slab of {pages} pages is not possible: expected 1 to {MAX_SLAB_PAGES}")]
    Size {
        /// What was asked for.
        pages: u64,
    },
    /// It has another size than was said.
    #[error("a slab of {bytes} bytes was received: expected {pages} pages of {PAGE_BYTES} bytes")]
    WrongSize {
        /// What it has.
        bytes: u64,
        /// What was said.
        pages: u64,
    },
    /// It can still be changed, or is no memory file.
    #[error("a slab was received that is not sealed: its seals are {seals:#x}, expected {:#x}", SEALS.bits())]
    NotSealed {
        /// Its seals; 0 for a file that has none.
        seals: u32,
    },
    /// Huge pages answer to seals, but are mapped in other units.
    #[error("a slab was received that is not made of ordinary pages")]
    NotOrdinary,
    /// The kernel refused.
    #[error("cannot {what} a slab")]
    Kernel {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

impl SlabError {
    fn kernel<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Kernel { what, source: source.into() }
    }
}

/// Pages reserved in one call, which takes 0.1 ms or two.
const RESERVE_PAGES: usize = 256;

/// A slab that is still being filled.
#[derive(Debug)]
pub struct Draft {
    file: File,
    pages: u64,
}

impl Draft {
    /// An empty one of `pages` pages, all of which are charged to this process's cgroup, whichever
    /// process fills them.
    pub fn new(pages: u64) -> Result<Self, SlabError> {
        Self::reserved(pages, &mut || {})
    }

    /// The same; `between` is called between two parts of the work, none of which takes long.
    pub fn reserved(pages: u64, between: &mut dyn FnMut()) -> Result<Self, SlabError> {
        if !(1..=MAX_SLAB_PAGES).contains(&pages) {
            return Err(SlabError::Size { pages });
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
        let file = rustix::fs::memfd_create(SLAB_NAME.trim_start_matches("/memfd:"), flags)
            .map_err(SlabError::kernel("make"))?;
        // Reserves the frames as well as setting the size. A kernel that does not preempt itself
        // does not let others run meanwhile.
        for page in (0..pages).step_by(RESERVE_PAGES) {
            let part = (pages - page).min(RESERVE_PAGES as u64) * PAGE_BYTES;
            rustix::fs::fallocate(&file, FallocateFlags::empty(), page * PAGE_BYTES, part)
                .map_err(SlabError::kernel("reserve memory for"))?;
            between();
        }
        Ok(Self { file: file.into(), pages })
    }

    /// One that another process made and wants filled.
    pub fn receive(file: OwnedFd, pages: u64) -> Result<Self, SlabError> {
        let file = File::from(file);
        check_size(&file, pages)?;
        Ok(Self { file, pages })
    }

    /// Its file, for the process that is to fill and seal it.
    pub fn into_file(self) -> File {
        self.file
    }

    /// Writes whole pages from `page` on.
    pub fn write(&self, page: SlabPage, bytes: &[u8]) -> Result<(), SlabError> {
        let end = u64::from(page.0) + bytes.len() as u64 / PAGE_BYTES;
        if !bytes.len().is_multiple_of(PAGE) || end > self.pages {
            let source = io::ErrorKind::InvalidInput.into();
            return Err(SlabError::Kernel { what: "write beyond the end of", source });
        }
        // Not through a mapping: one that is still there would make sealing fail.
        self.file.write_all_at(bytes, page.offset()).map_err(SlabError::kernel("fill"))
    }

    /// Gives its last pages back, so that `pages` are left.
    pub fn shrink(self, pages: u64) -> Result<Self, SlabError> {
        if !(1..=self.pages).contains(&pages) {
            return Err(SlabError::Size { pages });
        }
        rustix::fs::ftruncate(&self.file, pages * PAGE_BYTES).map_err(SlabError::kernel("shorten"))?;
        Ok(Self { pages, ..self })
    }

    /// Seals it: it cannot be changed from now on.
    pub fn seal(self) -> Result<Slab, SlabError> {
        rustix::fs::fcntl_add_seals(&self.file, SEALS).map_err(SlabError::kernel("seal"))?;
        Slab::receive(self.file.into(), self.pages)
    }
}

impl AsFd for Draft {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A slab that cannot change, mapped for reading.
#[derive(Debug)]
pub struct Slab {
    file: File,
    inode: u64,
    pages: u64,
    view: NonNull<u8>,
}

// SAFETY: the mapping is for reading, and nothing can change what is in it.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// One that another process says it has sealed, of `pages` pages.
    pub fn receive(file: OwnedFd, pages: u64) -> Result<Self, SlabError> {
        let file = File::from(file);
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if seals != SEALS {
            return Err(SlabError::NotSealed { seals: seals.bits() });
        }
        // After the seals: before, it could still change.
        check_size(&file, pages)?;
        let file_system = rustix::fs::fstatfs(&file).map_err(SlabError::kernel("look at"))?;
        if file_system.f_type != TMPFS {
            return Err(SlabError::NotOrdinary);
        }
        let inode = file.metadata().map_err(SlabError::kernel("look at"))?.ino();
        let bytes = to_usize(pages * PAGE_BYTES);
        // SAFETY: a new mapping where the kernel likes, of a file that holds that many bytes for
        // ever.
        let view = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::PRIVATE, &file, 0)
        };
        let view = view.map_err(SlabError::kernel("map"))?;
        let view = NonNull::new(view.cast()).ok_or(SlabError::NotOrdinary)?;
        Ok(Self { file, inode, pages, view })
    }

    /// The same slab once more, with a descriptor and a view of its own.
    pub fn try_clone(&self) -> Result<Self, SlabError> {
        let file = self.file.try_clone().map_err(SlabError::kernel("open"))?;
        Self::receive(file.into(), self.pages)
    }

    /// The number of its file, which no other one on this host has as long as this one is open or
    /// mapped.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether there are `pages` pages from `page` on.
    fn has(&self, page: SlabPage, pages: u64) -> bool {
        u64::from(page.0).checked_add(pages).is_some_and(|end| end <= self.pages)
    }

    /// What is in `pages` pages from `page` on; None if there are not as many.
    pub fn bytes(&self, page: SlabPage, pages: u64) -> Option<&[u8]> {
        if !self.has(page, pages) {
            return None;
        }
        // SAFETY: the range is inside the mapping, which lives as long as `self` and never changes.
        Some(unsafe {
            std::slice::from_raw_parts(
                self.view.as_ptr().add(to_usize(page.offset())),
                to_usize(pages * PAGE_BYTES),
            )
        })
    }

    /// Maps `pages` pages from `page` on, as guest RAM is to have them, with entries in the page
    /// table for all of them: else they would look as if they were not there to pagemap, and in
    /// counts of frames.
    pub fn stage(&self, page: SlabPage, pages: u64) -> Result<Staged, StageError> {
        if pages == 0 || !self.has(page, pages) {
            return Err(StageError::Range);
        }
        let bytes = to_usize(pages * PAGE_BYTES);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping where the kernel likes.
        let mapped =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, flags, &self.file, page.offset()) };
        let view = mapped.map_err(|error| match error {
            rustix::io::Errno::NOMEM => StageError::Mappings,
            error => StageError::Kernel(error.into()),
        })?;
        let staged = Staged { view, bytes };
        // The kernel maps what is around a page that is read: that takes a third of the time of
        // MADV_POPULATE_READ. Where it is set to map less, the rest comes when it is compared.
        // Read, not written: a written page would be no slab's any more.
        let to_aligned = (view.addr() + 1).next_multiple_of(FAULT_AROUND) - view.addr();
        for at in std::iter::once(0).chain((to_aligned..bytes).step_by(FAULT_AROUND)) {
            // SAFETY: the address is in the mapping that was made just now.
            unsafe { view.byte_add(at).cast::<u8>().read_volatile() };
        }
        Ok(staged)
    }

    /// Maps pages from `page` on over guest RAM that has not been written to, without entries in
    /// the page table: a page costs nothing until it is touched.
    pub(crate) fn map_over(&self, range: GuestRange<'_>, page: SlabPage) -> io::Result<()> {
        if !self.has(page, range.pages().pages()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: a range of guest RAM, of which any contents may become any others, and which is
        // mapped all the time, and as before. The file has those pages for ever.
        unsafe { rustix::mm::mmap(range.as_ptr(), range.bytes(), prot, flags, &self.file, page.offset()) }?;
        Ok(())
    }

    /// Bytes of frames it takes, mapped anywhere or not.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

impl AsFd for Slab {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.view.as_ptr().cast(), to_usize(self.pages * PAGE_BYTES)) };
    }
}

/// Why pages of a slab could not be staged.
#[derive(Debug)]
pub enum StageError {
    /// It has not as many.
    Range,
    /// The process may have no more mappings.
    Mappings,
    /// The kernel refused.
    Kernel(io::Error),
}

/// Pages of a slab that are mapped privately and writable, and on their way to where they are
/// wanted. Never written to here.
#[derive(Debug)]
pub struct Staged {
    view: *mut std::ffi::c_void,
    bytes: usize,
}

impl Staged {
    /// Advises the kernel of them.
    pub(crate) fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: the mapping is ours, as long as `self`.
        unsafe { advice.of(self.view, self.bytes) }
    }

    /// What is in them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is ours, as long as `self`, and neither it nor the slab is written
        // to.
        unsafe { std::slice::from_raw_parts(self.view.cast(), self.bytes) }
    }

    /// Moves them over guest RAM of the same size, atomically. Where it fails there may be a hole.
    pub(crate) fn move_to(self, run: GuestRange<'_>) -> Result<(), rustix::io::Errno> {
        if run.bytes() != self.bytes {
            return Err(rustix::io::Errno::INVAL);
        }
        let flags = MremapFlags::MAYMOVE;
        // SAFETY: the source is ours, and is no more after that. What it replaces is a range of
        // guest RAM, of which any contents may become any others.
        unsafe { rustix::mm::mremap_fixed(self.view, self.bytes, self.bytes, flags, run.as_ptr()) }?;
        // The view has been moved away: there is nothing left to unmap.
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.view, self.bytes) };
    }
}

fn check_size(file: &File, pages: u64) -> Result<(), SlabError> {
    if !(1..=MAX_SLAB_PAGES).contains(&pages) {
        return Err(SlabError::Size { pages });
    }
    let bytes = file.metadata().map_err(SlabError::kernel("look at"))?.len();
    if bytes == pages * PAGE_BYTES { Ok(()) } else { Err(SlabError::WrongSize { bytes, pages }) }
}

#[cfg(test)]
mod tests;
