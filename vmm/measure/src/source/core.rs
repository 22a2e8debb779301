//! Memory in an ELF core: of a process (`gcore`, the kernel), whose segments are chosen from as
//! mappings are, or of a machine (`dump-guest-memory`, `virsh dump --memory-only`), whose segments
//! are guest-physical memory.
//!
//! Source: System V ABI, chapter 5, and core(5). The file is of unknown origin: every number is
//! checked, every loop has a bound.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::choice::{Choice, Kind, LEAST_BYTES, Stretch, Stretches};
use super::mappings::kind_of;
use memory::PAGE_BYTES;
use memory::slab::SLAB_NAME;

const FILE_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const SECTION_HEADER_BYTES: usize = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
const EXECUTE: u32 = 1;
const WRITE: u32 = 2;
/// e_phnum of a file that has more segments than it can say: section 0 says it.
const MORE_THAN_FIT: u16 = 0xffff;
/// The mappings a process may have by default (vm.max_map_count) are fewer; the sysctl allows this
/// many.
const MOST_SEGMENTS: u64 = 1 << 24;
/// Notes are read up to this length: they name every mapped file.
const MOST_NOTE_BYTES: u64 = 64 << 20;
/// NT_FILE: which files are mapped where.
const NT_FILE: u32 = 0x4649_4c45;
/// Pages of each segment that are looked at to say how much of it is in use.
const SAMPLED_PAGES: u64 = 2048;

/// Why memory in a core cannot be measured.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CoreError {
    #[error("cannot read {} at byte {at:#x}", path.display())]
    Read {
        path: PathBuf,
        at: u64,
        #[source]
        source: io::Error,
    },
    /// A 32-bit or big-endian one.
    #[error("{} is an ELF core, but {what}: expected one of a 64-bit x86 process or machine", path.display())]
    Class {
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// Its headers contradict each other or the file.
    #[error("{} is an ELF core with damaged headers: {what}", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    /// It is shorter than its headers say.
    #[error(
        "{} is cut short: its segments end at byte {end}, the file has {bytes} bytes. Was the disk full, or the size of cores \
         limited (`ulimit -c`)? Make it again",
        path.display()
    )]
    CutShort {
        path: PathBuf,
        /// Where it should end.
        end: u64,
        bytes: u64,
    },
    /// There is no guest in it.
    #[error(
        "{} is a core without memory that looks like a guest's: a writable segment of {} MiB or more that is not all zeros. It has {stretches}. \
         VMMs may have their guests' memory left out of cores (MADV_DONTDUMP): `gcore -a PID` writes all, or measure the running process \
         with --pid",
        path.display(), LEAST_BYTES >> 20
    )]
    NoGuest {
        path: PathBuf,
        /// Its stretches, the one that holds most first.
        stretches: Stretches,
    },
}

/// A part of the file that is memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub at: u64,
    /// Pages that follow it.
    pub pages: u64,
}

/// The parts of a core that are measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Core {
    /// Its memory, by address.
    pub parts: Vec<Part>,
    /// Notes for readers of the numbers.
    pub notes: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    kind: u32,
    flags: u32,
    at: u64,
    vaddr: u64,
    paddr: u64,
    file_bytes: u64,
}

struct Reader<'a> {
    path: &'a Path,
    file: &'a File,
    bytes: u64,
}

impl Core {
    /// Of the core in `file`, of `bytes` bytes.
    ///
    /// # Errors
    /// It is damaged, or there is no guest in it.
    pub fn open(path: &Path, file: &File, bytes: u64) -> Result<Self, CoreError> {
        let reader = Reader { path, file, bytes };
        let segments = reader.segments()?;
        let loaded: Vec<Segment> =
            segments.iter().filter(|s| s.kind == LOAD && s.file_bytes >= PAGE_BYTES).copied().collect();
        let end = loaded.iter().map(|s| s.at.saturating_add(s.file_bytes)).max().unwrap_or(0);
        if end > bytes {
            return Err(CoreError::CutShort { path: path.into(), end, bytes });
        }
        // A process's core has no physical addresses, a machine's may have virtual ones.
        let is_machine = loaded.iter().any(|s| s.paddr != 0) || loaded.iter().all(|s| s.vaddr == 0);
        match is_machine && !loaded.is_empty() {
            true => Ok(machine(loaded)),
            false => reader.process(&segments, &loaded),
        }
    }
}

