//! The only way a device gives guest memory back to the host.
//!
//! A device decides *which* pages the guest no longer needs; how they are dropped depends on what
//! backs them and is the VMM's business.

use std::fmt;
use std::io;
use std::ops::Range;

/// Bytes of a page, in guests and on the host. Samepage knows no other size for merging, giving
/// back and accounting.
pub const PAGE_BYTES: u64 = 4096;

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Takes guest memory back.
pub trait Reclaim: Send {
    /// Frees the host frames behind `range`; the guest reads zeros there when it touches it again.
    ///
    /// Both ends must be multiples of [`PAGE_BYTES`]. The range comes from a guest: an
    /// implementation checks it against RAM and answers anything outside with
    /// `ErrorKind::InvalidInput`, having freed nothing.
    fn discard(&self, range: Range<Gpa>) -> io::Result<()>;

    /// The size of what can be freed, in bytes: a power of two, at least a page. Of a granule that
    /// is discarded in part no frame is freed: the part is zeroed where it has one.
    fn granule_bytes(&self) -> u64 {
        PAGE_BYTES
    }

    /// How many bytes of `ranges` have frames, which discarding them frees. Without a look at the
    /// page table, which not every memory is worth, all of them.
    fn framed_bytes(&self, ranges: &[Range<Gpa>]) -> u64 {
        ranges.iter().map(|range| range.end.0 - range.start.0).sum()
    }

    /// As [`Reclaim::discard`], for each of `ranges`; `failed` is called with those that were not
    /// freed.
    ///
    /// For implementations where many at once are cheaper than one by one.
    fn discard_all(&self, ranges: &[Range<Gpa>], failed: &mut dyn FnMut(&Range<Gpa>, io::Error)) {
        for range in ranges {
            if let Err(error) = self.discard(range.clone()) {
                failed(range, error);
            }
        }
    }
}
