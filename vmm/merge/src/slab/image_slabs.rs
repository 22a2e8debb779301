//! The slabs of an engine, for those that make images of guests.

use std::fs::File;
use std::sync::{Arc, Mutex};

use super::pins::Pins;
use super::shared_state::{SharedState, lock_state};

/// What images have to do with the slabs of an engine, from any thread.
#[derive(Clone)]
pub struct ImageSlabs(pub(super) Arc<Mutex<SharedState>>);

impl ImageSlabs {
    /// The slabs that images have.
    pub fn pins(&self) -> Pins {
        lock_state(&self.0).pins.clone()
    }

    /// The file of the slab of this domain whose file has this number, and its pages.
    pub fn find(&self, domain: &str, inode: u64) -> Option<(Arc<File>, u64)> {
        let files = {
            let shared = lock_state(&self.0);
            shared.domains.iter().find(|now| now.domain == domain)?.files.clone()
        };
        os::lock(&files).get(&inode).cloned()
    }
}
