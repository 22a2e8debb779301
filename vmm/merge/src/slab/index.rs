//! The index: where the page of a hash is.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use memory::{PageNo, SlabPage};

/// Pages published at a time: long enough for long runs, short enough that guests do not wait long
/// for the first.
pub const DRAFT_PAGES: usize = 2048;
/// Guests in one domain: what [`Place`] has bits for.
pub const MAX_GUESTS: u32 = 1 << 16;
/// Pages in one guest, likewise: 64 TiB.
pub const MAX_PAGES: u64 = 1 << 34;
/// Slabs ever made in one domain, likewise.
pub const MAX_SLABS: u32 = 1 << 31;

/// A page's hash, keyed for the domain: the same contents in another one have another.
pub type PageHash = u64;

/// A guest of the domain, by a number that is its own while it is there. After
/// [`Matchmaker::remove`](super::matchmaker::Matchmaker::remove) nothing of it is left under the
/// number, which the next guest may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestId(pub u16);

/// A page of a guest, counted through its RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestPage {
    /// Whose.
    pub guest: GuestId,
    /// Which.
    pub page: PageNo,
}

/// Parts of the index: one grows at a time, so that no offer waits while all of it is moved.
const SHARDS: usize = 64;

/// Where the page of a hash is. In 8 bytes, for there is one for each page that was ever offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// One guest has it, and no other has offered it.
    Owner(GuestPage),
    /// It is page number `.1` of a slab that is still to come.
    Drafted(u32, u16),
    /// It is in a slab.
    Slab(u32, SlabPage),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed(u64);

const _: () = assert!(size_of::<(PageHash, Packed)>() == 16 && DRAFT_PAGES <= 1 << 16);

impl Place {
    fn pack(self) -> Packed {
        Packed(match self {
            Self::Owner(GuestPage { guest, page }) => u64::from(guest.0) << 34 | page.0,
            Self::Drafted(slab, page) => 1 << 62 | u64::from(slab) << 31 | u64::from(page),
            Self::Slab(slab, page) => 2 << 62 | u64::from(slab) << 31 | u64::from(page.0),
        })
    }
}

impl Packed {
    fn unpack(self) -> Place {
        let (slab, page) = ((self.0 >> 31 & 0x7fff_ffff) as u32, (self.0 & 0x7fff_ffff) as u32);
        match self.0 >> 62 {
            0 => Place::Owner(GuestPage {
                guest: GuestId((self.0 >> 34) as u16),
                page: PageNo(self.0 & (MAX_PAGES - 1)),
            }),
            1 => Place::Drafted(slab, page as u16),
            _ => Place::Slab(slab, SlabPage(page)),
        }
    }
}

/// The hashes are keyed and as good as random already.
/// Takes a key that is a hash as its own hash.
#[derive(Default)]
struct Uniform(u64);

impl Hasher for Uniform {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }
}

type Shard = HashMap<PageHash, Packed, BuildHasherDefault<Uniform>>;

/// The index.
///
/// *Memory:* 17 bytes a bucket of hash tables that are between 7/16 and 7/8 full: 20 to 39 bytes
/// for each hash.
pub struct Index {
    shards: Box<[Shard]>,
}

impl Default for Index {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Shard::default()).collect() }
    }
}

impl Index {
    /// How many hashes there are.
    pub fn len(&self) -> usize {
        self.shards.iter().map(HashMap::len).sum()
    }

    /// Where the page of this hash is.
    pub fn get(&self, hash: PageHash) -> Option<Place> {
        self.shards[shard(hash)].get(&hash).map(|packed| packed.unpack())
    }

    /// It is here now.
    pub fn put(&mut self, hash: PageHash, place: Place) {
        self.shards[shard(hash)].insert(hash, place.pack());
    }

    /// It is nowhere.
    pub fn remove(&mut self, hash: PageHash) {
        self.shards[shard(hash)].remove(&hash);
    }
}

/// By bits that the tables use last.
fn shard(hash: PageHash) -> usize {
    (hash >> 48) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_packed_without_loss() {
        for place in [
            Place::Owner(GuestPage { guest: GuestId(u16::MAX), page: PageNo(MAX_PAGES - 1) }),
            Place::Owner(GuestPage { guest: GuestId(0), page: PageNo(0) }),
            Place::Drafted(super::super::matchmaker::MAX_SLABS - 1, (DRAFT_PAGES - 1) as u16),
            Place::Slab(super::super::matchmaker::MAX_SLABS - 1, SlabPage((DRAFT_PAGES - 1) as u32)),
            Place::Slab(0, SlabPage(0)),
        ] {
            assert_eq!(place.pack().unpack(), place);
        }
    }
}
