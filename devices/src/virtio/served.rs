//! What devices have in common whose one queue a thread serves ([`super::worker`]).

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};

use super::drain::{Completion, drain};
use super::worker::{Changer, Server, Worker};
use super::{Activation, Interrupt, Progress, RingError, place};
use crate::GuestMemory;
use crate::warn::Limited;

/// The queue and its thread.
pub(super) struct Served<S> {
    worker: Worker<S>,
    active: Option<Active>,
    broken: Limited,
}

struct Active {
    memory: Arc<GuestMemory>,
    queue: Option<Queue>,
    interrupt: Interrupt,
    write_through: bool,
}

impl<S: Server> Served<S> {
    /// Starts the thread, which calls `confine` first, and has no driver. `broken` counts requests that never reach it.
    pub(super) fn start(server: S, confine: fn(), broken: Limited) -> io::Result<(Self, Changer<S>)> {
        let (worker, changer) = Worker::start(server, confine)?;
        Ok((Self { worker, active: None, broken }, changer))
    }
}

impl<S> Served<S> {
    /// See [`super::VirtioDevice::activate`]. With `write_through` a write is finished once it is on stable storage.
    pub(super) fn activate(&mut self, mut activation: Activation, write_through: bool) {
        self.active = Some(Active {
            memory: activation.memory,
            queue: activation.queues.pop().flatten(),
            interrupt: activation.interrupt,
            write_through,
        });
    }

    /// Tells the driver of requests that are finished, and hands over others.
    pub(super) fn process(&mut self) -> Result<Progress, RingError> {
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

    /// What is readable when a request may be finished.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.worker.event()
    }

    /// What is in flight has been written to memory, or never will be. Waits for the thread.
    pub(super) fn reset(&mut self) {
        self.worker.abandon();
        self.active = None;
    }

    /// See [`super::VirtioDevice::quiesce`].
    pub(super) fn quiesce(&mut self, limit: Instant) -> Result<bool, RingError> {
        let is_quiet = self.worker.wait(Some(limit));
        self.complete()?;
        Ok(is_quiet)
    }

    /// See [`super::VirtioDevice::queue_place`].
    pub(super) fn place(&self) -> Option<(u16, u16)> {
        place(self.active.as_ref()?.queue.as_ref())
    }

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
