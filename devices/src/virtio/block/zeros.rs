//! Zeros in files, as holes or written.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Bytes of zeros that are written at once, where the file system cannot make them.
const ZEROS: usize = 64 << 10;

/// Makes a hole, which reads as zeros.
pub(super) fn punch(file: &File, at: u64, bytes: u64) -> Result<(), Errno> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, bytes)
}

pub(super) fn zero_range(file: &File, at: u64, bytes: u64) -> Result<(), Errno> {
    fallocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, at, bytes)
}

pub(super) fn write_zeros(mut file: &File, at: u64, bytes: u64) -> io::Result<()> {
    static NONE: [u8; ZEROS] = [0; ZEROS];
    file.seek(SeekFrom::Start(at))?;
    let mut left = bytes;
    while left > 0 {
        let here = left.min(ZEROS as u64);
        file.write_all(&NONE[..here as usize])?;
        left -= here;
    }
    Ok(())
}
