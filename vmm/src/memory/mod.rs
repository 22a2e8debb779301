//! Guest RAM and everything that maps, advises or reads it.
//!
//! Every mmap, madvise, fallocate and userfaultfd call on guest RAM is in this module.

pub mod layout;
pub mod ram;

/// Bytes of a page; Samepage knows no other size for merging and accounting.
pub const PAGE_BYTES: u64 = 4096;
