//! The balloon device (Virtio 1.2, section 5.5): the guest gives pages back to the host and takes
//! them again.
//!
//! Inflating, statistics, free page hinting and free page reporting are here. What is given back
//! reads as zeros when the guest touches it again, so with a poison value other than zero
//! (VIRTIO_BALLOON_F_PAGE_POISON) pages that are only hinted or reported are left alone: the driver
//! expects its pattern in them. Pages in the balloon are discarded whatever the poison, since the
//! driver writes them before it uses them again (5.5.6.6).
//!
//! The device never changes its own target and knows no policy: [`Handle`] is where the host asks,
//! and where it learns what the guest did.
//!
//! *Locks:* the transport's lock is the outer one, the lock behind [`Handle`] the inner. A discard
//! happens under both, so that no page is taken after [`Handle::stop_hinting`] has returned; a
//! [`Reclaim`] must not call the handle.

mod config;
mod held;
mod hint;
mod pfn;
mod ram;
mod requests;
mod saved;
mod state;
mod stats;

pub use config::Config;
pub use hint::HintStatus;
pub use state::{Counters, Handle, HintError};
pub use stats::{Statistics, Tag};

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Queue;

use self::config::Kind;
use self::ram::Ram;
use self::requests::Requests;
use super::drain::{Completion, drain};
use super::{Activation, Interrupt, Progress, RingError, VirtioDevice, place};
use crate::GuestMemory;
use crate::reclaim::Reclaim;
use crate::state::{DeviceState, RestoreError};
use crate::warn::Limited;

/// Size of every queue. Linux keeps one buffer each in most, wants at least 32 for reporting, and
/// in the hinting queue gives up pages that do not fit in.
const QUEUE_SIZE: u16 = 256;
/// All queues that there can be.
const MAX_QUEUES: usize = 5;

/// Pages that requests may name before others get their turn. At a microsecond for a discard, a
/// turn whose every page stands alone takes less than a tenth of a second.
const TURN_PAGES: u64 = 1 << 16;

/// The device.
#[derive(Debug)]
pub struct Balloon {
    config: Config,
    handle: Handle,
    requests: Requests,
    active: Option<Active>,
    broken: Limited,
}

#[derive(Debug)]
struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    /// By queue index.
    queues: Vec<Role>,
}

/// What a queue is for.
#[derive(Debug)]
enum Role {
    Requests(Kind, Option<Queue>),
    /// The queue itself is where the handle can complete its buffer.
    Statistics,
}

impl Balloon {
    /// A balloon over `memory` that gives pages back through `reclaim`, and the host's way to it.
    pub fn new(config: Config, memory: &GuestMemory, reclaim: Box<dyn Reclaim>) -> (Self, Handle) {
        let ram = Ram::new(memory);
        let handle = Handle::new(config, &ram);
        let balloon = Self {
            config,
            handle: handle.clone(),
            requests: Requests::new(ram, reclaim, handle.clone()),
            active: None,
            broken: Limited::new("virtio-balloon: broken request"),
        };
        (balloon, handle)
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; MAX_QUEUES][..self.config.queue_kinds(self.features()).count()]
    }

    fn features(&self) -> u64 {
        self.config.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.handle.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.handle.write_config(offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { memory, queues, features, interrupt } = activation;
        let mut statistics = None;
        let kinds = self.config.queue_kinds(features);
        let roles = kinds.zip(queues).map(|(kind, queue)| match kind {
            None => {
                statistics = queue;
                Role::Statistics
            }
            Some(kind) => Role::Requests(kind, queue),
        });
        let queues = roles.collect();
        self.handle.attach(Arc::clone(&memory), interrupt.clone(), features, statistics);
        self.active = Some(Active { memory, interrupt, queues });
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        let Some(Active { memory, interrupt, queues }) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        let broken_before = self.broken.count();
        let progress = match queues.get_mut(index) {
            Some(Role::Requests(kind, Some(queue))) => {
                let mut turn_pages = 0u64;
                drain(queue, memory, interrupt, &self.broken, |chain| {
                    turn_pages += self.requests.serve(*kind, chain);
                    if turn_pages < TURN_PAGES { Completion::Written(0) } else { Completion::Last(0) }
                })
            }
            Some(Role::Statistics) => self.handle.receive_statistics(&self.broken),
            Some(Role::Requests(_, None)) | None => Ok(Progress::Idle),
        };
        self.handle.refuse(self.broken.count() - broken_before);
        progress
    }

    fn reset(&mut self) {
        self.active = None;
        self.handle.detach();
    }

    fn queue_place(&self, index: usize) -> Option<(u16, u16)> {
        match self.active.as_ref()?.queues.get(index)? {
            Role::Requests(_, queue) => place(queue.as_ref()),
            Role::Statistics => self.handle.statistics_place(),
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(self.handle.save())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Balloon(state) => {
                self.handle.restore(state, self.requests.ram());
                Ok(())
            }
            _ => Err(RestoreError::Kind { device: self.device_id() }),
        }
    }
}

#[cfg(test)]
mod tests;
