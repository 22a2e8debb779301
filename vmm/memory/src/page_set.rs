//! Sets of pages, one bit a page.

use std::fmt;
use std::marker::PhantomData;

use super::page::{PageIndex, PageNo, PageRange, to_usize};

/// Pages of one word of a set.
pub const WORD_PAGES: u64 = u64::BITS as u64;

/// A set of pages of one guest's RAM; or, with another `P`, of one slab. A bit for each, the lowest
/// of a word first: as KVM's log of writes has them, which is why its words can be had. Its
/// capacity is fixed when it is made; pages beyond it are never in it.
pub struct PageSet<P = PageNo> {
    words: Vec<u64>,
    of: PhantomData<fn() -> P>,
}

impl<P: PageIndex> PageSet<P> {
    /// None of `pages` pages.
    pub fn none(pages: u64) -> Self {
        Self::from_words(vec![0; to_usize(pages.div_ceil(WORD_PAGES))])
    }

    /// All of `pages` pages.
    pub fn all(pages: u64) -> Self {
        let mut words = vec![u64::MAX; to_usize(pages.div_ceil(WORD_PAGES))];
        if let (Some(last), rest @ 1..) = (words.last_mut(), pages % WORD_PAGES) {
            *last = (1 << rest) - 1;
        }
        Self::from_words(words)
    }

    /// The set that these words are.
    pub fn from_words(words: Vec<u64>) -> Self {
        Self { words, of: PhantomData }
    }

    /// Its words.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Its words, to be changed.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Whether `page` is in it.
    pub fn has(&self, page: P) -> bool {
        let (word, bit) = place(page.index());
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Puts `page` into it.
    pub fn insert(&mut self, page: P) {
        let (word, bit) = place(page.index());
        if let Some(word) = self.words.get_mut(word) {
            *word |= bit;
        }
    }

    /// Takes `page` out of it.
    pub fn remove(&mut self, page: P) {
        let (word, bit) = place(page.index());
        if let Some(word) = self.words.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Puts all that is in `other` into it.
    pub fn union_with(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    /// Takes all that is in `other` out of it.
    pub fn subtract(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= !other);
    }

    /// Takes all that is not in `other` out of it.
    pub fn intersect(&mut self, other: &Self) {
        let others = other.words.iter().chain(std::iter::repeat(&0));
        self.words.iter_mut().zip(others).for_each(|(word, other)| *word &= other);
    }

    /// How many pages are in it.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The pages in it, ascending.
    pub fn iter(&self) -> impl Iterator<Item = P> {
        (0u64..)
            .zip(&self.words)
            .flat_map(|(n, word)| bits(*word).map(move |bit| P::at(n * WORD_PAGES + bit)))
    }
}

impl PageSet {
    /// Puts a range into it.
    pub fn insert_range(&mut self, range: PageRange) {
        self.masks(range).for_each(|(word, mask)| *word |= mask);
    }

    /// Takes a range out of it.
    pub fn remove_range(&mut self, range: PageRange) {
        self.masks(range).for_each(|(word, mask)| *word &= !mask);
    }

    /// The words in which a range has pages, each with the bits of those.
    fn masks(&mut self, range: PageRange) -> impl Iterator<Item = (&mut u64, u64)> {
        let (first, end) = (range.first().0, range.end().0);
        let len = self.words.len();
        let clip = |word: u64| usize::try_from(word).map_or(len, |word| word.min(len));
        let from = clip(first / WORD_PAGES);
        let to = if range.is_empty() { from } else { clip(end.div_ceil(WORD_PAGES)) };
        (from as u64..).zip(&mut self.words[from..to]).map(move |(n, word)| {
            let below = |page: u64| match page.saturating_sub(n * WORD_PAGES) {
                pages @ 0..WORD_PAGES => (1 << pages) - 1,
                _ => u64::MAX,
            };
            (word, below(end) & !below(first))
        })
    }

    /// Divides a range into runs of pages that are in the set, and of those that are not: each with
    /// whether it is.
    pub fn runs(&self, range: PageRange) -> impl Iterator<Item = (PageRange, bool)> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let is = !rest.is_empty() && self.has(rest.first());
            let (run, after) = rest.split(self.same(rest, is));
            rest = after;
            (!run.is_empty()).then_some((run, is))
        })
    }

    /// How many pages from the first of `range` on are in the set, or are not; as many words as
    /// that are looked at. It may be more than the range has.
    fn same(&self, range: PageRange, is: bool) -> u64 {
        let mut at = range.first().0;
        while at < range.end().0 {
            let word = self.words.get(to_usize(at / WORD_PAGES)).copied().unwrap_or(0);
            let bits = (if is { word } else { !word }) >> (at % WORD_PAGES);
            let left = WORD_PAGES - at % WORD_PAGES;
            let pages = u64::from(bits.trailing_ones()).min(left);
            at += pages;
            if pages < left {
                break;
            }
        }
        at - range.first().0
    }

    /// The pages of a range that are in the set, in runs of at most `most`.
    pub fn runs_of(&self, range: PageRange, most: u64) -> impl Iterator<Item = PageRange> {
        self.runs(range).filter(|(_, is)| *is).flat_map(move |(run, _)| {
            let mut rest = run;
            std::iter::from_fn(move || {
                let (piece, after) = rest.split(most);
                rest = after;
                (!piece.is_empty()).then_some(piece)
            })
        })
    }

    /// Whether a page of those words is in the set in which `range` has pages: a neighbour of those
    /// counts. Beyond its end there are such.
    pub fn may_have(&self, range: PageRange) -> bool {
        let words = to_usize(range.first().0 / WORD_PAGES)..to_usize(range.end().0.div_ceil(WORD_PAGES));
        self.words.get(words).is_none_or(|words| words.iter().any(|word| *word != 0))
    }
}

