//! Tags of pages: a keyed universal hash, so that what the tags say is a theorem and not a hope.
//!
//! Two steps, both with a key that is drawn for each measurement. The first makes a few words of a
//! page, in one of two ways:
//! - Where the processor multiplies without carry by vectors of 64 bytes (AVX-512 and VPCLMULQDQ:
//!   Ice Lake, Zen 4), CLNH (Lemire, Kaser: "Faster 64-bit universal hashing using carry-less
//!   multiplications", 2016): the sum of the products of neighbouring words, a key added to each,
//!   all of it as polynomials over GF(2). Two passes, whose keys overlap. From the caches it takes
//!   less than half as long as
//! - NH, elsewhere, with 32-bit words, three passes whose keys overlap (Black, Halevi, Krawczyk,
//!   Krovetz, Rogaway: "UMAC: Fast and Secure Message Authentication", 1999, theorem on the
//!   Toeplitz construction).
//!
//! Two pages that differ come out of it the same with a probability of at most 2^-96 (CLNH:
//! 2^-128). *Why the passes multiply, with CLNH, too:* take the last pair of words in which they
//! differ. Its key in the second pass is one that the first pass has used for no pair up to there,
//! and what comes behind is the same in both pages. So whatever the other keys are, both must solve
//! an equation a k + b j = c in this pair (k, j) of keys, a and b not both 0, and polynomials have
//! no divisors of zero: of 2^64 values of one key at most one will do.
//!
//! Then two multilinear forms modulo the prime 2^61 - 1, which are pairwise independent; an index
//! keeps [`KEPT_BITS`] bits of them. So two different pages have the same tag with a probability of
//! at most 2^-96 + 2^-87, whatever they hold, if their writer does not know the key: it never
//! leaves this process, and a tag never does either.
//!
//! In 64 GiB of pages that all differ there are 2^47 pairs: the chance that any one of them is
//! taken for equal is 2^-40. A hash of the usual fast kind has no such bound, and one that is
//! compared byte by byte has to read its first holder again; blake3 has a bound that rests on an
//! assumption, and takes ten times as long.
#![expect(
    unsafe_code,
    reason = "vector loads, prefetching, and calling what was compiled for processors that have more than the least"
)]

use splitmix::SplitMix64;
use std::arch::x86_64::{
    __m256i, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_add_epi32, _mm256_add_epi64, _mm256_loadu_si256,
    _mm256_mul_epu32, _mm256_setzero_si256, _mm256_srli_epi64, _mm256_storeu_si256, _mm512_clmulepi64_epi128,
    _mm512_loadu_si512, _mm512_setzero_si512, _mm512_storeu_si512, _mm512_xor_si512,
};

use super::{MeasureError, PAGE};

/// Bits of a tag by which an index distinguishes contents.
pub const KEPT_BITS: u32 = 87;

/// 64-bit words of a page.
const WORDS: usize = PAGE / 8;
/// NH: words of a block, and passes. The key of each begins a block later.
const BLOCK: usize = 4;
const PASSES: usize = 3;
/// The same of CLNH.
const CL_BLOCK: usize = 8;
const CL_PASSES: usize = 2;
const KEY_WORDS: usize = WORDS + (PASSES - 1) * BLOCK;
/// Words that the first step makes: of a pass of NH one, of a pass of CLNH two.
const SUMS: usize = 4;
const _: () = assert!(PASSES <= SUMS && 2 * CL_PASSES == SUMS);
const _: () = assert!(KEY_WORDS == WORDS + (CL_PASSES - 1) * CL_BLOCK);
/// The prime of the second step.
const PRIME: u64 = (1 << 61) - 1;
/// Pieces of the sums that go into the second step, of [`PIECE_BITS`] each: fewer than two for each
/// sum are fewer products.
const PIECES: usize = 5;
const PIECE_BITS: u32 = 52;
const _: () = assert!(PIECES as u32 * PIECE_BITS >= SUMS as u32 * u64::BITS && PIECE_BITS < 61);
/// How far ahead of what is hashed memory is fetched: the processor's own prefetching ends with the
/// page, and most often the next ones are hashed next.
const AHEAD: usize = 2 * PAGE;

/// Stands for a page's content within one measurement: two numbers below 2^61 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(pub [u64; 2]);

impl Tag {
    /// 64 bits of it.
    #[inline]
    pub fn short(self) -> u64 {
        let Self([first, second]) = self;
        first | second << 61
    }
}

/// The key of one measurement, or of any other comparison of pages by their tags.
pub struct TagKey {
    nh: Box<[u64; KEY_WORDS]>,
    /// A constant and a factor for each piece, for each of the two forms.
    forms: [[u64; PIECES + 1]; 2],
    way: Way,
}

