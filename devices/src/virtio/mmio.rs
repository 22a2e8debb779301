//! The virtio-mmio transport, version 2 (Virtio 1.2, section 4.2).
//!
//! The status machine is strict. A driver walks ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK; the
//! first two may come in one write, the last two each need their own. Features are accepted only
//! between DRIVER and FEATURES_OK, queues are set up only between FEATURES_OK and DRIVER_OK. What
//! breaks that order sets DEVICE_NEEDS_RESET, after which nothing is processed until the driver
//! writes 0 to Status, which works at any time. What merely makes no sense (an unknown register, a
//! wrong width, a queue that does not exist, an early notification) is ignored. Both are counted.
//!
//! Legacy (version 1) drivers, queue reset and shared memory regions are not supported.

mod halves;
mod registers;
mod saved;

use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio as reg;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use self::halves::{set_high, set_low};
use super::setup::QueueSetup;
use super::{Activation, Interrupt, Progress, TRANSPORT_FEATURES, VirtioDevice};
use crate::GuestMemory;
use crate::interrupt::IrqLine;
use crate::warn::Limited;

/// Bytes of the register window.
pub const MMIO_LEN: u64 = 0x1000;
/// Where a driver writes the index of a queue with new buffers (32 bits): the address for an
/// ioeventfd.
pub const NOTIFY_OFFSET: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// The bits of Status that a driver may write.
const DRIVER_BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// A virtio device behind its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    /// Status without DEVICE_NEEDS_RESET, which the interrupt holds because the device may set it.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueState>,
    violations: Limited,
    ignored: Limited,
}

#[derive(Debug, Default)]
struct QueueState {
    max: u16,
    setup: QueueSetup,
    /// Checked and not yet handed to the device.
    built: Option<Queue>,
    kick: Option<EventFd>,
}

impl MmioTransport {
    /// Puts `device` behind registers. `irq` is its interrupt line.
    pub fn new(memory: Arc<GuestMemory>, device: Box<dyn VirtioDevice>, irq: IrqLine) -> Self {
        let queues =
            device.queue_max_sizes().iter().map(|&max| QueueState { max, ..Default::default() }).collect();
        Self {
            device,
            memory,
            interrupt: Interrupt::new(irq),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            violations: Limited::new("virtio-mmio: driver broke the protocol, device needs reset"),
            ignored: Limited::new("virtio-mmio: access ignored"),
        }
    }

    /// Queues the device has. Queue `i` is notified by the value `i` at [`NOTIFY_OFFSET`].
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    /// Gives the transport the event (a duplicate of the ioeventfd) by which the event loop learns
    /// that a queue wants processing. The transport writes to it when a bounded pass left work
    /// behind, so that [`Progress::More`] is never forgotten, wherever [`MmioTransport::notify`]
    /// was called. Out-of-range indices are ignored.
    pub fn set_kick(&mut self, queue: usize, event: EventFd) {
        if let Some(queue) = self.queues.get_mut(queue) {
            queue.kick = Some(event);
        }
    }

    /// Processes a queue: called when its ioeventfd fires, and for a plain write to QueueNotify.
    ///
    /// Ignored and counted if the driver is not ready or there is no such queue. [`Progress::More`]
    /// needs attention only from a caller that has not given [`MmioTransport::set_kick`] an event.
    pub fn notify(&mut self, queue: usize) -> Progress {
        let ready = self.queues.get(queue).is_some_and(|queue| queue.setup.ready);
        if ready && self.configuring() {
            // Linux's balloon driver does that; the queue is processed once the device runs.
            return Progress::Idle;
        }
        if !self.running() || !ready {
            self.ignored.hit(format_args!("notification of queue {queue}, status {:#x}", self.status()));
            return Progress::Idle;
        }
        match self.device.process_queue(queue) {
            Ok(progress) => {
                if progress == Progress::More
                    && let Some(kick) = &self.queues[queue].kick
                {
                    // Fails only if the counter is full, that is, the event is already signalled.
                    let _ = kick.write(1);
                }
                progress
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                self.violate(format_args!("queue {queue}: {error}: {source}"));
                Progress::Idle
            }
        }
    }

    /// The host has something for a queue of the device ([`VirtioDevice::source`]), which is
    /// processed if there is a driver: without one that is no mistake, as it is with
    /// [`MmioTransport::notify`].
    pub fn arrived(&mut self, queue: usize) -> Progress {
        match self.running() && self.queues.get(queue).is_some_and(|queue| queue.setup.ready) {
            true => self.notify(queue),
            false => Progress::Idle,
        }
    }

    /// Has the device finish what is in flight: [`VirtioDevice::quiesce`].
    pub fn quiesce(&mut self, limit: Instant) -> bool {
        if !self.running() {
            return true;
        }
        self.device.quiesce(limit).unwrap_or_else(|error| {
            self.violate(format_args!("{error}"));
            true
        })
    }

    /// Times the driver broke the protocol so that the device needed a reset.
    pub fn violations(&self) -> u64 {
        self.violations.count()
    }

    /// Accesses and notifications that were ignored.
    pub fn ignored(&self) -> u64 {
        self.ignored.count()
    }

