//! What could be shared: every present page of every guest read, hashed, and compared byte by byte.
//!
//! A hash only finds the page to compare with; it never decides. Absent and swapped pages are not read, so
//! measuring neither grows a guest nor swaps it in. One exception: a page given back between our look at
//! the page table and our read gets the kernel's zero frame.
//!
//! Memory needed besides two buffers of 1 MiB: the index, 25 bytes a bucket. It has between 8/7 and 16/7
//! buckets for each distinct page, so 29 to 57 bytes, and half as much again while it grows.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use super::runs::{RunFollower, Runs};
use super::{MeasureError, Space, check};
use crate::memory::pagemap::{PAGE_BYTES, Pagemap, PagemapEntry};
use crate::memory::remote::{RemoteMemory, RemoteRange};

const PAGE: usize = PAGE_BYTES as usize;
/// Pages read in one call: 1 MiB stays in the cache from the read to the hash.
const BATCH_PAGES: usize = 256;
/// Page table entries read at a time.
const CHUNK_PAGES: usize = 16 * 1024;
/// Bytes of an index bucket: 16 of hash, 8 of holder, 1 of the table's own.
const BUCKET_BYTES: u64 = 25;

/// How a page is hashed; tests put in a bad one.
type PageHash<'a> = &'a dyn Fn(&[u8]) -> u128;

/// What the present pages hold. `zero + self_duplicates + cross_duplicates + distinct` is their number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Pages of zeros only.
    pub zero: u64,
    /// Pages whose content stands earlier in the same guest.
    pub self_duplicates: u64,
    /// Pages whose content was first seen in another guest, and not before in this one.
    pub cross_duplicates: u64,
    /// Different contents, zeros not counted. A page that equals an earlier one by hash but not by bytes
    /// counts here.
    pub distinct: u64,
    /// Frames that ideal sharing frees: zero and duplicate pages.
    pub ideal_saved_pages: u64,
    /// How the cross duplicates lie.
    pub runs: Runs,
    /// Pages on swap, which were not read.
    pub swapped_unread: u64,
    /// Pages whose hash was known but whose bytes differed: their guest wrote meanwhile, or made a collision.
    pub differed: u64,
    /// Memory the index took.
    pub index_bytes: u64,
}

impl Content {
    /// Pages that were read.
    pub fn present(&self) -> u64 {
        self.zero + self.self_duplicates + self.cross_duplicates + self.distinct
    }

    /// Adds what guests of another trust domain hold, with whom these share nothing.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        self.self_duplicates += other.self_duplicates;
        self.cross_duplicates += other.cross_duplicates;
        self.distinct += other.distinct;
        self.ideal_saved_pages += other.ideal_saved_pages;
        self.runs.join(&other.runs);
        self.swapped_unread += other.swapped_unread;
        self.differed += other.differed;
        self.index_bytes = self.index_bytes.max(other.index_bytes);
    }
}

/// Reads and compares every present page of `spaces`; calls `progress` with the pages done and their total
/// at least once for every 64 MiB.
///
/// # Errors
/// Names the guest and its process when either is gone or may not be read.
pub fn measure(spaces: &[Space], progress: &mut dyn FnMut(u64, u64)) -> Result<Content, MeasureError> {
    // A guest that knew the seed could make pages collide and so hide what they share.
    let seed = RandomState::new().build_hasher().finish();
    measure_with(spaces, &|page| XxHash3_128::oneshot_with_seed(seed, page), progress)
}

