//! Decompression: kernel payloads, kernel modules, the data of packages. All decoders are pure
//! Rust.
//!
//! Measured on a Debian 6.12 payload (57 MB unpacked), natively and under software emulation:
//! `zstd-rs` 211 and 76 MB/s, `ruzstd` 149 and 41, both 3 s to compile; `structured-zstd` 294 and
//! 154, but minutes to compile.

use std::io::{self, BufRead, Cursor, Read};

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use zstd_rs::Decompressor;

use super::elf;

/// The most that xz may take for its dictionary: `xz -9` needs a quarter of it.
const WINDOW_BYTES: u64 = 256 << 20;
/// Every block of the legacy lz4 format but the last holds this much.
const LZ4_BLOCK_BYTES: usize = 8 << 20;
const LZ4_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();

/// How something is compressed, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip, RFC 1952.
    Gzip,
    /// lz4 in its legacy frame format, which is what kernel builds use.
    Lz4,
    /// xz, with any of its branch filters.
    Xz,
    /// Zstandard, RFC 8878.
    Zstd,
    /// Recognised, but not supported: bzip2, lzma, lzo.
    Other(&'static str),
}

/// Why something could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The decoder found damage.
    #[error("the {0:?} data is damaged")]
    Damaged(Compression, #[source] io::Error),
    /// It unpacks to another size than it declares.
    #[error("the {compression:?} data unpacks to {got} bytes; expected {expected}")]
    Size {
        /// How it is compressed.
        compression: Compression,
        /// Bytes unpacked; one more than expected where there was more.
        got: usize,
        /// The size that it declares, in bytes.
        expected: usize,
    },
    /// It unpacks to more than is allowed.
    #[error("it unpacks to {0} bytes or more; at most {1} are accepted")]
    TooLarge(u64, u64),
    /// A format that is not supported.
    #[error("it is compressed with {0}, which is not supported; expected gzip, lz4, xz or zstd")]
    Unsupported(&'static str),
}

impl Compression {
    /// Recognises `bytes` by their magic number.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        Some(match bytes {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ if bytes.starts_with(&LZ4_MAGIC) => Self::Lz4,
            [b'B', b'Z', b'h', ..] => Self::Other("bzip2"),
            [0x5d, 0, 0, ..] => Self::Other("lzma"),
            [0x89, b'L', b'Z', b'O', ..] => Self::Other("lzo"),
            _ => return None,
        })
    }

    /// A reader of what `source` holds unpacked; it ends with the first stream or member.
    /// Of zstd, which is unpacked in memory, at most `cap` bytes are accepted.
    pub fn reader<'a, R: BufRead + 'a>(
        self,
        mut source: R,
        cap: u64,
    ) -> Result<Box<dyn Read + 'a>, UnpackError> {
        Ok(match self {
            Self::Gzip => Box::new(GzDecoder::new(source)),
            Self::Xz => Box::new(XzReader::new_mem_limit(source, false, (WINDOW_BYTES >> 10) as u32)),
            Self::Zstd => {
                let mut packed = Vec::new();
                // A file larger than the cap even when packed is cut, and then fails.
                source
                    .by_ref()
                    .take(cap)
                    .read_to_end(&mut packed)
                    .map_err(|e| UnpackError::Damaged(self, e))?;
                let unpacked = unzstd(&packed, usize::try_from(cap).unwrap_or(usize::MAX));
                Box::new(Cursor::new(unpacked.map_err(|e| UnpackError::Damaged(self, e))?))
            }
            Self::Lz4 => return Err(UnpackError::Unsupported("lz4")),
            Self::Other(name) => return Err(UnpackError::Unsupported(name)),
        })
    }
}

/// Unpacks all of `bytes`, which must come to at most `cap` bytes. What is not compressed is
/// copied.
pub fn unpack(bytes: &[u8], cap: u64) -> Result<Vec<u8>, UnpackError> {
    let mut out = Vec::new();
    let Some(compression) = Compression::of(bytes) else {
        return Ok(bytes.to_vec());
    };
    let reader = compression.reader(bytes, cap)?;
    reader.take(cap + 1).read_to_end(&mut out).map_err(|e| UnpackError::Damaged(compression, e))?;
    if out.len() as u64 > cap {
        return Err(UnpackError::TooLarge(cap + 1, cap));
    }
    Ok(out)
}

/// Unpacks the payload of a bzImage, whose last four bytes are its unpacked size in every format
/// (gzip has them of its own, for the others the kernel's build appends them). `cap` bounds that
/// size. `None` where the guest must unpack it, because the format is not supported here.
pub fn unpack_payload(payload: &[u8], cap: u64) -> Result<Option<Vec<u8>>, UnpackError> {
    let Some(compression) = Compression::of(payload) else {
        return Ok(payload.starts_with(&elf::MAGIC).then(|| payload.to_vec()));
    };
    let Some((data, size)) = payload.split_last_chunk::<4>() else {
        return Err(UnpackError::Size { compression, got: 0, expected: 0 });
    };
    let expected = u32::from_le_bytes(*size) as usize;
    if expected as u64 > cap {
        return Err(UnpackError::TooLarge(expected as u64, cap));
    }
    let mut out = if compression == Compression::Zstd { Vec::new() } else { vec![0; expected] };
    let got = match compression {
        Compression::Gzip | Compression::Xz => {
            let source = if compression == Compression::Gzip { payload } else { data };
            fill(&mut *compression.reader(source, cap)?, &mut out)
        }
        Compression::Zstd => unzstd(data, expected).map(|unpacked| {
            out = unpacked;
            out.len()
        }),
        Compression::Lz4 => fill_lz4(data, &mut out),
        Compression::Other(_) => return Ok(None),
    };
    let got = got.map_err(|e| UnpackError::Damaged(compression, e))?;
    if got != expected {
        return Err(UnpackError::Size { compression, got, expected });
    }
    Ok(Some(out))
}

/// Unpacks all frames in `data`, which must come to at most `cap` bytes.
fn unzstd(data: &[u8], cap: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    Decompressor::new().decompress(data, None, cap, &mut out).map_err(io::Error::other)?;
    Ok(out)
}

/// Fills `out` and returns how much there was, counting one byte more where there was more.
fn fill(reader: &mut dyn Read, out: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < out.len() {
        match reader.read(&mut out[got..])? {
            0 => return Ok(got),
            n => got += n,
        }
    }
    Ok(got + reader.read(&mut [0])?)
}

/// Unpacks lz4's legacy format: the magic number, then blocks with their compressed length before
/// them.
fn fill_lz4(mut data: &[u8], out: &mut [u8]) -> io::Result<usize> {
    let cut_short = || io::Error::new(io::ErrorKind::UnexpectedEof, "an lz4 block is cut short");
    let mut got = 0;
    while let Some((length, rest)) = data.split_first_chunk::<4>() {
        data = rest;
        // Files that were put together from several have the magic number between blocks as well.
        if *length == LZ4_MAGIC {
            continue;
        }
        let length = u32::from_le_bytes(*length) as usize;
        let (block, rest) = data.split_at_checked(length).ok_or_else(cut_short)?;
        data = rest;
        let room = &mut out[got..];
        let room_bytes = room.len().min(LZ4_BLOCK_BYTES);
        got += lz4_flex::block::decompress_into(block, &mut room[..room_bytes]).map_err(io::Error::other)?;
    }
    if data.is_empty() { Ok(got) } else { Err(cut_short()) }
}
