//! Packs: pages in frames, in one file, and an index of them in another. Both are written once.
//!
//! ```text
//! ID.pack  magic 8 bytes "SPPACK01", id u64, then frames, one after the other
//! ID.idx   magic 8 bytes "SPINDX01", format u32, frames u32, pages u32, 0 u32, id u64, bytes of the pack u64
//!          for each frame: bytes u32, method u8 (0 plain, 1 lz4, 2 zstd), 0 three times, digest of these bytes 32
//!          for each page: digest 32
//!          digest of all before 32
//! ```
//!
//! Numbers are little-endian; digests are BLAKE3 under the store's key. Page n of a pack is in frame n / 64: only the last frame may have fewer
//! than 64 pages. An id is random, and never used again: what refers to a pack that was removed finds none.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{Flaw, StoreError};
use crate::files::{Dir, NewFile};
use crate::frame::{self, FRAME_PAGES, MAX_FRAME_BYTES, Method, Packer};
use crate::key::{DIGEST_BYTES, Digest, Key};
use crate::{PAGE, Page};

const PACK_MAGIC: &[u8; 8] = b"SPPACK01";
const INDEX_MAGIC: &[u8; 8] = b"SPINDX01";
const FORMAT: u32 = 1;
const PACK_HEAD_BYTES: u64 = 16;
const INDEX_HEAD_BYTES: usize = 40;
const ENTRY_BYTES: usize = 8 + DIGEST_BYTES;
/// The most pages of a pack: 1 GiB.
pub const MAX_PACK_PAGES: u32 = 1 << 18;
/// Frames that are kept of a pack that is being written: 16 MiB. Equal pages of a guest often lie near.
const RECENT_FRAMES: usize = 64;
const MAX_FRAMES: u32 = MAX_PACK_PAGES / FRAME_PAGES as u32;
const MAX_INDEX_BYTES: usize =
    INDEX_HEAD_BYTES + MAX_FRAMES as usize * ENTRY_BYTES + (MAX_PACK_PAGES as usize + 1) * DIGEST_BYTES;

/// A frame as it lies in the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    offset: u64,
    pub bytes: u32,
    method: Method,
    digest: Digest,
}

/// What is in a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Index {
    pub id: u64,
    pub frames: Vec<Entry>,
    /// Of each page.
    pub digests: Vec<Digest>,
}

/// The names of the files of a pack.
pub(crate) fn names(id: u64) -> (String, String) {
    (format!("{id:016x}.pack"), format!("{id:016x}.idx"))
}

/// The number of the pack whose file this is, of either kind.
pub(crate) fn id_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".pack").or_else(|| name.strip_suffix(".idx"))?;
    let id = u64::from_str_radix(digits, 16).ok()?;
    (digits == format!("{id:016x}")).then_some(id)
}

impl Index {
    /// How many pages there are.
    pub fn pages(&self) -> u32 {
        self.digests.len() as u32
    }

    /// Pages of a frame.
    pub fn pages_of(&self, frame: usize) -> usize {
        self.digests.len().saturating_sub(frame * FRAME_PAGES).min(FRAME_PAGES)
    }

    fn pack_bytes(&self) -> u64 {
        self.frames.last().map_or(PACK_HEAD_BYTES, |last| last.offset + u64::from(last.bytes))
    }

    /// Bytes of its part of the pack that a page has.
    pub fn share(&self, page: u32) -> f64 {
        let frame = page as usize / FRAME_PAGES;
        self.frames
            .get(frame)
            .map_or(0.0, |entry| f64::from(entry.bytes) / self.pages_of(frame).max(1) as f64)
    }

    /// The index of pack `id` of the store with this key, by its files in `packs`, of which the other has the length that it says.
    pub fn read(packs: &Dir, id: u64, key: &Key) -> Result<(Self, File), StoreError> {
        let (pack, index) = names(id);
        let missing =
            |name: &str| packs.damaged(name, Flaw::Pack { pack: id, why: "which is not there".into() });
        let least = (INDEX_HEAD_BYTES + DIGEST_BYTES) as u64;
        let bytes = packs.read(&index, least, MAX_INDEX_BYTES as u64)?.ok_or_else(|| missing(&index))?;
        let read = Self::decode(&bytes, id, key).map_err(|why| packs.damaged(&index, why))?;
        let file = packs.file(&pack)?.ok_or_else(|| missing(&pack))?;
        let (found, expected) =
            (file.metadata().map_err(packs.failed("look at", &pack))?.len(), read.pack_bytes());
        if found != expected {
            let why = Flaw::Length { bytes: found, least: expected, most: expected };
            return Err(packs.damaged(&pack, why));
        }
        let mut head = [0; PACK_HEAD_BYTES as usize];
        file.read_exact_at(&mut head, 0).map_err(packs.failed("read", &pack))?;
        if head != pack_head(id) {
            return Err(packs.damaged(&pack, Flaw::Magic("a pack of this name")));
        }
        Ok((read, file))
    }