    /// The device, whatever its state.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        &mut *self.device
    }

    fn status(&self) -> u32 {
        self.status | if self.interrupt.needs_reset() { NEEDS_RESET } else { 0 }
    }

    /// Whether the device may be given work.
    fn running(&self) -> bool {
        self.status & (DRIVER_OK | FAILED) == DRIVER_OK && !self.interrupt.needs_reset()
    }

    /// Whether the driver is between FEATURES_OK and DRIVER_OK and nothing has gone wrong.
    fn configuring(&self) -> bool {
        self.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK
    }

    /// The driver broke the protocol. Before initialisation there is nothing to reset, so it is
    /// only counted.
    fn violate(&self, what: std::fmt::Arguments<'_>) {
        self.violations.hit(what);
        if self.status & DRIVER_OK != 0 {
            // 2.1.2: a running driver gets a configuration change notification.
            self.interrupt.device_needs_reset();
        } else if self.status != 0 {
            self.interrupt.set_needs_reset();
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn selected(&mut self) -> Option<&mut QueueState> {
        self.queues.get_mut(self.queue_sel as usize)
    }

    fn write_features(&mut self, value: u32) {
        if self.status() != ACKNOWLEDGE | DRIVER {
            return self.violate(format_args!("features written in status {:#x}", self.status()));
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // No feature has these bits.
            _ if value == 0 => {}
            sel => self.ignored.hit(format_args!("feature word {sel} of {value:#x}")),
        }
    }

    /// Changes the description of the selected queue.
    fn set_up(&mut self, offset: u32, change: impl FnOnce(&mut QueueSetup)) {
        let allowed = self.configuring();
        match self.selected() {
            None => self.ignored.hit(format_args!("register {offset:#x} of queue {}", self.queue_sel)),
            Some(queue) if allowed && !queue.setup.ready => change(&mut queue.setup),
            Some(_) => self.violate(format_args!(
                "register {offset:#x} of queue {} written in status {:#x}",
                self.queue_sel,
                self.status()
            )),
        }
    }

    fn write_ready(&mut self, value: u32) {
        let index = self.queue_sel;
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let configuring = self.configuring();
        let Some(queue) = self.queues.get_mut(index as usize) else {
            return self.ignored.hit(format_args!("QueueReady of queue {index}"));
        };
        match (value, queue.setup.ready) {
            // Stopping a queue is allowed at any time (4.2.2.2), and drivers do it after a reset
            // too.
            (0, _) => {
                queue.setup.ready = false;
                queue.built = None;
            }
            (1, false) if configuring => match queue.setup.build(queue.max, event_idx, &self.memory) {
                Ok(built) => {
                    queue.built = Some(built);
                    queue.setup.ready = true;
                }
                Err(error) => self.violate(format_args!("queue {index}: {error}")),
            },
            _ => self.violate(format_args!(
                "QueueReady of queue {index} set to {value:#x} in status {:#x}",
                self.status()
            )),
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // The device's own bit: a driver that sets what it read neither sets nor clears it.
        let value = value & !NEEDS_RESET;
        let added = value & !self.status;
        if value & !DRIVER_BITS != 0 || self.status & !value != 0 {
            return self.violate(format_args!("status {:#x} replaced by {value:#x}", self.status));
        }
        if added & FAILED != 0 {
            self.status |= FAILED;
            return;
        }
        if added == 0 || self.status & FAILED != 0 || self.interrupt.needs_reset() {
            return;
        }
        match value {
            ACKNOWLEDGE => self.status = value,
            _ if value == ACKNOWLEDGE | DRIVER => self.status = value,
            _ if added == FEATURES_OK && value == ACKNOWLEDGE | DRIVER | FEATURES_OK => self.negotiate(),
            _ if added == DRIVER_OK && self.configuring() => self.activate(),
            _ => self.violate(format_args!("status {:#x} replaced by {value:#x}", self.status)),
        }
    }

    /// FEATURES_OK stays clear if the features do not suit; the driver reads it back and gives up
    /// (3.1.1).
    fn negotiate(&mut self) {
        let unknown = self.driver_features & !self.offered_features();
        if unknown != 0 || self.driver_features & 1 << VIRTIO_F_VERSION_1 == 0 {
            self.ignored.hit(format_args!(
                "FEATURES_OK with features {:#x}: bits {unknown:#x} were not offered, bit {VIRTIO_F_VERSION_1} is required",
                self.driver_features
            ));
        } else {
            self.status |= FEATURES_OK;
        }
    }

    fn activate(&mut self) {
        self.status |= DRIVER_OK;
        self.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            queues: self.queues.iter_mut().map(|queue| queue.built.take()).collect(),
            features: self.driver_features,
            interrupt: self.interrupt.clone(),
        });
        // Linux's balloon driver notifies before it sets DRIVER_OK, when the queue must not be
        // read, and not again after.
        for queue in self.queues.iter().filter(|queue| queue.setup.ready) {
            if let Some(kick) = &queue.kick {
                let _ = kick.write(1);
            }
        }
    }

    fn reset(&mut self) {
        if self.status & DRIVER_OK != 0 {
            self.device.reset();
        }
        self.status = 0;
        self.interrupt.reset();
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        for queue in &mut self.queues {
            queue.setup = QueueSetup::default();
            queue.built = None;
        }
    }
}

#[cfg(test)]
mod tests;