/// All of guest-physical memory, each page once, in its order.
fn machine(mut segments: Vec<Segment>) -> Core {
    segments.sort_by_key(|segment| segment.paddr);
    let (mut parts, mut next): (Vec<Part>, u64) = (Vec::new(), 0);
    for Segment { at, paddr, file_bytes, .. } in segments {
        // Pages of an earlier segment: with page tables (paging) a page may be in several.
        let from = paddr.next_multiple_of(PAGE_BYTES).max(next);
        let Some(skipped) = from.checked_sub(paddr).filter(|skipped| *skipped < file_bytes) else { continue };
        let pages = (file_bytes - skipped) / PAGE_BYTES;
        next = from.saturating_add(pages * PAGE_BYTES);
        if pages > 0 {
            parts.push(Part { at: at + skipped, pages });
        }
    }
    let total: u64 = parts.iter().map(|part| part.pages).sum();
    let note = format!(
        "an ELF core of a machine: {} segments of guest-physical memory, {:.1} MiB; devices' memory that the hypervisor has dumped is among it",
        parts.len(),
        total as f64 / 256.0
    );
    Core { parts, notes: vec![note] }
}

impl Reader<'_> {
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), CoreError> {
        let end = at.saturating_add(bytes.len() as u64);
        if end > self.bytes {
            return Err(CoreError::CutShort { path: self.path.into(), end, bytes: self.bytes });
        }
        let path = || self.path.to_path_buf();
        self.file.read_exact_at(bytes, at).map_err(|source| CoreError::Read { path: path(), at, source })
    }

    fn damaged(&self, what: &'static str) -> CoreError {
        CoreError::Damaged { path: self.path.into(), what }
    }

    fn segments(&self) -> Result<Vec<Segment>, CoreError> {
        let mut head = [0; FILE_HEADER_BYTES];
        self.read(0, &mut head)?;
        let class = |what| Err(CoreError::Class { path: self.path.into(), what });
        match (head[4], head[5]) {
            (CLASS_64, LITTLE_ENDIAN) => {}
            (CLASS_64, _) => return class("big-endian"),
            _ => return class("of 32 bits"),
        }
        if usize::from(u16_at(&head, 54)) != PROGRAM_HEADER_BYTES {
            return Err(self.damaged("its program headers are not of 56 bytes"));
        }
        let (at, mut count) = (u64_at(&head, 32), u64::from(u16_at(&head, 56)));
        if count == u64::from(MORE_THAN_FIT) {
            let mut section = [0; SECTION_HEADER_BYTES];
            self.read(u64_at(&head, 40), &mut section)?;
            count = u64::from(u32_at(&section, 44));
        }
        if count > MOST_SEGMENTS {
            return Err(self.damaged("it has more segments than a process can have"));
        }
        let mut headers = vec![0; count as usize * PROGRAM_HEADER_BYTES];
        self.read(at, &mut headers)?;
        let segment = |header: &[u8; PROGRAM_HEADER_BYTES]| Segment {
            kind: u32_at(header, 0),
            flags: u32_at(header, 4),
            at: u64_at(header, 8),
            vaddr: u64_at(header, 16),
            paddr: u64_at(header, 24),
            file_bytes: u64_at(header, 32),
        };
        Ok(headers.as_chunks::<PROGRAM_HEADER_BYTES>().0.iter().map(segment).collect())
    }

    /// The guest in a process's core.
    fn process(&self, segments: &[Segment], loaded: &[Segment]) -> Result<Core, CoreError> {
        let mut files = Vec::new();
        for note in segments.iter().filter(|segment| segment.kind == NOTE) {
            let mut bytes = vec![0; note.file_bytes.min(MOST_NOTE_BYTES) as usize];
            self.read(note.at, &mut bytes)?;
            files.extend(mapped_files(&bytes));
        }
        files.sort_by_key(|(hvas, _)| hvas.start);
        let mut loaded = loaded.to_vec();
        loaded.sort_by_key(|segment| segment.vaddr);
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut before: Option<Segment> = None;
        for segment in &loaded {
            let (kind, is_slab) = kind(segment, &files);
            let held_bytes = match kind {
                Kind::Other(_) => segment.file_bytes,
                _ => self.filled_bytes(segment)?,
            };
            let end = segment.vaddr.saturating_add(segment.file_bytes);
            // As for mappings: large neighbours of one kind are one, and so are pieces between
            // slabs.
            let are_large = [Some(*segment), before].iter().flatten().all(|s| s.file_bytes >= LEAST_BYTES);
            let was_slab = before.is_some_and(|segment| self::kind(&segment, &files).1);
            match stretches.last_mut() {
                Some(last)
                    if last.hvas.end == segment.vaddr
                        && last.kind == kind
                        && (are_large || is_slab || was_slab) =>
                {
                    last.hvas.end = end;
                    last.held_bytes += held_bytes;
                }
                _ => {
                    let hvas = segment.vaddr..end;
                    stretches.push(Stretch { hvas, held_bytes, kind, parts: Vec::new() });
                }
            }
            before = Some(*segment);
        }
        let choice = Choice::of(stretches.clone());
        if choice.taken.is_empty() {
            stretches.sort_by_key(|stretch| std::cmp::Reverse((stretch.held_bytes, stretch.bytes())));
            return Err(CoreError::NoGuest { path: self.path.into(), stretches: Stretches(stretches) });
        }
        let is_taken = |segment: &&Segment| choice.taken.iter().any(|s| s.hvas.contains(&segment.vaddr));
        let part = |s: &Segment| Part { at: s.at, pages: s.file_bytes / PAGE_BYTES };
        let parts = loaded.iter().filter(is_taken).map(part).collect();
        Ok(Core { parts, notes: process_notes(&choice) })
    }

    /// Bytes of a segment that are not zeros, about: by pages that lie evenly apart in it.
    fn filled_bytes(&self, segment: &Segment) -> Result<u64, CoreError> {
        let pages = segment.file_bytes / PAGE_BYTES;
        let looked = pages.min(SAMPLED_PAGES);
        let (mut page, mut filled) = (vec![0; PAGE_BYTES as usize], 0);
        for n in 0..looked {
            let number = (u128::from(n) * u128::from(pages) / u128::from(looked)) as u64;
            self.read(segment.at + number * PAGE_BYTES, &mut page)?;
            filled += u64::from(page.iter().any(|byte| *byte != 0));
        }
        Ok((u128::from(segment.file_bytes) * u128::from(filled) / u128::from(looked.max(1))) as u64)
    }
}

