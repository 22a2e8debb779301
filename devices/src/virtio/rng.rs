//! The entropy device (Virtio 1.2, section 5.4): one queue, no configuration, no feature bits.
//!
//! Bytes come from the host's getrandom(2). A request is bounded, and a guest that asks without end
//! burns its own vCPU's time, so a rate limit is for those that want one.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;

use super::drain::{Completion, drain};
use super::{
    Activation, Interrupt, Progress, RingError, VirtioDevice, place, restore_limiters, save_limiters,
};
use crate::GuestMemory;
use crate::rate_limiter::Limiter;
use crate::state::{DeviceState, RestoreError};
use crate::virtio::Chain;
use crate::warn::Limited;

/// Drivers keep one or two requests in flight.
const QUEUE_SIZES: [u16; 1] = [16];

/// Most bytes answered per request. The device may use less than the whole buffer (5.4.6.2). Linux
/// asks for at most a cache line to a page; without a cap one descriptor could keep a host thread
/// in getrandom for gigabytes.
const MAX_REQUEST_BYTES: usize = 4096;

/// The device.
#[derive(Debug)]
pub struct Rng {
    limiter: Limiter,
    active: Option<Active>,
    broken: Limited,
    misused: Limited,
    unavailable: Limited,
}

#[derive(Debug)]
struct Active {
    memory: Arc<GuestMemory>,
    queue: Option<Queue>,
    interrupt: Interrupt,
}

impl Rng {
    /// A device without a driver.
    pub fn new() -> Self {
        Self::limited(Limiter::default())
    }

    /// Of which a driver gets no more than `limiter` lets through.
    pub fn limited(limiter: Limiter) -> Self {
        Self {
            limiter,
            active: None,
            broken: Limited::new("virtio-rng: broken request"),
            misused: Limited::new("virtio-rng: request with a device-readable buffer"),
            unavailable: Limited::new("virtio-rng: the host has no random bytes"),
        }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, mut activation: Activation) {
        self.active = Some(Active {
            memory: activation.memory,
            queue: activation.queues.pop().flatten(),
            interrupt: activation.interrupt,
        });
    }

    fn process_queue(&mut self, _index: usize) -> Result<Progress, RingError> {
        let Some(Active { memory, queue: Some(queue), interrupt }) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        let (misused, unavailable, limiter) = (&self.misused, &self.unavailable, &self.limiter);
        drain(queue, memory, interrupt, &self.broken, |chain| match limiter.take(wanted(chain) as u64) {
            Ok(()) => answer(chain, misused, unavailable),
            Err(wait) => Completion::Later(wait),
        })
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_place(&self, _index: usize) -> Option<(u16, u16)> {
        place(self.active.as_ref()?.queue.as_ref())
    }

    fn save(&self) -> DeviceState {
        save_limiters(&[&self.limiter])
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        restore_limiters(VIRTIO_ID_RNG, &[&self.limiter], state)
    }
}

/// Bytes of a request that are answered.
fn wanted(chain: &Chain<'_>) -> usize {
    MAX_REQUEST_BYTES.min(chain.writable_bytes() as usize)
}

/// Fills the request with random bytes, as far as the cap goes.
fn answer(chain: &mut Chain<'_>, misused: &Limited, unavailable: &Limited) -> Completion {
    if chain.readable_bytes() > 0 {
        // 5.4.6.1 forbids it. The buffer is not touched; the rest of the request is as good as any.
        misused.hit(format_args!("{} bytes", chain.readable_bytes()));
    }
    let mut bytes = [0; MAX_REQUEST_BYTES];
    let wanted = wanted(chain);
    if let Err(error) = getrandom::fill(&mut bytes[..wanted]) {
        unavailable.hit(format_args!("{error}"));
        return Completion::Written(0);
    }
    Completion::Written(chain.write(&bytes[..wanted]) as u32)
}

#[cfg(test)]
mod tests;
