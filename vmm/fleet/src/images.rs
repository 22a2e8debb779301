//! Images: guests as they were at one instant, from which others go on. They are in the daemon's memory, and end with it.
//!
//! What the daemon has of one are descriptors: the state in a sealed memfd, and slabs, which are charged to it. It maps none of that.

mod disk;
pub mod keeper;
mod slab;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use guest::protocol::{Fill, Ready};
use serde::{Deserialize, Serialize};

use self::disk::ImageDisk;
use self::keeper::Kept;
pub use self::slab::ImageSlab;
use super::spec::GuestSpec;
use machine::capture::Captured;
use machine::standby::ImageFiles;
use machine::{DiskFds, ImageFds};
use memory::PAGE_BYTES;
use os::handed;

/// The most snapshots that a fleet keeps.
pub const MAX_IMAGES: usize = 256;

/// A guest as it was.
#[derive(Debug)]
pub struct Image {
    /// What it was, and is again in each clone but for its name.
    pub spec: GuestSpec,
    /// What it said when it was ready.
    pub ready: Option<Ready>,
    /// What it was filled with.
    pub fill: Option<Fill>,
    /// What was taken, and how long that took.
    pub captured: Captured,
    state: OwnedFd,
    slabs: Vec<ImageSlab>,
    disks: Vec<ImageDisk>,
    from_disk: bool,
    taken: Instant,
}

impl Image {
    /// Of a guest that was captured just now.
    pub(crate) fn new(
        spec: GuestSpec,
        (ready, fill): (Option<Ready>, Option<Fill>),
        Kept { captured, state, slabs, disks }: Kept,
    ) -> Self {
        Self { spec, ready, fill, captured, state, slabs, disks, from_disk: false, taken: Instant::now() }
    }

    /// Of a guest that was captured at any time, and anywhere.
    pub(crate) fn from_disk(
        spec: GuestSpec,
        said: (Option<Ready>, Option<Fill>),
        captured: Captured,
        state: OwnedFd,
        slabs: Vec<ImageSlab>,
    ) -> Self {
        let kept = Kept { captured, state, slabs, disks: Vec::new() };
        Self { from_disk: true, ..Self::new(spec, said, kept) }
    }

    /// Whether it was captured at any time, and anywhere.
    pub(crate) fn is_from_disk(&self) -> bool {
        self.from_disk
    }

    /// Whether the guest had written to drives that have overlays.
    pub(crate) fn has_disks(&self) -> bool {
        !self.disks.is_empty()
    }

    /// Its state, sealed.
    pub(crate) fn state(&self) -> &OwnedFd {
        &self.state
    }

    /// Its slabs, by number.
    pub(crate) fn slabs(&self) -> &[ImageSlab] {
        &self.slabs
    }

    /// Hands it to the process that `program` starts.
    pub(crate) fn give(&self, program: &mut std::process::Command) -> std::io::Result<ImageFds> {
        let state = handed::give(program, self.state.try_clone()?);
        let give = |slab: &ImageSlab| Ok(handed::give(program, slab.file.try_clone()?.into()));
        let slabs = self.slabs.iter().map(give).collect::<std::io::Result<_>>()?;
        let give = |disk: &ImageDisk| {
            let map = disk.map.as_ref().map(File::try_clone).transpose()?;
            let map = map.map(|map| handed::give(program, map.into()));
            Ok(DiskFds { drive: disk.drive, top: handed::give(program, disk.copy()?.into()), map })
        };
        let disks = self.disks.iter().map(give).collect::<std::io::Result<_>>()?;
        Ok(ImageFds { state, slabs, disks, from_disk: self.from_disk })
    }

    /// Its descriptors, for one clone.
    pub(crate) fn with_files<T>(
        &self,
        with: impl FnOnce(ImageFiles<'_>) -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        let slabs: Vec<BorrowedFd<'_>> = self.slabs.iter().map(|slab| slab.file.as_fd()).collect();
        let tops = self.disks.iter().map(ImageDisk::copy).collect::<std::io::Result<Vec<_>>>()?;
        let disks: Vec<_> = (self.disks.iter().zip(&tops))
            .map(|(disk, top)| (disk.drive, top.as_fd(), disk.map.as_ref().map(File::as_fd)))
            .collect();
        with(ImageFiles { state: self.state.as_fd(), slabs: &slabs, disks: &disks })
    }

    /// Its slab whose file has this number.
    pub fn slab(&self, inode: u64) -> Option<&ImageSlab> {
        self.slabs.iter().find(|slab| slab.inode == inode)
    }

    /// The number of the file of each slab, and its pages.
    pub fn slab_sizes(&self) -> impl Iterator<Item = (u64, u64)> {
        self.slabs.iter().map(|slab| (slab.inode, slab.pages))
    }

    /// Pages of its slabs.
    pub fn slab_pages(&self) -> u64 {
        self.slabs.iter().map(|slab| slab.pages).sum()
    }
}

/// The snapshots of a fleet, by name.
#[derive(Debug, Default)]
pub struct Images(BTreeMap<String, Arc<Image>>);

/// What there is to say of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// The guest that was captured.
    pub guest: String,
    /// Its trust domain.
    pub domain: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of its slabs, of which others may have a part.
    pub slab_bytes: u64,
    /// How long ago it was taken, in seconds.
    pub age_seconds: f64,
    /// Guests that run and went on from it.
    pub clones: usize,
    /// What was taken, and for how long the guest stood still.
    pub captured: Captured,
}

impl Images {
    /// The one of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<Image>> {
        self.0.get(name)
    }

    /// Keeps one more. False if there is one of that name.
    pub fn insert(&mut self, name: &str, image: Arc<Image>) -> bool {
        let is_new = !self.0.contains_key(name);
        if is_new {
            self.0.insert(name.into(), image);
        }
        is_new
    }

    /// Lets go of one. What clones use of it stays as long as they do.
    pub fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    /// Whether there may be no more.
    pub fn is_full(&self) -> bool {
        self.0.len() >= MAX_IMAGES
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Arc<Image>)> {
        self.0.iter().map(|(name, image)| (name.as_str(), image))
    }
}

impl ImageInfo {
    /// Of the image called `name`, from which so many clones that run went on.
    pub fn of(name: &str, image: &Image, clones: usize) -> Self {
        let vm = &image.spec.vm;
        Self {
            name: name.into(),
            guest: image.spec.name.clone(),
            domain: image.spec.domain.clone(),
            memory_bytes: vm.memory_bytes,
            cpus: vm.cpus,
            slab_bytes: image.slab_pages() * PAGE_BYTES,
            age_seconds: image.taken.elapsed().as_secs_f64(),
            clones,
            captured: image.captured,
        }
    }
}
