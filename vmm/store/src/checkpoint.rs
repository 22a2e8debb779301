//! Checkpoints: what refers to pages. A file each, named as the checkpoint is, written once and renamed into its place.
//!
//! ```text
//! magic   8 bytes "SPCHCK01"
//! format  u32, 0 u32
//! bytes   u64 of each section: meta, packs, state, map
//! digests 32 of each section
//! digest  32 of all before
//! meta    whatever its writer likes, so that it can be listed; at most 1 MiB
//! packs   u64 each: the packs that it has pages in
//! state   whatever its writer likes; at most 16 MiB
//! map     slabs u32; for each slab: pages u32, runs u32, then the runs
//! run     page of the slab u32, pages u32, which of `packs` u32, page there u32
//! ```
//!
//! Numbers are little-endian; digests are BLAKE3 under the store's key. Runs of a slab are in order; pages in no run are absent.

use crate::error::Flaw;
use crate::key::{DIGEST_BYTES, Key};
use crate::pack::{MAX_PACK_PAGES, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"SPCHCK01";
const FORMAT: u32 = 1;
const SECTIONS: usize = 4;
pub(crate) const HEAD_BYTES: usize = 16 + SECTIONS * 8 + SECTIONS * DIGEST_BYTES + DIGEST_BYTES;
const META: usize = 0;
const PACKS: usize = 1;
const STATE: usize = 2;
const MAP: usize = 3;
const NAMES: [&str; SECTIONS] = ["the description", "the list of packs", "the state", "the map"];
/// The most bytes of each section.
pub const MAX_BYTES: [u64; SECTIONS] = [1 << 20, 1 << 20, 16 << 20, 64 << 20];
/// The most bytes of a checkpoint's file.
pub const MAX_FILE_BYTES: u64 = HEAD_BYTES as u64 + MAX_BYTES[0] + MAX_BYTES[1] + MAX_BYTES[2] + MAX_BYTES[3];
/// The most pages of a slab: 1 GiB.
pub const MAX_SLAB_PAGES: u32 = 1 << 18;
/// The most slabs.
pub const MAX_SLABS: u32 = 1 << 16;

/// Where a page lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The pack.
    pub pack: u64,
    /// The page there.
    pub page: u32,
}

/// Adjacent pages of a slab that are adjacent pages of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first page of the slab.
    pub page: u32,
    /// How many.
    pub pages: u32,
    /// Where the first one lies.
    pub place: Place,
}

/// Where the pages of a slab are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlabMap {
    /// How many there are.
    pub pages: u32,
    /// Those that are not absent, in order.
    pub runs: Vec<Run>,
}

/// A checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// What its writer says of it.
    pub meta: Vec<u8>,
    /// What else it is.
    pub state: Vec<u8>,
    /// Its pages.
    pub slabs: Vec<SlabMap>,
}

impl SlabMap {
    /// One more run; joined with the last if it goes on there.
    pub fn push(&mut self, run: Run) {
        if let Some(last) = self.runs.last_mut()
            && last.page + last.pages == run.page
            && last.place.pack == run.place.pack
            && last.place.page + last.pages == run.place.page
        {
            last.pages += run.pages;
        } else {
            self.runs.push(run);
        }
    }
}

/// What a file begins with, once its digest was compared.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    bytes: [u64; SECTIONS],
    digests: [[u8; DIGEST_BYTES]; SECTIONS],
}

impl Head {
    pub fn decode(bytes: &[u8], key: &Key) -> Result<Self, Flaw> {
        let length = HEAD_BYTES as u64;
        let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else {
            return Err(Flaw::Length { bytes: bytes.len() as u64, least: length, most: MAX_FILE_BYTES });
        };
        if !head.starts_with(MAGIC) {
            return Err(Flaw::Magic("a checkpoint"));
        }
        if u32_at(head, 8) != FORMAT {
            return Err(Flaw::Format { found: u32_at(head, 8), known: FORMAT });
        }
        let (content, digest) = head.split_at(HEAD_BYTES - DIGEST_BYTES);
        if key.digest(content) != *digest {
            return Err(Flaw::Digest("its head"));
        }
        let mut found = Self { bytes: [0; SECTIONS], digests: [[0; DIGEST_BYTES]; SECTIONS] };
        for (n, most) in MAX_BYTES.into_iter().enumerate() {
            found.bytes[n] = u64_at(head, 16 + n * 8);
            if found.bytes[n] > most {
                return Err(Flaw::Range { what: "the length of a section", found: found.bytes[n], most });
            }
            let at = 16 + SECTIONS * 8 + n * DIGEST_BYTES;
            found.digests[n].copy_from_slice(&head[at..at + DIGEST_BYTES]);
        }
        Ok(found)
    }

    /// Where meta and packs end.
    pub fn front_bytes(&self) -> usize {
        HEAD_BYTES + (self.bytes[META] + self.bytes[PACKS]) as usize
    }

