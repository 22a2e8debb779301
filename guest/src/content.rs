//! What a page holds: a function of its [`PageKey`], so that guest and host can each check every
//! page.
//!
//! A page is 512 little-endian words. A page of [`Class::Zero`] in generation 0 is all zeros. Every
//! other page is
//!
//! | word | holds |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 1 | generation in bits 0-31, class in bits 32-39 (0 zero, 1 common, 2 dup, 3 unique), the rest 0 |
//! | 2 | index |
//! | 3 | seed |
//! | 4-511 | a counter generator started from words 1-3 |
//!
//! The header is the whole key and nothing but the key, so equal keys mean equal pages. It is up to
//! the layout that pages meant to be equal get equal keys: common pages carry the seed that all
//! guests share, and the copies of a duplicated page carry the index of their group.
//!
//! The generator is not cryptographic; it need only be fast, incompressible and different for
//! different keys.

use crate::protocol::Class;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_SIZE / 8;

/// First word of every page that is not all zeros: `SamePage` in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"SamePage");

const HEADER_WORDS: usize = 4;

/// One page as words.
pub type Page = [u64; PAGE_WORDS];

/// Determines every byte of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageKey {
    /// The guest's own seed; for [`Class::Common`] the seed that all guests share.
    pub seed: u64,
    /// The class of the page.
    pub class: Class,
    /// Index within the class; for [`Class::Dup`] the index of the group of copies.
    pub index: u64,
    /// How often the page was written since it was filled.
    pub generation: u32,
}

impl PageKey {
    /// The key [`identify`] gives to a page of zeros; seed and index of such a page cannot be
    /// known.
    pub const ZERO: PageKey = PageKey { seed: 0, class: Class::Zero, index: 0, generation: 0 };

    /// Whether a page of this key is all zeros.
    pub const fn is_zero_page(self) -> bool {
        matches!(self.class, Class::Zero) && self.generation == 0
    }

    fn header(self) -> [u64; HEADER_WORDS] {
        let kind = u64::from(self.class.code()) << 32 | u64::from(self.generation);
        [MAGIC, kind, self.index, self.seed]
    }

    fn generator(self) -> Generator {
        let [_, kind, index, seed] = self.header();
        // Each word passes through the multiplier before the next is added: keys that differ in one
        // word by what they differ in another must not meet.
        let start = fold(fold(fold(seed, MULTIPLIERS[0]) ^ index, MULTIPLIERS[1]) ^ kind, MULTIPLIERS[2]);
        Generator { counter: start }
    }
}

/// Writes the content of `key` into `page`.
pub fn fill_page(page: &mut Page, key: PageKey) {
    if key.is_zero_page() {
        page.fill(0);
        return;
    }
    let (header, body) = page.split_at_mut(HEADER_WORDS);
    header.copy_from_slice(&key.header());
    let mut generator = key.generator();
    for word in body {
        *word = generator.next();
    }
}

/// Whether `page` has the content of `key`.
pub fn check_page(page: &Page, key: PageKey) -> bool {
    // Differences are accumulated: a page is nearly always right, and the loop stays branch-free.
    if key.is_zero_page() {
        return page.iter().fold(0, |seen, word| seen | word) == 0;
    }
    let (header, body) = page.split_at(HEADER_WORDS);
    if header != key.header() {
        return false;
    }
    let mut generator = key.generator();
    body.iter().fold(0, |seen, word| seen | (word ^ generator.next())) == 0
}

/// The key that the header of `page` claims, or `None` if this is no page of ours.
///
/// Only the header is read: follow with [`check_page`]. A page whose header is all zeros is claimed
/// to be [`PageKey::ZERO`].
pub fn identify(page: &Page) -> Option<PageKey> {
    let [magic, kind, index, seed] = [page[0], page[1], page[2], page[3]];
    if magic | kind | index | seed == 0 {
        return Some(PageKey::ZERO);
    }
    if magic != MAGIC || kind >> 40 != 0 {
        return None;
    }
    let class = Class::from_code((kind >> 32) as u8)?;
    let key = PageKey { seed, class, index, generation: kind as u32 };
    // Such a page would have been zeros.
    (!key.is_zero_page()).then_some(key)
}

