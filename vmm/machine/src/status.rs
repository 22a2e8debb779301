//! What a VM reports of itself.

use kernel_view::smaps::SharePages;
use memory::Extent;
use serde::{Deserialize, Serialize};

use super::throttle::Throttled;

/// What a VM is.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Do its vCPUs run?
    pub paused: bool,
    /// vCPUs.
    pub vcpus: u8,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// The KVM it runs on, e.g. `svm+npt`.
    pub backend: String,
    /// Where guest RAM lies in the process.
    pub extents: Vec<Extent>,
    /// How its growth is paced.
    #[serde(default)]
    pub throttle: Throttled,
    /// Pages that are elsewhere in the process just now, to see whether they are touched. They have
    /// frames, which `/proc/PID/pagemap` does not show where they belong. There are none while it
    /// is paused.
    #[serde(default)]
    pub parked_pages: u64,
    /// Why output of its console, or messages of its process, are lost; None while they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_trouble: Option<String>,
    /// What the VM process has of the host's frames, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub frames: Option<SharePages>,
    /// The files that it has as memory, where that was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub pmem: Vec<PmemPages>,
    /// Why its kernel panicked, as its console says; None if it did not say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panic: Option<String>,
}

/// A file that a guest has as memory.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct PmemPages {
    /// Where the guest has it.
    pub gpa: u64,
    /// Its length there.
    pub bytes: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// The pages of it that are in the page table: the guest has touched them, or their neighbours. Their frames are the page cache's, which
    /// all guests of the file have in common.
    pub mapped_pages: u64,
}
