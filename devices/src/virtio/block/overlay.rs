//! A copy-on-write disk: what was written lies in a file of its own, and everything else is read from a base, which is never written.
//!
//! The file has a header, a map with one bit for each block, and the blocks at their places behind that, so it is sparse:
//!
//! | at | |
//! |---|---|
//! | 0 | [`MAGIC`], version, bytes of a block, bytes of the base, its time of change (seconds, nanoseconds); little-endian |
//! | 4096 | the map: block *n* is here if bit *n* % 8 of byte *n* / 8 is 1, and in the base otherwise |
//! | from the next multiple of 4096 | block 0, block 1, ... |
//!
//! A block is whole before its bit is set in the file, which happens when the driver flushes. So a host that dies in between leaves the
//! disk as it was at some instant after the last flush, for each block. A temporary overlay ends with its VM: it has no header, its map is in
//! memory only, and a flush has nothing to do.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::zeros::{punch, write_zeros};

/// What the file of an overlay begins with.
pub const MAGIC: [u8; 16] = *b"Samepage overlay";
const VERSION: u64 = 1;
/// Bytes of a block: what file systems write at once.
const BLOCK_BYTES: u64 = 4096;
const HEADER_BYTES: usize = 4096;
/// Fields of the header behind the magic number.
const FIELDS: usize = 5;

/// A copy-on-write disk.
#[derive(Debug)]
pub struct Overlay {
    base: File,
    top: File,
    /// Bytes of the disk.
    bytes: u64,
    position: u64,
    /// Which blocks are in `top`.
    map: Vec<u8>,
    /// Parts of the map, of [`BLOCK_BYTES`], that are not in the file as they are here; None if they need not be.
    changed: Option<Vec<bool>>,
}

/// Why a file is no overlay of a base.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("it cannot be read or written")]
    File(#[from] io::Error),
    #[error("it is not an overlay of this kind: expected a file that was made as one, or none")]
    Form,
    #[error(
        "its base has {found} bytes, and had {expected} when it was made: expected the same base, unchanged"
    )]
    Length { found: u64, expected: u64 },
    #[error("its map has {found} bytes: expected {expected}")]
    Map { found: u64, expected: u64 },
    #[error("its base was written since it was made: expected the same base, unchanged")]
    Changed,
}

impl Overlay {
    /// One that ends with its VM, in `top`, which is empty and has no name.
    pub fn temporary(base: File, bytes: u64, top: File) -> io::Result<Self> {
        top.set_len(bytes.next_multiple_of(BLOCK_BYTES))?;
        Ok(Self { base, top, bytes, position: 0, map: map(bytes), changed: None })
    }

