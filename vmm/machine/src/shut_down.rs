//! Ending a guest in good order from outside: it is asked to power off, and its VM is stopped if it does not.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use devices::legacy::pm1::PowerButton;
use event_manager::MutEventSubscriber;

use super::exit::{Ending, Outcome};
use super::feed::Feed;
use super::timer::Timer;

/// The two ways to ask a guest, and the clock that runs after it.
#[derive(Clone)]
pub struct ShutDown {
    button: PowerButton,
    com2: Arc<Mutex<Feed>>,
    timer: Timer,
    limit: Arc<Mutex<Duration>>,
}

impl ShutDown {
    /// By this button and this way into COM2.
    pub fn new(button: PowerButton, com2: Arc<Mutex<Feed>>) -> io::Result<Self> {
        Ok(Self { button, com2, timer: Timer::new()?, limit: Arc::default() })
    }

    /// What stops the VM when the guest's time is up.
    pub fn subscriber(&self, outcome: Outcome) -> Box<dyn MutEventSubscriber> {
        let limit = self.limit.clone();
        self.timer.subscriber(move || {
            let limit = *limit.lock().unwrap_or_else(PoisonError::into_inner);
            outcome.tell(Ending::CutOff { limit });
        })
    }

    /// Presses the power button. False if the guest has no driver for it.
    pub fn press(&self) -> bool {
        self.button.press()
    }

    /// Presses the power button, gives the guest a line on COM2 if there is one, and lets it have so long from now on, which
    /// is more than nothing.
    pub fn begin(&self, limit: Duration, line: Option<&str>) -> io::Result<()> {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
        self.timer.every(limit)?;
        self.button.press();
        if let Some(line) = line {
            // What a client began and did not end is no part of it.
            let line = format!("\n{line}\n");
            self.com2.lock().unwrap_or_else(PoisonError::into_inner).push(line.as_bytes());
        }
        Ok(())
    }
}
