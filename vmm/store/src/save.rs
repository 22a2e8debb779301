//! Saves a checkpoint: pages that the store has are referred to, others are written to a new pack.
//!
//! A page is found by its digest and then compared, byte by byte: so what is restored is what was saved, whatever digests are equal. Only packs
//! are looked through that a checkpoint refers to: what a commit left that was killed may not be durable.

use std::collections::HashMap;

use crate::checkpoint::{Checkpoint, MAX_SLAB_PAGES, MAX_SLABS, Place, Run, SlabMap};
use crate::error::{Flaw, StoreError};
use crate::frame::{Compression, Packer};
use crate::key::Digest;
use crate::name::Name;
use crate::pack::{self, NewPack};
use crate::read::PageReader;
use crate::store::{Reading, Writing};
use crate::{PAGE, Page};

/// What saving a checkpoint took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    /// Pages that are not absent.
    pub pages: u64,
    /// Those that the store did not have.
    pub new_pages: u64,
    /// Those of which it was known before that it has them.
    pub known_pages: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
}

impl Writing<'_> {
    /// Begins to save a checkpoint, whose name must be free. Nothing is there under it until [`Save::commit`].
    pub fn save(&self, name: &Name, compression: Compression) -> Result<Save<'_>, StoreError> {
        if self.store.checkpoints.file(name.as_str()).is_ok_and(|file| file.is_some()) {
            return Err(StoreError::Taken(name.as_str().into()));
        }
        let mut save = Save {
            reading: self,
            name: name.clone(),
            packer: Packer::new(compression),
            reader: self.pages(),
            known: HashMap::new(),
            packs: Vec::new(),
            new_packs: Vec::new(),
            pack: None,
            slabs: Vec::new(),
            saved: Saved::default(),
            is_done: false,
        };
        save.look_through_packs()?;
        Ok(save)
    }
}

/// A checkpoint that is being saved. Dropped, it leaves nothing behind.
pub struct Save<'w> {
    reading: &'w Reading<'w>,
    name: Name,
    packer: Packer,
    reader: PageReader<'w>,
    /// Where a page lies that begins with these bytes of its digest.
    known: HashMap<u128, Place>,
    /// The packs that were looked through, and their pages.
    packs: Vec<(u64, u32)>,
    new_packs: Vec<u64>,
    pack: Option<NewPack>,
    slabs: Vec<SlabMap>,
    saved: Saved,
    is_done: bool,
}

fn short(digest: &Digest) -> u128 {
    digest.first_chunk().copied().map_or(0, u128::from_le_bytes)
}

