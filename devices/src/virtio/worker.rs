//! The thread that carries out the requests of a device over a file, so that a slow one holds up nothing but the guest that waits for it.
//!
//! Requests come and go by queues between it and the device; only the device touches the rings. What is in flight is bounded by the device:
//! [`MAX_IN_FLIGHT`], [`MAX_IN_FLIGHT_BYTES`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::Chain;
use super::chain::Detached;
use crate::GuestMemory;
use crate::lock::lock;

/// What the thread carries requests out with.
pub(super) trait Server: Send + 'static {
    /// Carries out a request. How many bytes of its device-writable part were written, from its start.
    fn serve(&mut self, write_through: bool, chain: &mut Chain<'_>) -> u32;
}

/// Most requests that a thread has.
pub(super) const MAX_IN_FLIGHT: usize = 128;
/// Bytes of requests that a thread has, beyond which it gets no other.
pub(super) const MAX_IN_FLIGHT_BYTES: u64 = 4 << 20;

/// What the thread is to do.
enum Job<S> {
    Serve {
        request: Detached,
        head: u16,
        bytes: u64,
        memory: Arc<GuestMemory>,
        write_through: bool,
    },
    /// Change what it serves with, for the requests from now on.
    Change(Box<dyn FnOnce(&mut S) + Send>),
    /// The device is gone.
    End,
}

/// A request that the thread has done with.
pub(super) struct Finished {
    pub(super) head: u16,
    /// As in the used ring.
    pub(super) written: u32,
    bytes: u64,
}

/// What both sides have.
struct Shared {
    finished: Mutex<Vec<Finished>>,
    /// Signalled with each.
    more: Condvar,
    /// Readable after each, for the event loop.
    event: OwnedFd,
    /// Requests that have not begun are not to.
    abandon: AtomicBool,
}

/// The device's side of the thread.
pub(super) struct Worker<S> {
    jobs: Sender<Job<S>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Given to the thread, and not taken back by [`Worker::finished`].
    in_flight: usize,
    in_flight_bytes: u64,
}

/// Changes what a thread serves with. Clones change the same.
pub(super) struct Changer<S>(Sender<Job<S>>);

impl<S> Clone for Changer<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Changer<S> {
    /// For the requests that come after those in flight.
    pub(super) fn change(&self, change: impl FnOnce(&mut S) + Send + 'static) {
        // It fails if the device is gone, and then there is no guest either.
        let _ = self.0.send(Job::Change(Box::new(change)));
    }

    /// What `look` sees, once all requests so far are carried out. None within `limit`, or without a device, is an error.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        limit: Duration,
        look: impl FnOnce(&S) -> T + Send + 'static,
    ) -> Result<T, RecvTimeoutError> {
        let (sender, seen) = channel();
        // Fails if it is not waited for any more.
        self.change(move |server| _ = sender.send(look(server)));
        seen.recv_timeout(limit)
    }
}

impl<S: Server> Worker<S> {
    /// Starts the thread, with nothing to do. It calls `confine` first.
    pub(super) fn start(server: S, confine: fn()) -> io::Result<(Self, Changer<S>)> {
        let (jobs, received) = channel();
        let shared = Arc::new(Shared {
            finished: Mutex::default(),
            more: Condvar::new(),
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            abandon: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let work = move || {
            confine();
            run(&received, server, &theirs);
        };
        let thread = std::thread::Builder::new().name("disk".into()).spawn(work)?;
        let changer = Changer(jobs.clone());
        let worker = Self { jobs, shared, thread: Some(thread), in_flight: 0, in_flight_bytes: 0 };
        Ok((worker, changer))
    }
}

impl<S> Worker<S> {
    /// What is readable when a request may be finished.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Whether it takes another request.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight < MAX_IN_FLIGHT && self.in_flight_bytes < MAX_IN_FLIGHT_BYTES
    }

    /// Hands over a request; see [`Worker::has_room`].
    pub(super) fn give(&mut self, chain: &mut Chain<'_>, memory: &Arc<GuestMemory>, write_through: bool) {
        let bytes = u64::from(chain.readable_bytes()) + u64::from(chain.writable_bytes());
        let (head, request) = (chain.head(), chain.detach());
        let job = Job::Serve { request, head, bytes, memory: memory.clone(), write_through };
        // The thread ends after the device only.
        if self.jobs.send(job).is_ok() {
            self.in_flight += 1;
            self.in_flight_bytes += bytes;
        }
    }

    /// The requests that have been finished since this was last asked.
    pub(super) fn finished(&mut self) -> Vec<Finished> {
        // Before looking: what comes later signals again.
        let _ = rustix::io::read(&self.shared.event, &mut [0; 8]);
        let finished = std::mem::take(&mut *lock(&self.shared.finished));
        self.in_flight -= finished.len();
        self.in_flight_bytes -= finished.iter().map(|request| request.bytes).sum::<u64>();
        finished
    }

    /// Waits, at most until `limit`, until nothing is in flight that is not finished. Whether that is so.
    pub(super) fn wait(&self, limit: Option<Instant>) -> bool {
        let mut finished: MutexGuard<'_, Vec<Finished>> = lock(&self.shared.finished);
        while finished.len() < self.in_flight {
            let left = limit.map(|limit| limit.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return false;
            }
            let woken = self.shared.more.wait_timeout(finished, left.unwrap_or(Duration::MAX));
            finished = woken.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        true
    }

    /// Has what has not begun forgotten, waits for what has, and forgets that too.
    pub(super) fn abandon(&mut self) {
        self.shared.abandon.store(true, Ordering::SeqCst);
        self.wait(None);
        self.shared.abandon.store(false, Ordering::SeqCst);
        self.finished();
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.shared.abandon.store(true, Ordering::SeqCst);
        let _ = self.jobs.send(Job::End);
        // The VM's end does not wait for a disk that does not answer.
        if self.wait(Some(Instant::now()))
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// What the thread does, until the device is gone.
fn run<S: Server>(jobs: &Receiver<Job<S>>, mut server: S, shared: &Shared) {
    for job in jobs {
        let (request, head, bytes, memory, write_through) = match job {
            Job::Change(change) => {
                change(&mut server);
                continue;
            }
            Job::End => return,
            Job::Serve { request, head, bytes, memory, write_through } => {
                (request, head, bytes, memory, write_through)
            }
        };
        let written = match shared.abandon.load(Ordering::SeqCst) {
            true => 0,
            false => server.serve(write_through, &mut Chain::attach(&memory, request)),
        };
        // What waits for this may take the memory away.
        drop(memory);
        lock(&shared.finished).push(Finished { head, written, bytes });
        shared.more.notify_all();
        // Fails only if the counter is full, that is, the event is already signalled.
        let _ = rustix::io::write(&shared.event, &1_u64.to_ne_bytes());
    }
}
