//! Addresses and pages of guest RAM, each a type of its own.
//!
//! [`Gpa`] is where the guest has a byte, [`Hva`] where a process of the host has it. [`PageNo`]
//! counts the pages of one guest's RAM, in guest-physical order without the hole; it is the name
//! that a page has from the log of writes to its merge. [`SlabPage`] counts the pages of one slab.

use std::fmt;
use std::ops::{Add, Sub};

pub use devices::reclaim::{Gpa, PAGE_BYTES};
pub use kernel_view::{Hva, PAGE, to_usize};

// Devices give back the pages that the kernel counts.
const _: () = assert!(PAGE_BYTES == kernel_view::PAGE_BYTES);

/// A page of one guest's RAM: its number in guest-physical order, the hole not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNo(pub u64);

/// A page of one slab, counted from its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabPage(pub u32);

impl SlabPage {
    /// Where in the slab's file it begins.
    pub const fn offset(self) -> u64 {
        // A u32 always fits; `From` is not const.
        self.0 as u64 * PAGE_BYTES
    }
}

impl Add<u64> for SlabPage {
    type Output = Self;

    /// The page `pages` further on. Slabs are too small for it to overflow: see
    /// [`MAX_SLAB_PAGES`](crate::slab::MAX_SLAB_PAGES).
    fn add(self, pages: u64) -> Self {
        Self::at(u64::from(self.0).saturating_add(pages))
    }
}

/// What numbers pages: so [`PageSet`](crate::page_set::PageSet) has sets of each kind.
pub trait PageIndex: Copy {
    /// Its number.
    fn index(self) -> u64;

    /// The page of a number that [`Self::index`] has given.
    fn at(index: u64) -> Self;
}

impl PageIndex for PageNo {
    fn index(self) -> u64 {
        self.0
    }

    fn at(index: u64) -> Self {
        Self(index)
    }
}

impl PageIndex for SlabPage {
    fn index(self) -> u64 {
        self.0.into()
    }

    fn at(index: u64) -> Self {
        Self(u32::try_from(index).unwrap_or(u32::MAX))
    }
}

impl Add<u64> for PageNo {
    type Output = Self;

    fn add(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }
}

impl Sub for PageNo {
    type Output = u64;

    fn sub(self, other: Self) -> u64 {
        self.0 - other.0
    }
}

impl fmt::Display for PageNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Adjacent pages of one guest's RAM. Whether there are such is for
/// [`Ram::range`](crate::ram::Ram::range) to say; but where the last one ends can always be said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    first: PageNo,
    pages: u64,
}

impl PageRange {
    /// `pages` pages from `first` on. None if the end overflows.
    pub fn new(first: PageNo, pages: u64) -> Option<Self> {
        first.0.checked_add(pages).map(|_| Self { first, pages })
    }

    /// One page; the very last number is none that a page can have.
    pub fn one(page: PageNo) -> Self {
        Self { first: page, pages: u64::from(page.0 < u64::MAX) }
    }

    /// From `first` to before `end`; none, if that is not above.
    pub fn between(first: PageNo, end: PageNo) -> Self {
        Self { first, pages: end.0.saturating_sub(first.0) }
    }

    /// The first page, also of none.
    pub fn first(self) -> PageNo {
        self.first
    }

    /// How many pages.
    pub fn pages(self) -> u64 {
        self.pages
    }

    /// The page after the last.
    pub fn end(self) -> PageNo {
        self.first + self.pages
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.pages == 0
    }

    /// Their length in bytes; what could not be mapped is as long as can be.
    pub fn bytes(self) -> u64 {
        self.pages.saturating_mul(PAGE_BYTES)
    }

    /// Whether `page` is one of them.
    pub fn contains(self, page: PageNo) -> bool {
        (self.first..self.end()).contains(&page)
    }

    /// Whether all of `other` are among them. Of none it must begin within, or at the end.
    pub fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.end() <= self.end()
    }

    /// Those that are among `other`, too.
    pub fn intersection(self, other: Self) -> Self {
        let first = self.first.max(other.first);
        Self::between(first, self.end().min(other.end()))
    }

    /// Its first `pages` pages, and the rest.
    pub fn split(self, pages: u64) -> (Self, Self) {
        let pages = pages.min(self.pages);
        let (first, middle) = (self.first, self.first + pages);
        (Self { first, pages }, Self { first: middle, pages: self.pages - pages })
    }

    /// Each of them, ascending.
    pub fn iter(self) -> impl Iterator<Item = PageNo> + Clone {
        (self.first.0..self.end().0).map(PageNo)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::new(PageNo(first), pages).unwrap()
    }

    #[test]
    fn what_cannot_end_is_no_range() {
        assert!(
            PageRange::new(PageNo(u64::MAX), 1).is_none() && PageRange::new(PageNo(2), u64::MAX).is_none()
        );
        assert!(PageRange::one(PageNo(u64::MAX)).is_empty());
        assert_eq!(range(0, u64::MAX).bytes(), u64::MAX);
        assert!(PageRange::between(PageNo(7), PageNo(3)).is_empty());
    }

    proptest! {
        #[test]
        fn a_range_is_what_its_pages_are(a in 0u64..40, b in 0u64..40, m in 0u64..40, n in 0u64..40, at in 0u64..50) {
            let (x, y) = (range(a, m), range(b, n));
            let has = |range: PageRange, page| range.iter().any(|one| one == page);
            for page in (0..90).map(PageNo) {
                prop_assert_eq!(x.contains(page), has(x, page));
                prop_assert_eq!(x.intersection(y).contains(page), has(x, page) && has(y, page));
            }
            prop_assert!(y.is_empty() || x.covers(y) == y.iter().all(|page| x.contains(page)));
            let (front, back) = x.split(at);
            prop_assert_eq!(front.iter().chain(back.iter()).collect::<Vec<_>>(), x.iter().collect::<Vec<_>>());
            prop_assert_eq!(front.pages(), at.min(m));
        }
    }
}
