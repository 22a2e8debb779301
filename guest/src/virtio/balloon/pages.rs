//! Two bits for each page of the workload: it is in the balloon, and the host may hold a frame for
//! it.

use core::ops::Range;

use crate::in_use::InUse;

/// The place of an array of pages in guest-physical space: from `base` on; those that do not fit
/// below 4 GiB, from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// Guest-physical address of page 0, page-aligned.
    pub base: u64,
    /// How many pages lie there.
    pub low_count: u64,
    /// How many more lie from 4 GiB on.
    pub high_count: u64,
}

const PAGE_SHIFT: u32 = 12;
const HIGH_PFN: u64 = 1 << (32 - PAGE_SHIFT);

impl Frames {
    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.low_count + self.high_count
    }

    /// The page frame number of `page`, which is below [`Frames::count`].
    pub fn pfn(&self, page: u64) -> u64 {
        match page.checked_sub(self.low_count) {
            None => (self.base >> PAGE_SHIFT) + page,
            Some(above) => HIGH_PFN + above,
        }
    }

    /// Guest-physical address of `page`, which is below [`Frames::count`].
    pub fn gpa(&self, page: u64) -> u64 {
        self.pfn(page) << PAGE_SHIFT
    }

    /// The page with this frame number.
    pub fn page(&self, pfn: u64) -> Option<u64> {
        let low = pfn.checked_sub(self.base >> PAGE_SHIFT).filter(|page| *page < self.low_count);
        let high = || pfn.checked_sub(HIGH_PFN).filter(|above| *above < self.high_count);
        low.or_else(|| high().map(|above| self.low_count + above))
    }

    /// The first part of `pages` that is contiguous in guest-physical space.
    pub fn contiguous(&self, pages: Range<u64>) -> Range<u64> {
        let crosses = pages.start < self.low_count && pages.end > self.low_count;
        pages.start..if crosses { self.low_count } else { pages.end }
    }
}

/// Bits by page, 64 a word.
#[derive(Debug)]
struct Bits<'m>(&'m mut [u64]);

impl<'m> Bits<'m> {
    fn get(&self, page: u64) -> bool {
        self.0[(page / 64) as usize] >> (page % 64) & 1 != 0
    }

    /// Sets or clears. True if that changed it.
    fn put(&mut self, page: u64, on: bool) -> bool {
        let changes = self.get(page) != on;
        self.0[(page / 64) as usize] ^= u64::from(changes) << (page % 64);
        changes
    }

