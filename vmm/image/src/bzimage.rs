//! The setup header of a bzImage: where its compressed payload lies and which kernel it is.
//!
//! Source: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header". Loading one is
//! not done here but in the boot loader.

use super::elf::{u16_at, u32_at};

/// The oldest protocol that gives the payload's place (Linux 2.6.26).
const PAYLOAD_VERSION: u16 = 0x208;
const XLOADFLAGS_VERSION: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
const HEADER_END: usize = 0x268;
/// A header that says 0 sectors means this many.
const DEFAULT_SETUP_SECTORS: u64 = 4;
const SECTOR_BYTES: u64 = 512;

/// Errors in a setup header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderProblem {
    /// Too old to be unpacked or to be started in 64-bit mode.
    #[error("is a bzImage of boot protocol {}.{:02}; expected 2.08 or later", .0 >> 8, .0 & 0xff)]
    Version(u16),
    /// It has no 64-bit entry point.
    #[error("is a 32-bit bzImage; expected a 64-bit x86-64 kernel")]
    Bits32,
    /// The file ends before the kernel does.
    #[error(
        "is a bzImage cut short: it should have {expected} bytes and has {len}; copy or download it again"
    )]
    Truncated {
        /// What the header says, in bytes.
        expected: u64,
        /// Length of the file in bytes.
        len: u64,
    },
}

/// A bzImage's setup header, checked against the length of the file.
#[derive(Clone, Debug)]
pub struct BzImage<'a> {
    /// The compressed kernel; empty where the header names none.
    pub payload: &'a [u8],
    /// The version string, such as `6.12.9-amd64 (build@host) #1 SMP ...`.
    pub version: Option<&'a str>,
}

/// Whether `bytes` begin as a bzImage does.
pub fn is_bzimage(bytes: &[u8]) -> bool {
    u16_at(bytes, 0x1fe) == 0xaa55 && bytes.get(0x202..0x206) == Some(b"HdrS")
}

/// Reads the setup header of `bytes`, for which [`is_bzimage`] holds.
pub fn parse(bytes: &[u8]) -> Result<BzImage<'_>, HeaderProblem> {
    let len = bytes.len() as u64;
    let truncated = |expected| HeaderProblem::Truncated { expected, len };
    if bytes.len() < HEADER_END {
        return Err(truncated(HEADER_END as u64));
    }
    let version = u16_at(bytes, 0x206);
    if version < PAYLOAD_VERSION {
        return Err(HeaderProblem::Version(version));
    }
    if version >= XLOADFLAGS_VERSION && u16_at(bytes, 0x236) & XLF_KERNEL_64 == 0 {
        return Err(HeaderProblem::Bits32);
    }
    let sectors = match bytes[0x1f1] {
        0 => DEFAULT_SETUP_SECTORS,
        n => u64::from(n),
    };
    let setup_bytes = (sectors + 1) * SECTOR_BYTES;
    let end = setup_bytes + u64::from(u32_at(bytes, 0x1f4)) * 16;
    let payload_at = setup_bytes + u64::from(u32_at(bytes, 0x248));
    let payload_end = payload_at + u64::from(u32_at(bytes, 0x24c));
    if payload_end > len || end > len {
        return Err(truncated(payload_end.max(end)));
    }
    // Both are at most `len`, so they fit.
    let payload = &bytes[payload_at as usize..payload_end as usize];
    Ok(BzImage { payload, version: version_string(bytes) })
}

fn version_string(bytes: &[u8]) -> Option<&str> {
    let at = usize::from(u16_at(bytes, 0x20e));
    let tail = bytes.get(at.checked_add(0x200)?..)?;
    let tail = &tail[..tail.len().min(256)];
    let text = std::str::from_utf8(&tail[..tail.iter().position(|&b| b == 0)?]).ok()?;
    (at != 0 && !text.is_empty()).then_some(text)
}
