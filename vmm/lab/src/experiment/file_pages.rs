//! Finds the pages of the experiment's file in guests' memory, from outside: each page of the file
//! identifies itself.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};

use guest::content::{PAGE_WORDS, Page, PageKey, fill_page, identify};
use guest::protocol::Class;

use fleet::HostError;
use fleet::check_error::CheckError;
use kernel_view::pagemap::Pagemap;
use measure::Space;
use memory::Extent;
use memory::Hva;
use memory::remote::{RemoteMemory, RemoteRange};

/// Bytes at the beginning of a page that identify it.
const HEADER_BYTES: usize = 32;

fn key(seed: u64, index: u64) -> PageKey {
    PageKey { seed, class: Class::Unique, index, generation: 0 }
}

/// Writes `pages` pages that follow from `seed` to `file`, from its beginning. No two are alike,
/// and none can be compressed.
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

/// Where one guest has pages of the file, by their number: addresses in its VM process.
#[derive(Debug, Default)]
pub(super) struct Located {
    hvas: HashMap<u64, Hva>,
}

impl Located {
    /// Searches all of a guest's present pages for those of `seed`.
    pub(super) fn of(space: &Space, seed: u64) -> Result<Self, HostError> {
        Self::search(space, seed).map_err(|source| HostError::Check { guest: space.name.clone(), source })
    }

    fn search(space: &Space, seed: u64) -> Result<Self, CheckError> {
        let (memory, mut located) = (RemoteMemory::open(space.pid)?, Self::default());
        // Only the header is ever filled: the rest is not needed here.
        let (mut header, mut page) = ([0; HEADER_BYTES], [0; PAGE_WORDS]);
        Pagemap::open(space.pid)?.each(space.extents.iter().map(Extent::hvas), |hva, entry| {
            if entry.present() {
                memory.read(&[RemoteRange { hva, bytes: HEADER_BYTES }], &mut header)?;
                let (words, _) = header.as_chunks::<8>();
                page.iter_mut().zip(words).for_each(|(to, from)| *to = u64::from_le_bytes(*from));
                if let Some(found) = identify(&page)
                    && found == key(seed, found.index)
                {
                    located.hvas.insert(found.index, hva);
                }
            }
            Ok::<_, CheckError>(())
        })?;
        Ok(located)
    }

    /// How many different pages of the file the guest has.
    pub(super) fn pages(&self) -> u64 {
        self.hvas.len() as u64
    }

    /// The frame of each, by its number. A page without a frame now, or whose frame number is
    /// hidden from this user, is left out.
    fn frames(&self, space: &Space) -> Result<HashMap<u64, u64>, HostError> {
        let by_hva: HashMap<Hva, u64> = self.hvas.iter().map(|(index, hva)| (*hva, *index)).collect();
        let mut frames = HashMap::new();
        let walked = Pagemap::open(space.pid).and_then(|mut pagemap| {
            pagemap.each(space.extents.iter().map(Extent::hvas), |hva, entry| {
                if let (Some(index), Some(frame)) = (by_hva.get(&hva), entry.pfn()) {
                    frames.insert(*index, frame.0);
                }
                Ok(())
            })
        });
        walked.map_err(|source| HostError::Check { guest: space.name.clone(), source: source.into() })?;
        Ok(frames)
    }
}

/// How many pages of the file are on one frame in both guests.
pub(super) fn shared(spaces: &[Space; 2], located: &[Located; 2]) -> Result<u64, HostError> {
    let first = located[0].frames(&spaces[0])?;
    let second = located[1].frames(&spaces[1])?;
    Ok(first.iter().filter(|(index, frame)| second.get(index) == Some(frame)).count() as u64)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use memory::{Extent, Gpa, PAGE_BYTES};

    #[test]
    fn pages_are_found_by_what_they_say_they_are() {
        let mut file = tempfile::tempfile().unwrap();
        write(&mut file, 7, 3).unwrap();
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 3 * PAGE_BYTES as usize);
        // Memory of our own with two of its pages, one of another seed, and one that is no page of
        // ours at all.
        let mut memory = vec![[0u64; PAGE_WORDS]; 6];
        let start = memory.as_ptr() as u64;
        let first = (start.next_multiple_of(PAGE_BYTES) - start) / 8;
        let mut put = |n: u64, content: &[u8]| {
            for (at, word) in content.as_chunks::<8>().0.iter().enumerate() {
                memory.as_flattened_mut()[(first + n * 512) as usize + at] = u64::from_le_bytes(*word);
            }
        };
        let page = |n: usize| &bytes[n * PAGE_BYTES as usize..][..PAGE_BYTES as usize];
        put(0, page(2));
        put(1, &[9; PAGE_BYTES as usize]);
        put(2, page(0));
        let mut other = tempfile::tempfile().unwrap();
        write(&mut other, 8, 2).unwrap();
        let mut others = Vec::new();
        other.rewind().unwrap();
        other.read_to_end(&mut others).unwrap();
        put(3, &others[PAGE_BYTES as usize..]);
        let hva = Hva(start.next_multiple_of(PAGE_BYTES));
        let extents = vec![Extent { gpa: Gpa(0), hva, bytes: 4 * PAGE_BYTES }];
        let space = Space { name: "we".into(), pid: std::process::id(), extents };
        let located = Located::of(&space, 7).unwrap();
        let expected = HashMap::from([(2, hva), (0, hva + 2 * PAGE_BYTES)]);
        assert_eq!((located.pages(), &located.hvas), (2, &expected));
        // With itself it shares all that root sees the frames of.
        let both = [located, Located { hvas: expected }];
        let root = rustix::process::geteuid().is_root();
        let spaces = [space.clone(), space];
        assert_eq!(shared(&spaces, &both).unwrap(), if root { 2 } else { 0 });
        let crossed = Located { hvas: HashMap::from([(2, hva + 2 * PAGE_BYTES), (0, hva)]) };
        let [one, _] = both;
        assert_eq!(shared(&spaces, &[one, crossed]).unwrap(), 0);
    }
}
