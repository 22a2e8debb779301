//! The block device (Virtio 1.2, section 5.2): one queue, over a regular file of whole sectors.
//!
//! Reading, writing (unless the disk is read-only), flushing, and the disk's name. Not offered: geometry, topology, more than one
//! queue, switching the write cache, discarding, writing zeros, zones.
//!
//! Data go between the file and guest memory without a copy in between, by read(2) and write(2) in the thread that processes the
//! queue. So a slow file holds up what else that thread serves: the event loop of this VM, and of no other.
//!
//! What a request may ask for is bounded by the configuration space: [`SEG_MAX`] segments of [`SIZE_MAX`] bytes.

mod request;

use std::fs::File;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Queue;

use self::request::{Errors, Served};
use super::drain::{Completion, drain};
use super::{Activation, Interrupt, Progress, RingError, VirtioDevice, place, read_at};
use crate::GuestMemory;
use crate::in_flight::InFlight;
use crate::warn::Limited;

/// What kind of device it is (Virtio 1.2, section 5).
pub const DEVICE_ID: u32 = VIRTIO_ID_BLOCK;
/// Bytes of a sector: what requests count in, and the block size in the configuration space.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a disk's name.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most segments of a request, besides its header and its status.
pub const SEG_MAX: u32 = 64;
/// Most bytes of a segment.
pub const SIZE_MAX: u32 = 16 << 10;
/// Most bytes of a request's data; after as many, other queues get their turn.
pub const MAX_REQUEST_BYTES: u32 = SEG_MAX * SIZE_MAX;

/// Linux keeps up to 128 requests in flight.
const QUEUE_SIZES: [u16; 1] = [128];

/// What is behind the device.
#[derive(Debug)]
pub struct Disk {
    /// A regular file, open for reading, and unless `read_only` for writing. Its position is the device's.
    pub file: File,
    /// Its size.
    pub sectors: u64,
    /// Whether writing is refused.
    pub read_only: bool,
    /// Its name (VIRTIO_BLK_T_GET_ID), padded with zeros.
    pub id: [u8; ID_BYTES],
}

/// The device.
pub struct Block {
    disk: Disk,
    in_flight: Box<dyn InFlight>,
    active: Option<Active>,
    broken: Limited,
    errors: Arc<Errors>,
}

struct Active {
    memory: Arc<GuestMemory>,
    queue: Option<Queue>,
    interrupt: Interrupt,
    /// Whether a write is finished once it is on stable storage: the driver knows of no flush (5.2.6.2).
    write_through: bool,
}

impl Block {
    /// A device over `disk` without a driver; `in_flight` hears of pages that the file is read into.
    pub fn new(disk: Disk, in_flight: Box<dyn InFlight>) -> Self {
        Self {
            disk,
            in_flight,
            active: None,
            broken: Limited::new("virtio-block: broken request"),
            errors: Arc::new(Errors::new()),
        }
    }

    /// The part of the configuration space that has a meaning with the features offered: `capacity`, `size_max`, `seg_max`,
    /// `geometry` (none) and `blk_size`.
    fn config(&self) -> [u8; 24] {
        let mut config = [0; 24];
        config[..8].copy_from_slice(&self.disk.sectors.to_le_bytes());
        config[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        config
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let kind = if self.disk.read_only { VIRTIO_BLK_F_RO } else { VIRTIO_BLK_F_FLUSH };
        1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << kind
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_at(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) {
        self.active = Some(Active {
            memory: activation.memory,
            queue: activation.queues.pop().flatten(),
            interrupt: activation.interrupt,
            write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
        });
    }

    fn process_queue(&mut self, _index: usize) -> Result<Progress, RingError> {
        let Some(Active { memory, queue: Some(queue), interrupt, write_through }) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        let (disk, in_flight, errors) = (&self.disk, &*self.in_flight, &self.errors);
        let (mut turn_bytes, write_through) = (0, *write_through);
        drain(queue, memory, interrupt, &self.broken, |chain| {
            let Served { written, moved_bytes, slow } =
                request::serve(disk, write_through, in_flight, chain, errors);
            turn_bytes += moved_bytes;
            match slow || turn_bytes >= MAX_REQUEST_BYTES {
                true => Completion::Last(written),
                false => Completion::Written(written),
            }
        })
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_place(&self, _index: usize) -> Option<(u16, u16)> {
        place(self.active.as_ref()?.queue.as_ref())
    }
}

#[cfg(test)]
mod tests;
