//! What the kernel shows of pages and frames: `/proc/PID/pagemap`, `/proc/kpagecount`,
//! `/proc/kpageflags`.
//!
//! Source: the kernel's Documentation/admin-guide/mm/pagemap.rst. Files are read in bulk with
//! `pread` into buffers that are used again. Nothing here touches the memory it describes, and
//! nothing here is a snapshot: the kernel moves pages between two reads.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use thiserror::Error;

use super::{Hva, PAGE, PAGE_BYTES, to_usize};

/// Bytes of one entry in each of the three files.
const ENTRY_BYTES: usize = 8;
/// Entries asked for in one `pread`: 512 KiB, describing 256 MiB.
const READ_ENTRIES: usize = 64 * 1024;
/// Pages whose entries [`Pagemap::each`] has at a time.
const CHUNK_PAGES: usize = 16 * 1024;
/// Two frames or pages no further apart than this are read in one call: reading an entry costs tens
/// of nanoseconds, a call some hundreds.
pub const GAP_ENTRIES: u64 = 16;

/// Errors of reading page tables.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// The file could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read {} entries at index {index:#x} of {}", entries, path.display())]
    Read {
        path: PathBuf,
        /// The first entry asked for.
        index: u64,
        /// How many were asked for.
        entries: usize,
        #[source]
        source: io::Error,
    },
    /// The file ended early: the process has no memory any more.
    #[error("{} ends at index {index:#x}: the process has exited", path.display())]
    Ended {
        path: PathBuf,
        /// The first entry that was not there.
        index: u64,
    },
}

/// A page frame number of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

/// One 64-bit entry of `/proc/PID/pagemap`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagemapEntry(pub u64);

impl PagemapEntry {
    const PRESENT: u64 = 1 << 63;
    const SWAP: u64 = 1 << 62;
    const FILE_OR_SHARED: u64 = 1 << 61;
    const UFFD_WP: u64 = 1 << 57;
    const EXCLUSIVE: u64 = 1 << 56;
    const SOFT_DIRTY: u64 = 1 << 55;
    const PFN_MASK: u64 = (1 << 55) - 1;
    const SWAP_TYPE_MASK: u64 = 0x1f;
    /// The last swap type of the kernel is not swap but a marker in an absent page's entry, such as
    /// userfaultfd's write protection.
    const SWAP_TYPE_MARKER: u64 = 31;

    /// The page has a frame, the kernel's zero frame included.
    pub fn present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// The page is on swap. An absent page that carries a marker only is not.
    pub fn swapped(self) -> bool {
        !self.present() && self.0 & Self::SWAP != 0 && !self.is_marker()
    }

    /// An absent page whose entry holds a marker, not a swap slot.
    pub fn is_marker(self) -> bool {
        !self.present() && self.0 & Self::SWAP != 0 && self.0 & Self::SWAP_TYPE_MASK == Self::SWAP_TYPE_MARKER
    }

    /// The frame belongs to a file, a memfd, or shared anonymous memory.
    pub fn file_or_shared(self) -> bool {
        self.0 & Self::FILE_OR_SHARED != 0
    }

    /// The frame is mapped once, here. Needs no privilege. Never set for the zero frame.
    pub fn exclusive(self) -> bool {
        self.0 & Self::EXCLUSIVE != 0
    }

    /// Whether the page stays on its frame when it is pinned for reading. Not so for an anonymous
    /// page that is mapped more than once, which is given a frame of its own first; nor, for all
    /// that can be seen from here, for the zero frame, for which it does not matter. An anonymous
    /// page that is mapped once may be moved to another frame, and shares nothing before or after.
    pub fn keeps_frame_when_pinned(self) -> bool {
        self.present() && (self.exclusive() || self.file_or_shared())
    }

    /// The page was written since soft-dirty bits were last cleared; always clear on kernels
    /// without them.
    pub fn soft_dirty(self) -> bool {
        self.0 & Self::SOFT_DIRTY != 0
    }

    /// userfaultfd write-protects the page.
    pub fn write_protected(self) -> bool {
        self.0 & Self::UFFD_WP != 0
    }

    /// The frame, or `None` for an absent page and for a reader without CAP_SYS_ADMIN, to which the
    /// kernel shows 0.
    pub fn pfn(self) -> Option<Pfn> {
        let pfn = self.0 & Self::PFN_MASK;
        (self.present() && pfn != 0).then_some(Pfn(pfn))
    }
}

/// A file of 64-bit entries, read in ranges.
#[derive(Debug)]
struct EntryFile {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
}

impl EntryFile {
    fn open(path: PathBuf) -> Result<Self, PagemapError> {
        match File::open(&path) {
            Ok(file) => Ok(Self { file, path, buffer: Vec::new() }),
            Err(source) => Err(PagemapError::Open { path, source }),
        }
    }

