//! Guest RAM as a flat file, as Firecracker has it: its pages one after the other in guest-physical
//! order, without the hole, and as long as RAM is. What is not in the file (a hole) reads as zeros.
//!
//! Loading here copies: a process that has the file open cannot change a running guest's memory,
//! and cutting the file short is no SIGBUS. See [`super::mapped_file`] for where that is not
//! needed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::page::to_usize;
use super::page_buffer::PageBuffer;
use super::ram::{Backing, Ram};
use super::{PAGE, PAGE_BYTES, PageNo, PageRange, PageSet};

/// Pages copied at a time.
const PIECE_PAGES: u64 = 256;

/// What becomes of pages of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// They are left out: the file has holes there, or is new.
    Skip,
    /// They are written: the file may hold something else there, or is laid over one that does.
    Write,
}

/// Why RAM was not written or loaded.
#[derive(Debug, Error)]
pub enum FlatError {
    /// The kernel refused.
    #[error("cannot {what}")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Of another guest, or cut short.
    #[error("the memory file has {found} bytes, and the guest's memory {expected}: expected as many")]
    Length {
        /// Bytes of the file.
        found: u64,
        /// Bytes of RAM.
        expected: u64,
    },
}

impl FlatError {
    pub(super) fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what, source: source.into() }
    }
}

impl Ram {
    /// Writes those of `pages` to `file`, each at its place. No vCPU runs and no device works
    /// meanwhile; what merges, parks or gives back waits. Returns how many pages were written.
    pub fn save_flat(&self, file: &File, pages: &PageSet, zeros: Zeros) -> Result<u64, FlatError> {
        let mut placement = self.placement();
        for stretch in self.stretches() {
            placement.settle(stretch).map_err(FlatError::io("bring parked pages back"))?;
        }
        let filled = self.filled().map_err(FlatError::io("read the page table"))?;
        let (mut buffer, mut written) = (PageBuffer::new(to_usize(PIECE_PAGES)), 0);
        for stretch in self.stretches() {
            for run in pages.runs_of(stretch.pages(), PIECE_PAGES) {
                // What was never touched is not read: that would get it entries in the page table.
                for (part, is_filled) in filled.runs(run) {
                    let bytes = &mut buffer[..to_usize(part.bytes())];
                    match (is_filled, zeros) {
                        (false, Zeros::Skip) => continue,
                        (false, Zeros::Write) => bytes.fill(0),
                        (true, _) => self.read(part, bytes)?,
                    }
                    written += write(file, part.first(), bytes, zeros)?;
                }
            }
        }
        Ok(written)
    }

    /// Pages that may be other than zeros.
    fn filled(&self) -> io::Result<PageSet> {
        // What another process fills, or is a file's, is not there before it is touched; of other
        // backings the page table does not tell.
        if self.is_filled_by_handler() || self.maps_file() || self.backing() != Backing::Anonymous {
            return Ok(PageSet::all(self.pages().pages()));
        }
        let mut filled = PageSet::none(self.pages().pages());
        self.pieces()?.iter().for_each(|piece| filled.insert_range(piece.range()));
        Ok(filled)
    }

    fn read(&self, pages: PageRange, bytes: &mut [u8]) -> Result<(), FlatError> {
        let gpa = self.gpa(pages.first()).map_or(0, |gpa| gpa.0);
        let read = self.memory().read_slice(bytes, GuestAddress(gpa));
        read.map_err(|error| FlatError::io("read guest memory")(io::Error::other(error)))
    }

    pub(super) fn check_length(&self, file: &File) -> Result<(), FlatError> {
        let (found, expected) =
            (file.metadata().map_err(FlatError::io("look at the memory file"))?.len(), self.bytes());
        if found == expected { Ok(()) } else { Err(FlatError::Length { found, expected }) }
    }

