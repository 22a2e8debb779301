//! The pages of an array that a workload uses.

use core::ops::Range;

/// At most four ranges of pages, ascending and apart; some may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    ranges: [Range<u64>; 4],
}

impl InUse {
    /// These ranges, which are in ascending order and do not overlap.
    pub const fn new(ranges: [Range<u64>; 4]) -> Self {
        Self { ranges }
    }

    /// How many pages they have.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum()
    }

    /// The range that `page` is in.
    pub fn range_of(&self, page: u64) -> Option<&Range<u64>> {
        self.ranges.iter().find(|range| range.contains(&page))
    }

    /// Where the first range that begins after `page` begins; `u64::MAX` if none does.
    pub fn next_start(&self, page: u64) -> u64 {
        let starts = self.ranges.iter().filter(|range| !range.is_empty()).map(|range| range.start);
        starts.filter(|start| *start > page).min().unwrap_or(u64::MAX)
    }

    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }
}
