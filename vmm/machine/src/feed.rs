//! Feeds bytes from outside into a serial port, no faster than the guest reads them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use devices::legacy::serial::Serial;

use super::vcpu::Shared;

/// Bytes held back for a guest that does not read.
const PENDING_BYTES: usize = 64 << 10;

/// The way into one serial port.
pub struct Feed {
    serial: Arc<Mutex<Serial>>,
    shared: Arc<Shared>,
    pending: VecDeque<u8>,
}

impl Feed {
    /// A way into `serial` that wakes the vCPUs of `shared`.
    pub fn new(serial: Arc<Mutex<Serial>>, shared: Arc<Shared>) -> Self {
        Self { serial, shared, pending: VecDeque::new() }
    }

    /// How many bytes `push` takes now.
    pub fn room(&self) -> usize {
        PENDING_BYTES - self.pending.len()
    }

    /// Whether the port has got all that it was to get.
    pub fn is_read(&self) -> bool {
        self.pending.is_empty()
    }

    /// Takes bytes, at most [`Self::room`] of them, and gives the guest those that it has room for.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend(&bytes[..bytes.len().min(self.room())]);
        self.pump();
    }

    /// Gives the guest the bytes that it has room for; to be called when it has read.
    pub fn pump(&mut self) {
        let fed = {
            let mut serial = os::lock(&self.serial);
            let (front, _) = self.pending.as_slices();
            let take = front.len().min(serial.input_room());
            serial.input(&front[..take])
        };
        self.pending.drain(..fed);
        if fed > 0 {
            self.shared.input_arrived();
        }
    }
}
