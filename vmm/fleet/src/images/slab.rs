//! A slab that an image has.

use std::fs::File;
use std::sync::{Arc, Mutex};

use crate::checkpoints::Origin;
use os::lock;

/// A sealed slab.
#[derive(Clone, Debug)]
pub struct ImageSlab {
    /// Its file.
    pub file: Arc<File>,
    /// Its pages.
    pub pages: u64,
    /// The number of its file.
    pub inode: u64,
    /// Where its pages lie on a disk, once they do. That of all images that have it.
    origin: Arc<Mutex<Option<Arc<Origin>>>>,
}

impl ImageSlab {
    /// The slab in `file`, which is sealed and has this number.
    pub fn new(file: Arc<File>, pages: u64, inode: u64) -> Self {
        Self { file, pages, inode, origin: Arc::default() }
    }

    /// Where its pages lie on a disk.
    pub(crate) fn origin(&self) -> Option<Arc<Origin>> {
        lock(&self.origin).clone()
    }

    /// They lie there.
    pub(crate) fn set_origin(&self, origin: Arc<Origin>) {
        *lock(&self.origin) = Some(origin);
    }
}
