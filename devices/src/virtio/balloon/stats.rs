//! What the guest says of its memory (Virtio 1.2, section 5.5.6.3), and when it said so.

use std::time::{Duration, Instant};

/// Bytes of an entry in the queue's buffer: a tag of 16 bits and a value of 64, little-endian, not
/// padded.
pub(super) const ENTRY_BYTES: usize = 10;
/// Entries looked at in one buffer. A driver sends each tag at most once.
pub(super) const MAX_ENTRIES: usize = 64;

/// A statistic. The numbers are VIRTIO_BALLOON_S_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Tag {
    SwapIn = 0,
    SwapOut = 1,
    MajorFaults = 2,
    MinorFaults = 3,
    FreeMemory = 4,
    TotalMemory = 5,
    AvailableMemory = 6,
    DiskCaches = 7,
    HugetlbAllocations = 8,
    HugetlbFailures = 9,
    OomKill = 10,
    AllocStall = 11,
    AsyncScan = 12,
    DirectScan = 13,
    AsyncReclaim = 14,
    DirectReclaim = 15,
}

impl Tag {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::SwapIn,
        Self::SwapOut,
        Self::MajorFaults,
        Self::MinorFaults,
        Self::FreeMemory,
        Self::TotalMemory,
        Self::AvailableMemory,
        Self::DiskCaches,
        Self::HugetlbAllocations,
        Self::HugetlbFailures,
        Self::OomKill,
        Self::AllocStall,
        Self::AsyncScan,
        Self::DirectScan,
        Self::AsyncReclaim,
        Self::DirectReclaim,
    ];

    /// Its key in Firecracker's API: `swap_in`, `free_memory`, ...
    pub fn name(self) -> &'static str {
        match self {
            Self::SwapIn => "swap_in",
            Self::SwapOut => "swap_out",
            Self::MajorFaults => "major_faults",
            Self::MinorFaults => "minor_faults",
            Self::FreeMemory => "free_memory",
            Self::TotalMemory => "total_memory",
            Self::AvailableMemory => "available_memory",
            Self::DiskCaches => "disk_caches",
            Self::HugetlbAllocations => "hugetlb_allocations",
            Self::HugetlbFailures => "hugetlb_failures",
            Self::OomKill => "oom_kill",
            Self::AllocStall => "alloc_stall",
            Self::AsyncScan => "async_scan",
            Self::DirectScan => "direct_scan",
            Self::AsyncReclaim => "async_reclaim",
            Self::DirectReclaim => "direct_reclaim",
        }
    }
}

/// The latest statistics. They are the guest's word: any value is possible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// How often the guest has sent some.
    pub updates: u64,
    /// When it has done so last.
    updated: Option<Instant>,
    values: [Option<u64>; Tag::ALL.len()],
}

impl Statistics {
    /// A value, if the guest has ever given it. Memory is in bytes, events are counted since the
    /// guest's boot.
    pub fn get(&self, tag: Tag) -> Option<u64> {
        self.values[tag as usize]
    }

    /// The values that there are, in the order of their tags.
    pub fn iter(&self) -> impl Iterator<Item = (Tag, u64)> + '_ {
        Tag::ALL.into_iter().filter_map(|tag| Some((tag, self.get(tag)?)))
    }

    /// How long ago the guest has sent some; None if it never has.
    pub fn age(&self) -> Option<Duration> {
        self.updated.map(|at| at.elapsed())
    }

    /// Counts one update: the values replace those of the same tag, the others stay.
    pub fn merge(&mut self, values: impl IntoIterator<Item = (Tag, u64)>) {
        self.updates += 1;
        self.updated = Some(Instant::now());
        for (tag, value) in values {
            self.values[tag as usize] = Some(value);
        }
    }
}

/// The entries of a statistics buffer, None for one whose tag is not known or that is cut short.
pub(super) fn entries(buffer: &[u8]) -> impl Iterator<Item = Option<(Tag, u64)>> + '_ {
    buffer.chunks(ENTRY_BYTES).map(|entry| {
        let (tag, value) = entry.split_first_chunk()?;
        let tag = Tag::ALL.get(usize::from(u16::from_le_bytes(*tag)))?;
        Some((*tag, u64::from_le_bytes(value.try_into().ok()?)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat()
    }

    #[test]
    fn tags_are_their_numbers() {
        for (number, tag) in Tag::ALL.into_iter().enumerate() {
            assert_eq!(tag as usize, number);
        }
    }

    #[test]
    fn entries_are_ten_bytes_each() {
        let buffer =
            [entry(4, u64::MAX - 1), entry(16, 1), entry(u16::MAX, 2), entry(0, 3), vec![1; 9]].concat();
        let found: Vec<_> = entries(&buffer).collect();
        assert_eq!(found, [Some((Tag::FreeMemory, u64::MAX - 1)), None, None, Some((Tag::SwapIn, 3)), None]);
        assert_eq!(entries(&[]).count(), 0);
    }

    #[test]
    fn later_values_replace_earlier_ones() {
        let mut statistics = Statistics::default();
        assert_eq!((statistics.iter().count(), statistics.age()), (0, None));
        statistics.merge([(Tag::FreeMemory, 1), (Tag::OomKill, 2), (Tag::FreeMemory, 3)]);
        statistics.merge([(Tag::SwapIn, 4), (Tag::OomKill, 5)]);
        let all: Vec<_> = statistics.iter().collect();
        assert_eq!(all, [(Tag::SwapIn, 4), (Tag::FreeMemory, 3), (Tag::OomKill, 5)]);
        assert_eq!((statistics.updates, statistics.get(Tag::DiskCaches)), (2, None));
        let before = statistics.age().expect("it was updated");
        std::thread::sleep(Duration::from_millis(2));
        assert!(statistics.age() > Some(before), "it grows until the next update");
    }
}
