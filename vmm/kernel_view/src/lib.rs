//! What the kernel shows of a process and of the host, in `/proc`, `/sys` and the files of control
//! groups.
//!
//! Reading only: nothing here changes anything, maps memory or makes a system call but open and
//! read. It must not know guests, slabs, fleets or what these numbers are used for. What is done to
//! memory is in `memory`, processes held by descriptors in `os`.
//!
//! Begin with [`pagemap`] (page by page), [`smaps`] (the kernel's own sums), [`maps`] (mappings)
//! and [`host`] (memory, swap, stalls and control groups). The crate `procfs` is not used: it
//! refuses a `/proc/meminfo` without any of 17 fields of which we need two, takes no root
//! directory, leaves the octal escapes in mountinfo, keeps a hash map for each mapping, and knows
//! no markers in pagemap.
#![forbid(unsafe_code)]
// A truncated page number or address is another one. Tests count small numbers.
#![cfg_attr(
    not(test),
    warn(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)
)]

mod groups;
pub mod host;
pub mod ksm_stat;
pub mod maps;
pub mod meminfo;
pub mod memory_blocks;
pub mod numa;
pub mod own_pages;
mod page;
pub mod pagemap;
pub mod psi;
pub mod smaps;
pub mod swaps;

pub use page::{Hva, PAGE, PAGE_BYTES, to_usize};
