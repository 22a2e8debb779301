//! Holds a guest back that takes frames faster than it may: the growth of this process's anonymous
//! memory is paced, by whatever it grows, first touches, copies of shared pages, pages read back
//! from swap, or what a disk writes.
//!
//! No thread watches: one that has to wait for a processor would watch too late, and that is when
//! it matters. Each vCPU looks itself, before it enters the guest and at the end of each slice of
//! time, which a timer of its own ends ([`super::slice`]); [`super::pacer`] says how long a slice
//! is and what follows from it. Without a rate there is no timer, and a vCPU reads one number more.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::pacer::{Next, Pacer};
use kernel_view::own_pages::OwnPages;

/// Why a VM was not throttled.
#[derive(Debug, Error)]
pub enum ThrottleError {
    /// Nothing would ever run again.
    #[error("a rate of 0 pages a second is not possible: expected at least 1; to stop the VM ask for pause")]
    Zero,
    /// Frames that are not anonymous memory's are not counted.
    #[error("guest RAM is not anonymous memory, and only that is watched as it grows: leave out `--backing`")]
    NotAnonymous,
    /// How much memory there is cannot be seen.
    #[error("the VM's growth cannot be watched")]
    Watch(#[source] io::Error),
}

/// How a VM is throttled, and what came of it. Pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttled {
    /// The pages that the process's anonymous memory may grow by in a second; None: any.
    pub pages_per_second: Option<u64>,
    /// The most that it may have grown by beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ahead_pages: Option<u64>,
    /// For how long the vCPUs were held, all such times together, in milliseconds.
    pub held_ms: u64,
    /// Pages that it grew by while there was a rate.
    pub admitted_pages: u64,
}

/// The throttle of one VM.
#[derive(Debug)]
pub(super) struct Throttle {
    vcpus: u8,
    /// Whether there is a rate; what vCPUs read where there is none.
    is_on: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    paced: Option<Paced>,
    held: Duration,
    held_since: Option<Instant>,
    admitted_pages: u64,
}

#[derive(Debug)]
struct Paced {
    pages_per_second: u64,
    pacer: Pacer,
    growth: Growth,
}

impl Throttle {
    /// For a VM of `vcpus` vCPUs; there is no rate yet.
    pub(super) fn new(vcpus: u8) -> Self {
        Self { vcpus, is_on: AtomicBool::new(false), state: Mutex::default() }
    }

    /// Sets the rate, or lifts it. Held vCPUs have to be woken then, and those that run without a
    /// slice made to look.
    pub(super) fn set(&self, pages_per_second: Option<u64>) -> Result<(), ThrottleError> {
        if pages_per_second == Some(0) {
            return Err(ThrottleError::Zero);
        }
        let mut state = self.state();
        match (pages_per_second, &mut state.paced) {
            (Some(rate), Some(paced)) => {
                paced.pages_per_second = rate;
                paced.pacer.set_rate(rate);
            }
            (Some(rate), none) => {
                let growth = Growth::begin().map_err(ThrottleError::Watch)?;
                let pacer = Pacer::new(rate, self.vcpus);
                *none = Some(Paced { pages_per_second: rate, pacer, growth });
            }
            (None, _) => state.lift(),
        }
        self.is_on.store(state.paced.is_some(), Ordering::SeqCst);
        Ok(())
    }

    /// What a vCPU, or a device that writes guest memory, may do now; None while there is no rate.
    pub(super) fn look(&self) -> Option<Next> {
        if !self.is_on.load(Ordering::SeqCst) {
            return None;
        }
        let mut state = self.state();
        let paced = state.paced.as_mut()?;
        match paced.growth.since() {
            Ok((elapsed, grown)) => {
                let next = paced.pacer.step(elapsed, grown);
                state.admitted_pages += grown.max(0).cast_unsigned();
                match next {
                    Next::Run(_) => state.count_held(),
                    Next::Hold(_) => _ = state.held_since.get_or_insert_with(Instant::now),
                }
                Some(next)
            }
            Err(error) => {
                drop(state);
                self.give_up("the process's memory cannot be seen", &error);
                None
            }
        }
    }

    /// Lifts the rate, which cannot be kept.
    pub(super) fn give_up(&self, why: &str, error: &io::Error) {
        tracing::warn!("no longer throttled: {why}: {error}");
        self.state().lift();
        self.is_on.store(false, Ordering::SeqCst);
    }

    /// How it is.
    pub(super) fn status(&self) -> Throttled {
        let state = self.state();
        let held = state.held + state.held_since.map_or(Duration::ZERO, |since| since.elapsed());
        Throttled {
            pages_per_second: state.paced.as_ref().map(|paced| paced.pages_per_second),
            ahead_pages: state.paced.as_ref().map(|paced| paced.pacer.ahead_pages()),
            held_ms: held.as_millis() as u64,
            admitted_pages: state.admitted_pages,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        os::lock(&self.state)
    }
}

impl State {
    fn lift(&mut self) {
        self.paced = None;
        self.count_held();
    }

    /// A hold, if there was one, is over.
    fn count_held(&mut self) {
        self.held += self.held_since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }
}

/// How this process's anonymous memory grows.
#[derive(Debug)]
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

#[cfg(test)]
mod tests;
