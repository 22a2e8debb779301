//! Recognises a kernel file and unpacks it: an ELF `vmlinux`, a `bzImage`, a distribution's
//! `vmlinuz`.
//!
//! Unpacking on the host spares the guest its own, slower decompressor. Loading the kernel into
//! guest memory is not done here.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use super::bzimage::{self, HeaderProblem};
use super::elf::{self, ElfProblem};
use super::unpack::{self, UnpackError};
use os::named_file;

/// The most bytes that a kernel may unpack to. A distribution's has about 60 MB.
pub const UNPACKED_CAP_BYTES: u64 = 512 << 20;
/// The most bytes of a compressed kernel that are read into memory.
const PACKED_CAP_BYTES: u64 = 512 << 20;

/// Where a compressed kernel is decompressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unpack {
    /// This program, before the guest starts: faster, and always to the same addresses
    #[default]
    Host,
    /// The kernel's own decompressor, in the guest: with address randomization (KASLR), unless the
    /// command line says nokaslr
    Guest,
}

impl Unpack {
    /// As on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Guest => "guest",
        }
    }
}

/// A kernel, ready to be loaded.
#[derive(Debug)]
pub enum Kernel {
    /// A checked ELF file: 64-bit, x86-64, executable, with every segment inside.
    Elf(KernelImage),
    /// A whole bzImage that the guest unpacks itself: because that was asked for, or because its
    /// format is not supported here (bzip2, lzma, lzo).
    BzImage(Vec<u8>),
}

/// The bytes of an ELF kernel, either still in their file (then a loader can read them straight
/// into guest memory, without a copy of them in this process) or unpacked in memory.
#[derive(Debug)]
pub struct KernelImage {
    source: Source,
    len: u64,
}

#[derive(Debug)]
enum Source {
    File(File),
    Memory(Cursor<Vec<u8>>),
}

/// An error in the kernel at `path`.
#[derive(Debug)]
pub struct KernelError {
    pub path: PathBuf,
    pub problem: KernelProblem,
}

/// Why a file cannot be used as a kernel. The texts continue "the kernel FILE ...".
#[derive(Debug, thiserror::Error)]
pub enum KernelProblem {
    /// It could not be opened or read.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// It is a directory.
    #[error("is a directory; expected a vmlinux, bzImage or vmlinuz file")]
    Directory,
    /// It is a device, pipe or socket.
    #[error("is not a regular file; expected a vmlinux, bzImage or vmlinuz file")]
    NotAFile,
    /// It has no bytes.
    #[error("is empty; expected a vmlinux, bzImage or vmlinuz file")]
    Empty,
    /// It is larger than any kernel.
    #[error("has {0} bytes; a kernel of at most {PACKED_CAP_BYTES} is accepted")]
    TooLarge(u64),
    /// Not a kernel.
    #[error("is not a kernel ({0}); expected an x86-64 vmlinux, bzImage or vmlinuz")]
    NotAKernel(Looks),
    /// An ELF file, but not one that can be started.
    #[error(transparent)]
    Elf(#[from] ElfProblem),
    /// A bzImage, but not one that can be started.
    #[error(transparent)]
    Header(#[from] HeaderProblem),
    /// It is unpacked already, and the guest was to unpack it.
    #[error(
        "is an unpacked vmlinux, which has no decompressor: to have the guest unpack its kernel, give the vmlinuz or bzImage that it came from"
    )]
    NoDecompressor,
    /// Its payload could not be unpacked.
    #[error("is a bzImage whose payload cannot be unpacked")]
    Unpack(#[from] UnpackError),
    /// Its payload is in an unknown format.
    #[error(
        "is a bzImage with a payload of an unknown format (it begins with {0:02x?}); is the file damaged?"
    )]
    Payload([u8; 4]),
    /// Its payload was unpacked and is no kernel.
    #[error("is a bzImage that does not unpack to a kernel")]
    Unpacked(#[source] ElfProblem),
}

/// What a file that is no kernel looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Looks(&'static str);

impl std::fmt::Display for Looks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::fmt::Display for KernelError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the kernel {} {}", self.path.display(), self.problem)
    }
}

impl std::error::Error for KernelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.problem.source()
    }
}

/// Opens the kernel at `path` and, with [`Unpack::Host`], unpacks it.
///
/// # Errors
///
/// Everything that makes it impossible to start the file as a 64-bit x86 kernel.
pub fn open(path: &Path, unpack: Unpack) -> Result<Kernel, KernelError> {
    open_file(path, unpack).map_err(|problem| KernelError { path: path.into(), problem })
}

