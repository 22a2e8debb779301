//! What can go wrong with measuring.

use std::io;
use std::path::PathBuf;

use guest::page_type::PageType;
use guest::protocol::ParseError;
use image::format::Format;
use kernel_view::pagemap::PagemapError;
use memory::remote::RemoteError;
use memory::{Hva, PAGE_BYTES};
use thiserror::Error;

use super::limits::MAX_SPACES;
use super::source::core::CoreError;
use super::source::mappings::MappingError;

/// Errors of measuring.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The page table of a guest could not be read.
    #[error("cannot see the pages of guest {guest:?} (pid {pid})")]
    Pages {
        guest: String,
        pid: u32,
        #[source]
        source: PagemapError,
    },
    /// The memory of a guest could not be read.
    #[error("cannot read the memory of guest {guest:?} (pid {pid})")]
    Memory {
        guest: String,
        pid: u32,
        #[source]
        source: RemoteError,
    },
    /// The kernel's books of a process could not be read.
    #[error("cannot read the kernel's counters of guest {guest:?} (/proc/{pid}/smaps)")]
    Books {
        guest: String,
        pid: u32,
        #[source]
        source: io::Error,
    },
    /// The host's frame table could not be read.
    #[error("cannot read the host's frame table")]
    FrameTable(#[source] PagemapError),
    /// An extent is not made of whole pages.
    #[error(
        "extent at {hva} of {bytes} bytes of guest {guest:?} is not made of whole pages of {PAGE_BYTES} bytes"
    )]
    Unaligned { guest: String, hva: Hva, bytes: u64 },
    /// A guest has more pages than an index entry can number.
    #[error(
        "with the {pages} pages of guest {guest:?} there are too many: one measurement takes at most {}",
        u32::MAX
    )]
    TooLarge { guest: String, pages: u64 },
    /// A file cannot be measured.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The use of a guest's pages cannot be determined.
    #[error(transparent)]
    PageTypes(#[from] PageTypesError),
    /// There is nothing to measure in a process.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The kernel has no random bytes for a key.
    #[error("cannot draw a key")]
    Random {
        #[source]
        source: io::Error,
    },
    /// A thread of the measurement ended by itself: a fault in Samepage.
    #[error("a thread that reads memory has failed; this is a fault in Samepage, please report it")]
    Worker,
    /// The caller asked to stop.
    #[error("interrupted; nothing was changed")]
    Interrupted,
    /// There are more guests than an index entry can number.
    #[error("{guests} guests were given; one measurement takes at most {MAX_SPACES}")]
    TooMany { guests: usize },
}

/// Why a file cannot be measured.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is a directory, a pipe, a device.
    #[error("{} is no regular file: a raw memory image is expected", path.display())]
    Kind { path: PathBuf },
    /// There is nothing in it.
    #[error("{} is empty: a raw memory image has at least a page of {PAGE_BYTES} bytes", path.display())]
    Empty { path: PathBuf },
    /// It is of another format.
    #[error(
        "{} is {format}: a raw memory image or an ELF core is expected; {}",
        path.display(), format.advice_for_memory()
    )]
    Format { path: PathBuf, format: Format },
    /// It is a core that cannot be measured.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// It has not even one page.
    #[error(
        "{} has {bytes} bytes: a raw memory image has at least a page of {PAGE_BYTES} bytes", path.display()
    )]
    LessThanAPage { path: PathBuf, bytes: u64 },
    /// It ends within a page.
    #[error(
        "{} has {bytes} bytes, which are not whole pages of {PAGE_BYTES}: is it a raw image, without a header? If it is, \
         `head -c {} {} > COPY` makes a copy of its whole pages",
        path.display(), bytes / PAGE_BYTES * PAGE_BYTES, path.display()
    )]
    Unaligned { path: PathBuf, bytes: u64 },
    #[error("{} ended at byte {at:#x} of {bytes:#x}: it was cut short while it was measured; measure a copy", path.display())]
    Shrunk {
        path: PathBuf,
        /// The first byte that was not there.
        at: u64,
        /// The length it had.
        bytes: u64,
    },
    #[error("cannot read {} at byte {at:#x}", path.display())]
    Read {
        path: PathBuf,
        at: u64,
        #[source]
        source: io::Error,
    },
}

/// Why a map of page types cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PageTypesError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is no copy of /proc/kpageflags.
    #[error(
        "{} has {bytes} bytes, which are not entries of 8: a copy of the guest's /proc/kpageflags is expected \
         (`cat /proc/kpageflags > FILE` in the guest, as root)",
        path.display()
    )]
    Unaligned { path: PathBuf, bytes: u64 },
    /// It ends too early.
    #[error(
        "{} has {frames} frames, and RAM of this guest ends with frame {end:#x}, if {} MiB of it are below the hole under 4 GiB: \
         say how much is there with --low-memory, or is it another guest's?",
        path.display(), low_bytes >> 20
    )]
    Short {
        path: PathBuf,
        /// Entries that it has.
        frames: u64,
        /// Frames that it should have.
        end: u64,
        /// RAM below the hole.
        low_bytes: u64,
    },
    /// It has memory in use where the guest has none.
    #[error(
        "{} says that frame {frame:#x} is used ({kind}), where this guest has no RAM if {} MiB of it are below the hole under 4 GiB: \
         say how much is there with --low-memory, or is it another guest's?",
        path.display(), low_bytes >> 20
    )]
    Outside {
        path: PathBuf,
        frame: u64,
        kind: PageType,
        /// RAM below the hole.
        low_bytes: u64,
    },
    /// It has no memory where the guest has.
    #[error(
        "{} knows of no memory at {holes} of {pages} frames where this guest has RAM, if {} MiB of it are below the hole under 4 GiB: \
         say how much is there with --low-memory, or is it another guest's?",
        path.display(), low_bytes >> 20
    )]
    Holes {
        path: PathBuf,
        /// Frames without memory.
        holes: u64,
        pages: u64,
        /// RAM below the hole.
        low_bytes: u64,
    },
    /// The order of several stretches is not known.
    #[error(
        "RAM of {who} is in {stretches} stretches, and none has the {} MiB that are below the hole under 4 GiB, so which is where is not known: \
         say how much is there with --low-memory",
        low_bytes >> 20
    )]
    Order {
        who: Box<str>,
        stretches: usize,
        /// RAM below the hole.
        low_bytes: u64,
    },
    /// The guest's report cannot be parsed.
    #[error("cannot parse guest {guest}'s report of its frames")]
    Said {
        guest: Box<str>,
        #[source]
        source: ParseError,
    },
}