    /// From bytes that are not trusted.
    pub fn decode(bytes: &[u8], id: u64, key: &Key) -> Result<Self, Flaw> {
        let (most, least) = (MAX_INDEX_BYTES as u64, (INDEX_HEAD_BYTES + DIGEST_BYTES) as u64);
        let length = Flaw::Length { bytes: bytes.len() as u64, least, most };
        if bytes.len() > MAX_INDEX_BYTES {
            return Err(length);
        }
        let Some((content, digest)) = bytes.split_last_chunk::<DIGEST_BYTES>() else { return Err(length) };
        let Some((head, rest)) = content.split_at_checked(INDEX_HEAD_BYTES) else { return Err(length) };
        if !head.starts_with(INDEX_MAGIC) {
            return Err(Flaw::Magic("an index of a pack"));
        }
        if u32_at(head, 8) != FORMAT {
            return Err(Flaw::Format { found: u32_at(head, 8), known: FORMAT });
        }
        if key.digest(content) != *digest {
            return Err(Flaw::Digest("the index"));
        }
        let (frames, pages) = (u32_at(head, 12), u32_at(head, 16));
        if pages > MAX_PACK_PAGES {
            return Err(Flaw::Range {
                what: "the number of pages",
                found: pages.into(),
                most: MAX_PACK_PAGES.into(),
            });
        }
        if u64::from(frames) != u64::from(pages).div_ceil(FRAME_PAGES as u64) || u64_at(head, 24) != id {
            return Err(Flaw::Inconsistent(
                "it is of another pack, or has another number of frames than its pages take",
            ));
        }
        let table_bytes = frames as usize * ENTRY_BYTES;
        let Some((table, digests)) = rest.split_at_checked(table_bytes) else {
            return Err(Flaw::Inconsistent("it is shorter than its frames are many"));
        };
        if digests.len() != pages as usize * DIGEST_BYTES {
            return Err(Flaw::Inconsistent("it has not one digest for each page"));
        }
        let (mut offset, mut entries) = (PACK_HEAD_BYTES, Vec::with_capacity(frames as usize));
        for entry in table.as_chunks::<ENTRY_BYTES>().0 {
            let (bytes, code) = (u32_at(entry, 0), entry[4]);
            if bytes as usize > MAX_FRAME_BYTES {
                let most = MAX_FRAME_BYTES as u64;
                return Err(Flaw::Range { what: "the length of a frame", found: bytes.into(), most });
            }
            let known = u64::from(Method::Zstd.code());
            let method = Method::of_code(code).ok_or(Flaw::Range {
                what: "the method of a frame",
                found: code.into(),
                most: known,
            })?;
            let mut digest = [0; DIGEST_BYTES];
            digest.copy_from_slice(&entry[8..]);
            entries.push(Entry { offset, bytes, method, digest });
            offset += u64::from(bytes);
        }
        let read = Self { id, frames: entries, digests: digests.as_chunks().0.to_vec() };
        match read.pack_bytes() == u64_at(head, 32) {
            true => Ok(read),
            false => Err(Flaw::Inconsistent("its frames do not add up to the length of its pack")),
        }
    }

    fn encode(&self, key: &Key) -> Vec<u8> {
        let mut out = Vec::with_capacity(
            INDEX_HEAD_BYTES + self.frames.len() * ENTRY_BYTES + (self.digests.len() + 1) * DIGEST_BYTES,
        );
        out.extend(INDEX_MAGIC);
        for number in [FORMAT, self.frames.len() as u32, self.pages(), 0] {
            out.extend(number.to_le_bytes());
        }
        out.extend(self.id.to_le_bytes());
        out.extend(self.pack_bytes().to_le_bytes());
        for entry in &self.frames {
            out.extend(entry.bytes.to_le_bytes());
            out.extend([entry.method.code(), 0, 0, 0]);
            out.extend(entry.digest);
        }
        self.digests.iter().for_each(|digest| out.extend(digest));
        let digest = key.digest(&out);
        out.extend(digest);
        out
    }

    /// The pages of a frame of the pack in `file`: the digest is compared before anything is decoded.
    pub fn frame(&self, file: &File, frame: usize, key: &Key) -> Result<Vec<u8>, FrameError> {
        let entry = self.frames.get(frame).ok_or(Flaw::Range {
            what: "the number of a frame",
            found: frame as u64,
            most: self.frames.len() as u64,
        })?;
        let mut packed = vec![0; entry.bytes as usize];
        file.read_exact_at(&mut packed, entry.offset).map_err(FrameError::Read)?;
        if key.digest(&packed) != entry.digest {
            return Err(Flaw::Digest("a frame of pages").into());
        }
        Ok(frame::unpack(entry.method, &packed, self.pages_of(frame))?)
    }
}

