//! Which pages of guest RAM have frames.

use std::ops::Range;

use super::page::to_usize;
use super::ram::Ram;
use super::{Gpa, PAGE_BYTES};
use kernel_view::pagemap::{Pagemap, PagemapError};

impl Ram {
    /// The pages in `ranges` that have a frame, or are on swap, in the same order, adjacent ones
    /// together. A range that is not in one stretch of RAM has none.
    pub fn resident(&self, ranges: &[Range<Gpa>]) -> Result<Vec<Range<Gpa>>, PagemapError> {
        let (mut pagemap, mut entries) = (Pagemap::open_self()?, Vec::new());
        let mut resident: Vec<Range<Gpa>> = Vec::new();
        for range in ranges {
            let Some(here) = self.range_at(range) else { continue };
            pagemap.read(here.hva(), to_usize(here.pages().pages()), &mut entries)?;
            for (n, _) in (0..).zip(&entries).filter(|(_, entry)| entry.present() || entry.swapped()) {
                let start = Gpa(range.start.0 + n * PAGE_BYTES);
                let end = Gpa(start.0 + PAGE_BYTES);
                match resident.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => resident.push(start..end),
                }
            }
        }
        Ok(resident)
    }
}

/// How many pages all of `ranges` have.
pub fn page_count(ranges: &[Range<Gpa>]) -> u64 {
    ranges.iter().map(|range| (range.end.0 - range.start.0) / PAGE_BYTES).sum()
}