/// Which bit of which word is that of a page.
fn place(page: u64) -> (usize, u64) {
    (to_usize(page / WORD_PAGES), 1 << (page % WORD_PAGES))
}

/// The bits that are set in a word, ascending.
pub fn bits(word: u64) -> impl Iterator<Item = u64> {
    let mut left = word;
    std::iter::from_fn(move || {
        let bit = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
        left &= left - 1;
        Some(bit)
    })
}

// By hand: a set is what its words are, whatever `P` can do.
impl<P> Clone for PageSet<P> {
    fn clone(&self) -> Self {
        Self { words: self.words.clone(), of: PhantomData }
    }

    fn clone_from(&mut self, other: &Self) {
        self.words.clone_from(&other.words);
    }
}

impl<P> Default for PageSet<P> {
    fn default() -> Self {
        Self { words: Vec::new(), of: PhantomData }
    }
}

impl<P> PartialEq for PageSet<P> {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

impl<P> Eq for PageSet<P> {}

impl<P: PageIndex> fmt::Debug for PageSet<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(PageIndex::index)).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::page::SlabPage;
    use super::*;

    /// Pages of the sets here; others are asked of them, too.
    const PAGES: u64 = 200;
    /// For how many there is room in whole words.
    const ROOM: u64 = 256;

    fn set(pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::none(PAGES);
        pages.iter().for_each(|page| set.insert(PageNo(*page)));
        set
    }

    fn pages(set: &PageSet) -> BTreeSet<u64> {
        set.iter().map(|page| page.0).collect()
    }

    fn some() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(0..PAGES, 0..150)
    }

    fn range() -> impl Strategy<Value = PageRange> {
        (0..PAGES + 90, 0..PAGES + 90)
            .prop_map(|(first, pages)| PageRange::new(PageNo(first), pages).unwrap())
    }

    #[test]
    fn all_are_no_more_than_there_are() {
        for pages in [0, 1, 63, 64, 65, 200] {
            let all = PageSet::<SlabPage>::all(pages);
            assert_eq!((all.count(), all.words().len() as u64), (pages, pages.div_ceil(64)));
            assert!(!all.has(SlabPage(u32::MAX)) && all.iter().all(|page| u64::from(page.0) < pages));
        }
        let none = PageSet::none(64);
        assert!(none.is_empty() && !none.has(PageNo(u64::MAX)));
        assert!(none.may_have(PageRange::between(PageNo(60), PageNo(70))), "nothing is known beyond its end");
    }

    proptest! {
        #[test]
        fn a_set_does_what_a_set_does(a in some(), b in some(), page in 0..PAGES + 90) {
            let (mut x, y) = (set(&a), set(&b));
            prop_assert_eq!(pages(&x), a.clone());
            prop_assert_eq!((x.count(), x.is_empty()), (a.len() as u64, a.is_empty()));
            prop_assert_eq!(x.has(PageNo(page)), a.contains(&page));
            x.union_with(&y);
            prop_assert_eq!(pages(&x), &a | &b);
            x.subtract(&y);
            prop_assert_eq!(pages(&x), &a - &b);
            let mut both = set(&a);
            both.intersect(&y);
            prop_assert_eq!(pages(&both), &a & &b);
            x.insert(PageNo(page));
            prop_assert_eq!(x.has(PageNo(page)), page < ROOM);
            x.remove(PageNo(page));
            prop_assert!(!x.has(PageNo(page)));
            x.clear();
            prop_assert!(x.is_empty() && x == PageSet::none(PAGES));
        }

        #[test]
        fn a_range_is_each_of_its_pages(a in some(), range in range()) {
            let inside: BTreeSet<u64> = range.iter().map(|page| page.0).filter(|page| *page < ROOM).collect();
            let mut x = set(&a);
            x.insert_range(range);
            prop_assert_eq!(pages(&x), &a | &inside);
            x.remove_range(range);
            prop_assert_eq!(pages(&x), &a - &inside);
            prop_assert!(set(&a).may_have(range) || a.is_disjoint(&inside));
        }

        #[test]
        fn runs_are_the_range_in_pieces_as_long_as_can_be(a in some(), range in range(), most in 1u64..40) {
            let x = set(&a);
            let runs: Vec<(PageRange, bool)> = x.runs(range).collect();
            prop_assert!(runs.windows(2).all(|two| two[0].1 != two[1].1));
            prop_assert!(runs.iter().all(|(run, is)| run.iter().all(|page| x.has(page) == *is)));
            let joined: Vec<PageNo> = runs.iter().flat_map(|(run, _)| run.iter()).collect();
            prop_assert_eq!(joined, range.iter().collect::<Vec<_>>());
            let pieces: Vec<PageRange> = x.runs_of(range, most).collect();
            prop_assert!(pieces.iter().all(|piece| (1..=most).contains(&piece.pages())));
            let found: Vec<PageNo> = pieces.iter().flat_map(|piece| piece.iter()).collect();
            prop_assert_eq!(found, range.iter().filter(|page| x.has(*page)).collect::<Vec<_>>());
        }
    }
}
