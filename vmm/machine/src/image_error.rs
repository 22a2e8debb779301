//! Why a VM does not go on from an image.

use std::io;
use std::os::fd::RawFd;

use devices::state::RestoreError;
use memory::image::ImageError;
use memory::slab::SlabError;
use thiserror::Error;

use super::generation::GenerationError;
use super::snapshot::load_error::LoadError;
use super::state::StateError;
use super::state::container::ContainerError;

/// Why a VM does not go on from an image.
#[derive(Debug, Error)]
pub enum ImageStartError {
    /// A descriptor is not there, or cannot be read.
    #[error("descriptor {fd} of the image cannot be read")]
    Read {
        /// Its number.
        fd: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It may still be changed.
    #[error("descriptor {0} is no state: expected a memfd that is sealed against writing and resizing")]
    Unsealed(RawFd),
    /// It is no state.
    #[error("the image's state cannot be used")]
    State(#[from] ContainerError),
    /// There are other slabs than the state says.
    #[error("the image has {found} slabs, and its state speaks of {expected}")]
    Slabs {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// A slab is not what it should be.
    #[error("slab {number} of the image cannot be used")]
    Slab {
        /// Which.
        number: usize,
        /// Why.
        #[source]
        source: SlabError,
    },
    /// The VM is to be another one.
    #[error("the image is of a VM with {what} {found}, and this one has {expected}")]
    Other {
        /// In what they differ.
        what: &'static str,
        /// What the image's had.
        found: String,
        /// What this one has.
        expected: String,
    },
    /// Its memory cannot be mapped.
    #[error("the image's memory cannot be mapped")]
    Memory(#[from] ImageError),
    /// This KVM does not take the state.
    #[error("the image's vCPUs cannot be restored")]
    Vcpus(#[from] StateError),
    /// The guest cannot learn that it is a copy.
    #[error("the guest cannot be given a generation of its own")]
    Generation(#[from] GenerationError),
    /// It comes from files, and these cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The devices cannot be what it says.
    #[error("the image's devices cannot be restored")]
    Devices(#[from] RestoreError),
}
