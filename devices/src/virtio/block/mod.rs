//! The block device (Virtio 1.2, section 5.2): one queue, over whole sectors of a file, a block device, or an overlay.
//!
//! Reading, writing (unless the disk is read-only), flushing, discarding, writing zeros, and the disk's name. Not offered: geometry,
//! topology, more than one queue, switching the write cache, secure erasure, zones.
//!
//! Data go between the file and guest memory without a copy in between, in a thread of the disk's own ([`super::worker`]): a slow disk holds up
//! nothing but the guest that waits for it.
//!
//! What a request may ask for is bounded by the configuration space: [`SEG_MAX`] segments of [`SIZE_MAX`] bytes, and of what is not moved
//! [`DISCARD_SECTORS`] and [`ZERO_SECTORS`].

mod disk;
mod medium;
mod overlay;
mod request;
mod zeros;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use self::disk::{
    DISCARD_RANGES, DISCARD_SECTORS, Disk, ID_BYTES, MAX_REQUEST_BYTES, SECTOR_BYTES, SEG_MAX, SIZE_MAX,
    ZERO_RANGES, ZERO_SECTORS,
};
pub use self::medium::Medium;
pub use self::overlay::{Overlay, OverlayError};
use self::request::{Errors, Service};
use super::served::Served;
use super::worker::Changer;
use super::{Activation, Interrupt, Progress, RingError, VirtioDevice, read_at};
use crate::in_flight::InFlight;
use crate::lock::lock;
use crate::warn::Limited;

/// What kind of device it is (Virtio 1.2, section 5).
pub const DEVICE_ID: u32 = VIRTIO_ID_BLOCK;
/// Linux keeps up to 128 requests in flight.
const QUEUE_SIZES: [u16; 1] = [128];

/// The device.
pub struct Block {
    served: Served<Service>,
    known: Arc<Known>,
    read_only: bool,
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

/// The host's way to a disk. Clones are the same way.
#[derive(Clone)]
pub struct Handle {
    changer: Changer<Service>,
    known: Arc<Known>,
    read_only: bool,
}

impl Handle {
    /// Puts `disk` in the place of the one that is there, for the requests after those in flight, and tells the driver of its size. Whether
    /// the driver may write stays as it is, for it has been told.
    pub fn replace(&self, disk: Disk) {
        self.known.sectors.store(disk.sectors, Ordering::SeqCst);
        let disk = Disk { read_only: self.read_only, ..disk };
        self.changer.change(|service| service.disk = disk);
        if let Some(interrupt) = &*lock(&self.known.interrupt) {
            interrupt.config_changed();
        }
    }

    /// Which blocks of the disk's overlay the guest has written, once all requests so far are carried out: bit *n* % 8 of byte *n* / 8 is
    /// that of block *n* of 4096 bytes. None of a disk without an overlay.
    pub fn written(&self, limit: Duration) -> io::Result<Option<Vec<u8>>> {
        let map = self.changer.ask(limit, |service| service.disk.medium.map());
        map.map_err(|error| io::Error::new(io::ErrorKind::TimedOut, error))
    }
}

impl Block {
    /// A device over `disk` without a driver, its thread, and the host's way to it; `in_flight` marks pages that the file is read into. The
    /// thread calls `confine` first.
    pub fn new(disk: Disk, in_flight: Box<dyn InFlight>, confine: fn()) -> io::Result<(Self, Handle)> {
        let errors = Arc::new(Errors::new());
        let read_only = disk.read_only;
        let known = Arc::new(Known { sectors: AtomicU64::new(disk.sectors), interrupt: Mutex::default() });
        let service = Service { disk, in_flight, errors: errors.clone() };
        let (served, changer) =
            Served::start(service, confine, Limited::new("virtio-block: broken request"))?;
        let handle = Handle { changer, known: known.clone(), read_only };
        let block = Self {
            served,
            known,
            read_only,
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

    fn activate(&mut self, activation: Activation) {
        *lock(&self.known.interrupt) = Some(activation.interrupt.clone());
        // The driver may know of no flush (5.2.6.2).
        let write_through = activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        self.served.activate(activation, write_through);
    }

    fn process_queue(&mut self, _index: usize) -> Result<Progress, RingError> {
        self.served.process()
    }

    fn source(&self) -> Option<(BorrowedFd<'_>, usize)> {
        Some((self.served.event(), 0))
    }

    /// Waits for the disk, on the thread of the vCPU that resets.
    fn reset(&mut self) {
        *lock(&self.known.interrupt) = None;
        self.served.reset();
    }

    fn quiesce(&mut self, limit: Instant) -> Result<bool, RingError> {
        self.served.quiesce(limit)
    }

    fn queue_place(&self, _index: usize) -> Option<(u16, u16)> {
        self.served.place()
    }
}

#[cfg(test)]
mod tests;