    /// Fills RAM, to which nothing was written yet, from `file`. Pages of zeros are left untouched,
    /// and cost no frame. Returns how many pages were filled.
    ///
    /// # Errors
    /// The file is of another length, or cannot be read. Then some pages may be filled: the memory
    /// is of no use.
    pub fn load_flat(&self, file: &File) -> Result<u64, FlatError> {
        self.check_length(file)?;
        let (mut buffer, mut filled, mut at) = (PageBuffer::new(to_usize(PIECE_PAGES)), 0, PageNo(0));
        while let Some(data) = next_data(file, at, self.pages().end())? {
            for part in self.parts(data) {
                let mut rest = part.pages();
                while !rest.is_empty() {
                    let (piece, after) = rest.split(PIECE_PAGES);
                    rest = after;
                    let bytes = &mut buffer[..to_usize(piece.bytes())];
                    file.read_exact_at(bytes, piece.first().0 * PAGE_BYTES)
                        .map_err(FlatError::io("read the memory file"))?;
                    filled += self.fill(piece, bytes)?;
                }
            }
            at = data.end();
        }
        Ok(filled)
    }

    fn fill(&self, pages: PageRange, bytes: &[u8]) -> Result<u64, FlatError> {
        let gpa = self.gpa(pages.first()).map_or(0, |gpa| gpa.0);
        let mut filled = 0;
        for (n, run) in runs(bytes).filter(|(_, run)| !is_zero(run)) {
            let written = self.memory().write_slice(run, GuestAddress(gpa + n * PAGE_BYTES));
            written.map_err(|error| FlatError::io("fill guest memory")(io::Error::other(error)))?;
            filled += (run.len() / PAGE) as u64;
        }
        Ok(filled)
    }
}

/// Makes `to`, an empty file, what `from` is, of `bytes` bytes: by reference where the file system
/// can.
pub fn copy(from: &File, to: &File, bytes: u64) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let (mut buffer, end) = (PageBuffer::new(to_usize(PIECE_PAGES)), PageNo(bytes / PAGE_BYTES));
    let mut at = PageNo(0);
    while let Some(data) = next_data(from, at, end).map_err(io::Error::other)? {
        let mut rest = data;
        while !rest.is_empty() {
            let (piece, after) = rest.split(PIECE_PAGES);
            rest = after;
            let part = &mut buffer[..to_usize(piece.bytes())];
            from.read_exact_at(part, piece.first().0 * PAGE_BYTES)?;
            to.write_all_at(part, piece.first().0 * PAGE_BYTES)?;
        }
        at = data.end();
    }
    Ok(())
}

/// Writes whole pages from `page` on. Returns how many.
fn write(file: &File, page: PageNo, bytes: &[u8], zeros: Zeros) -> Result<u64, FlatError> {
    let mut written = 0;
    let mut put = |n: u64, run: &[u8]| {
        written += (run.len() / PAGE) as u64;
        file.write_all_at(run, (page.0 + n) * PAGE_BYTES).map_err(FlatError::io("write the memory file"))
    };
    match zeros {
        Zeros::Write => put(0, bytes)?,
        Zeros::Skip => {
            for (n, run) in runs(bytes).filter(|(_, run)| !is_zero(run)) {
                put(n, run)?;
            }
        }
    }
    Ok(written)
}

/// Adjacent pages that are all zeros, or all others; each with the number of its first page.
fn runs(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut rest = bytes;
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = is_zero(rest.get(..PAGE)?);
        let same = rest.chunks_exact(PAGE).take_while(|page| is_zero(page) == first).count();
        let (run, after) = rest.split_at(same * PAGE);
        let n = at;
        (rest, at) = (after, at + same as u64);
        Some((n, run))
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.as_chunks::<8>().0.iter().all(|word| u64::from_ne_bytes(*word) == 0)
}

