//! Where guests have the pages of a file that the experiment made, seen from outside: each page of it says what it is.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};

use guest::content::{PAGE_WORDS, Page, PageKey, fill_page, identify, page_from_bytes};
use guest::protocol::Class;

use crate::host::HostError;
use crate::host::check::CheckError;
use crate::measure::Space;
use crate::memory::PAGE_BYTES;
use crate::memory::pagemap::{Pagemap, PagemapEntry};
use crate::memory::remote::{RemoteMemory, RemoteRange};

/// Bytes at the beginning of a page that say what it is.
const HEADER_BYTES: usize = 32;
/// Entries of a page table that are read at a time.
const CHUNK_PAGES: usize = 16 * 1024;

fn key(seed: u64, index: u64) -> PageKey {
    PageKey { seed, class: Class::Unique, index, generation: 0 }
}

/// Writes `pages` pages that follow from `seed` to `file`, from its beginning. No two are alike, and none can be compressed.
pub(super) fn write(file: &mut File, seed: u64, pages: u64) -> io::Result<()> {
    file.rewind()?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut page: Page = [0; PAGE_WORDS];
    for index in 0..pages {
        fill_page(&mut page, key(seed, index));
        for word in page {
            out.write_all(&word.to_le_bytes())?;
        }
    }
    out.flush()
}

/// Where one guest has pages of the file, by their number: addresses in its VM's process.
#[derive(Debug, Default)]
pub(super) struct Located {
    hvas: HashMap<u64, u64>,
}

impl Located {
    /// Looks through all of a guest's present pages for those of `seed`.
    pub(super) fn of(space: &Space, seed: u64) -> Result<Self, HostError> {
        Self::search(space, seed).map_err(|source| HostError::Check { guest: space.name.clone(), source })
    }

    fn search(space: &Space, seed: u64) -> Result<Self, CheckError> {
        let (memory, mut located) = (RemoteMemory::open(space.pid)?, Self::default());
        let mut header = [0; PAGE_BYTES as usize];
        each_entry(space, |hva, entry| {
            if entry.present() {
                memory.read(&[RemoteRange { hva, bytes: HEADER_BYTES }], &mut header)?;
                if let Some(found) = identify(&page_from_bytes(&header))
                    && found == key(seed, found.index)
                {
                    located.hvas.insert(found.index, hva);
                }
            }
            Ok(())
        })?;
        Ok(located)
    }

    /// How many different pages of the file the guest has.
    pub(super) fn pages(&self) -> u64 {
        self.hvas.len() as u64
    }

    /// The frame of each, by its number. A page that is on none now, or on one that is not shown to this user, is left out.
    fn frames(&self, space: &Space) -> Result<HashMap<u64, u64>, HostError> {
        let by_hva: HashMap<u64, u64> = self.hvas.iter().map(|(index, hva)| (*hva, *index)).collect();
        let mut frames = HashMap::new();
        let result = each_entry(space, |hva, entry| {
            if let (Some(index), Some(frame)) = (by_hva.get(&hva), entry.pfn()) {
                frames.insert(*index, frame.0);
            }
            Ok(())
        });
        result.map_err(|source| HostError::Check { guest: space.name.clone(), source })?;
        Ok(frames)
    }
}

/// How many pages of the file are on one frame in both guests.
pub(super) fn shared(spaces: &[Space; 2], located: &[Located; 2]) -> Result<u64, HostError> {
    let first = located[0].frames(&spaces[0])?;
    let second = located[1].frames(&spaces[1])?;
    Ok(first.iter().filter(|(index, frame)| second.get(index) == Some(frame)).count() as u64)
}

/// Hands out every page of a guest's memory: its address and its entry.
fn each_entry(
    space: &Space,
    mut each: impl FnMut(u64, PagemapEntry) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    let (mut pagemap, mut entries) = (Pagemap::open(space.pid)?, Vec::new());
    for extent in &space.extents {
        let (mut hva, end) = (extent.hva, extent.hva + extent.bytes);
        while hva < end {
            let pages = ((end - hva) / PAGE_BYTES).min(CHUNK_PAGES as u64);
            pagemap.read(hva, pages as usize, &mut entries)?;
            for entry in &entries {
                each(hva, *entry)?;
                hva += PAGE_BYTES;
            }
        }
    }
    Ok(())
}
