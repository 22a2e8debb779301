//! Guest memory in another process. Only pages with a frame are read, absent and swapped ones are
//! not.
//!
//! So measuring neither grows a guest nor swaps it in. One exception: a page that is given back
//! between reading the page table and reading the page gets the kernel's zero frame. Pages that may
//! share their frame are read through `/proc/PID/mem`, which leaves it so, all others by
//! process_vm_readv, which is faster.

use std::io::IoSliceMut;
use std::ops::Range;
use std::sync::Arc;

use super::{EachPage, PageReader, Source, Unread, hand_on};
use crate::page_types::PageTypes;
use crate::{MeasureError, PAGE, Space};
use kernel_view::pagemap::{GAP_ENTRIES, Pagemap, PagemapEntry};
use memory::page_buffer::PageBuffer;
use memory::remote::{RemoteError, RemoteMemory, RemoteRange};
use memory::{Extent, Hva, PAGE_BYTES};

/// Pages read in one call: 256 KiB stay in the second-level cache from the read to the hash.
const BATCH_PAGES: usize = 64;

/// The memory of a running guest.
#[derive(Clone, Debug)]
pub struct ProcessSource {
    space: Space,
    stopped: bool,
    page_types: Option<Arc<PageTypes>>,
}

impl ProcessSource {
    /// The memory of `space`. `stopped` says that nothing writes it.
    pub fn new(space: Space, stopped: bool) -> Self {
        Self { space, stopped, page_types: None }
    }

    /// The same, with what its pages are used for, if that is known.
    pub fn with_page_types(self, page_types: Option<Arc<PageTypes>>) -> Self {
        Self { page_types, ..self }
    }
}

impl Source for ProcessSource {
    fn name(&self) -> &str {
        &self.space.name
    }

    fn extents(&self) -> Vec<u64> {
        self.space.extents.iter().map(|extent| extent.bytes / PAGE_BYTES).collect()
    }

    fn is_live(&self) -> bool {
        !self.stopped
    }

    fn page_types(&self) -> Option<&PageTypes> {
        self.page_types.as_deref()
    }

    fn open(&self) -> Result<Box<dyn PageReader + '_>, MeasureError> {
        let space = &self.space;
        let (guest, pid) = (&space.name, space.pid);
        let pagemap =
            Pagemap::open(pid).map_err(|source| MeasureError::Pages { guest: guest.clone(), pid, source })?;
        let memory = RemoteMemory::open(pid).map_err(|source| MeasureError::Memory {
            guest: guest.clone(),
            pid,
            source,
        })?;
        let (entries, wanted) = (Vec::new(), Vec::with_capacity(BATCH_PAGES));
        Ok(Box::new(Reader { space, pagemap, memory, entries, wanted, buffer: PageBuffer::new(BATCH_PAGES) }))
    }
}

/// A page that is to be read next.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    page: u64,
    may_be_pinned: bool,
}

/// Pages that are neighbours and read the same way.
fn runs(wanted: &[Wanted]) -> impl Iterator<Item = &[Wanted]> {
    wanted.chunk_by(|a, b| a.page + 1 == b.page && a.may_be_pinned == b.may_be_pinned)
}

struct Reader<'a> {
    space: &'a Space,
    pagemap: Pagemap,
    memory: RemoteMemory,
    entries: Vec<PagemapEntry>,
    /// At most [`BATCH_PAGES`], ascending.
    wanted: Vec<Wanted>,
    /// A page for each of them.
    buffer: PageBuffer,
}

/// The address of a page.
fn address(space: &Space, page: u64) -> Hva {
    let mut before = 0;
    for Extent { hva, bytes, .. } in &space.extents {
        let pages = bytes / PAGE_BYTES;
        if page < before + pages {
            return *hva + (page - before) * PAGE_BYTES;
        }
        before += pages;
    }
    // Of no extent; the kernel will say that nothing is mapped there.
    Hva(!(PAGE_BYTES - 1))
}