/// The words of a page that was read as bytes, from a dump or another process.
pub fn page_from_bytes(bytes: &[u8; PAGE_SIZE]) -> Page {
    let (words, _) = bytes.as_chunks::<8>();
    core::array::from_fn(|index| u64::from_le_bytes(words[index]))
}

/// The constants of wyhash, version 4 (Wang Yi, public domain): odd, 32 bits set, prime.
const MULTIPLIERS: [u64; 4] =
    [0xa076_1d64_78bd_642f, 0xe703_7ed1_a0b4_28db, 0x8ebc_6af0_9c88_c6e3, 0x5899_65cc_7537_4cc3];

/// `wyrand`: a counter and one widening multiplication a word.
struct Generator {
    counter: u64,
}

impl Generator {
    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(MULTIPLIERS[0]);
        fold(self.counter, self.counter ^ MULTIPLIERS[1])
    }
}

#[inline(always)]
fn fold(left: u64, right: u64) -> u64 {
    let product = u128::from(left) * u128::from(right);
    (product as u64) ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn key() -> impl Strategy<Value = PageKey> {
        (any::<u64>(), 0_u8..4, any::<u64>(), any::<u32>()).prop_map(|(seed, class, index, generation)| {
            PageKey { seed, class: Class::from_code(class).unwrap(), index, generation }
        })
    }

    proptest! {
        #[test]
        fn what_was_filled_is_identified_and_checked(key in key()) {
            let mut page = [0xdead; PAGE_WORDS];
            fill_page(&mut page, key);
            prop_assert!(check_page(&page, key));
            let expected = if key.is_zero_page() { PageKey::ZERO } else { key };
            prop_assert_eq!(identify(&page), Some(expected));
            prop_assert!(check_page(&page, expected));
        }

        #[test]
        fn one_flipped_bit_is_seen(key in key(), bit in 0_usize..PAGE_SIZE * 8) {
            let mut page = [0; PAGE_WORDS];
            fill_page(&mut page, key);
            page[bit / 64] ^= 1 << (bit % 64);
            prop_assert!(!check_page(&page, key));
            if let Some(claimed) = identify(&page) {
                prop_assert!(!check_page(&page, claimed));
            }
        }

        #[test]
        fn different_keys_differ_beyond_the_header(a in key(), b in key()) {
            prop_assume!(a != b && !a.is_zero_page() && !b.is_zero_page());
            let (mut left, mut right) = ([0; PAGE_WORDS], [0; PAGE_WORDS]);
            fill_page(&mut left, a);
            fill_page(&mut right, b);
            prop_assert_ne!(&left[HEADER_WORDS..], &right[HEADER_WORDS..]);
        }

        #[test]
        fn rubbish_is_never_identified_as_correct(words in proptest::collection::vec(any::<u64>(), PAGE_WORDS)) {
            let page: Page = words.try_into().unwrap();
            prop_assert!(identify(&page).is_none_or(|key| !check_page(&page, key)));
        }
    }

    #[test]
    fn neighbouring_keys_share_no_word() {
        let mut seen = HashSet::new();
        for seed in 0..4 {
            for index in 0..16 {
                for generation in 0..4 {
                    let mut page = [0; PAGE_WORDS];
                    fill_page(&mut page, PageKey { seed, class: Class::Unique, index, generation });
                    assert!(page[HEADER_WORDS..].iter().all(|word| seen.insert(*word)));
                }
            }
        }
    }

    #[test]
    fn bytes_are_little_endian_words() {
        let mut bytes = [0; PAGE_SIZE];
        bytes[..8].copy_from_slice(b"SamePage");
        bytes[4088] = 1;
        let page = page_from_bytes(&bytes);
        assert_eq!((page[0], page[511]), (MAGIC, 1));
    }
}
