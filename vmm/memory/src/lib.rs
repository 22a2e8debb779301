//! Guest RAM and everything that maps, advises or reads it.
//!
//! Every mmap, madvise, fallocate and userfaultfd call on guest RAM is in this module.

use serde::{Deserialize, Serialize};

pub mod file;
mod freeze;
pub mod in_flight;
pub mod ksm_stat;
pub mod layout;
pub mod maps;
pub mod merge_log;
pub mod merge_run;
pub mod own;
pub mod page;
pub mod page_buffer;
pub mod page_out;
pub mod page_set;
pub mod pagemap;
pub mod parker;
pub mod parking;
pub mod ram;
mod reclaim;
pub mod remote;
pub mod resident;
pub mod scan;
pub mod size;
pub mod slab;
pub mod slabbed;
pub mod smaps;
pub mod swap_filler;
pub mod userfault;
pub mod written;

pub use page::{Gpa, Hva, PAGE, PAGE_BYTES, PageNo, PageRange, SlabPage};
pub use page_set::PageSet;

/// One contiguous stretch of guest RAM as mapped in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its address in the process that runs the guest; a multiple of the page size.
    pub hva: u64,
    /// Its length in bytes; a multiple of the page size.
    pub bytes: u64,
}
