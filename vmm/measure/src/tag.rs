//! Tags of pages: a keyed universal hash, so that what the tags say is a theorem and not a hope.
//!
//! Two steps, both with a key that is drawn for each measurement. First NH with 32-bit words, three passes whose keys
//! overlap (Black, Halevi, Krawczyk, Krovetz, Rogaway: "UMAC: Fast and Secure Message Authentication", 1999, theorem on
//! the Toeplitz construction): two pages that differ come out the same with a probability of at most 2^-96. Then two
//! multilinear forms modulo the prime 2^61 - 1, which are pairwise independent; an index keeps [`KEPT_BITS`] bits of them.
//! So two different pages have the same tag with a probability of at most 2^-96 + 2^-87, whatever they hold, as long as who
//! writes them does not know the key: it never leaves this process, and a tag never does either.
//!
//! In 64 GiB of pages that all differ there are 2^47 pairs: the chance that any one of them is taken for equal is 2^-40.
//! A hash of the usual fast kind has no such bound, and one that is compared byte by byte has to read its first holder
//! again; blake3 has a bound that rests on an assumption, and takes ten times as long.
#![expect(
    unsafe_code,
    reason = "vector loads, prefetching, and calling what was compiled for AVX2 where there is AVX2"
)]

use std::arch::x86_64::{
    __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_add_epi32, _mm256_add_epi64, _mm256_loadu_si256,
    _mm256_mul_epu32, _mm256_setzero_si256, _mm256_srli_epi64, _mm256_storeu_si256,
};

use super::{MeasureError, PAGE};

/// Bits of a tag that an index tells contents apart by.
pub const KEPT_BITS: u32 = 87;

/// 64-bit words of a page, and of one block of it.
const WORDS: usize = PAGE / 8;
const BLOCK: usize = 4;
/// Passes of NH. The key of each begins a block later.
const PASSES: usize = 3;
const KEY_WORDS: usize = WORDS + (PASSES - 1) * BLOCK;
/// The prime of the second step.
const PRIME: u64 = (1 << 61) - 1;
/// Pieces of the sums that go into the second step, of [`PIECE_BITS`] each: fewer than two for each sum are fewer products.
const PIECES: usize = 4;
const PIECE_BITS: u32 = 48;
const _: () = assert!(PIECES as u32 * PIECE_BITS == PASSES as u32 * u64::BITS && PIECE_BITS < 61);

/// What stands for a page's content within one measurement: two numbers below 2^61 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(pub [u64; 2]);

/// The key of one measurement.
pub struct TagKey {
    nh: Box<[u64; KEY_WORDS]>,
    /// A constant and a factor for each piece, for each of the two forms.
    forms: [[u64; PIECES + 1]; 2],
    avx2: bool,
}

impl TagKey {
    /// A key that nobody knows.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn random() -> Result<Self, MeasureError> {
        let mut bytes = [0; (KEY_WORDS + 2 * (PIECES + 1)) * 8];
        getrandom::fill(&mut bytes).map_err(|source| MeasureError::Random { source: source.into() })?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut words = words.iter().map(|word| u64::from_ne_bytes(*word));
        let mut next = || words.next().unwrap_or_default();
        let mut nh = Box::new([0; KEY_WORDS]);
        nh.fill_with(&mut next);
        // Three bits less than a word has; that two of all values stand for 0 is far below what the bound is rounded by.
        let forms = std::array::from_fn(|_| std::array::from_fn(|_| (next() >> 3) % PRIME));
        Ok(Self { nh, forms, avx2: is_x86_feature_detected!("avx2") })
    }

    /// The tag of a page.
    #[inline]
    pub fn tag(&self, page: &[u8; PAGE]) -> Tag {
        let sums = if self.avx2 {
            // SAFETY: this processor has AVX2.
            unsafe { sums_avx2(page, &self.nh) }
        } else {
            sums(page, &self.nh)
        };
        let [a, b, c, d] = pieces(sums).map(u128::from);
        Tag(self.forms.map(|form| {
            let [constant, e, f, g, h] = form.map(u128::from);
            // Four terms below 2^109 each, and one below 2^61.
            modulo(a * e + b * f + c * g + d * h + constant)
        }))
    }
}

impl TagKey {
    /// `N` different numbers below `below`, which is at least `N`, drawn by the key.
    pub(super) fn places<const N: usize>(&self, below: usize) -> [usize; N] {
        let mut drawn: Vec<usize> = Vec::with_capacity(N);
        for word in self.nh.iter() {
            let number = (*word % below as u64) as usize;
            if drawn.len() < N && !drawn.contains(&number) {
                drawn.push(number);
            }
        }
        // The key has hundreds of words; should they all be alike, the first numbers do as well.
        std::array::from_fn(|n| drawn.get(n).copied().unwrap_or(n))
    }
}

/// The bits of the sums, each in one piece: sums that differ differ in a piece.
#[inline]
fn pieces([a, b, c]: [u64; PASSES]) -> [u64; PIECES] {
    const MASK: u64 = (1 << PIECE_BITS) - 1;
    [a & MASK, (a >> 48 | b << 16) & MASK, (b >> 32 | c << 32) & MASK, c >> 16]
}

