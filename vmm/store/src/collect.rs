//! Collects garbage: packs that no checkpoint refers to are removed; of those that are used in a small part the rest is moved.
//!
//! What is moved is in a new pack, durably, before a checkpoint refers to it there; each checkpoint is renamed into its place; and only when
//! that is durable the old packs go. Killed in between, every checkpoint is whole, and the next collection finds what is left over.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::PAGE;
use crate::checkpoint::{Checkpoint, Place, Run, SlabMap};
use crate::error::StoreError;
use crate::frame::{Compression, Packer};
use crate::name::Name;
use crate::pack::{self, NewPack};
use crate::read::PageReader;
use crate::save;
use crate::store::{MAX_FILES, Writing};
use crate::uses::Uses;

/// A pack is small that has fewer pages ...
const SMALL_PAGES: u32 = 1 << 12;
/// ... and small packs are put together once there are so many.
const MANY_SMALL: usize = 16;

/// What was collected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// Packs that are gone.
    pub removed_packs: u64,
    /// Pages that were moved.
    pub moved_pages: u64,
    /// Bytes on the disk that were given back, less those that were written.
    pub freed_bytes: i64,
}

impl Writing<'_> {
    /// Collects. `tell` gets how many pages of how many were moved; false interrupts.
    ///
    /// # Errors
    /// A checkpoint is damaged: what it needs is not known, so nothing is removed.
    pub fn collect(
        &self,
        compression: Compression,
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Collected, StoreError> {
        let store = self.store;
        let before = self.pack_bytes()?;
        let (mut live, mut users): (Uses, BTreeMap<Name, Vec<u64>>) = Default::default();
        for name in self.names()? {
            let checkpoint = self.load(&name)?;
            live.add(&checkpoint);
            users.insert(name, checkpoint.packs());
        }
        // A removal that is not durable may yet be undone.
        store.checkpoints.sync()?;
        let wanted = self.to_move(&live);
        let mut moving = Moving {
            writing: self,
            packer: Packer::new(compression),
            pack: None,
            new_packs: Vec::new(),
            is_kept: false,
        };
        let moved = moving.pages(&wanted, &live, tell)?;
        for (name, packs) in &users {
            if packs.iter().any(|pack| wanted.contains(pack)) {
                let checkpoint = relocated(self.load(name)?, &moved);
                save::write(self, name, &checkpoint, false, &mut moving.is_kept)?;
            }
        }
        // No checkpoint refers to those any more.
        let is_dead = |id: &u64| !live.0.contains_key(id) || wanted.contains(id);
        let mut dead = self.pack_ids()?;
        dead.retain(|id| is_dead(id) && !moving.new_packs.contains(id));
        for id in &dead {
            pack::remove(&store.packs, *id)?;
        }
        moving.is_kept = true;
        for draft in store.checkpoints.names(MAX_FILES)?.iter().filter(|name| name.starts_with('.')) {
            store.checkpoints.remove(draft)?;
        }
        store.packs.sync()?;
        let freed_bytes = before as i64 - self.pack_bytes()? as i64;
        Ok(Collected { removed_packs: dead.len() as u64, moved_pages: moved.len() as u64, freed_bytes })
    }

    /// The packs whose pages are to be moved, sorted. One that cannot be read stays as it is.
    fn to_move(&self, live: &Uses) -> Vec<u64> {
        let mut reader = self.pages();
        let (mut wanted, mut small) = (Vec::new(), Vec::new());
        for (id, pages) in &live.0 {
            let Ok(index) = reader.index(*id) else { continue };
            let used = pages.count();
            if used * 2 < index.pages() {
                wanted.push(*id);
            } else if index.pages() < SMALL_PAGES {
                small.push(*id);
            }
        }
        if small.len() >= MANY_SMALL {
            wanted.extend(small);
        }
        wanted.sort_unstable();
        wanted
    }

    fn pack_bytes(&self) -> Result<u64, StoreError> {
        let packs = &self.store.packs;
        packs.names(2 * MAX_FILES)?.iter().map(|name| packs.disk_bytes(name)).sum()
    }
}

/// Pages on their way to new packs. Dropped before a checkpoint refers to these, they are gone.
struct Moving<'w> {
    writing: &'w Writing<'w>,
    packer: Packer,
    pack: Option<NewPack>,
    new_packs: Vec<u64>,
    is_kept: bool,
}

impl Moving<'_> {
    /// Where each of the pages is now that are used in the `wanted` packs. All of it is durable.
    fn pages(
        &mut self,
        wanted: &[u64],
        live: &Uses,
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<HashMap<Place, Place>, StoreError> {
        let store = self.writing.store;
        let used = |id: &u64| live.0.get(id).map_or(0, |pages| u64::from(pages.count()));
        let total = wanted.iter().map(used).sum();
        let (mut reader, mut moved) = (PageReader::new(store), HashMap::new());
        for id in wanted {
            for page in live.0.get(id).iter().flat_map(|pages| pages.iter()) {
                if !tell(moved.len() as u64, total) {
                    return Err(StoreError::Interrupted);
                }
                let (old, mut content) = (Place { pack: *id, page }, [[0; PAGE]]);
                reader.read(old, &mut content)?;
                let digest = store.key.page_digest(&content[0]);
                if self.pack.as_ref().is_some_and(NewPack::is_full) {
                    self.finish()?;
                }
                let pack = match &mut self.pack {
                    Some(pack) => pack,
                    None => {
                        let pack = NewPack::create(&store.packs)?;
                        self.new_packs.push(pack.id());
                        self.pack.insert(pack)
                    }
                };
                let number = pack.push(&content[0], digest, &mut self.packer, &store.key)?;
                moved.insert(old, Place { pack: pack.id(), page: number });
            }
        }
        self.finish()?;
        if !self.new_packs.is_empty() {
            store.packs.sync()?;
        }
        Ok(moved)
    }

    fn finish(&mut self) -> Result<(), StoreError> {
        if let Some(mut pack) = self.pack.take() {
            let store = self.writing.store;
            pack.finish(&store.packs, &mut self.packer, &store.key)?;
        }
        Ok(())
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            for id in &self.new_packs {
                // What cannot be removed now is collected later.
                let _ = pack::remove(&self.writing.store.packs, *id);
            }
        }
    }
}

/// The same checkpoint, with pages where they were moved to.
fn relocated(checkpoint: Checkpoint, moved: &HashMap<Place, Place>) -> Checkpoint {
    let relocate = |slab: &SlabMap| {
        let mut new = SlabMap { pages: slab.pages, runs: Vec::new() };
        for run in &slab.runs {
            for n in 0..run.pages {
                let old = Place { pack: run.place.pack, page: run.place.page + n };
                new.push(Run {
                    page: run.page + n,
                    pages: 1,
                    place: moved.get(&old).copied().unwrap_or(old),
                });
            }
        }
        new
    };
    Checkpoint { slabs: checkpoint.slabs.iter().map(relocate).collect(), ..checkpoint }
}
