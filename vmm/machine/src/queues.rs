//! Queue notifications on the event loop.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use devices::virtio::Progress;
use devices::virtio::mmio::MmioTransport;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::error::VmError;
use super::pacer::Next;
use super::timer::Timer;
use super::vcpu::Shared;

/// What says that a queue has work.
pub(super) enum Notified {
    /// The driver, and the device itself when a turn has left something.
    ByDriver(EventFd),
    /// The host, by what is readable as long as there is something: so it is watched for edges, and
    /// read by the device only. An edge that finds no driver is made up for when there is one, as
    /// then every queue is processed once.
    ByHost(OwnedFd),
}

struct QueueEvent {
    notified: Notified,
    transport: Arc<Mutex<MmioTransport>>,
    queue: usize,
    /// What it does may cost frames: it writes much of guest memory.
    takes_memory: bool,
    /// Notified while the VM was paused, or held by its throttle.
    missed: bool,
    /// When its rate limit lets something through again, if it holds something back.
    due: Option<Instant>,
}

impl QueueEvent {
    /// False if the device is in use for longer than an access takes: a vCPU resets it, and its
    /// disk is slow.
    fn process(&mut self) -> bool {
        let Some(mut transport) = lock_soon(&self.transport) else { return false };
        let progress = match self.notified {
            // A driver that has reset its device meanwhile makes no mistake.
            Notified::ByDriver(_) if self.due.is_none() => transport.notify(self.queue),
            _ => transport.arrived(self.queue),
        };
        self.due = match progress {
            Progress::Later(wait) => Instant::now().checked_add(wait),
            Progress::Idle | Progress::More => None,
        };
        true
    }
}

/// How often a lock is tried before the event loop does something else.
const TRIES: u32 = 1000;
/// When it is tried again.
const AGAIN: Duration = Duration::from_millis(1);

fn lock_soon<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    for _ in 0..TRIES {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

/// Behind the queues' numbers, and those of the resumption and of the throttle's timer: that of the
/// rate limits' timer.
const REFILLED: u32 = 2;
/// The least wait for a rate limit: a timer that is set more often costs more than it is worth.
const LEAST_WAIT: Duration = Duration::from_micros(100);

/// Handles queue notifications on the event loop; holds them back while the VM is paused, so that
/// devices leave a paused guest's memory alone, and those that take memory while it is held by its
/// throttle.
#[derive(Default)]
pub struct Queues {
    all: Vec<QueueEvent>,
    paused: Arc<AtomicBool>,
    resumed: Option<EventFd>,
    /// Set while something is held back by the throttle.
    paid: Option<Timer>,
    /// Set while something is held back by a rate limit.
    refilled: Option<Timer>,
    vcpus: Option<Arc<Shared>>,
}

impl Queues {
    /// Watches queue `queue` of a device, which has work when `notified` says so. `takes_memory`:
    /// what it does may cost frames.
    pub(super) fn add(
        &mut self,
        notified: Notified,
        transport: &Arc<Mutex<MmioTransport>>,
        queue: usize,
        takes_memory: bool,
    ) {
        let transport = transport.clone();
        self.all.push(QueueEvent { notified, transport, queue, takes_memory, missed: false, due: None });
    }

    /// The vCPUs to wake after work on a queue: one that waits in this process does not see the
    /// interrupt.
    pub fn wake(&mut self, vcpus: Arc<Shared>) {
        self.vcpus = Some(vcpus);
    }

    /// The switch that holds notifications back, and the event to write after it is off again, or
    /// after the throttle's rate is another.
    pub fn pausing(&mut self) -> Result<(Arc<AtomicBool>, EventFd), VmError> {
        let resumed = EventFd::new(libc::EFD_NONBLOCK).map_err(VmError::host("make an eventfd"))?;
        self.resumed = Some(resumed.try_clone().map_err(VmError::host("duplicate an eventfd"))?);
        self.paid = Some(Timer::new().map_err(VmError::host("make a timer"))?);
        self.refilled = Some(Timer::new().map_err(VmError::host("make a timer"))?);
        Ok((self.paused.clone(), resumed))
    }

    /// Handles the notification of queue `n`, or keeps it.
    fn process_queue(&mut self, n: usize) {
        let held = self.paused.load(Ordering::SeqCst) || self.is_throttled(n);
        if let Some(event) = self.all.get_mut(n) {
            event.missed = held || !event.process();
            if event.missed && !held {
                let _ = self.paid.as_ref().map(|paid| paid.every(AGAIN));
            }
            if event.due.is_some() {
                self.await_refill();
            }
        }
    }

    /// Sets the timer to when the first queue is due.
    fn await_refill(&self) {
        if let (Some(due), Some(refilled)) =
            (self.all.iter().filter_map(|event| event.due).min(), &self.refilled)
        {
            // Zero would be never.
            let wait = due.saturating_duration_since(Instant::now()).max(LEAST_WAIT);
            let _ = refilled.every(wait);
        }
    }

    /// Handles the queues that are due.
    fn refill(&mut self) {
        let _ = self.refilled.as_ref().map(Timer::disarm);
        let now = Instant::now();
        for n in 0..self.all.len() {
            if self.all.get(n).is_some_and(|event| event.due.is_some_and(|due| due <= now)) {
                self.process_queue(n);
                // One that is held back for another reason is looked at when that is over.
                if let Some(event) = self.all.get_mut(n).filter(|event| event.missed) {
                    event.due = None;
                }
            }
        }
        self.await_refill();
    }

    /// Whether queue `n` is to wait; then the timer is set.
    fn is_throttled(&self, n: usize) -> bool {
        let takes_memory = self.all.get(n).is_some_and(|event| event.takes_memory);
        let next = self.vcpus.as_ref().filter(|_| takes_memory).and_then(|vcpus| vcpus.throttle.look());
        match (next, &self.paid) {
            // Without the timer it would wait for ever.
            (Some(Next::Hold(time)), Some(paid)) => paid.every(time).is_ok(),
            _ => false,
        }
    }
}

impl MutEventSubscriber for Queues {
    fn init(&mut self, ops: &mut EventOps) {
        let count = self.all.len() as u32;
        for (n, event) in (0..).zip(&self.all) {
            let _ = match &event.notified {
                Notified::ByDriver(fd) => ops.add(Events::with_data(fd, n, EventSet::IN)),
                Notified::ByHost(fd) => {
                    ops.add(Events::with_data(fd, n, EventSet::IN | EventSet::EDGE_TRIGGERED))
                }
            };
        }
        if let Some(resumed) = &self.resumed {
            let _ = ops.add(Events::with_data(resumed, count, EventSet::IN));
        }
        if let Some(paid) = &self.paid {
            let _ = ops.add(Events::with_data(paid, count + 1, EventSet::IN));
        }
        if let Some(refilled) = &self.refilled {
            let _ = ops.add(Events::with_data(refilled, count + REFILLED, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let n = events.data() as usize;
        match self.all.get(n) {
            Some(event) => {
                if let Notified::ByDriver(fd) = &event.notified {
                    let _ = fd.read();
                }
                self.process_queue(n);
            }
            None if n == self.all.len() + REFILLED as usize => self.refill(),
            // Resumed, or what was owed is paid: what is to wait longer sets the timer again.
            None => {
                let _ = self.resumed.as_ref().map(EventFd::read);
                let _ = self.paid.as_ref().map(Timer::disarm);
                for n in 0..self.all.len() {
                    if self.all.get(n).is_some_and(|event| event.missed) {
                        self.process_queue(n);
                    }
                }
            }
        }
        if let Some(vcpus) = &self.vcpus {
            vcpus.input_arrived();
        }
    }
}
