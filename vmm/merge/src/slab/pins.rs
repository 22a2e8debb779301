//! Slabs that images have: the daemon says which, the hub leaves those as they are.
//!
//! An image is mapped by clones to come, all of it: its slabs are neither put together with others
//! nor let go of because no guest uses them just now. Their frames are on the image's account, not
//! on that of merging.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// The numbers of the files of these slabs.
#[derive(Clone, Debug, Default)]
pub struct Pins(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    inodes: Mutex<HashSet<u64>>,
    edition: AtomicU64,
}

impl Pins {
    /// One more.
    pub fn add(&self, inode: u64) {
        self.lock().insert(inode);
        self.0.edition.fetch_add(1, Ordering::Release);
    }

    /// These, and no others.
    pub fn set(&self, inodes: HashSet<u64>) {
        let mut now = self.lock();
        if *now == inodes {
            return;
        }
        *now = inodes;
        self.0.edition.fetch_add(1, Ordering::Release);
    }

    /// The numbers, for more than one look.
    pub fn lock(&self) -> MutexGuard<'_, HashSet<u64>> {
        os::lock(&self.0.inodes)
    }

    /// Another number after each change.
    pub fn edition(&self) -> u64 {
        self.0.edition.load(Ordering::Acquire)
    }
}