fn process_notes(choice: &Choice) -> Vec<String> {
    let mut notes =
        vec!["an ELF core of a process: pages without a frame are zeros in it, and count as such".to_owned()];
    if !choice.left_out.is_empty() {
        let line = |(stretch, reason): &(Stretch, _)| format!("{stretch}: {reason}");
        let left: Vec<String> = choice.left_out.iter().take(8).map(line).collect();
        let taken = Stretches(choice.taken.clone());
        notes.push(format!(
            "taken for guest memory: {taken}; left out: {} (what is in memory is estimated by what is not zeros)",
            left.join("; ")
        ));
    }
    notes
}

/// The kind of a segment, by its permissions and the files that were mapped; and whether it is
/// a slab of Samepage's.
fn kind(segment: &Segment, files: &[(Range<u64>, String)]) -> (Kind, bool) {
    if segment.flags & EXECUTE != 0 {
        return (Kind::Other("executable"), false);
    }
    if segment.flags & WRITE == 0 {
        return (Kind::Other("read-only"), false);
    }
    let after = files.partition_point(|(hvas, _)| hvas.start <= segment.vaddr);
    let file = files[..after].last().filter(|(hvas, _)| segment.vaddr < hvas.end);
    match file.map_or("", |(_, name)| name) {
        // Merged pages were anonymous before.
        name if name.contains(SLAB_NAME) => (Kind::Anonymous, true),
        name => (kind_of(name, false), false),
    }
}

/// Addresses and names in the NT_FILE note among `notes`.
fn mapped_files(notes: &[u8]) -> Vec<(Range<u64>, String)> {
    let mut rest = notes;
    while let Some(header) = rest.get(..12) {
        let [name, content] = [0, 4].map(|at| u32_at(header, at) as usize);
        let kind = u32_at(header, 8);
        let content_at = 12 + name.next_multiple_of(4);
        let Some(bytes) = rest.get(content_at..content_at.saturating_add(content)) else { break };
        if kind == NT_FILE {
            return file_entries(bytes).unwrap_or_default();
        }
        rest = rest.get(content_at + content.next_multiple_of(4)..).unwrap_or_default();
    }
    Vec::new()
}

fn file_entries(note: &[u8]) -> Option<Vec<(Range<u64>, String)>> {
    let count = usize::try_from(u64_at(note.get(..8)?, 0)).ok()?;
    let names_at = count.checked_mul(24)?.checked_add(16)?;
    let names = note.get(names_at..)?.split(|byte| *byte == 0);
    let entries = note.get(16..names_at)?.as_chunks::<24>().0.iter();
    let entry = |(entry, name): (&[u8; 24], &[u8])| {
        (u64_at(entry, 0)..u64_at(entry, 8), String::from_utf8_lossy(name).into_owned())
    };
    Some(entries.zip(names).map(entry).collect())
}

/// Little-endian numbers; 0 where there are too few bytes, which callers rule out.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
