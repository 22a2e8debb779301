//! A checkpoint on its way to another store: through a file, or to a process that says which pages it lacks.
//!
//! ```text
//! head    magic 8 bytes "SPMOVE01", format u32, 0 u32, key 32, bytes of the checkpoint u64, pages u64, BLAKE3 of all before 32
//! checkpoint  as its file, with digests under that key; page n of the stream is page n % 2^18 of pack n / 2^18
//! frames  pages u32, bytes u32, method u8, 0 three times, digest 32, then the bytes; until all pages came that are sent
//! end     magic 8 bytes "SPMOVEND"
//! ```
//!
//! To a process that answers, its store's key is taken for the stream, and before the frames come the digests of all pages (32 bytes each); it
//! answers with a bit for each page that it lacks, and no others are sent. Digests of pages tell only a process that has the key something, and
//! that one has the store. Pages that it has are found by their whole digest: there are no bytes to compare.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use crate::checkpoint::{Checkpoint, HEAD_BYTES, MAX_FILE_BYTES, Place, Run, SlabMap};
use crate::error::{Flaw, StoreError};
use crate::frame::{self, Compression, FRAME_PAGES, MAX_FRAME_BYTES, Method, Packer};
use crate::key::{DIGEST_BYTES, Digest, Key};
use crate::name::Name;
use crate::pack::{MAX_PACK_PAGES, u32_at, u64_at};
use crate::save::{Save, Saved};
use crate::store::{Reading, Store, Writing};
use crate::{PAGE, Page};

const MAGIC: &[u8; 8] = b"SPMOVE01";
const END: &[u8; 8] = b"SPMOVEND";
const FORMAT: u32 = 1;
const HEAD: usize = 16 + 32 + 16 + DIGEST_BYTES;
const FRAME_HEAD: usize = 12 + DIGEST_BYTES;
/// The most pages of a stream: 1 TiB.
const MAX_PAGES: u64 = 1 << 28;

/// Where the other end is, for messages.
const PLACE: &str = "the stream";

fn failed(what: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::File { what, path: PLACE.into(), source }
}

fn flaw(why: Flaw) -> StoreError {
    StoreError::Damaged { path: PLACE.into(), why }
}

fn read<const N: usize>(from: &mut dyn Read) -> Result<[u8; N], StoreError> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map_err(failed("read"))?;
    Ok(bytes)
}

/// `bytes` bytes, for which nothing is allocated before they come.
fn read_long(from: &mut dyn Read, bytes: u64) -> Result<Vec<u8>, StoreError> {
    let mut read = Vec::new();
    from.take(bytes).read_to_end(&mut read).map_err(failed("read"))?;
    match read.len() as u64 == bytes {
        true => Ok(read),
        false => Err(failed("read")(io::ErrorKind::UnexpectedEof.into())),
    }
}

fn place(number: u64) -> Place {
    Place { pack: number / u64::from(MAX_PACK_PAGES), page: (number % u64::from(MAX_PACK_PAGES)) as u32 }
}

fn number(place: Place) -> u64 {
    place.pack.saturating_mul(MAX_PACK_PAGES.into()).saturating_add(place.page.into())
}

/// A checkpoint of a store, to be sent.
pub struct Outgoing<'s> {
    reading: &'s Reading<'s>,
    checkpoint: Checkpoint,
    /// Where each page lies, by its number in the stream.
    pages: Vec<Place>,
}