    /// How many bits of `pages` are set.
    fn count(&self, pages: Range<u64>) -> u64 {
        let mut count = 0;
        let mut at = pages.start;
        while at < pages.end {
            let bits = (64 - at % 64).min(pages.end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            count += u64::from((self.0[(at / 64) as usize] & mask).count_ones());
            at += bits;
        }
        count
    }

    /// The first page from `page` on, below `end`, with its bit `on`.
    fn next(&self, mut page: u64, end: u64, on: bool) -> Option<u64> {
        while page < end {
            let word = self.0[(page / 64) as usize];
            let word = if on { word } else { !word } >> (page % 64);
            if word != 0 {
                let found = page + u64::from(word.trailing_zeros());
                return Some(found).filter(|found| *found < end);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    /// The last page below `page` with its bit clear.
    fn last_clear(&self, mut page: u64) -> Option<u64> {
        while page > 0 {
            let last = (page - 1) % 64;
            let word = !self.0[((page - 1) / 64) as usize] << (63 - last);
            if word != 0 {
                return Some(page - 1 - u64::from(word.leading_zeros()));
            }
            page -= last + 1;
        }
        None
    }
}

/// The balloon's state of each page.
#[derive(Debug)]
pub struct PageMap<'m> {
    frames: Frames,
    /// In the balloon, or on the way into it or out of it.
    given: Bits<'m>,
    /// Written since the host last emptied it: it has a frame there.
    touched: Bits<'m>,
    given_count: u64,
}

impl<'m> PageMap<'m> {
    /// Words of 64 bits that a map of `pages` needs.
    pub const fn words(pages: u64) -> usize {
        2 * pages.div_ceil(64) as usize
    }

    /// A map with nothing given and nothing touched. `words` are at least [`PageMap::words`]; pages
    /// that there are no words for are not part of it.
    pub fn new(frames: Frames, words: &'m mut [u64]) -> Self {
        words.fill(0);
        let half = words.len() / 2;
        let (given, touched) = words.split_at_mut(half);
        debug_assert!(half as u64 * 64 >= frames.count());
        Self { frames, given: Bits(given), touched: Bits(&mut touched[..half]), given_count: 0 }
    }

    /// Where the pages lie.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.frames.count().min(self.given.0.len() as u64 * 64)
    }

    /// How many are given.
    pub fn given(&self) -> u64 {
        self.given_count
    }

    /// How many of `pages` are given.
    pub fn given_in(&self, pages: Range<u64>) -> u64 {
        self.given.count(pages)
    }

    /// Whether `page` is given.
    pub fn is_given(&self, page: u64) -> bool {
        self.given.get(page)
    }

    /// Marks a page as given or taken back.
    pub fn set_given(&mut self, page: u64, on: bool) {
        if self.given.put(page, on) {
            self.given_count = if on { self.given_count + 1 } else { self.given_count - 1 };
        }
    }

    /// Forgets that anything was given: after a reset the device holds nothing.
    pub fn forget_given(&mut self) {
        self.given.0.fill(0);
        self.given_count = 0;
    }

    /// Marks pages as written, or as emptied by the host. Returns how many that changed.
    pub fn set_touched(&mut self, pages: Range<u64>, on: bool) -> u64 {
        pages.map(|page| u64::from(self.touched.put(page, on))).sum()
    }

    /// The first given page from `page` on.
    pub fn next_given(&self, page: u64) -> Option<u64> {
        self.given.next(page, self.count(), true)
    }

    /// The last page below `end` that is neither given nor in use.
    pub fn last_free(&self, end: u64, in_use: &InUse) -> Option<u64> {
        let mut end = end.min(self.count());
        loop {
            let page = self.given.last_clear(end)?;
            match in_use.range_of(page) {
                None => return Some(page),
                Some(used) => end = used.start,
            }
        }
    }

    /// The first pages from `from` on that are neither given nor in use, as one range of at most
    /// `max`, contiguous in guest-physical space.
    pub fn next_free(&self, from: u64, max: u64, in_use: &InUse) -> Option<Range<u64>> {
        self.next_run(from, max, in_use, None)
    }

    /// As [`PageMap::next_free`], but only pages that are `touched`, or only pages that are not.
    pub fn next_free_touched(
        &self,
        from: u64,
        max: u64,
        in_use: &InUse,
        touched: bool,
    ) -> Option<Range<u64>> {
        self.next_run(from, max, in_use, Some(touched))
    }

    /// Each turn of the loop goes on to the end of a range in use, of a given run, or of a run of
    /// the wrong kind.
    fn next_run(&self, mut from: u64, max: u64, in_use: &InUse, touched: Option<bool>) -> Option<Range<u64>> {
        let count = self.count();
        loop {
            from = self.given.next(from, count, false)?;
            if let Some(used) = in_use.range_of(from) {
                from = used.end;
                continue;
            }
            if let Some(on) = touched.filter(|on| self.touched.get(from) != *on) {
                from = self.touched.next(from, count, on)?;
                continue;
            }
            let mut end = count.min(from.saturating_add(max)).min(in_use.next_start(from));
            end = self.given.next(from, end, true).unwrap_or(end);
            if let Some(on) = touched {
                end = self.touched.next(from, end, !on).unwrap_or(end);
            }
            return Some(self.frames.contiguous(from..end));
        }
    }
}
