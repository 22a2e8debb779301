//! How a virtio device interrupts its driver: the interrupt status register, suppression, and the
//! line.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use virtio_bindings::bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::ring_error::RingError;
use crate::GuestMemory;
use crate::interrupt::IrqLine;

/// A handle on the device's interrupt. Clones share it.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Shared>);

/// Whether the driver has not set VIRTQ_AVAIL_F_NO_INTERRUPT, which virtio-queue leaves to its
/// caller.
fn wants_interrupts(queue: &Queue, memory: &GuestMemory) -> Result<bool, RingError> {
    // As with an event index: the used index must be visible before the flag is read.
    fence(Ordering::SeqCst);
    let flags: u16 = memory
        .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

#[derive(Debug)]
struct Shared {
    line: IrqLine,
    /// The InterruptStatus register.
    status: AtomicU32,
    /// The ConfigGeneration register.
    generation: AtomicU32,
    /// The DEVICE_NEEDS_RESET bit of the Status register.
    needs_reset: AtomicBool,
}

impl Interrupt {
    pub(super) fn new(line: IrqLine) -> Self {
        Self(Arc::new(Shared {
            line,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        }))
    }

    /// Whether the driver has an interrupt to look at: the InterruptStatus register is not 0.
    pub fn is_pending(&self) -> bool {
        self.status() != 0
    }

    /// Buffers have been put in the used ring: interrupts unless the driver asked not to be
    /// (VIRTQ_AVAIL_F_NO_INTERRUPT, or used_event with EVENT_IDX; Virtio 1.2, 2.7.7).
    pub fn used_buffers(&self, queue: &mut Queue, memory: &GuestMemory) -> Result<(), RingError> {
        let wanted = match queue.event_idx_enabled() {
            true => queue.needs_notification(memory)?,
            false => wants_interrupts(queue, memory)?,
        };
        if wanted {
            self.raise(VIRTIO_MMIO_INT_VRING);
        }
        Ok(())
    }

    /// As [`Interrupt::used_buffers`], of a queue whose used ring the device itself writes: from
    /// the element `first` on, which was the next one before.
    pub(super) fn used_since(
        &self,
        first: u16,
        queue: &Queue,
        memory: &GuestMemory,
    ) -> Result<(), RingError> {
        let next = queue.next_used();
        let wanted = match queue.event_idx_enabled() {
            _ if next == first => false,
            true => {
                fence(Ordering::SeqCst);
                // Behind the available ring's flags, index and entries.
                let at = GuestAddress(queue.avail_ring() + 4 + 2 * u64::from(queue.size()));
                let event = memory.load(at, Ordering::Relaxed).map(u16::from_le);
                let event = event.map_err(virtio_queue::Error::GuestMemory)?;
                next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(first)
            }
            false => wants_interrupts(queue, memory)?,
        };
        if wanted {
            self.raise(VIRTIO_MMIO_INT_VRING);
        }
        Ok(())
    }

    /// The device changed its configuration space.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device cannot go on until the driver resets it. Notifications are ignored from now on.
    pub fn device_needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, bits: u32) {
        // The status must be there before the guest can look at it.
        self.0.status.fetch_or(bits, Ordering::SeqCst);
        self.0.line.trigger();
    }

    /// As [`Interrupt::device_needs_reset`], without an interrupt: for a driver that is not running
    /// yet.
    pub(super) fn set_needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::SeqCst);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn status(&self) -> u32 {
        self.0.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u32 {
        self.0.generation.load(Ordering::SeqCst)
    }

    /// Restores the state of a VM that was saved; raises no interrupt.
    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.0.status.store(status & (VIRTIO_MMIO_INT_CONFIG | VIRTIO_MMIO_INT_VRING), Ordering::SeqCst);
        self.0.generation.store(generation, Ordering::SeqCst);
        self.0.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Interrupts once more if the driver has not acknowledged the last one.
    pub(super) fn raise_again(&self) {
        if self.is_pending() {
            self.0.line.trigger();
        }
    }

    /// Back to the state after power-on. The generation stays: it only ever has to differ.
    pub(super) fn reset(&self) {
        self.0.status.store(0, Ordering::SeqCst);
        self.0.needs_reset.store(false, Ordering::SeqCst);
    }
}