impl<'s> Outgoing<'s> {
    /// The checkpoint `name`.
    pub fn of(reading: &'s Reading<'s>, name: &Name) -> Result<Self, StoreError> {
        let checkpoint = reading.load(name)?;
        let (mut numbers, mut pages): (HashMap<Place, u64>, Vec<Place>) = Default::default();
        let mut slabs = Vec::with_capacity(checkpoint.slabs.len());
        for slab in &checkpoint.slabs {
            let mut renumbered = SlabMap { pages: slab.pages, runs: Vec::new() };
            for run in &slab.runs {
                for n in 0..run.pages {
                    let here = Place { page: run.place.page + n, ..run.place };
                    let next = pages.len() as u64;
                    let number = *numbers.entry(here).or_insert(next);
                    if number == next {
                        pages.push(here);
                    }
                    renumbered.push(Run { page: run.page + n, pages: 1, place: place(number) });
                }
            }
            slabs.push(renumbered);
        }
        let checkpoint = Checkpoint { slabs, ..checkpoint };
        Ok(Self { reading, checkpoint, pages })
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Writes all of it, for a file. `tell` gets how many pages of how many were written; false interrupts.
    pub fn export(
        &self,
        to: &mut dyn Write,
        compression: Compression,
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64, StoreError> {
        let mut key = [0; 32];
        getrandom::fill(&mut key)
            .map_err(|error| failed("get random numbers for")(io::Error::other(error.to_string())))?;
        let key = Key::new(key);
        self.write_head(to, &key)?;
        self.write_frames(to, &key, &mut |_| true, compression, tell)
    }

    /// Sends to a process that [`receives`](Incoming::receive) it those pages that it lacks. Returns how many these were.
    pub fn send(
        &self,
        to: &mut dyn Write,
        from: &mut dyn Read,
        compression: Compression,
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64, StoreError> {
        let key = Key::new(read(from)?);
        self.write_head(to, &key)?;
        let (mut reader, mut page) = (self.reading.pages(), [[0; PAGE]]);
        for (at, place) in self.pages.iter().enumerate() {
            if at % FRAME_PAGES == 0 && !tell(0, self.pages()) {
                return Err(StoreError::Interrupted);
            }
            reader.read(*place, &mut page)?;
            to.write_all(&key.page_digest(&page[0])).map_err(failed("write to"))?;
        }
        to.flush().map_err(failed("write to"))?;
        let lacks = read_long(from, self.pages().div_ceil(8))?;
        let is_wanted = |number: u64| {
            lacks.get((number / 8) as usize).is_some_and(|byte| byte & (1 << (number % 8)) != 0)
        };
        self.write_frames(to, &key, &mut |number| is_wanted(number), compression, tell)
    }

    fn write_head(&self, to: &mut dyn Write, key: &Key) -> Result<(), StoreError> {
        let checkpoint = self.checkpoint.encode(key).map_err(flaw)?;
        let mut head = MAGIC.to_vec();
        head.extend(FORMAT.to_le_bytes());
        head.extend([0; 4]);
        head.extend(key.bytes());
        head.extend((checkpoint.len() as u64).to_le_bytes());
        head.extend(self.pages().to_le_bytes());
        let digest = blake3::hash(&head);
        head.extend(digest.as_bytes());
        to.write_all(&head).and_then(|()| to.write_all(&checkpoint)).map_err(failed("write to"))
    }

    fn write_frames(
        &self,
        to: &mut dyn Write,
        key: &Key,
        is_wanted: &mut dyn FnMut(u64) -> bool,
        compression: Compression,
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64, StoreError> {
        let wanted: Vec<u64> = (0..self.pages()).filter(|number| is_wanted(*number)).collect();
        let (mut reader, mut packer) = (self.reading.pages(), Packer::new(compression));
        let mut pages = vec![[0; PAGE]; FRAME_PAGES];
        for (n, numbers) in wanted.chunks(FRAME_PAGES).enumerate() {
            if !tell((n * FRAME_PAGES) as u64, wanted.len() as u64) {
                return Err(StoreError::Interrupted);
            }
            for (page, number) in pages.iter_mut().zip(numbers) {
                reader.read(self.pages[*number as usize], std::slice::from_mut(page))?;
            }
            let (method, packed) = packer.pack(pages[..numbers.len()].as_flattened());
            let mut head = (numbers.len() as u32).to_le_bytes().to_vec();
            head.extend((packed.len() as u32).to_le_bytes());
            head.extend([method.code(), 0, 0, 0]);
            head.extend(key.digest(&packed));
            to.write_all(&head).and_then(|()| to.write_all(&packed)).map_err(failed("write to"))?;
        }
        to.write_all(END).and_then(|()| to.flush()).map_err(failed("write to"))?;
        tell(wanted.len() as u64, wanted.len() as u64);
        Ok(wanted.len() as u64)
    }
}

/// A checkpoint that comes, of which the pages are still to come.
pub struct Incoming {
    checkpoint: Checkpoint,
    key: Key,
    pages: u64,
}

impl Incoming {
    /// Reads what comes before the pages, of a file.
    pub fn read(from: &mut dyn Read) -> Result<Self, StoreError> {
        let head: [u8; HEAD] = read(from)?;
        let (content, digest) = head.split_at(HEAD - DIGEST_BYTES);
        if !content.starts_with(MAGIC) {
            return Err(flaw(Flaw::Magic("a checkpoint that was exported or sent")));
        }
        if u32_at(content, 8) != FORMAT {
            return Err(flaw(Flaw::Format { found: u32_at(content, 8), known: FORMAT }));
        }
        if blake3::hash(content).as_bytes() != digest {
            return Err(flaw(Flaw::Digest("its head")));
        }
        let mut key = [0; 32];
        key.copy_from_slice(&content[16..48]);
        let (bytes, pages) = (u64_at(content, 48), u64_at(content, 56));
        for (what, found, most) in [
            ("the length of the checkpoint", bytes, MAX_FILE_BYTES),
            ("the number of pages", pages, MAX_PAGES),
        ] {
            if found > most {
                return Err(flaw(Flaw::Range { what, found, most }));
            }
        }
        if bytes < HEAD_BYTES as u64 {
            return Err(flaw(Flaw::Length { bytes, least: HEAD_BYTES as u64, most: MAX_FILE_BYTES }));
        }
        let key = Key::new(key);
        let checkpoint = Checkpoint::decode(&read_long(from, bytes)?, &key).map_err(flaw)?;
        let runs = checkpoint.slabs.iter().flat_map(|slab| &slab.runs);
        let referred = runs.clone().map(|run| u64::from(run.pages)).sum::<u64>();
        // Each page is there because it is referred to, so there are not more.
        let is_inside = |run: &Run| number(run.place).saturating_add(run.pages.into()) <= pages;
        match pages <= referred && runs.clone().all(is_inside) {
            true => Ok(Self { checkpoint, key, pages }),
            false => {
                Err(flaw(Flaw::Inconsistent("it refers to pages that do not come, or not to all that do")))
            }
        }
    }

    /// Reads what comes before the pages, of a process that [`sends`](Outgoing::send) it to `store`.
    pub fn receive(store: &Store, from: &mut dyn Read, to: &mut dyn Write) -> Result<Self, StoreError> {
        to.write_all(store.key.bytes()).and_then(|()| to.flush()).map_err(failed("write to"))?;
        let incoming = Self::read(from)?;
        match incoming.key.bytes() == store.key.bytes() {
            true => Ok(incoming),
            false => Err(flaw(Flaw::Digest("the key"))),
        }
    }

    /// What its writer says of it.
    pub fn meta(&self) -> &[u8] {
        &self.checkpoint.meta
    }

    /// Saves it as `name`, of a file, with this in place of what its writer says of it.
    pub fn import(
        self,
        writing: &Writing<'_>,
        name: &Name,
        (meta, compression): (Vec<u8>, Compression),
        from: &mut dyn Read,
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Saved, StoreError> {
        let save = writing.save(name, compression)?;
        let places = vec![None; usize::try_from(self.pages).unwrap_or(usize::MAX)];
        self.take(save, (places, Vec::new()), meta, from, tell)
    }

    /// The same, of a process that sends it, which is told which pages are there.
    pub fn import_missing(
        self,
        writing: &Writing<'_>,
        name: &Name,
        (meta, compression): (Vec<u8>, Compression),
        (from, to): (&mut dyn Read, &mut dyn Write),
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Saved, StoreError> {
        let mut save = writing.save(name, compression)?;
        let (mut places, mut lacks) = (Vec::new(), vec![0u8; self.pages.div_ceil(8) as usize]);
        // Where the sender has a page twice, it comes once.
        let (mut asked, mut same): (HashMap<Digest, u64>, Vec<(u64, u64)>) = Default::default();
        for number in 0..self.pages {
            let digest: Digest = read(from)?;
            let place = save.find(&digest);
            match asked.get(&digest) {
                _ if place.is_some() => {}
                Some(first) => same.push((number, *first)),
                None => {
                    asked.insert(digest, number);
                    lacks[(number / 8) as usize] |= 1 << (number % 8);
                }
            }
            places.push(place);
        }
        to.write_all(&lacks).and_then(|()| to.flush()).map_err(failed("write to"))?;
        self.take(save, (places, same), meta, from, tell)
    }

    /// Takes the pages of which the place is not known, and commits.
    fn take(
        self,
        mut save: Save<'_>,
        (mut places, same): (Vec<Option<Place>>, Vec<(u64, u64)>),
        meta: Vec<u8>,
        from: &mut dyn Read,
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Saved, StoreError> {
        let missing = places.iter().filter(|place| place.is_none()).count();
        let total = missing.saturating_sub(same.len()) as u64;
        let is_same =
            |number: usize| same.binary_search_by_key(&(number as u64), |(number, _)| *number).is_ok();
        let wanted =
            places.iter_mut().enumerate().filter(|(number, place)| place.is_none() && !is_same(*number));
        let (mut done, mut wanted) = (0, wanted.map(|(_, place)| place));
        while done < total {
            if !tell(done, total) {
                return Err(StoreError::Interrupted);
            }
            let pages = self.read_frame(from, total - done)?;
            done += pages.len() as u64;
            for (page, place) in pages.iter().zip(&mut wanted) {
                *place = Some(save.put(page)?);
            }
        }
        for (number, first) in &same {
            let place = places.get(*first as usize).copied().flatten();
            if let Some(same) = places.get_mut(*number as usize) {
                *same = place;
            }
        }
        if read::<8>(from)? != *END {
            return Err(flaw(Flaw::Inconsistent("it does not end behind its last page")));
        }
        for slab in &self.checkpoint.slabs {
            save.slab(slab.pages)?;
            for run in &slab.runs {
                for n in 0..run.pages {
                    let number = number(run.place) + u64::from(n);
                    let place = places.get(number as usize).copied().flatten();
                    let place = place
                        .ok_or_else(|| flaw(Flaw::Inconsistent("it refers to a page that did not come")))?;
                    save.add(Run { page: run.page + n, pages: 1, place })?;
                }
            }
        }
        tell(total, total);
        Ok(save.commit(meta, self.checkpoint.state)?.0)
    }

    fn read_frame(&self, from: &mut dyn Read, most: u64) -> Result<Vec<Page>, StoreError> {
        let head: [u8; FRAME_HEAD] = read(from)?;
        let (pages, bytes) = (u32_at(&head, 0), u32_at(&head, 4));
        let range = |what, found: u32, most: u64| flaw(Flaw::Range { what, found: found.into(), most });
        let most = most.min(FRAME_PAGES as u64);
        if pages == 0 || u64::from(pages) > most {
            return Err(range("the number of pages of a frame", pages, most));
        }
        if bytes as usize > MAX_FRAME_BYTES {
            return Err(range("the length of a frame", bytes, MAX_FRAME_BYTES as u64));
        }
        let known = u64::from(Method::Zstd.code());
        let method =
            Method::of_code(head[8]).ok_or_else(|| range("the method of a frame", head[8].into(), known))?;
        let packed = read_long(from, bytes.into())?;
        if self.key.digest(&packed) != head[12..] {
            return Err(flaw(Flaw::Digest("a frame of pages")));
        }
        let unpacked = frame::unpack(method, &packed, pages as usize).map_err(flaw)?;
        Ok(unpacked.as_chunks::<PAGE>().0.to_vec())
    }
}