    /// One that is kept in `top`: made there if that is empty.
    pub fn kept(base: File, bytes: u64, top: File) -> Result<Self, OverlayError> {
        let mut map = map(bytes);
        let header = header(&base, bytes)?;
        if top.metadata()?.len() == 0 {
            top.set_len(data_start(bytes) + bytes.next_multiple_of(BLOCK_BYTES))?;
            let mut text = [0; HEADER_BYTES];
            text[..MAGIC.len()].copy_from_slice(&MAGIC);
            for (to, field) in text[MAGIC.len()..].chunks_exact_mut(8).zip(header) {
                to.copy_from_slice(&field.to_le_bytes());
            }
            top.write_all_at(&text, 0)?;
        } else {
            let mut text = [0; MAGIC.len() + 8 * FIELDS];
            top.read_exact_at(&mut text, 0).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => OverlayError::Form,
                _ => OverlayError::File(error),
            })?;
            let (magic, fields) = text.split_at(MAGIC.len());
            let mut found = [0; FIELDS];
            for (to, field) in found.iter_mut().zip(fields.chunks_exact(8)) {
                *to = field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            }
            if magic != MAGIC || found[..2] != header[..2] {
                return Err(OverlayError::Form);
            }
            if found[2] != bytes {
                return Err(OverlayError::Length { found: bytes, expected: found[2] });
            }
            if found != header {
                return Err(OverlayError::Changed);
            }
            top.read_exact_at(&mut map, HEADER_BYTES as u64)?;
        }
        let parts = map.len().div_ceil(BLOCK_BYTES as usize);
        Ok(Self { base, top, bytes, position: 0, map, changed: Some(vec![false; parts]) })
    }

    /// One that ends with its VM, and begins with what another one had: `map` says which blocks of `top` that is.
    pub fn resumed(base: File, bytes: u64, top: File, map: Vec<u8>) -> Result<Self, OverlayError> {
        let (found, expected) = (map.len() as u64, map_bytes(bytes));
        if found != expected {
            return Err(OverlayError::Map { found, expected });
        }
        top.set_len(bytes.next_multiple_of(BLOCK_BYTES))?;
        Ok(Self { base, top, bytes, position: 0, map, changed: None })
    }

    pub(super) fn base(&self) -> &File {
        &self.base
    }

    /// The file with what was written, and where in it the disk begins.
    pub(super) fn top(&self) -> (&File, u64) {
        (&self.top, self.place(0))
    }

    /// Which blocks were written: bit *n* % 8 of byte *n* / 8 is that of block *n*.
    pub(super) fn map(&self) -> &[u8] {
        &self.map
    }

    pub(super) fn seek(&mut self, at: u64) {
        self.position = at;
    }

    /// As [`super::Medium::sync`]. The blocks are safe before the map says that they are here.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.changed.is_none() {
            return Ok(());
        }
        self.top.sync_data()?;
        if self.store_map()? {
            self.top.sync_data()?;
        }
        Ok(())
    }

    /// Writes what has changed of the map; whether there was something.
    fn store_map(&mut self) -> io::Result<bool> {
        let mut any = false;
        let parts = self.map.chunks(BLOCK_BYTES as usize).zip(self.changed.iter_mut().flatten());
        for ((part, changed), at) in parts.zip((HEADER_BYTES as u64..).step_by(BLOCK_BYTES as usize)) {
            if *changed {
                self.top.write_all_at(part, at)?;
                (*changed, any) = (false, true);
            }
        }
        Ok(any)
    }

    pub(super) fn discard(&mut self, at: u64, bytes: u64) -> io::Result<()> {
        // What lies in the base is not ours to give back; what is here and partly discarded stays.
        let first = at.div_ceil(BLOCK_BYTES);
        let end = (at + bytes) / BLOCK_BYTES;
        let mut block = first;
        while block < end {
            let run = self.run(block, end);
            if self.has(block) {
                // A hint: a file system that cannot is none the worse.
                let _ = punch(&self.top, self.place(block * BLOCK_BYTES), run * BLOCK_BYTES);
            }
            block += run;
        }
        Ok(())
    }

    pub(super) fn zero(&mut self, at: u64, bytes: u64) -> io::Result<()> {
        let (mut at, end) = (at, at + bytes);
        while at < end {
            let block = at / BLOCK_BYTES;
            if at.is_multiple_of(BLOCK_BYTES) && end - at >= BLOCK_BYTES {
                let blocks = (end - at) / BLOCK_BYTES;
                let length = blocks * BLOCK_BYTES;
                if punch(&self.top, self.place(at), length).is_err() {
                    write_zeros(&self.top, self.place(at), length)?;
                }
                (block..block + blocks).for_each(|block| self.set(block));
                at += length;
            } else {
                let length = ((block + 1) * BLOCK_BYTES).min(end) - at;
                self.take_in(block)?;
                write_zeros(&self.top, self.place(at), length)?;
                at += length;
            }
        }
        Ok(())
    }

    /// Where in `top` byte `at` of the disk is.
    fn place(&self, at: u64) -> u64 {
        if self.changed.is_some() { data_start(self.bytes) + at } else { at }
    }

    fn has(&self, block: u64) -> bool {
        self.map.get((block / 8) as usize).is_some_and(|byte| byte >> (block % 8) & 1 != 0)
    }

    fn set(&mut self, block: u64) {
        let at = (block / 8) as usize;
        if let Some(byte) = self.map.get_mut(at) {
            *byte |= 1 << (block % 8);
        }
        let changed = self.changed.as_mut();
        if let Some(part) = changed.and_then(|parts| parts.get_mut(at / BLOCK_BYTES as usize)) {
            *part = true;
        }
    }

    /// How many blocks from `block` on, and before `end`, are where that one is: at least 1.
    fn run(&self, block: u64, end: u64) -> u64 {
        let here = self.has(block);
        (block + 1..end).take_while(|next| self.has(*next) == here).count() as u64 + 1
    }

    /// Copies a block from the base, if it is not here.
    fn take_in(&mut self, block: u64) -> io::Result<()> {
        if self.has(block) {
            return Ok(());
        }
        let at = block * BLOCK_BYTES;
        let mut content = [0; BLOCK_BYTES as usize];
        let content = &mut content[..BLOCK_BYTES.min(self.bytes - at) as usize];
        (&self.base).seek(SeekFrom::Start(at))?;
        (&self.base).read_exact(content)?;
        (&self.top).seek(SeekFrom::Start(self.place(at)))?;
        (&self.top).write_all(content)?;
        self.set(block);
        Ok(())
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // The disk of a guest that did not flush is as far as the files of others would be: in the host's cache.
        if let Err(error) = self.store_map() {
            tracing::warn!("what was written to an overlay since the last flush is lost: {error}");
        }
    }
}

