//! The little of ELF that a kernel and its modules need: the file header, the program headers, the
//! sections by name. Everything is read from bytes of unknown origin, so every offset is checked.
//!
//! Source: System V ABI, chapters 4 and 5, and the x86-64 supplement.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};

/// The first four bytes of every ELF file.
pub const MAGIC: [u8; 4] = *b"\x7fELF";
const FILE_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const SECTION_HEADER_BYTES: usize = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_INTERPRETER: u32 = 3;
const FLAG_EXECUTE: u32 = 1;

/// Why an ELF file cannot be started as a kernel.
#[derive(Debug, thiserror::Error)]
pub enum ElfProblem {
    /// The file could not be read.
    #[error("cannot read its ELF headers")]
    Read(#[source] io::Error),
    /// The magic number is another one.
    #[error("has no ELF header")]
    NotElf,
    #[error("is a 32-bit ELF for {0}; expected a 64-bit x86-64 kernel")]
    Class(Machine),
    #[error("is an ELF for {0}; expected x86-64")]
    Machine(Machine),
    #[error("is a big-endian ELF; expected x86-64, which is little-endian")]
    Endian,
    /// Not of type ET_EXEC.
    #[error("is an ELF {0}, which cannot be started as a kernel; expected an executable vmlinux")]
    Type(FileType),
    /// It asks for a dynamic linker, so it is a program for an operating system.
    #[error("is a program that needs a dynamic linker, not a kernel; expected a vmlinux or bzImage")]
    Program,
    /// Headers or segments lie beyond the end of the file.
    #[error("is cut short: its {what} end at byte {end}, the file has {len}; copy or download it again")]
    Truncated {
        what: &'static str,
        /// Where it should end, in bytes from the start of the file.
        end: u64,
        /// Length of the file in bytes.
        len: u64,
    },
    /// The program headers are not of the size that x86-64 has.
    #[error("has program headers of {0} bytes; expected 56")]
    HeaderSize(u16),
    /// A segment is larger in the file than in memory, or wraps around.
    #[error(
        "has a damaged segment: {file_bytes} bytes in the file, {memory_bytes} in memory at {address:#x}"
    )]
    Segment {
        /// p_filesz.
        file_bytes: u64,
        /// p_memsz.
        memory_bytes: u64,
        /// p_paddr.
        address: u64,
    },
    /// No PT_LOAD segment with contents.
    #[error("has no loadable segment; expected a linked vmlinux")]
    NothingToLoad,
    /// No segment may be executed.
    #[error("has no executable segment; expected a linked vmlinux")]
    NothingToExecute,
    /// The entry point is outside all segments.
    #[error("has its entry point {0:#x} outside every loadable segment")]
    Entry(u64),
}

/// An ELF machine number, shown by name where it is a common one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine(pub u16);

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            2 | 18 | 43 => "SPARC",
            3 => "x86 (i386)",
            8 => "MIPS",
            20 => "PowerPC",
            21 => "PowerPC64",
            22 => "S/390",
            40 => "ARM",
            50 => "IA-64",
            MACHINE_X86_64 => "x86-64",
            183 => "AArch64",
            243 => "RISC-V",
            247 => "BPF",
            258 => "LoongArch",
            other => return write!(f, "machine {other}"),
        };
        f.write_str(name)
    }
}

/// The e_type field, shown in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileType(pub u16);

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("object file (a kernel module?)"),
            3 => f.write_str("shared object or position-independent program"),
            4 => f.write_str("core dump"),
            other => write!(f, "file of type {other}"),
        }
    }
}

/// Checks that `image`, of `len` bytes, is an x86-64 executable whose segments all lie inside it.
/// Returns the number of bytes of the file that headers, segments and sections take.
pub fn check_kernel<F: Read + Seek>(image: &mut F, len: u64) -> Result<u64, ElfProblem> {
    let truncated = |what, end| ElfProblem::Truncated { what, end, len };
    let mut head = [0; FILE_HEADER_BYTES];
    let got = read_up_to(image, 0, &mut head).map_err(ElfProblem::Read)?;
    if head[..4] != MAGIC {
        return Err(ElfProblem::NotElf);
    }
    if got < FILE_HEADER_BYTES {
        return Err(truncated("ELF header", FILE_HEADER_BYTES as u64));
    }
    let machine = Machine(u16_at(&head, 18));
    match (head[4], head[5]) {
        // The machine number of a big-endian file is elsewhere, so report the endianness.
        (_, e) if e != LITTLE_ENDIAN => return Err(ElfProblem::Endian),
        (CLASS_64, _) if machine.0 == MACHINE_X86_64 => {}
        (CLASS_64, _) => return Err(ElfProblem::Machine(machine)),
        _ => return Err(ElfProblem::Class(machine)),
    }
    let file_type = FileType(u16_at(&head, 16));
    let (entry, headers_at) = (u64_at(&head, 24), u64_at(&head, 32));
    let (header_bytes, headers) = (u16_at(&head, 54), u16_at(&head, 56));
    if headers == 0 {
        let relocatable = file_type.0 != TYPE_EXECUTABLE;
        return Err(if relocatable { ElfProblem::Type(file_type) } else { ElfProblem::NothingToLoad });
    }
    if usize::from(header_bytes) != PROGRAM_HEADER_BYTES {
        return Err(ElfProblem::HeaderSize(header_bytes));
    }
    let table_bytes = usize::from(headers) * PROGRAM_HEADER_BYTES;
    let table_end = headers_at.saturating_add(table_bytes as u64);
    if table_end > len {
        return Err(truncated("program headers", table_end));
    }
    let mut table = vec![0; table_bytes];
    if read_up_to(image, headers_at, &mut table).map_err(ElfProblem::Read)? < table_bytes {
        return Err(truncated("program headers", table_end));
    }
    let segments = table.chunks_exact(PROGRAM_HEADER_BYTES);
    if segments.clone().any(|s| u32_at(s, 0) == SEGMENT_INTERPRETER) {
        return Err(ElfProblem::Program);
    }
    if file_type.0 != TYPE_EXECUTABLE {
        return Err(ElfProblem::Type(file_type));
    }
    let segments_end = check_segments(segments, entry, len)?;
    let sections_end = u64_at(&head, 40)
        .saturating_add(u64::from(u16_at(&head, 60)).saturating_mul(SECTION_HEADER_BYTES as u64));
    Ok(table_end.max(segments_end).max(sections_end).min(len))
}

