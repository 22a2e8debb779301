//! Frames: up to 64 pages of a pack, compressed together.

use lz4_flex::block;
use serde::{Deserialize, Serialize};
use zstd_rs::{CompressionConfig, Compressor, Decompressor};

use crate::PAGE;
use crate::error::Flaw;

/// Pages of a frame; the last of a pack may have fewer.
pub const FRAME_PAGES: usize = 64;
/// The most bytes of a frame, compressed or not: what would be longer is stored as it is.
pub const MAX_FRAME_BYTES: usize = FRAME_PAGES * PAGE;

/// How pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// lz4: fast.
    #[default]
    Lz4,
    /// Zstandard, level 3: smaller, and some times slower to write.
    Zstd,
}

/// How a frame is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Plain,
    Lz4,
    Zstd,
}

impl Method {
    pub fn code(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub fn of_code(code: u8) -> Option<Self> {
        [Self::Plain, Self::Lz4, Self::Zstd].into_iter().find(|method| method.code() == code)
    }
}

/// Compresses frames.
pub struct Packer {
    zstd: Option<Compressor>,
}

impl Packer {
    pub fn new(compression: Compression) -> Self {
        Self {
            zstd: match compression {
                Compression::Lz4 => None,
                // Its settings are possible; else frames are compressed by lz4.
                Compression::Zstd => Compressor::new(CompressionConfig::DEFAULT).ok(),
            },
        }
    }

    /// `pages` as they are to be stored.
    pub fn pack(&mut self, pages: &[u8]) -> (Method, Vec<u8>) {
        let (method, packed) = match &mut self.zstd {
            None => (Method::Lz4, block::compress(pages)),
            Some(zstd) => {
                let mut out = Vec::with_capacity(pages.len());
                match zstd.compress(pages, None, &mut out) {
                    Ok(()) => (Method::Zstd, out),
                    Err(_) => (Method::Plain, pages.to_vec()),
                }
            }
        };
        if packed.len() < pages.len() { (method, packed) } else { (Method::Plain, pages.to_vec()) }
    }
}

/// The pages of a frame, of which there are `pages`.
pub fn unpack(method: Method, packed: &[u8], pages: usize) -> Result<Vec<u8>, Flaw> {
    let bytes = pages.min(FRAME_PAGES) * PAGE;
    let mut out = Vec::new();
    let unpacked = match method {
        Method::Plain => {
            out.extend_from_slice(packed);
            true
        }
        Method::Lz4 => {
            out.resize(bytes, 0);
            block::decompress_into(packed, &mut out).is_ok_and(|n| n == bytes)
        }
        Method::Zstd => {
            out.reserve(bytes);
            Decompressor::new().decompress(packed, None, bytes, &mut out).is_ok()
        }
    };
    if unpacked && out.len() == bytes { Ok(out) } else { Err(Flaw::Decode("a frame of pages")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_packed_comes_back(
            parts in prop::collection::vec((any::<u8>(), 1usize..PAGE), 1..200), pages in 1usize..=FRAME_PAGES, zstd: bool,
        ) {
            let mut bytes: Vec<u8> = parts.iter().flat_map(|(byte, times)| std::iter::repeat_n(*byte, *times)).collect();
            bytes.resize(pages * PAGE, 7);
            let mut packer = Packer::new(if zstd { Compression::Zstd } else { Compression::Lz4 });
            let (method, packed) = packer.pack(&bytes);
            prop_assert!(packed.len() <= bytes.len());
            prop_assert_eq!(unpack(method, &packed, pages).unwrap(), bytes);
        }

        #[test]
        fn rubbish_is_refused_or_has_its_length(code in 0u8..3, packed in prop::collection::vec(any::<u8>(), 0..5000), pages in 1usize..=FRAME_PAGES) {
            if let Ok(bytes) = unpack(Method::of_code(code).unwrap(), &packed, pages) {
                prop_assert_eq!(bytes.len(), pages * PAGE);
            }
        }

        #[test]
        fn damaged_frames_are_refused_or_have_their_length(seed: u64, at in any::<prop::sample::Index>(), bit in 0u8..8, zstd: bool) {
            let mut random = splitmix::SplitMix64::new(seed);
            let words: Vec<u64> = (0..64).map(|_| random.draw() & 0xff).collect();
            let bytes: Vec<u8> = (0..16 * PAGE).map(|n| words[n / 7 % 64] as u8).collect();
            let (method, mut packed) = Packer::new(if zstd { Compression::Zstd } else { Compression::Lz4 }).pack(&bytes);
            let at = at.index(packed.len());
            packed[at] ^= 1 << bit;
            if let Ok(bytes) = unpack(method, &packed, 16) {
                prop_assert_eq!(bytes.len(), 16 * PAGE);
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_stored_as_it_is() {
        let mut random = splitmix::SplitMix64::new(1);
        let bytes: Vec<u8> = (0..2 * PAGE).map(|_| random.draw() as u8).collect();
        let (method, packed) = Packer::new(Compression::Zstd).pack(&bytes);
        assert_eq!((method, packed), (Method::Plain, bytes));
    }
}