    /// Passes entries `index..index + entries` to `each` in order; returns the number of entries
    /// that the file had.
    fn read(&mut self, index: u64, entries: usize, mut each: impl FnMut(u64)) -> Result<usize, PagemapError> {
        let mut done = 0;
        while done < entries {
            let wanted = (entries - done).min(READ_ENTRIES) * ENTRY_BYTES;
            self.buffer.resize(wanted, 0);
            let at = index + done as u64;
            let got = match self.file.read_at(&mut self.buffer, at.saturating_mul(ENTRY_BYTES as u64)) {
                Ok(got) => got / ENTRY_BYTES,
                Err(source) if source.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(PagemapError::Read {
                        path: self.path.clone(),
                        index: at,
                        entries: wanted / ENTRY_BYTES,
                        source,
                    });
                }
            };
            if got == 0 {
                break;
            }
            let (words, _) = self.buffer[..got * ENTRY_BYTES].as_chunks::<ENTRY_BYTES>();
            words.iter().for_each(|word| each(u64::from_ne_bytes(*word)));
            done += got;
        }
        Ok(done)
    }
}

/// The page table of one process, as the kernel shows it.
#[derive(Debug)]
pub struct Pagemap(EntryFile);

impl Pagemap {
    /// The pagemap of process `pid`. Needs what ptrace reading needs: the same user, or
    /// CAP_SYS_PTRACE.
    pub fn open(pid: u32) -> Result<Self, PagemapError> {
        EntryFile::open(PathBuf::from(format!("/proc/{pid}/pagemap"))).map(Self)
    }

    pub fn open_self() -> Result<Self, PagemapError> {
        EntryFile::open(PathBuf::from("/proc/self/pagemap")).map(Self)
    }

    /// Calls `each` with the address and the entry of every page at the addresses `ranges`, in
    /// their order. An error of `each` ends it.
    ///
    /// # Errors
    /// As [`Self::read`], and those of `each`.
    pub fn each<E: From<PagemapError>>(
        &mut self,
        ranges: impl IntoIterator<Item = Range<Hva>>,
        mut each: impl FnMut(Hva, PagemapEntry) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut entries = Vec::new();
        for range in ranges {
            let pages = range.end.0.saturating_sub(range.start.0) / PAGE_BYTES;
            for at in (0..pages).step_by(CHUNK_PAGES) {
                let hva = range.start + at * PAGE_BYTES;
                self.read(hva, to_usize(pages - at).min(CHUNK_PAGES), &mut entries)?;
                for (hva, entry) in (hva.0..).step_by(PAGE).map(Hva).zip(&entries) {
                    each(hva, *entry)?;
                }
            }
        }
        Ok(())
    }

    /// Replaces the contents of `out` with the entries of `pages` pages from address `hva` on.
    ///
    /// # Errors
    /// [`PagemapError::Ended`] when the process exits meanwhile.
    pub fn read(&mut self, hva: Hva, pages: usize, out: &mut Vec<PagemapEntry>) -> Result<(), PagemapError> {
        out.clear();
        out.reserve(pages);
        let index = hva.0 / PAGE_BYTES;
        let got = self.0.read(index, pages, |word| out.push(PagemapEntry(word)))?;
        if got < pages {
            return Err(PagemapError::Ended { path: self.0.path.clone(), index: index + got as u64 });
        }
        Ok(())
    }
}

/// The flags of a frame in `/proc/kpageflags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameFlags(pub u64);

impl FrameFlags {
    /// KSM merged it; but Linux 6.12 sets that flag on every anonymous page: see
    /// [`FrameTable::tells_ksm`].
    pub fn ksm(self) -> bool {
        self.0 & (1 << 21) != 0
    }

    /// The kernel's zero frame, 4 KiB or huge.
    pub fn zero(self) -> bool {
        self.0 & (1 << 24) != 0
    }
}

/// `/proc/kpagecount` and `/proc/kpageflags`: what the host knows of each frame. Needs root.
#[derive(Debug)]
pub struct FrameTable {
    counts: EntryFile,
    flags: EntryFile,
}

impl FrameTable {
    pub fn open() -> Result<Self, PagemapError> {
        Ok(Self {
            counts: EntryFile::open(PathBuf::from("/proc/kpagecount"))?,
            flags: EntryFile::open(PathBuf::from("/proc/kpageflags"))?,
        })
    }

    /// Whether a frame's flag for KSM means what it says: a page of our own, which is never merged,
    /// must not have it.
    pub fn tells_ksm(&mut self) -> bool {
        let pages = vec![1u8; 2 * PAGE];
        // The first page that begins in there is whole.
        let hva = (Hva::of(pages.as_ptr()) + (PAGE_BYTES - 1)).page();
        let (mut entries, mut flags) = (Vec::new(), Vec::new());
        let read = Pagemap::open_self().and_then(|mut pagemap| pagemap.read(hva, 1, &mut entries));
        let Some(frame) = entries.first().and_then(|entry| entry.pfn()) else { return false };
        read.is_ok() && self.flags(&[frame], &mut flags).is_ok() && flags.first().is_some_and(|f| !f.ksm())
    }

