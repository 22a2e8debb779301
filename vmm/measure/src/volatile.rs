//! Pages that change while they are measured: read once more, and compared by their tags.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::MeasureError;
use super::sample::Estimate;
use super::scan::Scan;
use super::source::Source;
use super::tag::Tag;

/// Pages that are asked for at a time.
const SOME_PAGES: usize = 1024;

/// The part of what was measured that changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Volatile {
    /// Pages that were read twice.
    pub looked_pages: u64,
    /// Of these, how many held something else the second time, or were gone.
    pub changed_pages: u64,
    /// Their part of all pages that were read.
    pub share: Estimate,
    /// How many of all pages that makes: counted where all were read twice, else estimated.
    pub pages: u64,
    /// Half the width of the interval that holds their true number in 95 of 100 samples; 0 where
    /// all were read twice.
    pub pages_error_95: u64,
    /// From the begin of the scan to the end of the second look, wall clock.
    pub seconds: f64,
}

impl Scan {
    /// Reads pages of `sources`, which are those of the scan, that may have been written since once
    /// more. None if none of them can be written.
    ///
    /// # Errors
    ///
    /// A source is gone.
    pub fn look_again(&self, sources: &[&dyn Source]) -> Result<Option<Volatile>, MeasureError> {
        if sources.iter().all(|source| !source.is_live()) {
            return Ok(None);
        }
        let began = Instant::now();
        let mut changed = Vec::with_capacity(self.second_look.len());
        let place = |(number, tag): &(u32, Option<Tag>)| {
            let (guest, page) = self.numbering.place(*number);
            (guest, page, *tag)
        };
        let placed: Vec<(usize, u64, Option<Tag>)> = self.second_look.iter().map(place).collect();
        for of_guest in placed.chunk_by(|a, b| a.0 == b.0) {
            let mut reader = sources[of_guest[0].0].open()?;
            for some in of_guest.chunks(SOME_PAGES) {
                let pages: Vec<u64> = some.iter().map(|(_, page, _)| *page).collect();
                // Until it is read again, a page may be gone.
                let mut is_changed = vec![true; some.len()];
                reader.read_scattered(&pages, &mut |page, content| {
                    if let Ok(at) = pages.binary_search(&page) {
                        let tag = self.key.tag_unless_zero(content);
                        is_changed[at] = tag != some[at].2;
                    }
                })?;
                changed.extend(is_changed.iter().map(|is| f64::from(u8::from(*is))));
            }
        }
        let of = |(guest, source): (usize, &&dyn Source)| {
            if source.is_live() { self.guests[guest].zero + self.guests[guest].filled } else { 0 }
        };
        let all: u64 = sources.iter().enumerate().map(of).sum();
        let share = Estimate::of(&changed, all);
        Ok(Some(Volatile {
            looked_pages: changed.len() as u64,
            changed_pages: changed.iter().sum::<f64>() as u64,
            share,
            pages: (share.mean * all as f64).round() as u64,
            pages_error_95: (share.error_95 * all as f64).ceil() as u64,
            seconds: self.seconds + began.elapsed().as_secs_f64(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::PAGE;
    use crate::scan::{Options, scan};
    use crate::source::{EachPage, PageReader, Unread};

    /// One number a page, which may change; the largest stands for a page that is not there.
    struct Guest {
        pages: Vec<AtomicU32>,
        live: bool,
    }

    impl Source for Guest {
        fn name(&self) -> &str {
            "guest"
        }

        fn extents(&self) -> Vec<u64> {
            vec![10, self.pages.len() as u64 - 10]
        }

        fn is_live(&self) -> bool {
            self.live
        }

        fn open(&self) -> Result<Box<dyn PageReader + '_>, MeasureError> {
            Ok(Box::new(Reader(self)))
        }
    }

    struct Reader<'a>(&'a Guest);

    impl PageReader for Reader<'_> {
        fn read(&mut self, first: u64, pages: u64, each: EachPage<'_>) -> Result<Unread, MeasureError> {
            let mut unread = Unread::default();
            for page in first..first + pages {
                let number = self.0.pages[page as usize].load(Ordering::Relaxed);
                let mut content = [0; PAGE];
                content[..4].copy_from_slice(&number.to_ne_bytes());
                if number == u32::MAX {
                    unread.absent += 1;
                } else {
                    each(page, &content);
                }
            }
            Ok(unread)
        }
    }

    #[test]
    fn what_changed_or_went_is_volatile_and_nothing_else() {
        let guest = |live| Guest { pages: (0..3000).map(AtomicU32::new).collect(), live };
        let (first, still, last) = (guest(true), guest(false), guest(true));
        let sources: [&dyn Source; 3] = [&first, &still, &last];
        last.pages[5].store(u32::MAX, Ordering::Relaxed);
        let options = Options { second_look_pages: 6000, ..Options::default() };
        let scan = scan(&sources, &options, &mut |_, _| true).unwrap();
        let unchanged = scan.look_again(&sources).unwrap().unwrap();
        assert_eq!((unchanged.looked_pages, unchanged.changed_pages), (5999, 0));
        // Another content, zeros, something instead of zeros, and gone. Sources that cannot change
        // are not read again.
        first.pages[9].store(77, Ordering::Relaxed);
        first.pages[2000].store(0, Ordering::Relaxed);
        last.pages[0].store(1, Ordering::Relaxed);
        last.pages[2999].store(u32::MAX, Ordering::Relaxed);
        still.pages[1].store(5, Ordering::Relaxed);
        let volatile = scan.look_again(&sources).unwrap().unwrap();
        assert_eq!((volatile.looked_pages, volatile.changed_pages, volatile.pages), (5999, 4, 4));
        assert_eq!(scan.look_again(&sources[1..2]).unwrap(), None);
    }
}