fn measure_with(
    spaces: &[Space],
    hash: PageHash<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Content, MeasureError> {
    check(spaces)?;
    let total = spaces.iter().map(Space::pages).sum();
    let mut done = 0;
    let mut reader = Reader::new(spaces, hash);
    let mut entries = Vec::new();
    let mut batch = Vec::with_capacity(BATCH_PAGES);
    progress(0, total);
    for (guest, space) in spaces.iter().enumerate() {
        let wrap = |source| MeasureError::Pages { guest: space.name.clone(), pid: space.pid, source };
        let mut pagemap = Pagemap::open(space.pid).map_err(wrap)?;
        for (extent, number) in space.extents.iter().zip(numbers(space)) {
            let pages = (extent.bytes / PAGE_BYTES) as usize;
            for first in (0..pages).step_by(CHUNK_PAGES) {
                let len = (pages - first).min(CHUNK_PAGES);
                pagemap.read(extent.hva + first as u64 * PAGE_BYTES, len, &mut entries).map_err(wrap)?;
                for (at, entry) in entries.iter().enumerate() {
                    reader.content.swapped_unread += u64::from(PagemapEntry::swapped(*entry));
                    if entry.present() {
                        batch.push(number + (first + at) as u32);
                    }
                    if batch.len() == BATCH_PAGES {
                        reader.take(guest, &batch)?;
                        batch.clear();
                        progress(done + at as u64, total);
                    }
                }
                reader.take(guest, &batch)?;
                batch.clear();
                done += len as u64;
                progress(done, total);
            }
        }
        reader.runs.end();
    }
    Ok(reader.finish())
}

/// The number of each extent's first page. One number is left out between extents, so that no run of
/// neighbouring numbers crosses from one into the next.
fn numbers(space: &Space) -> impl Iterator<Item = u32> {
    space.extents.iter().scan(0u32, |next, extent| {
        let first = *next;
        *next += (extent.bytes / PAGE_BYTES) as u32 + 1;
        Some(first)
    })
}

/// A page hash, already uniform.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key([u64; 2]);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0[0]);
    }
}

/// Takes a key that is a hash as its own hash.
#[derive(Default)]
pub struct Uniform(u64);

impl Hasher for Uniform {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }
}

/// Who holds a content.
#[derive(Clone, Copy)]
struct Holder {
    /// The page that had it first.
    page: u32,
    /// That page's guest.
    first: u16,
    /// The guest that had it last.
    last: u16,
}

const _: () = assert!(size_of::<(Key, Holder)>() as u64 + 1 == BUCKET_BYTES);

/// What one page of a batch turned out to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Zero,
    Distinct,
    SelfDuplicate,
    CrossDuplicate { guest: u16, page: u32 },
}

/// A page whose hash is known: the bytes must tell.
#[derive(Clone, Copy)]
struct Suspect {
    guest: u16,
    page: u32,
    slot: usize,
}

struct Reader<'a> {
    spaces: &'a [Space],
    /// For each guest the first page number and first address of each extent.
    layout: Vec<Vec<(u32, u64)>>,
    hash: PageHash<'a>,
    index: HashMap<Key, Holder, BuildHasherDefault<Uniform>>,
    content: Content,
    /// Pages of the batch, then pages to compare them with.
    buffer: Vec<u8>,
    other: Vec<u8>,
    ranges: Vec<RemoteRange>,
    /// Each guest's memory, opened when it is first read.
    memories: Vec<Option<RemoteMemory>>,
    classes: Vec<Class>,
    suspects: Vec<Suspect>,
    runs: RunFollower,
}

impl<'a> Reader<'a> {
    fn new(spaces: &'a [Space], hash: PageHash<'a>) -> Self {
        let layout = |space: &Space| {
            numbers(space).zip(&space.extents).map(|(number, extent)| (number, extent.hva)).collect()
        };
        Self {
            spaces,
            layout: spaces.iter().map(layout).collect(),
            hash,
            index: HashMap::default(),
            content: Content::default(),
            buffer: vec![0; BATCH_PAGES * PAGE],
            other: vec![0; BATCH_PAGES * PAGE],
            ranges: Vec::with_capacity(BATCH_PAGES),
            memories: spaces.iter().map(|_| None).collect(),
            classes: Vec::with_capacity(BATCH_PAGES),
            suspects: Vec::with_capacity(BATCH_PAGES),
            runs: RunFollower::default(),
        }
    }

