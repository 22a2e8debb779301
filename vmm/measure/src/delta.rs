//! What a page takes when it is kept as the difference to a page that is much like it.

use std::collections::HashMap;

use super::PAGE;

/// Bytes that are looked up at a time; a shorter copy does not pay for its record.
const SEED: usize = 16;
/// Bytes of a record "copy N bytes from there", and of one "N literal bytes follow".
const COPY: usize = 5;
const LITERAL: usize = 3;

/// A page to which others are compared.
pub struct Reference<'a> {
    page: &'a [u8; PAGE],
    /// Where each of its blocks begins first.
    blocks: HashMap<[u8; SEED], u16>,
}

impl<'a> Reference<'a> {
    pub fn new(page: &'a [u8; PAGE]) -> Self {
        let mut blocks = HashMap::with_capacity(PAGE / SEED);
        for (n, block) in page.as_chunks::<SEED>().0.iter().enumerate() {
            blocks.entry(*block).or_insert((n * SEED) as u16);
        }
        Self { page, blocks }
    }

    /// Bytes that `page` takes as copies out of the reference and what is between them; at most a
    /// few more than a page has. A copy may come from another place: what was moved by an insertion
    /// is found again.
    pub fn patch_bytes(&self, page: &[u8; PAGE]) -> usize {
        let (mut at, mut literals, mut bytes) = (0, 0, 0);
        while at < PAGE {
            let same = common(&page[at..], &self.page[at..]);
            let copied = if same >= SEED { same } else { self.elsewhere(&page[at..]) };
            if copied == 0 {
                literals += 1;
                at += 1;
                continue;
            }
            bytes += COPY + if literals > 0 { LITERAL + literals } else { 0 };
            literals = 0;
            at += copied;
        }
        bytes + if literals > 0 { LITERAL + literals } else { 0 }
    }

    /// Bytes of the copy that begins with a block of the reference; 0 if there is none.
    fn elsewhere(&self, rest: &[u8]) -> usize {
        let Some(seed) = rest.first_chunk::<SEED>() else { return 0 };
        self.blocks.get(seed).map_or(0, |from| common(rest, &self.page[usize::from(*from)..]))
    }
}

/// How many bytes both begin with.
fn common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(seed: u32) -> [u8; PAGE] {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
    }

    #[test]
    fn what_differs_little_takes_little() {
        let reference = page(1);
        let index = Reference::new(&reference);
        assert_eq!(index.patch_bytes(&reference), COPY);
        let mut changed = reference;
        changed[100] ^= 1;
        changed[2000..2010].fill(7);
        assert_eq!(index.patch_bytes(&changed), 3 * COPY + (LITERAL + 1) + (LITERAL + 10));
        let strange = index.patch_bytes(&page(2));
        assert_eq!(strange, LITERAL + PAGE);
    }

    #[test]
    fn what_was_moved_is_found_again() {
        let reference = page(1);
        let mut moved = reference;
        moved.copy_within(..PAGE - 50, 50);
        moved[..50].fill(9);
        let bytes = Reference::new(&reference).patch_bytes(&moved);
        assert!(bytes < 100, "{bytes}");
    }
}
