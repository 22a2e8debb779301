//! A VM's balloon as the host sees it: what the driver says it gave, against what the host has got.

use std::collections::BTreeMap;

use devices::virtio::balloon::{Counters, Handle, HintError, Tag};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use kernel_view::pagemap::PagemapError;
use memory::ram::Ram;
use memory::resident::page_count;

/// Why a balloon did not do what was asked.
#[derive(Debug, Error)]
pub enum BalloonError {
    /// There is none.
    #[error("this VM has no balloon")]
    None,
    /// The guest is smaller than that.
    #[error("a balloon of {pages} pages is not possible: the guest has {ram_pages} pages of memory")]
    TooLarge {
        /// What was asked for.
        pages: u32,
        /// What there is.
        ram_pages: u64,
    },
    /// Hinting was not possible.
    #[error(transparent)]
    Hinting(#[from] HintError),
    /// The guest cannot be asked for statistics.
    #[error(
        "the guest cannot be asked for statistics now: it has no balloon driver, has not answered the last time, or is paused"
    )]
    Unasked,
    /// The page table could not be read.
    #[error("cannot see what the host has of the balloon")]
    Pagemap(#[from] PagemapError),
}

/// How large a balloon is and should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonSize {
    /// Does a driver run it?
    pub driver: bool,
    /// The size the host wants, in pages of 4096 bytes.
    pub target_pages: u32,
    /// The size the driver says it has.
    pub actual_pages: u32,
}

impl BalloonSize {
    /// Asks `handle`.
    pub fn of(handle: &Handle) -> Self {
        Self {
            driver: handle.has_driver(),
            target_pages: handle.target_pages(),
            actual_pages: handle.actual_pages(),
        }
    }
}

/// How a balloon is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// Its sizes.
    #[serde(flatten)]
    pub size: BalloonSize,
    /// How often the guest has sent statistics.
    pub updates: u64,
    /// How long ago it has sent the latest, in seconds; absent if it never has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<f64>,
    /// The latest of them, by Firecracker's names; memory in bytes. The guest's word.
    pub guest: BTreeMap<String, u64>,
    /// What the host has seen for itself.
    pub host: BalloonHost,
}

impl BalloonStatus {
    /// What the guest could do without, by its own word.
    pub fn spare_bytes(&self) -> Option<u64> {
        ["available_memory", "free_memory"].iter().find_map(|name| self.guest.get(*name)).copied()
    }
}

/// What the host knows of a balloon without asking the guest. Pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonHost {
    /// Pages the driver has given and not taken back.
    pub held_pages: u64,
    /// Of these, pages without a frame: what the host really has back.
    pub absent_pages: u64,
    /// Of these, pages with a frame (or on swap) again: the guest has touched them, or the host
    /// kernel has put a huge page over them and their neighbours.
    pub touched_pages: u64,
    /// Of these, pages with a frame that the host cannot have: parts of huge pages of the pool of
    /// which the guest uses the rest.
    #[serde(default)]
    pub kept_pages: u64,
    /// Pages that were found so and dropped again, each time counted.
    pub swept_pages: u64,
    /// Pages given so far, each time counted.
    pub inflated_pages: u64,
    /// Pages taken back so far.
    pub deflated_pages: u64,
    /// Bytes dropped because of inflation.
    pub reclaimed_bytes: u64,
    /// Bytes dropped because of free page reporting.
    pub reported_bytes: u64,
    /// Bytes dropped because of free page hinting.
    pub hinted_bytes: u64,
    /// Times the host kernel would not drop a range.
    pub failed_discards: u64,
    /// Pages outside RAM and requests that made no sense.
    pub refused: u64,
}

impl BalloonHost {
    /// Reads the counters, and the page table where the balloon holds pages.
    pub fn of(handle: &Handle, ram: &Ram) -> Result<Self, PagemapError> {
        let Counters {
            inflated_pages,
            deflated_pages,
            reclaimed_bytes,
            swept_pages,
            reported_bytes,
            hinted_bytes,
            failed_discards,
            refused,
        } = handle.counters();
        let held = handle.held();
        let (whole, parts) = ram.units(&held);
        let held_pages = page_count(&held);
        let (touched_pages, kept_pages) =
            (page_count(&ram.resident(&whole)?), page_count(&ram.resident(&parts)?));
        Ok(Self {
            held_pages,
            absent_pages: held_pages - touched_pages - kept_pages,
            touched_pages,
            kept_pages,
            inflated_pages,
            deflated_pages,
            reclaimed_bytes,
            swept_pages,
            reported_bytes,
            hinted_bytes,
            failed_discards,
            refused,
        })
    }
}

impl BalloonStatus {
    /// Asks `handle` and the page table.
    pub fn of(handle: &Handle, ram: &Ram) -> Result<Self, PagemapError> {
        let statistics = handle.statistics();
        Ok(Self {
            size: BalloonSize::of(handle),
            updates: statistics.map_or(0, |s| s.updates),
            age_seconds: statistics.and_then(|s| s.age()).map(|age| age.as_secs_f64()),
            guest: statistics
                .iter()
                .flat_map(|s| Tag::ALL.iter().filter_map(|tag| Some((tag.name().to_owned(), s.get(*tag)?))))
                .collect(),
            host: BalloonHost::of(handle, ram)?,
        })
    }
}