    fn section<'a>(&self, file: &'a [u8], n: usize, key: &Key) -> Result<&'a [u8], Flaw> {
        let at = HEAD_BYTES as u64 + self.bytes[..n].iter().sum::<u64>();
        let end = at + self.bytes[n];
        let section = file.get(at as usize..end as usize).ok_or(Flaw::Length {
            bytes: file.len() as u64,
            least: end,
            most: MAX_FILE_BYTES,
        })?;
        match key.digest(section) == self.digests[n] {
            true => Ok(section),
            false => Err(Flaw::Digest(NAMES[n])),
        }
    }

    /// What its writer says of it.
    pub fn meta(&self, file: &[u8], key: &Key) -> Result<Vec<u8>, Flaw> {
        Ok(self.section(file, META, key)?.to_vec())
    }

    /// The packs that it has pages in.
    pub fn packs(&self, file: &[u8], key: &Key) -> Result<Vec<u64>, Flaw> {
        let (packs, rest) = self.section(file, PACKS, key)?.as_chunks::<8>();
        match rest.is_empty() {
            true => Ok(packs.iter().map(|id| u64::from_le_bytes(*id)).collect()),
            false => Err(Flaw::Inconsistent("its list of packs does not end with a pack")),
        }
    }
}

impl Checkpoint {
    /// The packs that it has pages in, sorted.
    pub fn packs(&self) -> Vec<u64> {
        let mut packs: Vec<u64> =
            self.slabs.iter().flat_map(|slab| &slab.runs).map(|run| run.place.pack).collect();
        packs.sort_unstable();
        packs.dedup();
        packs
    }

    /// As it is written; the error names what is too long.
    pub(crate) fn encode(&self, key: &Key) -> Result<Vec<u8>, Flaw> {
        let packs = self.packs();
        let mut map = (self.slabs.len() as u32).to_le_bytes().to_vec();
        for slab in &self.slabs {
            map.extend(slab.pages.to_le_bytes());
            map.extend((slab.runs.len() as u32).to_le_bytes());
            for run in &slab.runs {
                let pack = packs.binary_search(&run.place.pack).unwrap_or(0) as u32;
                for number in [run.page, run.pages, pack, run.place.page] {
                    map.extend(number.to_le_bytes());
                }
            }
        }
        let packs: Vec<u8> = packs.iter().flat_map(|id| id.to_le_bytes()).collect();
        let sections = [&self.meta, &packs, &self.state, &map];
        let mut out = MAGIC.to_vec();
        out.extend(FORMAT.to_le_bytes());
        out.extend([0; 4]);
        for (section, most) in sections.iter().zip(MAX_BYTES) {
            let found = section.len() as u64;
            if found > most {
                return Err(Flaw::Range { what: "the length of a section", found, most });
            }
            out.extend(found.to_le_bytes());
        }
        sections.iter().for_each(|section| out.extend(key.digest(section)));
        let digest = key.digest(&out);
        out.extend(digest);
        sections.iter().for_each(|section| out.extend_from_slice(section));
        Ok(out)
    }

    /// From bytes that are not trusted. Whether the pages are there is not known yet.
    pub(crate) fn decode(bytes: &[u8], key: &Key) -> Result<Self, Flaw> {
        let head = Head::decode(bytes, key)?;
        let expected = HEAD_BYTES as u64 + head.bytes.iter().sum::<u64>();
        if bytes.len() as u64 != expected {
            return Err(Flaw::Length { bytes: bytes.len() as u64, least: expected, most: expected });
        }
        let packs = head.packs(bytes, key)?;
        let (meta, state) = (head.meta(bytes, key)?, head.section(bytes, STATE, key)?.to_vec());
        let slabs = decode_map(head.section(bytes, MAP, key)?, &packs)?;
        Ok(Self { meta, state, slabs })
    }
}

fn decode_map(map: &[u8], packs: &[u64]) -> Result<Vec<SlabMap>, Flaw> {
    let short = || Flaw::Inconsistent("its map ends too early");
    let (count, mut rest) = map.split_at_checked(4).ok_or_else(short)?;
    let count = u32_at(count, 0);
    // Each takes 8 bytes of the map.
    let most = MAX_SLABS.min((rest.len() / 8) as u32);
    if count > most {
        return Err(Flaw::Range { what: "the number of slabs", found: count.into(), most: most.into() });
    }
    let mut slabs = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let (head, after) = rest.split_at_checked(8).ok_or_else(short)?;
        let (pages, runs) = (u32_at(head, 0), u32_at(head, 4));
        if !(1..=MAX_SLAB_PAGES).contains(&pages) {
            let most = MAX_SLAB_PAGES.into();
            return Err(Flaw::Range { what: "the number of pages of a slab", found: pages.into(), most });
        }
        let bytes = u64::from(runs) * 16;
        let (table, after) =
            usize::try_from(bytes).ok().and_then(|bytes| after.split_at_checked(bytes)).ok_or_else(short)?;
        rest = after;
        let (mut slab, mut end) = (SlabMap { pages, runs: Vec::with_capacity(runs as usize) }, 0);
        for run in table.as_chunks::<16>().0 {
            let [page, count, pack, place] = [0, 4, 8, 12].map(|at| u32_at(run, at));
            let is_inside = count > 0
                && page >= end
                && page.checked_add(count).is_some_and(|end| end <= pages)
                && place.checked_add(count).is_some_and(|end| end <= MAX_PACK_PAGES);
            let pack = packs.get(pack as usize).filter(|_| is_inside);
            let pack = *pack.ok_or(Flaw::Inconsistent("it has a run that is in no slab, or in no pack"))?;
            end = page + count;
            slab.runs.push(Run { page, pages: count, place: Place { pack, page: place } });
        }
        slabs.push(slab);
    }
    match rest.is_empty() {
        true => Ok(slabs),
        false => Err(Flaw::Inconsistent("its map goes on behind the last slab")),
    }
}
