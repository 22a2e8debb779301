//! Which mappings of a process are the memory of a guest: by rule, or as ranges that were named.
//!
//! The rule: memory that is writable, not executable, and anonymous or of a memfd, of shared memory or of huge pages (not the heap,
//! not a stack, no file of a disk) counts. Neighbours are one stretch if one of them is a slab of Samepage's, if both are of
//! that size, or if they are of one file. Guest memory are the stretches of at least [`LEAST_BYTES`] that have at least a [`FRACTION`]th of the largest one. So QEMU, Firecracker and Cloud Hypervisor keep their guests'
//! memory. What else is as large (a framebuffer, a cache) is taken for it, and memory above a hole that is smaller than that
//! is not: name the ranges then.

use std::fmt;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::PathBuf;

use thiserror::Error;

use crate::memory::slab::SLAB_NAME;
use crate::memory::{Extent, PAGE_BYTES};

/// The smallest stretch that may be guest memory.
pub const LEAST_BYTES: u64 = 16 << 20;
/// A stretch of less than this part of the largest one is something else.
pub const FRACTION: u64 = 16;
/// Stretches that an error lists.
const LISTED: usize = 8;

/// What a mapping is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous memory.
    Anonymous,
    /// A memfd, shared memory, huge pages.
    Memory,
    /// The heap, a stack, code, a file.
    Other,
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub hvas: Range<u64>,
    /// What it is made of.
    pub backing: Backing,
    /// The number of its file; 0 if it has none.
    inode: u64,
    is_slab: bool,
    is_readable: bool,
    is_data: bool,
}

/// A contiguous stretch of memory that may be a guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch(pub Range<u64>);

impl fmt::Display for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x} ({} KiB)", self.0.start, self.0.end, (self.0.end - self.0.start) >> 10)
    }
}

/// Stretches in a row, for errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretches(pub Vec<Stretch>);

impl fmt::Display for Stretches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return write!(f, "none at all");
        }
        for (n, stretch) in self.0.iter().take(LISTED).enumerate() {
            write!(f, "{}{stretch}", if n == 0 { "" } else { ", " })?;
        }
        match self.0.len().saturating_sub(LISTED) {
            0 => Ok(()),
            more => write!(f, " and {more} smaller ones"),
        }
    }
}

/// Why there is nothing to measure in a process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MappingError {
    /// There is no such process.
    #[error("there is no process {pid} (any more)")]
    Gone {
        /// Which.
        pid: u32,
    },
    /// It is somebody else's.
    #[error(
        "the memory of process {pid} may not be looked at: that takes its owner's rights, or root's (CAP_SYS_PTRACE). \
         Without them you can measure your own processes, and memory images with --file"
    )]
    Denied {
        /// Which.
        pid: u32,
    },
    /// Its mappings could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no guest in it.
    #[error(
        "process {pid} has no memory that looks like a guest's: a writable stretch of {} MiB or more, anonymous or shared. It has {stretches}. \
         Name what you mean with --range START-END",
        LEAST_BYTES >> 20
    )]
    NoGuest {
        /// Which.
        pid: u32,
        /// What it has, the largest first.
        stretches: Stretches,
    },
    /// A range that was named is not memory.
    #[error(
        "range {range:x?} of process {pid} is not mapped at {at:#x}; the largest stretches of memory are {stretches}"
    )]
    Unmapped {
        /// Which.
        pid: u32,
        /// The range.
        range: Range<u64>,
        /// The first address that is nothing.
        at: u64,
        /// What there is.
        stretches: Stretches,
    },
    /// Two ranges that were named have pages in common.
    #[error("ranges {first:x?} and {second:x?} overlap; each page is counted once, so name it once")]
    Overlap {
        /// The one.
        first: Range<u64>,
        /// The other.
        second: Range<u64>,
    },
}