impl ReadVolatile for Overlay {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let at = self.position;
        let bytes = (buf.len() as u64).min(self.bytes.saturating_sub(at));
        if bytes == 0 {
            return Ok(0);
        }
        let (block, end) = (at / BLOCK_BYTES, (at + bytes).div_ceil(BLOCK_BYTES));
        let here = ((block + self.run(block, end)) * BLOCK_BYTES - at).min(bytes);
        let (mut file, from) = match self.has(block) {
            true => (&self.top, self.place(at)),
            false => (&self.base, at),
        };
        file.seek(SeekFrom::Start(from)).map_err(VolatileMemoryError::IOError)?;
        let read = file.read_volatile(&mut buf.subslice(0, here as usize)?)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl WriteVolatile for Overlay {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let at = self.position;
        let bytes = (buf.len() as u64).min(self.bytes.saturating_sub(at));
        let (block, whole) = (at / BLOCK_BYTES, bytes / BLOCK_BYTES);
        let is_whole = at.is_multiple_of(BLOCK_BYTES) && whole > 0;
        let bytes = match is_whole {
            true => whole * BLOCK_BYTES,
            false => {
                self.take_in(block).map_err(VolatileMemoryError::IOError)?;
                ((block + 1) * BLOCK_BYTES - at).min(bytes)
            }
        };
        let mut top = &self.top;
        top.seek(SeekFrom::Start(self.place(at))).map_err(VolatileMemoryError::IOError)?;
        let written = top.write_volatile(&buf.subslice(0, bytes as usize)?)?;
        if is_whole {
            let blocks = written as u64 / BLOCK_BYTES;
            (block..block + blocks).for_each(|block| self.set(block));
            if blocks < whole && !(written as u64).is_multiple_of(BLOCK_BYTES) {
                // Part of a block: as if it had not been written, and the next attempt begins with it.
                self.position += blocks * BLOCK_BYTES;
                return match blocks {
                    0 => Err(VolatileMemoryError::IOError(io::ErrorKind::WriteZero.into())),
                    _ => Ok((blocks * BLOCK_BYTES) as usize),
                };
            }
        }
        self.position += written as u64;
        Ok(written)
    }
}

/// A map for a disk of `bytes` bytes, without a block.
fn map(bytes: u64) -> Vec<u8> {
    vec![0; map_bytes(bytes) as usize]
}

/// Where the blocks begin in the file.
fn data_start(bytes: u64) -> u64 {
    HEADER_BYTES as u64 + map_bytes(bytes).next_multiple_of(BLOCK_BYTES)
}

fn map_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES).div_ceil(8)
}

/// The fields of the header of an overlay over `base`.
fn header(base: &File, bytes: u64) -> io::Result<[u64; FIELDS]> {
    let meta = base.metadata()?;
    Ok([VERSION, BLOCK_BYTES, bytes, meta.mtime() as u64, meta.mtime_nsec() as u64])
}

#[cfg(test)]
mod tests;
