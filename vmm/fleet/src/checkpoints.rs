//! Checkpoints: guests as they were, on disk. Each trust domain has a store of its own, so no page of one is a page of another.
//!
//! An image's slabs are a checkpoint's slabs, of which those pages are kept that the guest's memory has. So what is captured, saved, read back
//! and mapped is in the same places all the way, and its state does not change. A slab that was saved or read here knows where its pages lie in
//! the store ([`Origin`]): they are not read again.

mod description;
mod error;
mod load;
mod origin;
mod save;
mod shelf;
pub mod suspended;
mod work;

use serde::{Deserialize, Serialize};

pub use description::Description;
pub use error::CheckpointError;
pub use load::load;
pub(crate) use origin::Origin;
pub use save::save;
pub(crate) use shelf::STORE_LIMIT;
pub use shelf::Shelf;
pub use work::{Work, WorkKind, Works};

/// What there is to say of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
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
    /// When it was saved, in seconds since 1970.
    pub saved_at: u64,
    /// The fleet that is to go on from it, where `fleet down --save` saved it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended: Option<String>,
    /// Its pages on the disk, where they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<store::Size>,
    /// What saving it took, where that was just done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<store::Saved>,
    /// How long that took, in seconds: capturing, writing, and until it was on the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

impl CheckpointInfo {
    /// Of the checkpoint called `name`.
    pub fn of(name: &str, description: &Description) -> Self {
        let guest = &description.guest;
        Self {
            name: name.into(),
            guest: guest.name.clone(),
            domain: guest.domain.clone(),
            memory_bytes: guest.vm.memory_bytes,
            cpus: guest.vm.cpus,
            saved_at: description.saved_at,
            suspended: description.suspended.clone(),
            size: None,
            saved: None,
            seconds: None,
        }
    }
}