/// How the first step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// NH.
    Plain,
    /// NH, by AVX2.
    Avx2,
    /// CLNH, by AVX-512 and VPCLMULQDQ; AVX2 is there as well.
    CarryLess,
}

impl Way {
    /// The fastest that this processor has.
    fn best() -> Self {
        let has_wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq");
        match is_x86_feature_detected!("avx2") {
            true if has_wide => Self::CarryLess,
            true => Self::Avx2,
            false => Self::Plain,
        }
    }
}

impl TagKey {
    /// A random key.
    ///
    /// # Errors
    ///
    /// The kernel has no random bytes.
    pub fn random() -> Result<Self, MeasureError> {
        let mut bytes = [0; (KEY_WORDS + 2 * (PIECES + 1)) * 8];
        getrandom::fill(&mut bytes).map_err(|source| MeasureError::Random { source: source.into() })?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut words = words.iter().map(|word| u64::from_ne_bytes(*word));
        Ok(Self::drawn(|| words.next().unwrap_or_default()))
    }

    /// The key that follows from `seed`: the same for each holder of the seed, on machines of one
    /// kind. The module's bounds hold for random keys; without the seed this one is as hard to
    /// guess as SplitMix64 (Steele, Lea, Flood, 2014) is close to random.
    pub fn from_seed(seed: u64) -> Self {
        let mut numbers = SplitMix64::new(seed);
        Self::drawn(|| numbers.draw())
    }

    fn drawn(mut next: impl FnMut() -> u64) -> Self {
        let mut nh = Box::new([0; KEY_WORDS]);
        nh.fill_with(&mut next);
        // Three bits less than a word has; that two of all values stand for 0 is far below what the
        // bound is rounded by.
        let forms = std::array::from_fn(|_| std::array::from_fn(|_| (next() >> 3) % PRIME));
        Self { nh, forms, way: Way::best() }
    }

    /// The tag of a page; None if it is of zeros only.
    #[inline]
    pub fn tag_unless_zero(&self, page: &[u8; PAGE]) -> Option<Tag> {
        // Nearly all pages that are not of zeros differ from them at their beginning.
        let (beginning, _) = page.as_chunks::<8>();
        let bits = beginning[..8].iter().fold(0, |bits, word| bits | u64::from_ne_bytes(*word));
        (bits != 0 || !self.is_zero(page)).then(|| self.tag(page))
    }

    fn is_zero(&self, page: &[u8; PAGE]) -> bool {
        match self.way {
            Way::Plain => is_zero(page),
            // SAFETY: this processor has AVX2.
            Way::CarryLess | Way::Avx2 => unsafe { is_zero_avx2(page) },
        }
    }

