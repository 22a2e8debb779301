//! Snapshots on disk, as Firecracker's API has them: a file with the state, and one with the
//! memory.
//!
//! A file that is loaded is believed no more than a driver: the state's digests are checked before
//! anything in it is decoded, what is decoded is checked where it is used, and memory is copied, or
//! mapped under a lease, so that nothing changes it afterwards.

pub mod create;
mod handler;
pub mod info;
mod lease;
pub mod load;
pub mod load_error;
mod memory_file;

pub(crate) use handler::{Connection, Handler, Watch};
pub(crate) use lease::{FileLease, FileWatch};
pub(crate) use memory_file::MemoryFile;

#[cfg(test)]
mod tests;