impl Reader<'_> {
    fn error(&self, source: RemoteError) -> MeasureError {
        MeasureError::Memory { guest: self.space.name.clone(), pid: self.space.pid, source }
    }

    /// Reads the pages of `first..first + pages` that `is_wanted` names, in batches.
    fn want(
        &mut self,
        first: u64,
        pages: u64,
        mut is_wanted: impl FnMut(u64) -> bool,
        unread: &mut Unread,
        each: EachPage<'_>,
    ) -> Result<(), MeasureError> {
        let hva = address(self.space, first);
        let mut entries = std::mem::take(&mut self.entries);
        let read = self.pagemap.read(hva, pages as usize, &mut entries);
        read.map_err(|source| MeasureError::Pages {
            guest: self.space.name.clone(),
            pid: self.space.pid,
            source,
        })?;
        for (page, entry) in (first..).zip(&entries).filter(|(page, _)| is_wanted(*page)) {
            if entry.present() {
                self.wanted.push(Wanted { page, may_be_pinned: entry.keeps_frame_when_pinned() });
            } else if entry.swapped() {
                unread.swapped += 1;
            } else {
                unread.absent += 1;
            }
            if self.wanted.len() == BATCH_PAGES {
                unread.vanished += self.read_wanted(each)?;
            }
        }
        self.entries = entries;
        Ok(())
    }

    /// Reads the rest of the batch, and checks that all pages were of the process that was opened.
    fn finish(&mut self, unread: &mut Unread, each: EachPage<'_>) -> Result<(), MeasureError> {
        unread.vanished += self.read_wanted(each)?;
        self.memory.check_alive().map_err(|source| self.error(source))
    }

    /// Reads the wanted pages, and passes them on. Returns how many of them have gone.
    fn read_wanted(&mut self, each: EachPage<'_>) -> Result<u64, MeasureError> {
        let mut wanted = std::mem::take(&mut self.wanted);
        let are_pinned = self.read_pinned(&wanted);
        let (mut before, mut vanished) = (0, 0);
        for run in runs(&wanted) {
            let (first, slots) = (run[0].page, before..before + run.len());
            before = slots.end;
            if are_pinned && run[0].may_be_pinned {
                hand_on(first, &self.buffer[slots.start * PAGE..slots.end * PAGE], each);
            } else {
                vanished += self.read_run(first, slots, each)?;
            }
        }
        wanted.clear();
        self.wanted = wanted;
        Ok(vanished)
    }

    /// Reads the pages that may be pinned to their places in the buffer; false if one of them could
    /// not be read.
    fn read_pinned(&mut self, wanted: &[Wanted]) -> bool {
        let (mut hvas, mut into) = (Vec::new(), Vec::new());
        let mut rest = &mut *self.buffer;
        for run in runs(wanted) {
            let (place, behind) = rest.split_at_mut(run.len() * PAGE);
            rest = behind;
            if run[0].may_be_pinned {
                hvas.push(address(self.space, run[0].page));
                into.push(IoSliceMut::new(place));
            }
        }
        !hvas.is_empty() && self.memory.read_pinned(&hvas, &mut into)
    }

    /// Reads neighbouring pages that were all present, to their places in the buffer. Returns how
    /// many have gone.
    fn read_run(&mut self, first: u64, slots: Range<usize>, each: EachPage<'_>) -> Result<u64, MeasureError> {
        let hva = address(self.space, first);
        let buffer = &mut self.buffer[slots.start * PAGE..slots.end * PAGE];
        match self.memory.read(&[RemoteRange { hva, bytes: buffer.len() }], buffer) {
            Ok(_) => {
                hand_on(first, buffer, each);
                Ok(0)
            }
            Err(RemoteError::Unmapped { .. }) if slots.len() == 1 => Ok(1),
            Err(RemoteError::Unmapped { .. }) => {
                let half = slots.len() / 2;
                let middle = slots.start + half;
                let vanished = self.read_run(first, slots.start..middle, each)?;
                Ok(vanished + self.read_run(first + half as u64, middle..slots.end, each)?)
            }
            Err(source) => Err(self.error(source)),
        }
    }
}