/// The mappings of a process, by address.
///
/// # Errors
/// It is gone or somebody else's.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>, MappingError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let text =
        std::fs::read_to_string(&path).map_err(|source| match (source.kind(), source.raw_os_error()) {
            (ErrorKind::NotFound, _) | (_, Some(libc::ESRCH)) => MappingError::Gone { pid },
            (ErrorKind::PermissionDenied, _) => MappingError::Denied { pid },
            _ => MappingError::Read { path, source },
        })?;
    if text.is_empty() {
        // A zombie, or a thread of the kernel.
        return Err(MappingError::Gone { pid });
    }
    Ok(text.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let permissions = fields.next()?;
    let inode = fields.nth(2)?.parse().ok()?;
    let name = fields.next().unwrap_or("").trim();
    let in_memory = ["/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage", "/dev/hugepages"];
    let backing = match name {
        "" => Backing::Anonymous,
        _ if name.starts_with("[anon") => Backing::Anonymous,
        _ if in_memory.iter().any(|start| name.starts_with(start)) => Backing::Memory,
        _ => Backing::Other,
    };
    Some(Mapping {
        hvas: hex(start)?..hex(end)?,
        backing,
        inode,
        is_slab: name.contains(SLAB_NAME),
        is_readable: permissions.starts_with('r'),
        is_data: permissions.starts_with("rw-"),
    })
}

/// Stretches of memory that may be a guest's, the largest first.
fn stretches(mappings: &[Mapping]) -> Vec<Stretch> {
    let data: Vec<&Mapping> = mappings.iter().filter(|m| m.is_data && m.backing != Backing::Other).collect();
    // A stack or an allocator's memory may lie next to a guest's: that they touch is not enough.
    let belong = |a: &Mapping, b: &Mapping| {
        let are_large = [a, b].iter().all(|m| m.hvas.end - m.hvas.start >= LEAST_BYTES);
        let are_one_file = a.inode != 0 && a.inode == b.inode;
        a.hvas.end == b.hvas.start && (a.is_slab || b.is_slab || are_large || are_one_file)
    };
    let stretch = |group: &[&Mapping]| Stretch(group[0].hvas.start..group[group.len() - 1].hvas.end);
    let mut found: Vec<Stretch> = data.chunk_by(|a, b| belong(a, b)).map(stretch).collect();
    found.sort_by_key(|stretch| (std::cmp::Reverse(stretch.0.end - stretch.0.start), stretch.0.start));
    found
}

/// The memory of the guest in process `pid`, by the rule above.
///
/// # Errors
/// There is none.
pub fn guest_memory(pid: u32, mappings: &[Mapping]) -> Result<Vec<Extent>, MappingError> {
    let stretches = stretches(mappings);
    let bytes = |stretch: &Stretch| stretch.0.end - stretch.0.start;
    let largest = stretches.first().map_or(0, bytes);
    let least = LEAST_BYTES.max(largest / FRACTION);
    if largest < least {
        return Err(MappingError::NoGuest { pid, stretches: Stretches(stretches) });
    }
    let mut ranges: Vec<_> = stretches.iter().filter(|s| bytes(s) >= least).map(|s| s.0.clone()).collect();
    ranges.sort_by_key(|range| range.start);
    Ok(extents(&ranges))
}

/// The memory of process `pid` at `ranges`, which are of whole pages.
///
/// # Errors
/// Two overlap, or nothing is mapped there.
pub fn named_memory(
    pid: u32,
    mappings: &[Mapping],
    ranges: &[Range<u64>],
) -> Result<Vec<Extent>, MappingError> {
    let mut ranges = ranges.to_vec();
    ranges.sort_by_key(|range| range.start);
    if let Some(pair) = ranges.windows(2).find(|pair| pair[0].end > pair[1].start) {
        return Err(MappingError::Overlap { first: pair[0].clone(), second: pair[1].clone() });
    }
    for range in &ranges {
        let mut at = range.start;
        for mapping in mappings.iter().filter(|mapping| mapping.is_readable) {
            if mapping.hvas.contains(&at) {
                at = mapping.hvas.end;
            }
        }
        if at < range.end {
            let stretches = Stretches(stretches(mappings));
            return Err(MappingError::Unmapped { pid, range: range.clone(), at, stretches });
        }
    }
    Ok(extents(&ranges))
}