/// The rest of a number below 2^120 by the prime.
#[inline]
fn modulo(number: u128) -> u64 {
    let folded = (number as u64 & PRIME) + (number >> 61) as u64;
    let folded = (folded & PRIME) + (folded >> 61);
    if folded >= PRIME { folded - PRIME } else { folded }
}

/// NH as it is defined: for machines without AVX2, and to check the other one by.
fn sums(page: &[u8; PAGE], key: &[u64; KEY_WORDS]) -> [u64; PASSES] {
    let (words, _) = page.as_chunks::<8>();
    std::array::from_fn(|pass| {
        let pairs = words.iter().map(|word| u64::from_le_bytes(*word)).zip(&key[pass * BLOCK..]);
        pairs.fold(0, |sum: u64, (word, key)| {
            let low = (word as u32).wrapping_add(*key as u32);
            let high = ((word >> 32) as u32).wrapping_add((key >> 32) as u32);
            sum.wrapping_add(u64::from(low) * u64::from(high))
        })
    })
}

/// Has the processor fetch what is at an address, if there is something.
#[inline]
#[allow(unused_unsafe, reason = "safe from some version of Rust on, and not before")]
pub(super) fn prefetch(at: *const u8) {
    // SAFETY: nothing is read; an address that is not there is not fetched.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

#[target_feature(enable = "avx2")]
fn sums_avx2(page: &[u8; PAGE], key: &[u64; KEY_WORDS]) -> [u64; PASSES] {
    let (blocks, _) = page.as_chunks::<{ BLOCK * 8 }>();
    let (keys, _) = key.as_chunks::<BLOCK>();
    let step = |sum: __m256i, block: __m256i, key: __m256i| {
        let added = _mm256_add_epi32(block, key);
        _mm256_add_epi64(sum, _mm256_mul_epu32(added, _mm256_srli_epi64::<32>(added)))
    };
    let mut sums = [_mm256_setzero_si256(); PASSES];
    // SAFETY: a block of the key has 32 bytes; the load needs no alignment.
    let load_key = |at: usize| unsafe { _mm256_loadu_si256(keys[at].as_ptr().cast()) };
    let (mut first, mut second) = (load_key(0), load_key(1));
    for (block, key) in blocks.iter().zip(&keys[PASSES - 1..]) {
        // The processor's own prefetching ends with the page; most often the next one is hashed next.
        prefetch(block.as_ptr().wrapping_add(PAGE));
        // SAFETY: a block of the page has 32 bytes; the load needs no alignment.
        let block = unsafe { _mm256_loadu_si256(block.as_ptr().cast()) };
        // SAFETY: as above.
        let third = unsafe { _mm256_loadu_si256(key.as_ptr().cast()) };
        sums[0] = step(sums[0], block, first);
        sums[1] = step(sums[1], block, second);
        sums[2] = step(sums[2], block, third);
        (first, second) = (second, third);
    }
    sums.map(|sum| {
        let mut lanes = [0u64; BLOCK];
        // SAFETY: the array has the 32 bytes that are written; the store needs no alignment.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
        lanes.iter().fold(0, |all: u64, lane| all.wrapping_add(*lane))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(seed: u64) -> [u8; PAGE] {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
    }

    proptest! {
        #[test]
        fn both_ways_to_add_agree(seed: u64) {
            let key = TagKey::random().unwrap();
            if key.avx2 {
                // SAFETY: this processor has AVX2.
                let fast = unsafe { sums_avx2(&page(seed), &key.nh) };
                prop_assert_eq!(fast, sums(&page(seed), &key.nh));
            }
        }

        #[test]
        fn every_bit_of_the_sums_is_in_a_piece(sums: [u64; PASSES]) {
            let pieces = pieces(sums);
            prop_assert!(pieces.iter().all(|piece| *piece < 1 << PIECE_BITS));
            // Back again.
            let [a, b, c, d] = pieces;
            prop_assert_eq!([a | b << 48, b >> 16 | c << 32, c >> 32 | d << 16], sums);
        }

        #[test]
        fn the_rest_is_the_rest(number in 0..1u128 << 120) {
            prop_assert_eq!(u128::from(modulo(number)), number % u128::from(PRIME));
        }
    }

    #[test]
    fn every_single_bit_counts_and_equal_pages_agree() {
        let key = TagKey::random().unwrap();
        let first = page(1);
        let mut tags: Vec<Tag> = (0..PAGE * 8)
            .map(|bit| {
                let mut other = first;
                other[bit / 8] ^= 1 << (bit % 8);
                key.tag(&other)
            })
            .collect();
        tags.push(key.tag(&first));
        assert_eq!(key.tag(&first), tags[PAGE * 8]);
        tags.sort_unstable();
        tags.dedup();
        assert_eq!(tags.len(), PAGE * 8 + 1);
        // What is moved about is something else, too.
        let mut moved = first;
        moved.rotate_left(32);
        assert_ne!(key.tag(&moved), key.tag(&first));
        assert_ne!(
            TagKey::random().unwrap().tag(&first),
            key.tag(&first),
            "each measurement has its own key"
        );
    }
}