fn open_file(path: &Path, unpack: Unpack) -> Result<Kernel, KernelProblem> {
    let (mut file, meta) = named_file::any(path).map_err(KernelProblem::Read)?;
    match meta.file_type() {
        t if t.is_dir() => return Err(KernelProblem::Directory),
        t if !t.is_file() => return Err(KernelProblem::NotAFile),
        _ => {}
    }
    let len = meta.len();
    let mut magic = Vec::new();
    file.by_ref().take(4).read_to_end(&mut magic).map_err(KernelProblem::Read)?;
    if magic == elf::MAGIC {
        elf::check_kernel(&mut file, len)?;
        if unpack == Unpack::Guest {
            return Err(KernelProblem::NoDecompressor);
        }
        file.rewind().map_err(KernelProblem::Read)?;
        return Ok(Kernel::Elf(KernelImage { source: Source::File(file), len }));
    }
    if len > PACKED_CAP_BYTES {
        return Err(KernelProblem::TooLarge(len));
    }
    let mut bytes = magic;
    bytes.reserve(len as usize);
    // `take`: the file may grow meanwhile.
    file.take(PACKED_CAP_BYTES).read_to_end(&mut bytes).map_err(KernelProblem::Read)?;
    parse(bytes, unpack)
}

/// As [`open`], for a kernel that is in memory.
pub fn parse(bytes: Vec<u8>, unpack: Unpack) -> Result<Kernel, KernelProblem> {
    if bytes.is_empty() {
        return Err(KernelProblem::Empty);
    }
    if bytes.starts_with(&elf::MAGIC) {
        elf::check_kernel(&mut Cursor::new(&bytes), bytes.len() as u64)?;
        if unpack == Unpack::Guest {
            return Err(KernelProblem::NoDecompressor);
        }
        return Ok(Kernel::Elf(KernelImage::in_memory(bytes)));
    }
    if !bzimage::is_bzimage(&bytes) {
        return Err(KernelProblem::NotAKernel(looks_like(&bytes)));
    }
    let payload = bzimage::parse(&bytes)?.payload;
    if unpack == Unpack::Guest {
        return Ok(Kernel::BzImage(bytes));
    }
    match unpack::unpack_payload(payload, UNPACKED_CAP_BYTES)? {
        Some(mut elf) => {
            let used = elf::check_kernel(&mut Cursor::new(&elf), elf.len() as u64)
                .map_err(KernelProblem::Unpacked)?;
            // After the ELF file the payload has the relocations for KASLR, which only the
            // decompressor uses.
            elf.truncate(used as usize);
            Ok(Kernel::Elf(KernelImage::in_memory(elf)))
        }
        None if payload.is_empty() || unpack::Compression::of(payload).is_some() => {
            Ok(Kernel::BzImage(bytes))
        }
        None => {
            let mut first = [0; 4];
            first.iter_mut().zip(payload).for_each(|(to, from)| *to = *from);
            Err(KernelProblem::Payload(first))
        }
    }
}

fn looks_like(bytes: &[u8]) -> Looks {
    Looks(match bytes {
        [0x1f, 0x8b, ..] => "it looks like a gzip file: an initrd?",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it looks like a zstd file: an initrd?",
        [0xfd, b'7', b'z', ..] => "it looks like an xz file",
        [b'0', b'7', b'0', b'7', b'0', ..] => "it looks like a cpio archive: give it as --initrd",
        [b'!', b'<', b'a', b'r', ..] => {
            "it looks like a Debian package: `samepage image --deb` takes a kernel out of one"
        }
        [b'#', b'!', ..] => "it looks like a script",
        [b'Q', b'F', b'I', 0xfb, ..] => "it looks like a qcow2 disk",
        [b'M', b'Z', ..] if bytes.get(0x38..0x3c) == Some(b"ARM\x64") => "it looks like an AArch64 kernel",
        [b'M', b'Z', ..] => "it looks like an EFI program without a Linux setup header",
        _ if bytes.get(0x38..0x3c) == Some(b"ARM\x64") => "it looks like an AArch64 kernel",
        _ if bytes.iter().all(|&b| b == 0) => "it is all zeros",
        _ => "it has neither an ELF header nor a Linux setup header",
    })
}

impl KernelImage {
    fn in_memory(bytes: Vec<u8>) -> Self {
        Self { len: bytes.len() as u64, source: Source::Memory(Cursor::new(bytes)) }
    }

    /// The file, if the image is still in one.
    pub fn file(&self) -> Option<&File> {
        match &self.source {
            Source::File(file) => Some(file),
            Source::Memory(_) => None,
        }
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a checked ELF file is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// All bytes, read from the file if they are not in memory yet.
    pub fn into_bytes(self) -> io::Result<Vec<u8>> {
        match self.source {
            Source::Memory(cursor) => Ok(cursor.into_inner()),
            Source::File(mut file) => {
                let mut bytes = Vec::with_capacity(usize::try_from(self.len).unwrap_or(0));
                file.rewind()?;
                file.read_to_end(&mut bytes)?;
                Ok(bytes)
            }
        }
    }
}

impl Read for KernelImage {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.source {
            Source::File(file) => file.read(buffer),
            Source::Memory(cursor) => cursor.read(buffer),
        }
    }
}

impl Seek for KernelImage {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match &mut self.source {
            Source::File(file) => file.seek(to),
            Source::Memory(cursor) => cursor.seek(to),
        }
    }
}

impl ReadVolatile for KernelImage {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        match &mut self.source {
            Source::File(file) => file.read_volatile(buffer),
            Source::Memory(cursor) => cursor.read_volatile(buffer),
        }
    }
}
