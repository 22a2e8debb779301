//! Snapshots on disk, as Firecracker's API has them: a file with the state, and one with the memory.
//!
//! A file that is loaded is believed no more than a driver: the state's digests are checked before anything in it is decoded, what is
//! decoded is checked by whoever uses it, and memory is copied, so that nobody changes it afterwards.

pub mod create;
mod handler;
pub mod info;
pub mod load;

pub(crate) use handler::{Connection, Handler, Watch};

#[cfg(test)]
mod tests;
