//! What checkpoints cost on the disk, alone and together.

use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::name::Name;
use crate::store::Reading;
use crate::uses::Uses;

/// What a checkpoint costs. A frame counts by the part of its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// Different pages that it refers to.
    pub pages: u64,
    /// Bytes that these take.
    pub bytes: u64,
    /// Bytes of those that no other checkpoint refers to: what removing it alone gives back, once it is collected.
    pub own_bytes: u64,
}

/// What a store costs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sizes {
    /// Each checkpoint; those that are damaged are left out.
    pub checkpoints: Vec<(Name, Size)>,
    /// Bytes on the disk of all files.
    pub bytes: u64,
}

impl Reading<'_> {
    /// What each checkpoint costs, and all together.
    pub fn sizes(&self) -> Result<Sizes, StoreError> {
        let names = self.names()?;
        // Of one as of the other, each once: pages that several have.
        let (mut seen, mut shared) = (Uses::default(), Uses::default());
        let uses = |name: &Name| self.load(name).ok().map(|checkpoint| Uses::of(&checkpoint));
        for name in &names {
            for (pack, page) in uses(name).iter().flat_map(Uses::iter) {
                if !seen.0.entry(pack).or_default().insert(page) {
                    shared.0.entry(pack).or_default().insert(page);
                }
            }
        }
        let (mut reader, mut sizes) = (self.pages(), Sizes::default());
        for name in names {
            let Some(uses) = uses(&name) else { continue };
            let (mut size, mut bytes, mut own) = (Size::default(), 0.0, 0.0);
            for (pack, page) in uses.iter() {
                let share = reader.index(pack).map_or(0.0, |index| index.share(page));
                size.pages += 1;
                bytes += share;
                own += if shared.has(pack, page) { 0.0 } else { share };
            }
            (size.bytes, size.own_bytes) = (bytes.round() as u64, own.round() as u64);
            sizes.checkpoints.push((name, size));
        }
        let store = self.store;
        for dir in [&store.packs, &store.checkpoints] {
            for name in dir.names(2 * crate::store::MAX_FILES)? {
                sizes.bytes += dir.disk_bytes(&name).unwrap_or(0);
            }
        }
        Ok(sizes)
    }
}