    /// The tag of a page.
    #[inline]
    pub fn tag(&self, page: &[u8; PAGE]) -> Tag {
        let sums = match self.way {
            // SAFETY: this processor has AVX-512 and VPCLMULQDQ.
            Way::CarryLess => unsafe { carry_less_sums(page, &self.nh) },
            // SAFETY: this processor has AVX2.
            Way::Avx2 => unsafe { sums_avx2(page, &self.nh) },
            Way::Plain => sums(page, &self.nh),
        };
        let pieces = pieces(sums).map(u128::from);
        Tag(self.forms.map(|[constant, factors @ ..]| {
            // Five terms below 2^113 each, and one below 2^61.
            let products = pieces.iter().zip(factors).map(|(piece, factor)| piece * u128::from(factor));
            modulo(products.fold(constant.into(), |all, product| all + product))
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
fn pieces([a, b, c, d]: [u64; SUMS]) -> [u64; PIECES] {
    const MASK: u64 = (1 << PIECE_BITS) - 1;
    [a & MASK, (a >> 52 | b << 12) & MASK, (b >> 40 | c << 24) & MASK, (c >> 28 | d << 36) & MASK, d >> 16]
}

/// The rest of a number below 2^120 by the prime.
#[inline]
fn modulo(number: u128) -> u64 {
    let folded = (number as u64 & PRIME) + (number >> 61) as u64;
    let folded = (folded & PRIME) + (folded >> 61);
    if folded >= PRIME { folded - PRIME } else { folded }
}

/// NH as it is defined: for machines without AVX2, and to check the other one by.
fn sums(page: &[u8; PAGE], key: &[u64; KEY_WORDS]) -> [u64; SUMS] {
    let (words, _) = page.as_chunks::<8>();
    let sum = |pass: usize| {
        let pairs = words.iter().map(|word| u64::from_le_bytes(*word)).zip(&key[pass * BLOCK..]);
        pairs.fold(0, |sum: u64, (word, key)| {
            let low = (word as u32).wrapping_add(*key as u32);
            let high = ((word >> 32) as u32).wrapping_add((key >> 32) as u32);
            sum.wrapping_add(u64::from(low) * u64::from(high))
        })
    };
    [sum(0), sum(1), sum(2), 0]
}

/// Whether a page is of zeros only.
#[inline]
fn is_zero(page: &[u8; PAGE]) -> bool {
    // This much at a time is compared without a branch.
    page.as_chunks::<256>().0.iter().all(|part| {
        // Where there are zeros there are often more: see [`AHEAD`].
        (0..256).step_by(64).for_each(|at| prefetch(part.as_ptr().wrapping_add(at + AHEAD)));
        part.as_chunks::<8>().0.iter().fold(0, |bits, word| bits | u64::from_ne_bytes(*word)) == 0
    })
}

#[target_feature(enable = "avx2")]
fn is_zero_avx2(page: &[u8; PAGE]) -> bool {
    is_zero(page)
}

/// Prefetches the memory at an address, if there is any.
#[inline]
#[allow(unused_unsafe, reason = "safe from some version of Rust on, and not before")]
pub(super) fn prefetch(at: *const u8) {
    // SAFETY: nothing is read; an address that is not there is not fetched.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

#[target_feature(enable = "avx2")]
fn sums_avx2(page: &[u8; PAGE], key: &[u64; KEY_WORDS]) -> [u64; SUMS] {
    let step = |sum: __m256i, block: __m256i, key: __m256i| {
        let added = _mm256_add_epi32(block, key);
        _mm256_add_epi64(sum, _mm256_mul_epu32(added, _mm256_srli_epi64::<32>(added)))
    };
    let mut sums = [_mm256_setzero_si256(); PASSES];
    let (keys, _) = key.as_chunks::<BLOCK>();
    let (mut first, mut second) = (load(&keys[0]), load(&keys[1]));
    let keys = keys[PASSES - 1..].as_chunks::<2>().0;
    for (line, key) in page.as_chunks::<{ 2 * BLOCK * 8 }>().0.iter().zip(keys) {
        prefetch(line.as_ptr().wrapping_add(AHEAD));
        for (block, key) in line.as_chunks().0.iter().zip(key) {
            let (block, third) = (load_bytes(block), load(key));
            sums[0] = step(sums[0], block, first);
            sums[1] = step(sums[1], block, second);
            sums[2] = step(sums[2], block, third);
            (first, second) = (second, third);
        }
    }
    let [a, b, c] = sums.map(|sum| lanes(sum).iter().fold(0, |all: u64, lane| all.wrapping_add(*lane)));
    [a, b, c, 0]
}

/// CLNH; the words of a pass are the halves of its sum.
#[target_feature(enable = "avx512f,vpclmulqdq")]
fn carry_less_sums(page: &[u8; PAGE], key: &[u64; KEY_WORDS]) -> [u64; SUMS] {
    let step = |sum: __m512i, block: __m512i, key: __m512i| {
        let added = _mm512_xor_si512(block, key);
        // In each pair of words the lower one times the upper one.
        _mm512_xor_si512(sum, _mm512_clmulepi64_epi128::<0x10>(added, added))
    };
    // SAFETY: a block of the key has 64 bytes; the load needs no alignment.
    let load_key = |block: &[u64; CL_BLOCK]| unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
    let mut sums = [_mm512_setzero_si512(); CL_PASSES];
    let (keys, _) = key.as_chunks::<CL_BLOCK>();
    let mut first = load_key(&keys[0]);
    for (block, key) in page.as_chunks::<{ CL_BLOCK * 8 }>().0.iter().zip(&keys[CL_PASSES - 1..]) {
        prefetch(block.as_ptr().wrapping_add(AHEAD));
        let second = load_key(key);
        // SAFETY: a block of the page has 64 bytes; the load needs no alignment.
        let block = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
        sums[0] = step(sums[0], block, first);
        sums[1] = step(sums[1], block, second);
        first = second;
    }
    let [[a, b], [c, d]] = sums.map(|sum| {
        let mut lanes = [0; CL_BLOCK];
        // SAFETY: the array has the 64 bytes that are written; the store needs no alignment.
        unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), sum) };
        lanes.as_chunks::<2>().0.iter().fold([0, 0], |[a, b], [low, high]| [a ^ low, b ^ high])
    });
    [a, b, c, d]
}

#[target_feature(enable = "avx2")]
fn load(block: &[u64; BLOCK]) -> __m256i {
    // SAFETY: a block has 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(block.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn load_bytes(block: &[u8; BLOCK * 8]) -> __m256i {
    // SAFETY: a block has 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(block.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn lanes(vector: __m256i) -> [u64; BLOCK] {
    let mut lanes = [0; BLOCK];
    // SAFETY: the array has the 32 bytes that are written; the store needs no alignment.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), vector) };
    lanes
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

    /// The product of two polynomials over GF(2), as lower and upper word.
    fn carry_less_product(a: u64, b: u64) -> [u64; 2] {
        let product = (0..64).filter(|bit| b >> bit & 1 != 0).fold(0, |sum, bit| sum ^ u128::from(a) << bit);
        [product as u64, (product >> 64) as u64]
    }

    /// CLNH as it is defined.
    fn carry_less_sums_plain(page: &[u8; PAGE], key: &[u64; KEY_WORDS]) -> [u64; SUMS] {
        let words: Vec<u64> = page.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let mut sums = [0; SUMS];
        for pass in 0..CL_PASSES {
            for (words, key) in words.as_chunks::<2>().0.iter().zip(key[pass * CL_BLOCK..].as_chunks::<2>().0)
            {
                let [low, high] = carry_less_product(words[0] ^ key[0], words[1] ^ key[1]);
                sums[2 * pass] ^= low;
                sums[2 * pass + 1] ^= high;
            }
        }
        sums
    }

    /// Keys that go every way that this processor has.
    fn keys() -> Vec<TagKey> {
        let all = [Way::Plain, Way::Avx2, Way::CarryLess];
        let ways = &all[..=all.iter().position(|way| *way == Way::best()).unwrap()];
        ways.iter().map(|way| TagKey { way: *way, ..TagKey::random().unwrap() }).collect()
    }

    proptest! {
        #[test]
        fn vectors_add_as_is_defined(seed: u64) {
            let (page, key) = (page(seed), TagKey::random().unwrap());
            if key.way != Way::Plain {
                // SAFETY: this processor has AVX2.
                let fast = unsafe { sums_avx2(&page, &key.nh) };
                prop_assert_eq!(fast, sums(&page, &key.nh));
            }
            if key.way == Way::CarryLess {
                // SAFETY: this processor has AVX-512 and VPCLMULQDQ.
                let fast = unsafe { carry_less_sums(&page, &key.nh) };
                prop_assert_eq!(fast, carry_less_sums_plain(&page, &key.nh));
            }
        }

        #[test]
        fn every_bit_of_the_sums_is_in_a_piece(sums: [u64; SUMS]) {
            let pieces = pieces(sums);
            prop_assert!(pieces.iter().all(|piece| *piece < 1 << PIECE_BITS));
            // Back again.
            let [a, b, c, d, e] = pieces;
            let back = [a | b << 52, b >> 12 | c << 40, c >> 24 | d << 28, d >> 36 | e << 16];
            prop_assert_eq!(back, sums);
        }

        #[test]
        fn the_rest_is_the_rest(number in 0..1u128 << 120) {
            prop_assert_eq!(u128::from(modulo(number)), number % u128::from(PRIME));
        }
    }

    #[test]
    fn every_single_bit_counts_and_equal_pages_agree() {
        for key in keys() {
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
            assert_eq!(tags.len(), PAGE * 8 + 1, "{:?}", key.way);
            // A page with moved contents has another tag, too.
            for by in [16, 32, 64] {
                let mut moved = first;
                moved.rotate_left(by);
                assert_ne!(key.tag(&moved), key.tag(&first), "{:?}, {by}", key.way);
            }
            let other = TagKey { way: key.way, ..TagKey::random().unwrap() };
            assert_ne!(other.tag(&first), key.tag(&first), "each measurement has its own key");
        }
    }

    #[test]
    fn a_seed_determines_the_tags() {
        let (one, other, third) = (TagKey::from_seed(7), TagKey::from_seed(7), TagKey::from_seed(8));
        let shorts: std::collections::HashSet<u64> =
            (0..1000).map(|seed| one.tag(&page(seed)).short()).collect();
        assert_eq!(shorts.len(), 1000);
        for seed in 0..1000 {
            assert_eq!(one.tag(&page(seed)), other.tag(&page(seed)));
            assert!(!shorts.contains(&third.tag(&page(seed)).short()));
        }
    }

    #[test]
    fn a_page_is_of_zeros_when_no_bit_is_set() {
        for key in keys() {
            assert_eq!(key.tag_unless_zero(&[0; PAGE]), None);
            for bit in 0..PAGE * 8 {
                let mut page = [0; PAGE];
                page[bit / 8] = 1 << (bit % 8);
                assert_eq!(key.tag_unless_zero(&page), Some(key.tag(&page)), "{:?}, bit {bit}", key.way);
            }
        }
    }
}
