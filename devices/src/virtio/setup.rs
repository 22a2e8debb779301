//! A queue as the driver describes it, before it is believed.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::GuestMemory;

/// Plain numbers from the guest, checked once, in [`QueueSetup::build`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueSetup {
    pub(super) size: u32,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
    pub(super) ready: bool,
}

/// What is wrong with a queue that the driver called ready.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetupError {
    #[error("queue size {size} is not a power of two from 1 to {max}")]
    Size { size: u32, max: u16 },
    #[error(transparent)]
    Ring(#[from] virtio_queue::Error),
    #[error(
        "a ring is outside RAM: descriptors at {desc:#x}, available {avail:#x}, used {used:#x}, size {size}"
    )]
    OutsideRam { desc: u64, avail: u64, used: u64, size: u32 },
}

impl QueueSetup {
    /// Makes the queue that the numbers describe, if they describe one.
    pub(super) fn build(&self, max: u16, event_idx: bool, memory: &GuestMemory) -> Result<Queue, SetupError> {
        let wrong_size = SetupError::Size { size: self.size, max };
        let Ok(size) = u16::try_from(self.size) else {
            return Err(wrong_size);
        };
        let mut queue = Queue::new(max)?;
        queue.try_set_size(size).map_err(|_| wrong_size)?;
        queue.try_set_desc_table_address(GuestAddress(self.desc_table))?;
        queue.try_set_avail_ring_address(GuestAddress(self.avail_ring))?;
        queue.try_set_used_ring_address(GuestAddress(self.used_ring))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // virtio-queue takes an available ring at 0 for a queue that was never set up.
        if self.avail_ring == 0 || !queue.is_valid(memory) {
            return Err(SetupError::OutsideRam {
                desc: self.desc_table,
                avail: self.avail_ring,
                used: self.used_ring,
                size: self.size,
            });
        }
        Ok(queue)
    }
}
