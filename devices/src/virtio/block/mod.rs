//! The block device (Virtio 1.2, section 5.2): one queue, over whole sectors of a file, a block device, or an overlay.
//!
//! Reading, writing (unless the disk is read-only), flushing, discarding, writing zeros, and the disk's name. Not offered: geometry,
//! topology, more than one queue, switching the write cache, secure erasure, zones.
//!
//! Data go between the file and guest memory without a copy in between, in a thread of the disk's own ([`worker`]): a slow disk holds up
//! nothing but the guest that waits for it.
//!
//! What a request may ask for is bounded by the configuration space: [`SEG_MAX`] segments of [`SIZE_MAX`] bytes, and of what is not moved
//! [`DISCARD_SECTORS`] and [`ZERO_SECTORS`].

mod medium;
mod overlay;
mod request;
mod worker;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueT};

pub use self::medium::Medium;
pub use self::overlay::{Overlay, OverlayError};
use self::request::Errors;
use self::worker::{Swap, Worker};
use super::drain::{Completion, drain};
use super::{Activation, Interrupt, Progress, RingError, VirtioDevice, place, read_at};
use crate::GuestMemory;
use crate::in_flight::InFlight;
use crate::lock::lock;
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
/// Most bytes of a request's data.
pub const MAX_REQUEST_BYTES: u32 = SEG_MAX * SIZE_MAX;

/// Most sectors of a range that is discarded: 1 GiB.
pub const DISCARD_SECTORS: u32 = 1 << 21;
/// Most ranges of a request to discard.
pub const DISCARD_RANGES: u32 = 16;
/// Most sectors of a range that is zeroed: 64 MiB, for some file systems must write them.
pub const ZERO_SECTORS: u32 = 1 << 17;
/// Most ranges of a request to write zeros.
pub const ZERO_RANGES: u32 = 1;
/// Linux keeps up to 128 requests in flight.
const QUEUE_SIZES: [u16; 1] = [128];

/// What is behind the device.
#[derive(Debug)]
pub struct Disk {
    /// Open for reading, and unless `read_only` for writing.
    pub medium: Medium,
    /// Its size.
    pub sectors: u64,
    /// Whether writing is refused.
    pub read_only: bool,
    /// Its name (VIRTIO_BLK_T_GET_ID), padded with zeros.
    pub id: [u8; ID_BYTES],
}

/// The device.
pub struct Block {
    worker: Worker,
    known: Arc<Known>,
    read_only: bool,
    active: Option<Active>,
    broken: Limited,
    #[cfg(test)]
    errors: Arc<Errors>,
}

/// What the device and its handle have.
#[derive(Debug)]
struct Known {
    sectors: AtomicU64,
    /// While there is a driver.
    interrupt: Mutex<Option<Interrupt>>,
}

struct Active {
    memory: Arc<GuestMemory>,
    queue: Option<Queue>,
    interrupt: Interrupt,
    /// Whether a write is finished once it is on stable storage: the driver knows of no flush (5.2.6.2).
    write_through: bool,
}

/// The host's way to a disk. Clones are the same way.
#[derive(Clone)]
pub struct Handle {
    swap: Swap,
    known: Arc<Known>,
    read_only: bool,
}

impl Handle {
    /// Puts `disk` in the place of the one that is there, for the requests after those in flight, and tells the driver of its size. Whether
    /// the driver may write stays as it is, for it has been told.
    pub fn replace(&self, disk: Disk) {
        self.known.sectors.store(disk.sectors, Ordering::SeqCst);
        self.swap.replace(Disk { read_only: self.read_only, ..disk });
        if let Some(interrupt) = &*lock(&self.known.interrupt) {
            interrupt.config_changed();
        }
    }

    /// Which blocks of the disk's overlay the guest has written, once all requests so far are carried out: bit *n* % 8 of byte *n* / 8 is
    /// that of block *n* of 4096 bytes. None of a disk without an overlay.
    pub fn written(&self, limit: Duration) -> io::Result<Option<Vec<u8>>> {
        self.swap.map(limit).map_err(|error| io::Error::new(io::ErrorKind::TimedOut, error))
    }
}

