//! Holds a guest back that takes frames faster than it may: the growth of this process's anonymous memory is paced, by whatever it
//! grows, first touches, copies of shared pages, or pages read back from swap.
//!
//! A thread looks every millisecond or two while there is a rate, and holds the vCPUs at their gate as [`super::pacer`] says. Between
//! two looks a guest may take what it likes; that is paid for after.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::pacer::{Next, Pacer};
use super::vcpu::{Shared, Vcpus};
use crate::memory::own::OwnPages;

/// Why a VM was not throttled.
#[derive(Debug, Error)]
pub enum ThrottleError {
    /// Nothing would ever run again.
    #[error("a rate of 0 pages a second is not possible: expected at least 1; to stop the VM ask for pause")]
    Zero,
    /// Frames that are not anonymous memory's are not counted.
    #[error("guest RAM is not anonymous memory, and only that is watched as it grows: leave out `--backing`")]
    NotAnonymous,
    /// How much memory there is cannot be seen, or there is no thread.
    #[error("the VM's growth cannot be watched")]
    Watch(#[source] io::Error),
}

/// How a VM is throttled, and what came of it. Pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttled {
    /// The pages that the process's anonymous memory may grow by in a second; None: any.
    pub pages_per_second: Option<u64>,
    /// For how long the vCPUs were held, all such times together, in milliseconds.
    pub held_ms: u64,
    /// Pages that it grew by while there was a rate.
    pub admitted_pages: u64,
}

/// The throttle of one VM. Clones are the same one.
#[derive(Clone)]
pub(super) struct Throttle(Arc<Inner>);

struct Inner {
    vcpus: Arc<Mutex<Vcpus>>,
    shared: Arc<Shared>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pages_per_second: Option<u64>,
    /// The thread is there.
    watched: bool,
    held: Duration,
    held_since: Option<Instant>,
    admitted_pages: u64,
}

impl Throttle {
    /// For these vCPUs; there is no rate yet.
    pub(super) fn new(vcpus: Arc<Mutex<Vcpus>>, shared: Arc<Shared>) -> Self {
        Self(Arc::new(Inner { vcpus, shared, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// Sets the rate, or lifts it, which frees who is held at once.
    pub(super) fn set(&self, pages_per_second: Option<u64>) -> Result<(), ThrottleError> {
        if pages_per_second == Some(0) {
            return Err(ThrottleError::Zero);
        }
        let mut state = self.0.state();
        if pages_per_second.is_some() && !state.watched {
            let growth = Growth::begin().map_err(ThrottleError::Watch)?;
            let inner = Arc::clone(&self.0);
            thread::Builder::new()
                .name("throttle".into())
                .spawn(move || inner.watch(growth))
                .map_err(ThrottleError::Watch)?;
            state.watched = true;
        }
        state.pages_per_second = pages_per_second;
        if pages_per_second.is_none() {
            self.0.release(&mut state);
        }
        self.0.changed.notify_all();
        Ok(())
    }

    /// How it is.
    pub(super) fn status(&self) -> Throttled {
        let state = self.0.state();
        let held = state.held + state.held_since.map_or(Duration::ZERO, |since| since.elapsed());
        Throttled {
            pages_per_second: state.pages_per_second,
            held_ms: held.as_millis() as u64,
            admitted_pages: state.admitted_pages,
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: until the rate is lifted, or this process's memory cannot be seen any more.
    fn watch(&self, mut growth: Growth) {
        let mut state = self.state();
        let mut paced: Option<(u64, Pacer)> = None;
        while let Some(rate) = state.pages_per_second {
            let (elapsed, grown) = match growth.since() {
                Ok(since) => since,
                Err(error) => {
                    tracing::warn!("no longer throttled: the process's memory cannot be seen: {error}");
                    state.pages_per_second = None;
                    break;
                }
            };
            state.admitted_pages += grown.max(0).cast_unsigned();
            let (_, pacer) = match &mut paced {
                Some(same) if same.0 == rate => same,
                other => other.insert((rate, Pacer::new(rate))),
            };
            let wait = match pacer.step(elapsed, grown) {
                Next::Run(time) => {
                    self.release(&mut state);
                    time
                }
                Next::Hold(time) => {
                    // Whoever pauses or stops the VM has the vCPUs for a while; nobody who has them wants the state.
                    self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).hold();
                    state.held_since = Some(Instant::now());
                    time
                }
            };
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.release(&mut state);
        state.watched = false;
    }

    /// Lets the vCPUs run, if they were held.
    fn release(&self, state: &mut State) {
        if let Some(since) = state.held_since.take() {
            self.shared.release();
            state.held += since.elapsed();
        }
    }
}

/// How this process's anonymous memory grows.
struct Growth {
    pages: OwnPages,
    looked: Instant,
    had: u64,
}

impl Growth {
    fn begin() -> io::Result<Self> {
        let pages = OwnPages::open()?;
        Ok(Self { looked: Instant::now(), had: pages.anonymous()?, pages })
    }

    /// Since the last call: how long, and by how many pages; below zero when it shrank.
    fn since(&mut self) -> io::Result<(Duration, i64)> {
        let (elapsed, has) = (self.looked.elapsed(), self.pages.anonymous()?);
        let grown = has.cast_signed() - self.had.cast_signed();
        self.looked += elapsed;
        self.had = has;
        Ok((elapsed, grown))
    }
}
