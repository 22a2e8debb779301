//! Checkpoints on disk: a directory that holds pages of memory, each once, and checkpoints that refer to them.
//!
//! A [`Store`] belongs to one trust domain and one user. A *checkpoint* is a name, two pieces of data that the store does not look into, and
//! *slabs*: lists of pages, of which each is absent or somewhere in a *pack*. A pack is written once, by one commit, and never changed: a page
//! that an earlier checkpoint has is referred to there, so every checkpoint but the first is a difference by itself, and none depends on
//! another one. Begin with [`Store`]; [`pack`] and [`checkpoint`] have the forms of the files.
//!
//! Nothing in such a directory is trusted: sizes are capped before anything is allocated, digests compared before anything is decoded, names
//! opened beneath the directory and through no link. A commit or a removal that is killed at any instant, or meets a full disk or a power cut,
//! has happened or has not. There is no KVM here, no fleet, and no unsafe code.
#![forbid(unsafe_code)]

pub mod checkpoint;
mod collect;
mod error;
mod files;
mod frame;
mod key;
mod name;
pub mod pack;
mod read;
mod save;
mod sizes;
mod store;
mod transfer;
mod uses;
mod verify;

pub use checkpoint::{Checkpoint, Place, Run, SlabMap};
pub use collect::Collected;
pub use error::StoreError;
pub use files::{Hook, Step};
pub use frame::Compression;
pub use name::Name;
pub use read::PageReader;
pub use save::{Save, Saved};
pub use sizes::{Size, Sizes};
pub use store::{Reading, Store, Writing};
pub use transfer::{Incoming, Outgoing};
pub use verify::{Damage, Verified};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// A page.
pub type Page = [u8; PAGE];
