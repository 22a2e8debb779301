//! Sets of pages, one bit a page.

/// A set of none of `pages` pages.
pub fn none(pages: u64) -> Vec<u64> {
    vec![0; pages.div_ceil(64) as usize]
}

/// A set of all of them, and of those that there might be in its last word.
pub fn all(pages: u64) -> Vec<u64> {
    vec![u64::MAX; pages.div_ceil(64) as usize]
}

/// Whether page `page` is in the set.
pub fn has(set: &[u64], page: u64) -> bool {
    set.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
}

/// Puts `page` into the set, or takes it out. A page beyond its end is passed over.
pub fn put(set: &mut [u64], page: u64, on: bool) {
    if let Some(word) = set.get_mut((page / 64) as usize) {
        match on {
            true => *word |= 1 << (page % 64),
            false => *word &= !(1 << (page % 64)),
        }
    }
}

/// The pages in the set, ascending.
pub fn each(set: &[u64]) -> impl Iterator<Item = u64> {
    (0u64..).zip(set).flat_map(|(n, word)| {
        let mut left = *word;
        std::iter::from_fn(move || {
            let bit = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
            left &= left - 1;
            Some(n * 64 + bit)
        })
    })
}

/// How many there are.
pub fn count(set: &[u64]) -> u64 {
    set.iter().map(|word| u64::from(word.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_there() {
        let mut set = [0u64; 3];
        for page in [191, 0, 63, 64, 64, 999] {
            put(&mut set, page, true);
        }
        put(&mut set, 63, false);
        assert_eq!(each(&set).collect::<Vec<_>>(), [0, 64, 191]);
        assert!(has(&set, 191) && !has(&set, 63) && !has(&set, 999));
        assert_eq!(count(&set), 3);
    }
}
