//! The balloon device (Virtio 1.2, section 5.5): the guest gives pages back to the host and takes them again.

mod state;
mod stats;

pub use state::{Counters, Handle, HintError, HintStatus};
pub use stats::{Statistics, Tag};

use super::{Activation, Progress, RingError, VirtioDevice};
use crate::GuestMemory;
use crate::reclaim::Reclaim;

/// What a balloon offers; fixed once it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Target at the start, in pages of 4096 bytes.
    pub target_pages: u32,
    /// Let the guest take pages back when it runs out of memory (VIRTIO_BALLOON_F_DEFLATE_ON_OOM).
    pub deflate_on_oom: bool,
    /// Offer the statistics queue (VIRTIO_BALLOON_F_STATS_VQ).
    pub statistics: bool,
    /// Offer free page hinting (VIRTIO_BALLOON_F_FREE_PAGE_HINT).
    pub hinting: bool,
    /// Offer free page reporting (VIRTIO_BALLOON_F_REPORTING).
    pub reporting: bool,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    handle: Handle,
}

impl Balloon {
    /// A balloon over `memory` that gives pages back through `reclaim`, and the host's way to it.
    pub fn new(config: Config, memory: &GuestMemory, reclaim: Box<dyn Reclaim>) -> (Self, Handle) {
        let _ = (memory, reclaim);
        let handle = Handle::new(config);
        (Self { handle: handle.clone() }, handle)
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 256]
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, _activation: Activation) {}

    fn process_queue(&mut self, _index: usize) -> Result<Progress, RingError> {
        Ok(Progress::Idle)
    }

    fn reset(&mut self) {
        let _ = &self.handle;
    }
}