    /// Counts `pages` (ascending numbers, at most [`BATCH_PAGES`]) of `guest`.
    fn take(&mut self, guest: usize, pages: &[u32]) -> Result<(), MeasureError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.read(guest, pages.iter().copied(), &mut buffer)?;
        self.classes.clear();
        self.suspects.clear();
        let (contents, _) = buffer.as_chunks::<PAGE>();
        for (slot, (page, content)) in pages.iter().zip(contents).enumerate() {
            let class = self.look_up(guest as u16, *page, slot, content);
            self.classes.push(class);
        }
        self.compare(guest, pages, contents)?;
        self.buffer = buffer;
        for (slot, page) in pages.iter().enumerate() {
            self.tally(*page, self.classes[slot]);
        }
        Ok(())
    }

    fn look_up(&mut self, guest: u16, page: u32, slot: usize, content: &[u8; PAGE]) -> Class {
        if content == &[0; PAGE] {
            return Class::Zero;
        }
        let hash = (self.hash)(content);
        match self.index.entry(Key([hash as u64, (hash >> 64) as u64])) {
            Entry::Vacant(vacant) => {
                vacant.insert(Holder { page, first: guest, last: guest });
                Class::Distinct
            }
            Entry::Occupied(mut occupied) => {
                let holder = occupied.get_mut();
                self.suspects.push(Suspect { guest: holder.first, page: holder.page, slot });
                if holder.last == guest {
                    return Class::SelfDuplicate;
                }
                holder.last = guest;
                Class::CrossDuplicate { guest: holder.first, page: holder.page }
            }
        }
    }

    /// Compares every suspect with the page that had its hash first; one that differs is distinct.
    fn compare(&mut self, guest: usize, pages: &[u32], contents: &[[u8; PAGE]]) -> Result<(), MeasureError> {
        let mut suspects = std::mem::take(&mut self.suspects);
        let mut other = std::mem::take(&mut self.other);
        suspects.sort_unstable_by_key(|suspect| (suspect.guest, suspect.page));
        for group in suspects.chunk_by(|a, b| a.guest == b.guest) {
            let holder = usize::from(group[0].guest);
            let (here, elsewhere): (Vec<Suspect>, Vec<Suspect>) = group
                .iter()
                .partition(|suspect| holder == guest && pages.binary_search(&suspect.page).is_ok());
            for suspect in here {
                // What was indexed a moment ago is this buffer, not what the guest has there by now.
                let first = pages.binary_search(&suspect.page).unwrap_or(suspect.slot);
                self.verdict(suspect.slot, contents[first] == contents[suspect.slot]);
            }
            self.read(holder, elsewhere.iter().map(|suspect| suspect.page), &mut other)?;
            for (suspect, first) in elsewhere.iter().zip(other.as_chunks::<PAGE>().0) {
                self.verdict(suspect.slot, first == &contents[suspect.slot]);
            }
        }
        self.suspects = suspects;
        self.other = other;
        Ok(())
    }

    fn verdict(&mut self, slot: usize, equal: bool) {
        if !equal {
            self.classes[slot] = Class::Distinct;
            self.content.differed += 1;
        }
    }

    /// Reads `pages` of `guest` one after the other into the start of `buffer`.
    fn read(
        &mut self,
        guest: usize,
        pages: impl Iterator<Item = u32>,
        buffer: &mut [u8],
    ) -> Result<(), MeasureError> {
        self.ranges.clear();
        let layout = &self.layout[guest];
        for page in pages {
            let extent = layout.partition_point(|(number, _)| *number <= page) - 1;
            let (number, start) = layout[extent];
            let hva = start + u64::from(page - number) * PAGE_BYTES;
            match self.ranges.last_mut() {
                Some(range) if range.hva + range.bytes as u64 == hva => range.bytes += PAGE,
                _ => self.ranges.push(RemoteRange { hva, bytes: PAGE }),
            }
        }
        let space = &self.spaces[guest];
        let failed = |source| MeasureError::Memory { guest: space.name.clone(), pid: space.pid, source };
        let memory = match &mut self.memories[guest] {
            Some(memory) => memory,
            closed => closed.insert(RemoteMemory::open(space.pid).map_err(failed)?),
        };
        memory.read(&self.ranges, buffer).map_err(failed)?;
        Ok(())
    }

    fn tally(&mut self, page: u32, class: Class) {
        match class {
            Class::Zero => self.content.zero += 1,
            Class::Distinct => self.content.distinct += 1,
            Class::SelfDuplicate => self.content.self_duplicates += 1,
            Class::CrossDuplicate { .. } => self.content.cross_duplicates += 1,
        }
        let holder = match class {
            Class::CrossDuplicate { guest, page } => Some((guest, page)),
            _ => None,
        };
        self.runs.step(page, holder);
    }

    fn finish(self) -> Content {
        let mut content = self.content;
        content.runs = self.runs.found;
        content.ideal_saved_pages = content.zero + content.self_duplicates + content.cross_duplicates;
        content.index_bytes = (self.index.capacity() as u64 * 8).div_ceil(7) * BUCKET_BYTES;
        content
    }
}

#[cfg(test)]
#[path = "content_tests.rs"]
mod tests;