/// Which guest-physical addresses they have cannot be seen from outside; they are numbered in order.
fn extents(ranges: &[Range<u64>]) -> Vec<Extent> {
    let mut gpa = 0;
    let mut extent = |range: &Range<u64>| {
        let bytes = (range.end - range.start) / PAGE_BYTES * PAGE_BYTES;
        gpa += bytes;
        Extent { gpa: gpa - bytes, hva: range.start, bytes }
    };
    ranges.iter().map(&mut extent).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRECRACKER: &str = "\
555555554000-5555557a0000 r-xp 00000000 08:01 1 /usr/bin/firecracker
5555557a0000-555555900000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f00c0000000 rw-p 00000000 00:00 0 
7f0100000000-7f0110000000 rw-p 00000000 00:00 0 
7f0200000000-7f0200021000 rw-p 00000000 00:00 0 
7f0300000000-7f0340000000 rwxp 00000000 00:00 0 
7f0400000000-7f0440000000 rw-s 00000000 08:01 9 /var/lib/disk.img
7ffc00000000-7ffc40000000 rw-p 00000000 00:00 0 [stack]";

    fn all(text: &str) -> Vec<Mapping> {
        text.lines().filter_map(parse).collect()
    }

    fn ranges(extents: &[Extent]) -> Vec<(u64, u64)> {
        extents.iter().map(|e| (e.hva, e.bytes)).collect()
    }

    #[test]
    fn memory_on_both_sides_of_the_hole_is_the_guests() {
        let found = guest_memory(7, &all(FIRECRACKER)).unwrap();
        assert_eq!(ranges(&found), [(0x7f00_0000_0000, 3 << 30), (0x7f01_0000_0000, 256 << 20)]);
        assert_eq!(found[1].gpa, 3 << 30);
    }

    #[test]
    fn what_merging_has_cut_up_is_one_stretch() {
        let text = "\
7f0000000000-7f0000800000 rw-p 00000000 00:00 0 
7f0000800000-7f0000900000 rw-p 00003000 00:01 47 /memfd:samepage-slab (deleted)
7f0000900000-7f0001000000 rw-p 00000000 00:00 0 
7f0001000000-7f0001800000 rw-p 00000000 00:00 0 ";
        let found = guest_memory(7, &all(text)).unwrap();
        assert_eq!(ranges(&found), [(0x7f00_0000_0000, 16 << 20)], "and the stack above it is none of it");
    }

    #[test]
    fn a_file_that_is_mapped_in_pieces_is_one_stretch() {
        let text = "\
7f0000000000-7f0000800000 rw-s 00000000 00:01 48 /dev/shm/ram with spaces
7f0000800000-7f0001000000 rw-s 00800000 00:01 48 /dev/shm/ram with spaces
7f0001000000-7f0001100000 rw-s 00000000 00:01 49 /memfd:other (deleted)";
        let found = guest_memory(7, &all(text)).unwrap();
        assert_eq!(ranges(&found), [(0x7f00_0000_0000, 16 << 20)]);
    }

    #[test]
    fn without_a_guest_what_there_is_is_listed() {
        let text = "7f0000000000-7f0000800000 rw-p 00000000 00:00 0 \n7f0001000000-7f0001001000 r--p 00000000 00:00 0 ";
        let error = guest_memory(7, &all(text)).unwrap_err().to_string();
        assert!(
            error.contains("7f0000000000-7f0000800000 (8192 KiB)") && error.contains("--range"),
            "{error}"
        );
        let none = guest_memory(7, &[]).unwrap_err().to_string();
        assert!(none.contains("none at all"), "{none}");
    }

    #[test]
    fn named_ranges_are_mapped_and_do_not_overlap() {
        let maps = all(FIRECRACKER);
        let good = [0x7f01_0000_0000..0x7f01_0000_2000, 0x7f00_0000_1000..0x7f00_0000_3000];
        let found = named_memory(7, &maps, &good).unwrap();
        assert_eq!(ranges(&found), [(0x7f00_0000_1000, 0x2000), (0x7f01_0000_0000, 0x2000)]);
        let over = [0x7f01_0000_0000..0x7f01_0000_2000, 0x7f01_0000_1000..0x7f01_0000_3000];
        assert!(matches!(named_memory(7, &maps, &over), Err(MappingError::Overlap { .. })));
        // It begins in a mapping and ends behind it.
        let off = 0x7f02_0002_0000..0x7f02_0002_2000;
        let error = named_memory(7, &maps, std::slice::from_ref(&off)).unwrap_err();
        assert!(matches!(error, MappingError::Unmapped { at: 0x7f02_0002_1000, .. }), "{error}");
    }

    #[test]
    fn a_process_that_is_gone_is_told_from_one_of_somebody_else() {
        assert!(matches!(mappings(u32::MAX - 1), Err(MappingError::Gone { .. })));
        assert!(!mappings(std::process::id()).unwrap().is_empty());
    }
}
