//! Verifies a store: every digest of every file, and that what is referred to is there.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::PAGE;
use crate::error::{Flaw, StoreError};
use crate::pack::{Index, names};
use crate::store::Reading;

/// A file that is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Which.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
    /// The checkpoints that need it.
    pub checkpoints: Vec<String>,
}

/// What was verified.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Checkpoints.
    pub checkpoints: u64,
    /// Pages of packs.
    pub pages: u64,
    /// What is not as it was written.
    pub damage: Vec<Damage>,
}

impl Reading<'_> {
    /// Reads all of it. `tell` gets how many packs of how many were read; false interrupts.
    pub fn verify(&self, tell: &mut dyn FnMut(u64, u64) -> bool) -> Result<Verified, StoreError> {
        let mut verified = Verified::default();
        let (mut needed, mut pages): (BTreeMap<u64, Vec<String>>, BTreeMap<u64, u32>) = Default::default();
        let mut loaded = Vec::new();
        for name in self.names()? {
            match self.load(&name) {
                Ok(checkpoint) => {
                    for pack in checkpoint.packs() {
                        needed.entry(pack).or_default().push(name.as_str().into());
                    }
                    // The end of what it refers to in each pack is all that is needed of it below.
                    let mut ends: BTreeMap<u64, u32> = BTreeMap::new();
                    for run in checkpoint.slabs.iter().flat_map(|slab| &slab.runs) {
                        let end = ends.entry(run.place.pack).or_default();
                        *end = (*end).max(run.place.page + run.pages);
                    }
                    loaded.push((name.clone(), ends));
                    verified.checkpoints += 1;
                }
                Err(error) => verified.add(self, &error, vec![name.as_str().into()]),
            }
        }
        // What no checkpoint refers to is not read: it may be what a killed commit left.
        let total = needed.len() as u64;
        for (n, (pack, checkpoints)) in needed.iter().enumerate() {
            match self.verify_pack(*pack, &mut || tell(n as u64, total)) {
                Ok(found) => {
                    verified.pages += u64::from(found);
                    pages.insert(*pack, found);
                }
                Err(StoreError::Interrupted) => return Err(StoreError::Interrupted),
                Err(error) => verified.add(self, &error, checkpoints.clone()),
            }
        }
        for (name, ends) in loaded {
            for (pack, end) in ends {
                if pages.get(&pack).is_some_and(|pages| *pages < end) {
                    let why = Flaw::Pack { pack, why: format!("which has fewer than {end}") };
                    let error = self.store.checkpoints.damaged(name.as_str(), why);
                    verified.add(self, &error, vec![name.as_str().into()]);
                }
            }
        }
        tell(total, total);
        Ok(verified)
    }

    /// How many pages it has.
    fn verify_pack(&self, id: u64, goes_on: &mut dyn FnMut() -> bool) -> Result<u32, StoreError> {
        let store = self.store;
        let (index, file) = Index::read(&store.packs, id, &store.key)?;
        let mut page = 0;
        for frame in 0..index.frames.len() {
            if !goes_on() {
                return Err(StoreError::Interrupted);
            }
            let pages = index.frame(&file, frame, &store.key).map_err(|error| error.of(&store.packs, id))?;
            for content in pages.as_chunks::<PAGE>().0 {
                if index.digests.get(page) != Some(&store.key.page_digest(content)) {
                    return Err(store.packs.damaged(&names(id).0, Flaw::Digest("a page")));
                }
                page += 1;
            }
        }
        Ok(index.pages())
    }
}

impl Verified {
    fn add(&mut self, reading: &Reading<'_>, error: &StoreError, checkpoints: Vec<String>) {
        let (path, why) = match error {
            StoreError::Damaged { path, why } => (path.clone(), why.to_string()),
            // A disk that cannot be read is damage, too.
            StoreError::File { path, source, .. } => (path.clone(), source.to_string()),
            other => (reading.store.root.path(""), other.to_string()),
        };
        self.damage.push(Damage { path, why, checkpoints });
    }
}