fn check_segments<'a>(
    segments: impl Iterator<Item = &'a [u8]>,
    entry: u64,
    len: u64,
) -> Result<u64, ElfProblem> {
    let (mut end, mut loads, mut executes, mut entered) = (0, false, false, false);
    for segment in segments.filter(|s| u32_at(s, 0) == SEGMENT_LOAD) {
        let (offset, virtual_address, address) =
            (u64_at(segment, 8), u64_at(segment, 16), u64_at(segment, 24));
        let (file_bytes, memory_bytes) = (u64_at(segment, 32), u64_at(segment, 40));
        if file_bytes > memory_bytes || address.checked_add(memory_bytes).is_none() {
            return Err(ElfProblem::Segment { file_bytes, memory_bytes, address });
        }
        let segment_end = offset.saturating_add(file_bytes);
        if segment_end > len {
            return Err(ElfProblem::Truncated { what: "loadable segments", end: segment_end, len });
        }
        end = end.max(segment_end);
        loads |= file_bytes > 0;
        executes |= u32_at(segment, 4) & FLAG_EXECUTE != 0;
        // A vmlinux names its entry by physical address; other kernels by virtual address.
        let inside = |start: u64| entry >= start && entry - start < memory_bytes;
        entered |= inside(address) || inside(virtual_address);
    }
    match (loads, executes, entered) {
        (false, _, _) => Err(ElfProblem::NothingToLoad),
        (_, false, _) => Err(ElfProblem::NothingToExecute),
        (_, _, false) => Err(ElfProblem::Entry(entry)),
        _ => Ok(end),
    }
}

/// Whether `image` is a 64-bit x86-64 program that needs no dynamic linker, as /init of an image
/// must be.
pub fn is_static_program(image: &[u8]) -> bool {
    let header = image.len() >= FILE_HEADER_BYTES
        && image.starts_with(&MAGIC)
        && image[4] == CLASS_64
        && image[5] == LITTLE_ENDIAN
        && u16_at(image, 18) == MACHINE_X86_64;
    if !header || usize::from(u16_at(image, 54)) != PROGRAM_HEADER_BYTES {
        return false;
    }
    let table = usize::try_from(u64_at(image, 32)).ok().and_then(|at| image.get(at..)).unwrap_or_default();
    let count = usize::from(u16_at(image, 56));
    let mut segments = table.chunks_exact(PROGRAM_HEADER_BYTES).take(count).map(|s| u32_at(s, 0));
    table.len() >= count * PROGRAM_HEADER_BYTES && segments.all(|kind| kind != SEGMENT_INTERPRETER)
}

/// The contents of the section called `name`, of a 64-bit little-endian file. `None` where the file
/// has none, or is no such file, or is damaged.
pub fn section<'a>(image: &'a [u8], name: &str) -> Option<&'a [u8]> {
    if image.len() < FILE_HEADER_BYTES
        || image[..4] != MAGIC
        || image[4] != CLASS_64
        || image[5] != LITTLE_ENDIAN
    {
        return None;
    }
    let table = image.get(usize::try_from(u64_at(image, 40)).ok()?..)?;
    if usize::from(u16_at(image, 58)) != SECTION_HEADER_BYTES {
        return None;
    }
    let headers = || table.chunks_exact(SECTION_HEADER_BYTES).take(usize::from(u16_at(image, 60)));
    let contents = |header: &[u8]| {
        let at = usize::try_from(u64_at(header, 24)).ok()?;
        image.get(at..at.checked_add(usize::try_from(u64_at(header, 32)).ok()?)?)
    };
    let names = contents(headers().nth(usize::from(u16_at(image, 62)))?)?;
    let found = headers().find(|header| {
        let tail = names.get(u32_at(header, 0) as usize..).unwrap_or_default();
        tail.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    });
    contents(found?)
}

/// Reads from byte `at` until `buffer` is full or the file ends; returns the number of bytes read.
fn read_up_to<F: Read + Seek>(image: &mut F, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
    image.seek(SeekFrom::Start(at))?;
    let mut got = 0;
    while got < buffer.len() {
        match image.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

// Out of range these are 0: the callers check lengths, and a damaged file must not panic.

/// The little-endian number at byte `at`.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

/// The little-endian number at byte `at`.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// The little-endian number at byte `at`.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}