    /// How many page table entries on the host map each of `frames` (ascending), in the same order,
    /// into `out`. 0 for the zero frame, which is not counted, and for a frame the host does not
    /// have.
    pub fn counts(&mut self, frames: &[Pfn], out: &mut Vec<u64>) -> Result<(), PagemapError> {
        lookup(&mut self.counts, frames, out)
    }

    /// The flags of each of `frames` (ascending), in the same order, into `out`.
    pub fn flags(&mut self, frames: &[Pfn], out: &mut Vec<FrameFlags>) -> Result<(), PagemapError> {
        let mut words = Vec::new();
        lookup(&mut self.flags, frames, &mut words)?;
        out.clear();
        out.extend(words.into_iter().map(FrameFlags));
        Ok(())
    }
}

fn lookup(file: &mut EntryFile, frames: &[Pfn], out: &mut Vec<u64>) -> Result<(), PagemapError> {
    out.clear();
    out.reserve(frames.len());
    let mut rest = frames;
    let mut words = Vec::new();
    while let Some(&Pfn(first)) = rest.first() {
        let len = span(rest);
        let (batch, after) = rest.split_at(len);
        let last = batch[len - 1].0;
        words.clear();
        file.read(first, to_usize(last - first + 1), |word| words.push(word))?;
        out.extend(batch.iter().map(|frame| words.get(to_usize(frame.0 - first)).copied().unwrap_or(0)));
        rest = after;
    }
    Ok(())
}

/// How many of `frames`, which ascend, are worth reading in one call.
fn span(frames: &[Pfn]) -> usize {
    let first = frames[0].0;
    1 + frames
        .windows(2)
        .take_while(|pair| pair[1].0 - pair[0].0 <= GAP_ENTRIES && pair[1].0 - first < READ_ENTRIES as u64)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_bit_by_bit() {
        let entry = PagemapEntry(1 << 63 | 1 << 61 | 1 << 56 | 1 << 55 | 0x1234);
        assert!(entry.present() && entry.file_or_shared() && entry.exclusive() && entry.soft_dirty());
        assert_eq!(entry.pfn(), Some(Pfn(0x1234)));
        assert!(!entry.swapped());
    }

    #[test]
    fn a_shared_anonymous_page_would_move_when_pinned() {
        let keeps = |bits: u64| PagemapEntry(bits | 0x1234).keeps_frame_when_pinned();
        assert!(keeps(1 << 63 | 1 << 56) && keeps(1 << 63 | 1 << 61) && keeps(1 << 63 | 1 << 61 | 1 << 56));
        // Anonymous and mapped more than once, or the zero frame; absent; on swap.
        assert!(!keeps(1 << 63) && !keeps(1 << 61 | 1 << 56) && !keeps(1 << 62 | 1 << 61));
    }

    #[test]
    fn a_write_protect_marker_is_not_swap() {
        let marker = PagemapEntry(1 << 62 | 1 << 57 | 0x3f);
        assert!(marker.is_marker() && !marker.swapped() && !marker.present());
        assert_eq!(marker.pfn(), None);
        let swap = PagemapEntry(1 << 62 | 42 << 5 | 1);
        assert!(swap.swapped() && !swap.is_marker());
    }

    #[test]
    fn frame_zero_means_no_privilege() {
        assert_eq!(PagemapEntry(1 << 63).pfn(), None);
    }

    #[test]
    fn frames_close_together_are_read_in_one_call() {
        let frames = |list: &[u64]| list.iter().map(|pfn| Pfn(*pfn)).collect::<Vec<_>>();
        assert_eq!(span(&frames(&[5, 6, 20, 100])), 3);
        assert_eq!(span(&frames(&[5])), 1);
        assert_eq!(span(&frames(&[5, 5, 5])), 3);
        let long: Vec<u64> = (0..10_000).map(|step| step * 16).collect();
        assert_eq!(span(&frames(&long)), READ_ENTRIES / 16);
    }

    #[test]
    fn our_own_pages_are_found() {
        let pages = vec![7u8; 3 * PAGE];
        let hva = (Hva::of(pages.as_ptr()) + (PAGE_BYTES - 1)).page();
        let mut entries = Vec::new();
        Pagemap::open_self().unwrap().read(hva, 2, &mut entries).unwrap();
        assert_eq!(entries.len(), 2);
        assert!(entries.iter().all(|entry| entry.present() && !entry.file_or_shared()));
    }

    #[test]
    fn a_process_that_is_gone_is_an_error_with_its_path() {
        let error = Pagemap::open(u32::MAX - 1).unwrap_err();
        assert!(error.to_string().contains("4294967294"), "{error}");
    }
}
