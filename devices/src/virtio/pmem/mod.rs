//! The persistent memory device (Virtio 1.2, section 5.19): where a file lies in guest-physical space, and one queue for flushes.
//!
//! The guest reads and writes the file by itself: its pages are those of the host's page cache, mapped as guest memory. So guests of one file
//! have one copy of it. Nothing here touches that memory.
//!
//! A flush is answered after fsync(2) of the file, in a thread of the device's own ([`super::worker`]). Guests that may only read the file are
//! told of no error, and cause no work.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use super::served::Served;
use super::worker::Server;
use super::{Activation, Chain, Progress, RingError, VirtioDevice, read_at};
use crate::state::{DeviceState, RestoreError};
use crate::warn::Limited;

/// What kind of device it is (Virtio 1.2, section 5).
pub const DEVICE_ID: u32 = VIRTIO_ID_PMEM;
/// What the range has to be a multiple of, in place and length: Linux maps it by huge pages.
pub const ALIGN_BYTES: u64 = 2 << 20;

/// Linux keeps one flush in flight for each thread that syncs.
const QUEUE_SIZES: [u16; 1] = [64];
/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// Answers.
const DONE: u32 = 0;
const REFUSED: u32 = u32::MAX;

/// The device.
pub struct Pmem {
    served: Served<Service>,
    start: u64,
    bytes: u64,
}

impl Pmem {
    /// A device without a driver, over `bytes` from guest-physical address `start` on, where `file` is mapped: None if it is only read. Its
    /// thread calls `confine` first.
    pub fn new(start: u64, bytes: u64, file: Option<File>, confine: fn()) -> io::Result<Self> {
        let service = Service {
            file,
            malformed: Limited::new("virtio-pmem: request without a type, or without a place for its answer"),
            unknown: Limited::new("virtio-pmem: request of an unknown type"),
            failed: Limited::new("virtio-pmem: the file cannot be flushed"),
        };
        let (served, _) = Served::start(service, confine, Limited::new("virtio-pmem: broken request"))?;
        Ok(Self { served, start, bytes })
    }

    fn config(&self) -> [u8; 16] {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.start.to_le_bytes());
        config[8..].copy_from_slice(&self.bytes.to_le_bytes());
        config
    }
}

impl VirtioDevice for Pmem {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_at(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.served.activate(activation, false);
    }

    fn process_queue(&mut self, _index: usize) -> Result<Progress, RingError> {
        self.served.process()
    }

    fn source(&self) -> Option<(BorrowedFd<'_>, usize)> {
        Some((self.served.event(), 0))
    }

    fn reset(&mut self) {
        self.served.reset();
    }

    fn quiesce(&mut self, limit: Instant) -> Result<bool, RingError> {
        self.served.quiesce(limit)
    }

    fn queue_place(&self, _index: usize) -> Option<(u16, u16)> {
        self.served.place()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Pmem { start: self.start, bytes: self.bytes }
    }

    /// The guest goes on with the file where it was, and as long as it was.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match *state {
            DeviceState::Pmem { start, bytes } if (start, bytes) == (self.start, self.bytes) => Ok(()),
            DeviceState::Pmem { start, bytes } => {
                let expected = (self.start, self.bytes);
                Err(RestoreError::Pmem { found: (start, bytes), expected })
            }
            _ => Err(RestoreError::Kind { device: DEVICE_ID }),
        }
    }
}

/// What flushes are carried out with.
struct Service {
    file: Option<File>,
    malformed: Limited,
    unknown: Limited,
    failed: Limited,
}

impl Server for Service {
    fn serve(&mut self, _write_through: bool, chain: &mut Chain<'_>) -> u32 {
        let mut kind = [0; 4];
        if chain.writable_bytes() < 4 || chain.read(&mut kind) < kind.len() {
            self.malformed.hit(format_args!(
                "{} readable and {} writable bytes",
                chain.readable_bytes(),
                chain.writable_bytes()
            ));
            return 0;
        }
        let answer = match u32::from_le_bytes(kind) {
            FLUSH => self.flush(),
            other => {
                self.unknown.hit(format_args!("type {other:#x}"));
                REFUSED
            }
        };
        chain.write(&answer.to_le_bytes()) as u32
    }
}

impl Service {
    fn flush(&self) -> u32 {
        match self.file.as_ref().map_or(Ok(()), File::sync_all) {
            Ok(()) => DONE,
            Err(error) => {
                self.failed.hit(format_args!("{error}"));
                REFUSED
            }
        }
    }
}

#[cfg(test)]
mod tests;
