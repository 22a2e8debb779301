//! What a balloon offers: its feature bits, and which queue has which index.

use serde::{Deserialize, Serialize};

/// The driver tells before it uses a page from the balloon. Always offered.
pub(super) const MUST_TELL_HOST: u64 = 1 << 0;
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const FREE_PAGE_HINT: u64 = 1 << 3;
/// The driver says what it fills free pages with. Always offered.
pub(super) const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

/// What a request is, by the queue it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A list of PFNs that the driver gives.
    Inflate,
    /// A list of PFNs that it takes back.
    Deflate,
    /// A command ID, or free pages that the host asked for.
    Hint,
    /// Pages that are free now.
    Report,
}

/// What a balloon offers; fixed once it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Target at the start, in pages of 4096 bytes.
    pub target_pages: u32,
    /// Let the guest take pages back when it runs out of memory (VIRTIO_BALLOON_F_DEFLATE_ON_OOM).
    /// The driver does all of it; the host sees deflated pages and a lower `actual`.
    pub deflate_on_oom: bool,
    /// Offer the statistics queue (VIRTIO_BALLOON_F_STATS_VQ).
    pub statistics: bool,
    /// Offer free page hinting (VIRTIO_BALLOON_F_FREE_PAGE_HINT).
    #[serde(rename = "free_page_hinting")]
    pub hinting: bool,
    /// Offer free page reporting (VIRTIO_BALLOON_F_REPORTING).
    #[serde(rename = "free_page_reporting")]
    pub reporting: bool,
}

impl Config {
    /// The feature bits offered.
    pub(super) fn features(&self) -> u64 {
        let optional = [
            (self.statistics, STATS_VQ),
            (self.deflate_on_oom, DEFLATE_ON_OOM),
            (self.hinting, FREE_PAGE_HINT),
            (self.reporting, REPORTING),
        ];
        let offered = optional.iter().filter(|(on, _)| *on).fold(0, |bits, (_, bit)| bits | bit);
        offered | MUST_TELL_HOST | PAGE_POISON
    }

    /// What each queue is for, by index, under these features; None is the statistics queue.
    ///
    /// The specification numbers the queues 0 to 4, but drivers give the next number to the next
    /// queue whose feature was negotiated (Linux in `init_vqs` and its transports' `find_vqs`), and
    /// so do devices.
    pub(super) fn queue_kinds(&self, features: u64) -> impl Iterator<Item = Option<Kind>> {
        [
            (0, Some(Kind::Inflate)),
            (0, Some(Kind::Deflate)),
            (STATS_VQ, None),
            (FREE_PAGE_HINT, Some(Kind::Hint)),
            (REPORTING, Some(Kind::Report)),
        ]
        .into_iter()
        .filter(move |(needs, _)| features & needs == *needs)
        .map(|(_, kind)| kind)
    }
}
