//! Telling the VMM of guest pages that a system call is about to write to.
//!
//! On most file systems read(2) copies into guest memory by ordinary faults. Some (9p, FUSE, NFS
//! without their caches) pin the pages instead and have them written behind the page table, and a
//! page that is replaced meanwhile would lose what was written. A device cannot tell which it has,
//! so it says what it does each time.

use std::ops::Range;

use crate::reclaim::Gpa;

/// What must know of pages that may be pinned.
pub trait InFlight: Send {
    /// Calls `transfer` once. Until that returns, the pages of `range` may be written without a
    /// fault.
    ///
    /// The range has been checked to be RAM; its ends are any bytes.
    fn during(&self, range: Range<Gpa>, transfer: &mut dyn FnMut());
}
