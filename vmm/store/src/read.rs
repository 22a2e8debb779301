//! Reads pages of packs: each frame is read whole, checked, and kept for a while.

use std::collections::{HashMap, VecDeque};
use std::fs::File;

use crate::checkpoint::Place;
use crate::error::{Flaw, StoreError};
use crate::frame::FRAME_PAGES;
use crate::pack::{Index, names};
use crate::store::{Reading, Store};
use crate::{PAGE, Page};

/// Packs that are open at a time.
const OPEN_PACKS: usize = 128;
/// Frames that are kept: 8 MiB.
const KEPT_FRAMES: usize = 32;

impl<'s> Reading<'s> {
    /// Reads pages.
    pub fn pages(&self) -> PageReader<'s> {
        PageReader::new(self.store())
    }
}

/// Reads pages of a store.
pub struct PageReader<'s> {
    store: &'s Store,
    open: HashMap<u64, (Index, File)>,
    /// The newest last.
    kept: VecDeque<((u64, usize), Vec<u8>)>,
}

impl<'s> PageReader<'s> {
    pub(crate) fn new(store: &'s Store) -> Self {
        Self { store, open: HashMap::new(), kept: VecDeque::new() }
    }

    /// Puts the pages from `place` on into `out`, as many as fit there: whole ones.
    ///
    /// # Errors
    /// They are not there, or not what was written. Then what is in `out` is of no use.
    pub fn read(&mut self, place: Place, out: &mut [Page]) -> Result<(), StoreError> {
        let mut at = 0;
        while at < out.len() {
            let page = u32::try_from(at).ok().and_then(|at| place.page.checked_add(at));
            let page = page.map_or_else(|| Err(self.outside(place)), Ok)? as usize;
            let first = page % FRAME_PAGES;
            let now = (FRAME_PAGES - first).min(out.len() - at);
            let frame = self.frame(place.pack, page / FRAME_PAGES)?.as_chunks::<PAGE>().0;
            match frame.get(first..first + now) {
                Some(pages) => out[at..at + now].copy_from_slice(pages),
                None => return Err(self.outside(place)),
            }
            at += now;
        }
        Ok(())
    }

    /// What is known of a pack.
    pub(crate) fn index(&mut self, pack: u64) -> Result<&Index, StoreError> {
        Ok(&self.opened(pack)?.0)
    }

    fn opened(&mut self, pack: u64) -> Result<&(Index, File), StoreError> {
        if self.open.len() >= OPEN_PACKS && !self.open.contains_key(&pack) {
            self.open.clear();
        }
        Ok(match self.open.entry(pack) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => {
                new.insert(Index::read(&self.store.packs, pack, &self.store.key)?)
            }
        })
    }

    fn frame(&mut self, pack: u64, frame: usize) -> Result<&[u8], StoreError> {
        let wanted = (pack, frame);
        if let Some(at) = self.kept.iter().position(|(kept, _)| *kept == wanted) {
            return Ok(&self.kept[at].1);
        }
        let store = self.store;
        let (index, file) = self.opened(pack)?;
        let pages = index.frame(file, frame, &store.key).map_err(|error| error.of(&store.packs, pack))?;
        if self.kept.len() == KEPT_FRAMES {
            self.kept.pop_front();
        }
        self.kept.push_back((wanted, pages));
        Ok(self.kept.back().map_or(&[], |(_, pages)| pages))
    }

    fn outside(&self, place: Place) -> StoreError {
        let why = Flaw::Inconsistent("it has fewer pages than are referred to");
        self.store.packs.damaged(&names(place.pack).0, why)
    }
}