impl Block {
    /// A device over `disk` without a driver, its thread, and the host's way to it; `in_flight` hears of pages that the file is read into. The
    /// thread calls `confine` first.
    pub fn new(disk: Disk, in_flight: Box<dyn InFlight>, confine: fn()) -> io::Result<(Self, Handle)> {
        let errors = Arc::new(Errors::new());
        let read_only = disk.read_only;
        let known = Arc::new(Known { sectors: AtomicU64::new(disk.sectors), interrupt: Mutex::default() });
        let (worker, swap) = Worker::start(disk, in_flight, errors.clone(), confine)?;
        let handle = Handle { swap, known: known.clone(), read_only };
        let block = Self {
            worker,
            known,
            read_only,
            active: None,
            broken: Limited::new("virtio-block: broken request"),
            #[cfg(test)]
            errors,
        };
        Ok((block, handle))
    }

    /// The part of the configuration space that has a meaning with the features offered, up to `write_zeroes_may_unmap`; without a
    /// geometry and a topology.
    fn config(&self) -> [u8; 60] {
        let sectors = self.known.sectors.load(Ordering::SeqCst);
        let mut config = [0; 60];
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(8, SIZE_MAX);
        put(12, SEG_MAX);
        put(20, SECTOR_BYTES as u32);
        if !self.read_only {
            put(36, DISCARD_SECTORS);
            put(40, DISCARD_RANGES);
            // The alignment that is best, in sectors: a block of a file system.
            put(44, 8);
            put(48, ZERO_SECTORS);
            put(52, ZERO_RANGES);
            put(56, 1);
        }
        config
    }

    /// Tells the driver of requests that are finished.
    fn complete(&mut self) -> Result<(), RingError> {
        let finished = self.worker.finished();
        let Some(Active { memory, queue: Some(queue), interrupt, .. }) = &mut self.active else {
            return Ok(());
        };
        if finished.is_empty() {
            return Ok(());
        }
        for request in &finished {
            queue.add_used(&**memory, request.head, request.written)?;
        }
        interrupt.used_buffers(queue, memory)
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
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        always
            | match self.read_only {
                true => 1 << VIRTIO_BLK_F_RO,
                false => 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
            }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_at(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) {
        *lock(&self.known.interrupt) = Some(activation.interrupt.clone());
        self.active = Some(Active {
            memory: activation.memory,
            queue: activation.queues.pop().flatten(),
            interrupt: activation.interrupt,
            write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
        });
    }

    fn process_queue(&mut self, _index: usize) -> Result<Progress, RingError> {
        self.complete()?;
        let worker = &mut self.worker;
        let Some(Active { memory, queue: Some(queue), interrupt, write_through }) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        if !worker.has_room() {
            return Ok(Progress::Idle);
        }
        let progress = drain(queue, memory, interrupt, &self.broken, |chain| {
            worker.give(chain, memory, *write_through);
            match worker.has_room() {
                true => Completion::Held,
                false => Completion::HeldLast,
            }
        })?;
        // Without room, what is finished is what goes on.
        Ok(if worker.has_room() { progress } else { Progress::Idle })
    }

    fn source(&self) -> Option<(BorrowedFd<'_>, usize)> {
        Some((self.worker.event(), 0))
    }

    /// What is in flight has been written to memory, or never will be. Waits for the disk, on the thread of the vCPU that resets.
    fn reset(&mut self) {
        *lock(&self.known.interrupt) = None;
        self.worker.abandon();
        self.active = None;
    }

    fn quiesce(&mut self, limit: Instant) -> Result<bool, RingError> {
        let is_quiet = self.worker.wait(Some(limit));
        self.complete()?;
        Ok(is_quiet)
    }

    fn queue_place(&self, _index: usize) -> Option<(u16, u16)> {
        place(self.active.as_ref()?.queue.as_ref())
    }
}

#[cfg(test)]
mod tests;
