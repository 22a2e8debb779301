//! Guest memory in another process, read through `/proc/PID/mem`; what is absent or on swap is not read.
//!
//! So measuring neither grows a guest nor swaps it in. One exception: a page that is given back between our look at the
//! page table and our read gets the kernel's zero frame.

use super::{PageReader, Source, Unread};
use crate::measure::{MeasureError, PAGE, Space};
use crate::memory::Extent;
use crate::memory::pagemap::{PAGE_BYTES, Pagemap, PagemapEntry};
use crate::memory::remote::{RemoteError, RemoteMemory, RemoteRange};

/// Pages read in one call: 256 KiB stay in the second-level cache from the read to the hash.
const BATCH_PAGES: usize = 64;

/// The memory of a running guest.
#[derive(Clone, Debug)]
pub struct ProcessSource {
    space: Space,
    stopped: bool,
}

impl ProcessSource {
    /// Of `space`. `stopped` says that nobody writes there.
    pub fn new(space: Space, stopped: bool) -> Self {
        Self { space, stopped }
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
        let (entries, buffer) = (Vec::new(), vec![0; BATCH_PAGES * PAGE]);
        Ok(Box::new(Reader { space, pagemap, memory, entries, buffer }))
    }
}

struct Reader<'a> {
    space: &'a Space,
    pagemap: Pagemap,
    memory: RemoteMemory,
    entries: Vec<PagemapEntry>,
    buffer: Vec<u8>,
}

impl Reader<'_> {
    /// The address of a page.
    fn address(&self, page: u64) -> u64 {
        let mut before = 0;
        for Extent { hva, bytes, .. } in &self.space.extents {
            let pages = bytes / PAGE_BYTES;
            if page < before + pages {
                return hva + (page - before) * PAGE_BYTES;
            }
            before += pages;
        }
        // Of no extent; the kernel will say that nothing is mapped there.
        !(PAGE_BYTES - 1)
    }

    /// Reads pages that are neighbours and all there, some of which may have gone.
    fn read_run(
        &mut self,
        first: u64,
        pages: usize,
        each: &mut dyn FnMut(u64, &[u8; PAGE]),
    ) -> Result<u64, MeasureError> {
        let hva = self.address(first);
        let buffer = &mut self.buffer[..pages * PAGE];
        match self.memory.read(&[RemoteRange { hva, bytes: buffer.len() }], buffer) {
            Ok(_) => {
                let (contents, _) = buffer.as_chunks::<PAGE>();
                (first..).zip(contents).for_each(|(page, content)| each(page, content));
                Ok(0)
            }
            Err(RemoteError::Unmapped { .. }) if pages == 1 => Ok(1),
            Err(RemoteError::Unmapped { .. }) => {
                let half = pages / 2;
                let vanished = self.read_run(first, half, each)?;
                Ok(vanished + self.read_run(first + half as u64, pages - half, each)?)
            }
            Err(source) => {
                Err(MeasureError::Memory { guest: self.space.name.clone(), pid: self.space.pid, source })
            }
        }
    }
}

impl PageReader for Reader<'_> {
    fn read(
        &mut self,
        first: u64,
        pages: u64,
        each: &mut dyn FnMut(u64, &[u8; PAGE]),
    ) -> Result<Unread, MeasureError> {
        let mut entries = std::mem::take(&mut self.entries);
        let read = self.pagemap.read(self.address(first), pages as usize, &mut entries);
        read.map_err(|source| MeasureError::Pages {
            guest: self.space.name.clone(),
            pid: self.space.pid,
            source,
        })?;
        let mut unread = Unread::default();
        let mut page = first;
        for run in entries.chunk_by(|a, b| a.present() == b.present()) {
            if run[0].present() {
                for batch in run.chunks(BATCH_PAGES) {
                    unread.vanished += self.read_run(page, batch.len(), each)?;
                    page += batch.len() as u64;
                }
            } else {
                let swapped = run.iter().filter(|entry| entry.swapped()).count() as u64;
                unread.swapped += swapped;
                unread.absent += run.len() as u64 - swapped;
                page += run.len() as u64;
            }
        }
        self.entries = entries;
        Ok(unread)
    }
}