/// The next pages before `end` of which the file has data.
pub(super) fn next_data(file: &File, at: PageNo, end: PageNo) -> Result<Option<PageRange>, FlatError> {
    if at >= end {
        return Ok(None);
    }
    let failed = |error: Errno| FlatError::io("look for data in the memory file")(error);
    let first = match seek(file, SeekFrom::Data(at.0 * PAGE_BYTES)) {
        Ok(first) => PageNo(first / PAGE_BYTES).max(at),
        // No more.
        Err(Errno::NXIO) => return Ok(None),
        // A file system that does not tell.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(PageRange::between(at, end))),
        Err(error) => return Err(failed(error)),
    };
    let hole = match seek(file, SeekFrom::Hole(first.0 * PAGE_BYTES)) {
        Ok(hole) => PageNo(hole.div_ceil(PAGE_BYTES)),
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // At least a page: the file may be changing.
    let hole = hole.max(first + 1).min(end);
    Ok((first < end).then(|| PageRange::between(first, hole)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const BYTES: u64 = 16 << 20;

    fn ram() -> Ram {
        Ram::new(BYTES, Backing::Anonymous).unwrap()
    }

    fn put(ram: &Ram, page: u64, value: u8) {
        ram.memory().write_slice(&[value; PAGE], GuestAddress(page * PAGE_BYTES)).unwrap();
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        file
    }

    fn all() -> PageSet {
        PageSet::all(BYTES / PAGE_BYTES)
    }

    fn contents(ram: &Ram) -> Vec<u8> {
        let mut bytes = vec![0; BYTES as usize];
        ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    #[test]
    fn what_was_saved_is_loaded_and_zeros_cost_nothing() {
        let first = ram();
        // One at each end, neighbours, one that is zeros again.
        for (page, value) in [(0, 1), (700, 2), (701, 3), (702, 0), (1500, 0), (4095, 9)] {
            put(&first, page, value);
        }
        let file = file();
        assert_eq!(first.save_flat(&file, &all(), Zeros::Skip).unwrap(), 4);
        assert!(file.metadata().unwrap().blocks() * 512 < 64 << 10, "{:?}", file.metadata());
        let second = ram();
        assert_eq!(second.load_flat(&file).unwrap(), 4);
        let resident = second.resident(&[crate::Gpa(0)..crate::Gpa(BYTES)]).unwrap();
        assert_eq!(crate::resident::page_count(&resident), 4);
        assert_eq!(contents(&second), contents(&first));
    }

    #[test]
    fn some_pages_are_laid_over_others_zeros_as_well() {
        let ram = ram();
        (10..20).for_each(|page| put(&ram, page, 7));
        let base = file();
        ram.save_flat(&base, &all(), Zeros::Skip).unwrap();
        put(&ram, 12, 0);
        put(&ram, 13, 8);
        put(&ram, 500, 9);
        let mut dirty = PageSet::none(BYTES / PAGE_BYTES);
        // Page 14 is given back, 15 is not among them.
        devices::reclaim::Reclaim::discard(&ram, crate::Gpa(14 * PAGE_BYTES)..crate::Gpa(16 * PAGE_BYTES))
            .unwrap();
        [12, 13, 14, 500].iter().for_each(|page| dirty.insert(PageNo(*page)));
        assert_eq!(ram.save_flat(&base, &dirty, Zeros::Write).unwrap(), 4);
        let other = super::tests::ram();
        other.load_flat(&base).unwrap();
        let byte = |page: u64| contents(&other)[to_usize(page * PAGE_BYTES)];
        assert_eq!([10, 11, 12, 13, 14, 15, 500].map(byte), [7, 7, 0, 8, 0, 7, 9]);
    }

    #[test]
    fn pages_of_slabs_and_above_the_hole_are_where_they_belong() {
        let ram = Ram::new((3 << 30) + BYTES, Backing::Anonymous).unwrap();
        ram.memory().write_slice(&[5; PAGE], GuestAddress((4 << 30) + PAGE_BYTES)).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(ram.bytes()).unwrap();
        assert_eq!(ram.save_flat(&file, &PageSet::all(ram.pages().pages()), Zeros::Skip).unwrap(), 1);
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, (3 << 30) + PAGE_BYTES).unwrap();
        assert_eq!(page, [5; PAGE]);
        let other = Ram::new(ram.bytes(), Backing::Anonymous).unwrap();
        assert_eq!(other.load_flat(&file).unwrap(), 1);
        let seen: u8 = other.memory().read_obj(GuestAddress((4 << 30) + PAGE_BYTES)).unwrap();
        assert_eq!(seen, 5);
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let ram = ram();
        for bytes in [0, BYTES - 1, BYTES + PAGE_BYTES] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            let error = ram.load_flat(&file).unwrap_err();
            assert!(matches!(error, FlatError::Length { found, .. } if found == bytes), "{error}");
        }
    }
}
