//! The store's key, and digests under it: of a page in one store nothing is learned from another store's.

use crate::Page;

/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 32;
/// A digest.
pub type Digest = [u8; DIGEST_BYTES];

/// The key of a store.
#[derive(Clone)]
pub struct Key {
    bytes: [u8; 32],
    /// Digests of pages have so many bits only, so that different pages have the same.
    #[cfg(test)]
    pub(crate) page_bits: u32,
}

impl Key {
    /// The one with these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self {
            bytes,
            #[cfg(test)]
            page_bits: 256,
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// The digest of anything.
    pub fn digest(&self, bytes: &[u8]) -> Digest {
        *blake3::keyed_hash(&self.bytes, bytes).as_bytes()
    }

    /// The digest of a page.
    pub fn page_digest(&self, page: &Page) -> Digest {
        let digest = self.digest(page);
        #[cfg(test)]
        if self.page_bits < 8 {
            let mut weak = [0; DIGEST_BYTES];
            weak[0] = digest[0] & ((1 << self.page_bits) - 1);
            return weak;
        }
        digest
    }
}
