//! The mappings of a process: read, joined to stretches, chosen from by the rule of
//! [`super::choice`] or by ranges that were named.
//!
//! Neighbours are one stretch if one of them is a slab of Samepage's, if both are large and of one
//! kind, or if they are of one file.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::PathBuf;

use thiserror::Error;

use super::choice::{Choice, FilePart, Kind, LEAST_BYTES, Stretch, Stretches};
use kernel_view::maps;
use kernel_view::smaps::Area;
use memory::slab::SLAB_NAME;
use memory::{Extent, Gpa, Hva, PAGE_BYTES};

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub hvas: Range<u64>,
    /// Its kind.
    pub kind: Kind,
    /// Bytes that have a frame or are on swap.
    pub held_bytes: u64,
    /// Its file and where in it, if it is a file's.
    part: Option<FilePart>,
    is_shared: bool,
    is_slab: bool,
    is_readable: bool,
}

/// Why there is nothing to measure in a process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MappingError {
    /// There is no such process.
    #[error("there is no process {pid} (any more)")]
    Gone { pid: u32 },
    /// It belongs to another user.
    #[error(
        "the memory of process {pid} may not be read: that takes its owner's rights, or root's (CAP_SYS_PTRACE). \
         Without them you can measure your own processes, and memory images with --file"
    )]
    Denied { pid: u32 },
    /// Its mappings could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// There is no guest in it.
    #[error(
        "process {pid} has no memory that looks like a guest's: a writable stretch of {} MiB or more with pages in memory. It has {stretches}. \
         Name what you mean with --range START-END",
        LEAST_BYTES >> 20
    )]
    NoGuest {
        pid: u32,
        /// Its stretches, the largest first.
        stretches: Stretches,
    },
    /// A range that was named is not memory.
    #[error(
        "range {range:x?} of process {pid} is not readable memory at {at:#x}; the largest stretches are {stretches}"
    )]
    Unmapped {
        pid: u32,
        range: Range<u64>,
        /// The first address that is nothing.
        at: u64,
        stretches: Stretches,
    },
    /// Two ranges that were named have pages in common.
    #[error("ranges {first:x?} and {second:x?} overlap; each page is counted once, so name it once")]
    Overlap { first: Range<u64>, second: Range<u64> },
}

/// The mappings of a process, by address.
///
/// # Errors
/// It is gone or another user's.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>, MappingError> {
    let areas = Area::of(pid).map_err(|source| match (source.kind(), source.raw_os_error()) {
        (ErrorKind::NotFound, _) | (_, Some(libc::ESRCH)) => MappingError::Gone { pid },
        (ErrorKind::PermissionDenied, _) => MappingError::Denied { pid },
        _ => MappingError::Read { path: PathBuf::from(format!("/proc/{pid}/smaps")), source },
    })?;
    if areas.is_empty() {
        // A zombie, or a thread of the kernel.
        return Err(MappingError::Gone { pid });
    }
    let memory = memory_devices(pid);
    Ok(areas.iter().filter_map(|area| parse(area, &memory)).collect())
}

/// Devices of file systems that are memory, in the mount namespace of process `pid`, as its maps
/// write them.
fn memory_devices(pid: u32) -> BTreeSet<String> {
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    mounts.lines().filter_map(memory_device).collect()
}

/// The device of a line of `/proc/PID/mountinfo`, if what is mounted there is memory.
fn memory_device(line: &str) -> Option<String> {
    let (before, after) = line.split_once(" - ")?;
    if !matches!(after.split(' ').next()?, "tmpfs" | "ramfs" | "hugetlbfs" | "devtmpfs") {
        return None;
    }
    let (major, minor) = before.split(' ').nth(2)?.split_once(':')?;
    Some(device(major.parse().ok()?, minor.parse().ok()?))
}

fn device(major: u32, minor: u32) -> String {
    format!("{major:02x}:{minor:02x}")
}

/// The kind of a mapping with a name, where its permissions allow it to be RAM.
pub(super) fn kind_of(name: &str, is_on_memory: bool) -> Kind {
    let in_memory = ["/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage", "/dev/hugepages"];
    match name {
        "" => Kind::Anonymous,
        "[heap]" => Kind::Other("heap"),
        _ if name.starts_with("[anon_shmem") => Kind::Memory,
        _ if name.starts_with("[anon") => Kind::Anonymous,
        _ if name.starts_with('[') => Kind::Other("stack or the kernel's"),
        _ if is_on_memory || in_memory.iter().any(|start| name.starts_with(start)) => Kind::Memory,
        _ if name.starts_with('/') => Kind::File,
        _ => Kind::Other("of a device or the like"),
    }
}

