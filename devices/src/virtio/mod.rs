//! Virtio 1.2 devices: what a device is ([`VirtioDevice`]), what it gets when the driver is ready
//! ([`Activation`]), the transport ([`mmio`]) and the ring loop ([`drain`]).
//!
//! Only split virtqueues. Packed rings, queue reset and shared memory regions are not offered.

pub mod balloon;
pub mod block;
mod chain;
pub mod drain;
mod gather;
mod interrupt;
pub mod mmio;
pub mod net;
pub mod pmem;
mod ring_error;
pub mod rng;
mod served;
mod setup;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
mod worker;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use crate::GuestMemory;
use crate::rate_limiter::Limiter;
use crate::state::{DeviceState, RestoreError};

pub use chain::{Buffer, Chain};
pub use interrupt::Interrupt;
pub use ring_error::RingError;

/// What the transport and the ring loop offer for every device, as a feature mask.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Whether a pass over a queue left work behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The queue is empty; the next notification will come from the driver.
    Idle,
    /// A turn is over, by the bound on passes or by the device's own, and there may be more. No
    /// notification will come: process again.
    More,
    /// A rate limit holds back what there is, for this long: process again then.
    Later(Duration),
}

/// A virtio device behind a transport.
///
/// Order: `activate` once the driver is ready; then `process_queue`, any number of times; `reset`
/// at any time, after which only `activate` brings it back. Configuration space may be accessed in
/// any state. Every method runs under the transport's lock, on a vCPU's thread or the event loop's.
pub trait VirtioDevice: Send {
    /// The virtio device ID (Virtio 1.2, section 5).
    fn device_id(&self) -> u32;

    /// For each queue the largest size offered: a power of two, at most 32768. Constant.
    fn queue_max_sizes(&self) -> &[u16];

    /// Device-specific feature bits (0 to 23, 50 and up); the transport adds
    /// [`TRANSPORT_FEATURES`]. Constant.
    fn features(&self) -> u64;

    /// Reads device configuration space. Bytes outside of it are left as they are (the transport
    /// zeroes them).
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    /// Writes device configuration space. Writes outside of it, or to read-only fields, are
    /// ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set DRIVER_OK.
    fn activate(&mut self, activation: Activation);

    /// The driver has made buffers available in queue `index`, which is ready.
    ///
    /// On an error the ring itself cannot be used any more: the transport sets DEVICE_NEEDS_RESET,
    /// and calls nothing but `reset` until the driver does that.
    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError>;

    /// What becomes readable when the host has something for a queue, and that queue's index: it is
    /// processed then, as if the driver had notified. Watched edge-triggered. Constant.
    fn source(&self) -> Option<(BorrowedFd<'_>, usize)> {
        None
    }

    /// Forget the activation: drop queues and memory, stop everything in flight before returning.
    fn reset(&mut self);

    /// Finish what is in flight and tell the driver of it, for at most until `limit`; nothing new
    /// is begun. False if something still is in flight then. The vCPUs stand still.
    fn quiesce(&mut self, _limit: Instant) -> Result<bool, RingError> {
        Ok(true)
    }

    /// How far it has got in queue `index`: the next entries of the available and of the used ring.
    /// None while it has no such queue.
    fn queue_place(&self, index: usize) -> Option<(u16, u16)>;

    /// What it knows besides its queues and what `activate` tells it.
    fn save(&self) -> DeviceState {
        DeviceState::Nothing
    }

    /// Knows this from now on; called after `activate`, if the driver was ready.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Nothing => Ok(()),
            _ => Err(RestoreError::Kind { device: self.device_id() }),
        }
    }
}

/// The limiters of a device in a captured state: nothing, where nothing is limited.
fn save_limiters(limiters: &[&Limiter]) -> DeviceState {
    let all: Vec<_> = limiters.iter().map(|limiter| limiter.save()).collect();
    match all.iter().all(Option::is_none) {
        true => DeviceState::Nothing,
        false => DeviceState::Limiters(all),
    }
}

/// And back. Without any they stay as they are.
fn restore_limiters(device: u32, limiters: &[&Limiter], state: &DeviceState) -> Result<(), RestoreError> {
    match state {
        DeviceState::Nothing => Ok(()),
        DeviceState::Limiters(all) if all.len() == limiters.len() => {
            for (limiter, state) in limiters.iter().zip(all) {
                limiter.restore(&state.unwrap_or_default());
            }
            Ok(())
        }
        _ => Err(RestoreError::Kind { device }),
    }
}

/// Reads any part of a configuration space; what is outside of it is left as it is.
fn read_at(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// How far a device has got in a queue.
fn place(queue: Option<&Queue>) -> Option<(u16, u16)> {
    queue.map(|queue| (queue.next_avail(), queue.next_used()))
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// By queue index; None where the driver did not make the queue ready. Each queue given has
    /// been checked: its size is a power of two within the maximum and its rings are aligned and
    /// inside RAM.
    pub queues: Vec<Option<Queue>>,
    /// Features that both sides agreed on, [`TRANSPORT_FEATURES`] included.
    pub features: u64,
    /// How the device tells the driver that something happened.
    pub interrupt: Interrupt,
}