impl PageReader for Reader<'_> {
    fn read(&mut self, first: u64, pages: u64, each: EachPage<'_>) -> Result<Unread, MeasureError> {
        let mut unread = Unread::default();
        self.want(first, pages, |_| true, &mut unread, each)?;
        self.finish(&mut unread, each)?;
        Ok(unread)
    }

    fn read_scattered(&mut self, pages: &[u64], each: EachPage<'_>) -> Result<Unread, MeasureError> {
        let mut unread = Unread::default();
        let space = self.space;
        // Between pages of two extents lies other memory.
        let are_near = |a: &u64, b: &u64| {
            let apart = b.saturating_sub(*a);
            apart <= GAP_ENTRIES
                && address(space, *b).0.wrapping_sub(address(space, *a).0) == apart * PAGE_BYTES
        };
        for near in pages.chunk_by(are_near) {
            let (Some(first), Some(last)) = (near.first(), near.last()) else { continue };
            let mut wanted = near.iter().peekable();
            let is_wanted = |page| wanted.next_if_eq(&&page).is_some();
            self.want(*first, last - first + 1, is_wanted, &mut unread, each)?;
        }
        self.finish(&mut unread, each)?;
        Ok(unread)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use memory::ram::{Backing, Ram};

    const PAGES: u64 = 4096;

    /// Of every seven pages two are absent, two are on the zero frame, and three hold their number.
    fn guest() -> (Ram, Space) {
        let ram = Ram::new(PAGES * PAGE_BYTES, Backing::Anonymous).unwrap();
        ram.set_huge_pages(false).unwrap();
        for page in 0..PAGES {
            let at = GuestAddress(page * PAGE_BYTES);
            match page % 7 {
                0 | 1 => {}
                2 | 3 => assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 0),
                _ => ram.memory().write_obj(page, at).unwrap(),
            }
        }
        let space = Space { name: "us".into(), pid: std::process::id(), extents: ram.extents() };
        (ram, space)
    }

    fn entries(space: &Space) -> Vec<PagemapEntry> {
        let mut entries = Vec::new();
        Pagemap::open(space.pid).unwrap().read(address(space, 0), PAGES as usize, &mut entries).unwrap();
        entries
    }

    #[test]
    fn pages_of_all_kinds_are_read_in_order_and_left_as_they_were() {
        let (_ram, space) = guest();
        let before = entries(&space);
        let pinned = before.iter().filter(|entry| entry.keeps_frame_when_pinned()).count();
        let present = before.iter().filter(|entry| entry.present()).count();
        assert_eq!((pinned, present), (1755, 2925));
        let source = ProcessSource::new(space.clone(), true);
        // By batches of other sizes than the page table's.
        for step in [1, 63, 64, 65, 4096] {
            let mut reader = source.open().unwrap();
            let (mut seen, mut unread) = (Vec::new(), Unread::default());
            for first in (0..PAGES).step_by(step) {
                let pages = (PAGES - first).min(step as u64);
                let read = reader.read(first, pages, &mut |page, content| {
                    seen.push((page, u64::from_ne_bytes(*content.first_chunk().unwrap())));
                });
                unread.add(read.unwrap());
            }
            let expected = (0..PAGES).filter(|page| page % 7 > 1).map(|n| (n, if n % 7 > 3 { n } else { 0 }));
            assert_eq!(seen, expected.collect::<Vec<_>>(), "{step}");
            assert_eq!(unread, Unread { absent: 1171, swapped: 0, vanished: 0 });
        }
        // And any of them, near to each other and far apart.
        let some: Vec<u64> = (0..PAGES).filter(|n| n % 1000 < 300 && (n % 3 == 0 || n % 7 > 4)).collect();
        let mut seen = Vec::new();
        let unread = source.open().unwrap().read_scattered(&some, &mut |page, content| {
            seen.push((page, u64::from_ne_bytes(*content.first_chunk().unwrap())));
        });
        let expected = some.iter().filter(|n| *n % 7 > 1).map(|n| (*n, if n % 7 > 3 { *n } else { 0 }));
        assert_eq!(seen, expected.collect::<Vec<_>>());
        assert_eq!(unread.unwrap().absent, some.iter().filter(|n| *n % 7 < 2).count() as u64);
        assert_eq!(entries(&space), before);
    }
}
