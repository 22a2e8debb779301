//! A timer on the event loop.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A timer. Clones share it.
#[derive(Clone, Debug)]
pub struct Timer(Arc<OwnedFd>);

impl Timer {
    /// One that is not set.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(Arc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?)))
    }

    /// Sets it to so often from now on. Zero: never.
    pub fn every(&self, period: Duration) -> io::Result<()> {
        let period = Timespec { tv_sec: period.as_secs() as i64, tv_nsec: period.subsec_nanos().into() };
        let interval = Itimerspec { it_interval: period, it_value: period };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &interval)?;
        Ok(())
    }

    /// Its time has come, and was seen: however often it came meanwhile, once is enough.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }

    /// Sets it to never, and forgets that its time had come.
    pub fn disarm(&self) -> io::Result<()> {
        self.every(Duration::ZERO)?;
        match rustix::io::read(&self.0, &mut [0u8; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Does `tick` whenever its time has come.
    pub fn subscriber(&self, tick: impl FnMut() + 'static) -> Box<dyn MutEventSubscriber> {
        Box::new(Ticking { timer: self.clone(), tick })
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

struct Ticking<F> {
    timer: Timer,
    tick: F,
}

impl<F: FnMut()> MutEventSubscriber for Ticking<F> {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&*self.timer.0, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.timer.clear();
        (self.tick)();
    }
}