/// Why there are no pages of a frame.
#[derive(Debug)]
pub(crate) enum FrameError {
    Read(std::io::Error),
    Flaw(Flaw),
}

impl From<Flaw> for FrameError {
    fn from(flaw: Flaw) -> Self {
        Self::Flaw(flaw)
    }
}

impl FrameError {
    /// Of the pack with this number.
    pub fn of(self, packs: &Dir, id: u64) -> StoreError {
        let (name, _) = names(id);
        match self {
            Self::Read(source) => packs.failed("read", &name)(source),
            Self::Flaw(why) => packs.damaged(&name, why),
        }
    }
}

fn pack_head(id: u64) -> [u8; PACK_HEAD_BYTES as usize] {
    let mut head = [0; PACK_HEAD_BYTES as usize];
    head[..8].copy_from_slice(PACK_MAGIC);
    head[8..].copy_from_slice(&id.to_le_bytes());
    head
}

/// A pack that is being written.
pub(crate) struct NewPack {
    file: NewFile,
    index: Index,
    /// Pages that are in no frame yet; their digests are in the index.
    pending: Vec<u8>,
    /// Frames that were written last, as they were before.
    recent: VecDeque<Vec<u8>>,
}

impl NewPack {
    /// One with a number that no other has.
    pub fn create(packs: &Dir) -> Result<Self, StoreError> {
        let mut id = [0; 8];
        getrandom::fill(&mut id).map_err(|error| {
            packs.failed("get random numbers for", "a pack")(std::io::Error::other(error.to_string()))
        })?;
        let id = u64::from_le_bytes(id);
        let mut file = packs.create(&names(id).0)?;
        // If this fails the file is removed by its owner, which knows no pack yet.
        if let Err(error) = file.append(&pack_head(id)) {
            let _ = packs.remove(&names(id).0);
            return Err(error);
        }
        let index = Index { id, frames: Vec::new(), digests: Vec::new() };
        Ok(Self { file, index, pending: Vec::with_capacity(MAX_FRAME_BYTES), recent: VecDeque::new() })
    }

    pub fn id(&self) -> u64 {
        self.index.id
    }

    pub fn is_full(&self) -> bool {
        self.index.pages() >= MAX_PACK_PAGES
    }

    /// Appends a page. Its number.
    pub fn push(
        &mut self,
        page: &Page,
        digest: Digest,
        packer: &mut Packer,
        key: &Key,
    ) -> Result<u32, StoreError> {
        let number = self.index.pages();
        self.pending.extend_from_slice(page);
        self.index.digests.push(digest);
        if self.pending.len() == MAX_FRAME_BYTES {
            self.flush(packer, key)?;
        }
        Ok(number)
    }

    fn flush(&mut self, packer: &mut Packer, key: &Key) -> Result<(), StoreError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (method, packed) = packer.pack(&self.pending);
        let entry = Entry {
            offset: self.file.bytes(),
            bytes: packed.len() as u32,
            method,
            digest: key.digest(&packed),
        };
        self.file.append(&packed)?;
        self.index.frames.push(entry);
        if self.recent.len() == RECENT_FRAMES {
            self.recent.pop_front();
        }
        self.recent.push_back(std::mem::replace(&mut self.pending, Vec::with_capacity(MAX_FRAME_BYTES)));
        Ok(())
    }

    /// The pages of the frame that has page `number`, which is written.
    pub fn frame_of(&self, number: u32, key: &Key) -> Result<Vec<u8>, FrameError> {
        self.index.frame(self.file.file(), number as usize / FRAME_PAGES, key)
    }

    /// Whether page `number` is this one, if that is known without reading.
    pub fn recent_is(&self, number: u32, page: &Page) -> Option<bool> {
        let (frame, at) = (number as usize / FRAME_PAGES, number as usize % FRAME_PAGES * PAGE);
        let written = self.index.frames.len();
        let pages = match frame.checked_sub(written) {
            Some(_) => &self.pending,
            None => self.recent.get((frame + self.recent.len()).checked_sub(written)?)?,
        };
        Some(pages.get(at..at + PAGE) == Some(page.as_slice()))
    }

    /// Makes it durable, and then its index. The names are not yet. Bytes of both.
    pub fn finish(&mut self, packs: &Dir, packer: &mut Packer, key: &Key) -> Result<u64, StoreError> {
        self.flush(packer, key)?;
        self.file.sync()?;
        let mut index = packs.create(&names(self.id()).1)?;
        index.append(&self.index.encode(key))?;
        index.sync()?;
        Ok(self.file.bytes() + index.bytes())
    }
}

/// Removes the files of a pack: the index first, without which the pack is none.
pub(crate) fn remove(packs: &Dir, id: u64) -> Result<(), StoreError> {
    let (pack, index) = names(id);
    packs.remove(&index)?;
    packs.remove(&pack)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}
