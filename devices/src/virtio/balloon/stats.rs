//! What the guest says of its memory (Virtio 1.2, section 5.5.6.3).

/// A statistic. The numbers are VIRTIO_BALLOON_S_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each has the name the specification gives it")]
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
    values: [Option<u64>; Tag::ALL.len()],
}

impl Statistics {
    /// A value, if the guest has ever given it. Memory is in bytes, events are counted since the guest's boot.
    pub fn get(&self, tag: Tag) -> Option<u64> {
        self.values[tag as usize]
    }
}