impl Save<'_> {
    fn look_through_packs(&mut self) -> Result<(), StoreError> {
        let mut packs: Vec<u64> = Vec::new();
        for name in self.reading.names()? {
            // One that is damaged keeps no other from being saved; what it refers to is written once more.
            packs.extend(self.reading.packs_of(&name).unwrap_or_default());
        }
        packs.sort_unstable();
        packs.dedup();
        for id in packs {
            let Ok(index) = self.reader.index(id) else { continue };
            for (page, digest) in index.digests.iter().enumerate() {
                self.known.entry(short(digest)).or_insert(Place { pack: id, page: page as u32 });
            }
            self.packs.push((id, index.pages()));
        }
        Ok(())
    }

    /// Begins the next slab, of `pages` pages, of which all are absent yet.
    pub fn slab(&mut self, pages: u32) -> Result<(), StoreError> {
        let too_many = |what, found: usize, most: u32| StoreError::TooMany {
            what,
            found: found as u64,
            most: most.into(),
        };
        if !(1..=MAX_SLAB_PAGES).contains(&pages) {
            return Err(too_many("pages of a slab", pages as usize, MAX_SLAB_PAGES));
        }
        if self.slabs.len() >= MAX_SLABS as usize {
            return Err(too_many("slabs of a checkpoint", self.slabs.len() + 1, MAX_SLABS));
        }
        self.slabs.push(SlabMap { pages, runs: Vec::new() });
        Ok(())
    }

    /// Has page `number` of the slab be this one. Pages come in order; one of zeros is absent.
    pub fn page(&mut self, number: u32, page: &Page) -> Result<(), StoreError> {
        if page.as_chunks::<8>().0.iter().all(|word| u64::from_ne_bytes(*word) == 0) {
            return Ok(());
        }
        let place = self.place(page)?;
        self.add(Run { page: number, pages: 1, place })
    }

    /// Has this page be in the store, though no slab has it yet.
    pub(crate) fn put(&mut self, page: &Page) -> Result<Place, StoreError> {
        self.place(page)
    }

    /// Where the page lies that has this digest, all of it.
    pub(crate) fn find(&mut self, digest: &Digest) -> Option<Place> {
        let place = *self.known.get(&short(digest))?;
        let index = self.reader.index(place.pack).ok()?;
        (index.digests.get(place.page as usize) == Some(digest)).then_some(place)
    }

    /// Has the pages of the slab that `runs` name be what lies there. False, and nothing is changed, if that is not in this store.
    pub fn refer(&mut self, runs: &[Run]) -> Result<bool, StoreError> {
        let is_here = |run: &Run| {
            let at = self.packs.binary_search_by_key(&run.place.pack, |(id, _)| *id);
            let end = run.place.page.checked_add(run.pages);
            at.is_ok_and(|at| end.is_some_and(|end| end <= self.packs[at].1))
        };
        if !runs.iter().all(is_here) {
            return Ok(false);
        }
        for run in runs {
            self.saved.known_pages += u64::from(run.pages);
            self.add(*run)?;
        }
        Ok(true)
    }

    /// Adds pages that lie in the store.
    pub(crate) fn add(&mut self, run: Run) -> Result<(), StoreError> {
        let end = |run: &Run| run.page.checked_add(run.pages);
        let slab = self.slabs.last_mut();
        let fits = |slab: &&mut SlabMap| {
            run.pages > 0
                && end(&run).is_some_and(|end| end <= slab.pages)
                && slab.runs.last().is_none_or(|last| end(last).is_some_and(|end| end <= run.page))
        };
        match slab.filter(fits) {
            Some(slab) => slab.push(run),
            None => {
                let why = Flaw::Inconsistent("a page came out of order");
                return Err(self.reading.store.checkpoints.damaged(self.name.as_str(), why));
            }
        }
        self.saved.pages += u64::from(run.pages);
        Ok(())
    }

    /// Where this page lies; it is written if it lies nowhere.
    fn place(&mut self, page: &Page) -> Result<Place, StoreError> {
        let key = &self.reading.store.key;
        let digest = key.page_digest(page);
        if let Some(place) = self.known.get(&short(&digest)).copied()
            && self.is_at(place, page)
        {
            return Ok(place);
        }
        if self.pack.as_ref().is_some_and(NewPack::is_full) {
            self.finish_pack()?;
        }
        let pack = match &mut self.pack {
            Some(pack) => pack,
            None => {
                let pack = NewPack::create(&self.reading.store.packs)?;
                self.new_packs.push(pack.id());
                self.pack.insert(pack)
            }
        };
        let number = pack.push(page, digest, &mut self.packer, key)?;
        let place = Place { pack: pack.id(), page: number };
        self.saved.new_pages += 1;
        // What cannot be read there any more, or is another page, is found no longer.
        self.known.insert(short(&digest), place);
        Ok(place)
    }

    /// Whether that page is there. What cannot be read is not.
    fn is_at(&mut self, place: Place, page: &Page) -> bool {
        if let Some(pack) = self.pack.as_ref().filter(|pack| pack.id() == place.pack) {
            if let Some(is_same) = pack.recent_is(place.page, page) {
                return is_same;
            }
            let at = place.page as usize % crate::frame::FRAME_PAGES * PAGE;
            let frame = pack.frame_of(place.page, &self.reading.store.key);
            return frame.is_ok_and(|frame| frame.get(at..at + PAGE) == Some(page.as_slice()));
        }
        let mut found = [[0; PAGE]];
        self.reader.read(place, &mut found).is_ok() && found[0] == *page
    }

    fn finish_pack(&mut self) -> Result<(), StoreError> {
        if let Some(mut pack) = self.pack.take() {
            let store = self.reading.store;
            self.saved.written_bytes += pack.finish(&store.packs, &mut self.packer, &store.key)?;
        }
        Ok(())
    }

    /// Where the pages of each slab are, so far.
    pub fn slabs(&self) -> &[SlabMap] {
        &self.slabs
    }

    /// Has the checkpoint be there, with these two pieces of data. From here on it outlives the host. Returns what it took, and where its
    /// pages are.
    pub fn commit(mut self, meta: Vec<u8>, state: Vec<u8>) -> Result<(Saved, Vec<SlabMap>), StoreError> {
        self.finish_pack()?;
        if !self.new_packs.is_empty() {
            self.reading.store.packs.sync()?;
        }
        let checkpoint = Checkpoint { meta, state, slabs: std::mem::take(&mut self.slabs) };
        let written = write(self.reading, &self.name, &checkpoint, true, &mut self.is_done);
        self.saved.written_bytes += written?;
        Ok((self.saved, checkpoint.slabs))
    }
}

/// Writes a checkpoint's file and gives it its name, durably. `is_named` is true once it has that. Returns its bytes.
pub(crate) fn write(
    reading: &Reading<'_>,
    name: &Name,
    checkpoint: &Checkpoint,
    is_new: bool,
    is_named: &mut bool,
) -> Result<u64, StoreError> {
    let checkpoints = &reading.store.checkpoints;
    let bytes =
        checkpoint.encode(&reading.store.key).map_err(|why| checkpoints.damaged(name.as_str(), why))?;
    let draft = format!(".{name}");
    // It is of a commit that was killed: the store is ours.
    checkpoints.remove(&draft)?;
    let written = (|| {
        let mut file = checkpoints.create(&draft)?;
        file.append(&bytes)?;
        file.sync()?;
        checkpoints.rename(&draft, name.as_str(), is_new)
    })();
    if let Err(error) = written {
        let _ = checkpoints.remove(&draft);
        return Err(error);
    }
    // Its packs stay from now on, whether it is durable or not.
    *is_named = true;
    checkpoints.sync()?;
    Ok(bytes.len() as u64)
}

impl Drop for Save<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            self.pack = None;
            for id in &self.new_packs {
                // What cannot be removed now is collected later.
                let _ = pack::remove(&self.reading.store.packs, *id);
            }
        }
    }
}

#[cfg(test)]
mod tests;