fn parse(area: &Area, memory: &BTreeSet<String>) -> Option<Mapping> {
    let maps::Mapping { hvas, permissions, offset, device, inode, name } =
        maps::Mapping::parse(&area.header)?;
    let hvas = hvas.start.0..hvas.end.0;
    let is_slab = name.contains(SLAB_NAME);
    let kind = match permissions.as_bytes() {
        _ if area.is_device => Kind::Other("of a device"),
        // Merged pages were anonymous before.
        [b'r', b'w', b'-', ..] if is_slab => Kind::Anonymous,
        [b'r', b'w', b'-', ..] => kind_of(name, memory.contains(device)),
        [b'r', _, b'x', ..] => Kind::Other("executable"),
        _ => Kind::Other("read-only"),
    };
    let bytes = offset..offset.saturating_add(hvas.end - hvas.start);
    Some(Mapping {
        part: (inode != 0).then(|| FilePart { file: (device.to_owned(), inode), bytes }),
        hvas,
        kind,
        held_bytes: area.held_bytes,
        is_shared: permissions.ends_with('s'),
        is_slab,
        is_readable: permissions.starts_with('r') && !area.is_device,
    })
}

/// Stretches of memory that can be read, by address.
fn stretches(mappings: &[Mapping]) -> Vec<Stretch> {
    let readable: Vec<&Mapping> = mappings.iter().filter(|mapping| mapping.is_readable).collect();
    // A stack or an allocator's memory may lie next to a guest's: that they touch is not enough.
    let belong = |a: &Mapping, b: &Mapping| {
        let are_large = [a, b].iter().all(|m| m.hvas.end - m.hvas.start >= LEAST_BYTES);
        let same_file = a.part.as_ref().zip(b.part.as_ref()).filter(|(a, b)| a.file == b.file);
        // The same pages may be mapped twice, one behind the other.
        let goes_on = same_file.is_none_or(|(a, b)| a.bytes.end == b.bytes.start);
        let are_one_file = same_file.is_some();
        let is_merged = a.is_slab || b.is_slab;
        let are_neighbours = a.hvas.end == b.hvas.start && a.kind == b.kind;
        are_neighbours && (is_merged || goes_on && (are_large || are_one_file))
    };
    let stretch = |group: &[&Mapping]| Stretch {
        hvas: group[0].hvas.start..group[group.len() - 1].hvas.end,
        held_bytes: group.iter().map(|mapping| mapping.held_bytes).sum(),
        kind: group[0].kind,
        // Slabs are the engine's, each of many small parts.
        parts: group.iter().filter(|m| m.is_shared && !m.is_slab).filter_map(|m| m.part.clone()).collect(),
    };
    readable.chunk_by(|a, b| belong(a, b)).map(stretch).collect()
}

/// The memory of the guest in process `pid`, by the rule.
///
/// # Errors
/// There is none.
pub fn guest_memory(pid: u32, mappings: &[Mapping]) -> Result<Choice, MappingError> {
    let choice = Choice::of(stretches(mappings));
    if choice.taken.is_empty() {
        return Err(MappingError::NoGuest { pid, stretches: largest(mappings) });
    }
    Ok(choice)
}

/// All stretches, the one that holds most first.
fn largest(mappings: &[Mapping]) -> Stretches {
    let mut stretches = stretches(mappings);
    stretches.sort_by_key(|stretch| std::cmp::Reverse((stretch.held_bytes, stretch.bytes())));
    Stretches(stretches)
}

/// The memory of process `pid` at `ranges`, which are of whole pages.
///
/// # Errors
/// Two overlap, or nothing is mapped there.
pub fn named_memory(
    pid: u32,
    mappings: &[Mapping],
    ranges: &[Range<u64>],
) -> Result<(Vec<Extent>, Choice), MappingError> {
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
            let stretches = largest(mappings);
            return Err(MappingError::Unmapped { pid, range: range.clone(), at, stretches });
        }
    }
    Ok((extents(&ranges), Choice::named(stretches(mappings), &ranges)))
}

impl Choice {
    /// Where the guest's RAM is.
    pub fn extents(&self) -> Vec<Extent> {
        extents(&self.taken.iter().map(|stretch| stretch.hvas.clone()).collect::<Vec<_>>())
    }
}

/// Which guest-physical addresses they have cannot be seen from outside; they are numbered in
/// order.
fn extents(ranges: &[Range<u64>]) -> Vec<Extent> {
    let mut gpa = 0;
    let mut extent = |range: &Range<u64>| {
        let bytes = (range.end - range.start) / PAGE_BYTES * PAGE_BYTES;
        gpa += bytes;
        Extent { gpa: Gpa(gpa - bytes), hva: Hva(range.start), bytes }
    };
    ranges.iter().map(&mut extent).collect()
}

#[cfg(test)]
#[path = "mappings_tests.rs"]
mod tests;
