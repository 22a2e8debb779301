//! Ending a guest in good order from outside: it is asked to power off, and its VM is stopped if it
//! does not.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::legacy::pm1::PowerButton;
use event_manager::MutEventSubscriber;

use super::exit::{Ending, Outcome};
use super::feed::Feed;
use super::timer::Timer;

/// How often the line is said again: what is said before a guest's driver of the port is up is
/// lost.
const REPEAT: Duration = Duration::from_secs(5);

/// The two ways to ask a guest, and the clock that runs after it.
#[derive(Clone)]
pub struct ShutDown {
    button: PowerButton,
    com2: Arc<Mutex<Feed>>,
    timer: Timer,
    asked: Arc<Mutex<Option<Asked>>>,
}

/// What a guest was asked.
struct Asked {
    limit: Duration,
    until: Instant,
    line: Option<String>,
}

impl ShutDown {
    /// By this button and this way into COM2.
    pub fn new(button: PowerButton, com2: Arc<Mutex<Feed>>) -> io::Result<Self> {
        Ok(Self { button, com2, timer: Timer::new()?, asked: Arc::default() })
    }

    /// What asks again, and stops the VM when the guest's time is up.
    pub fn subscriber(&self, outcome: Outcome) -> Box<dyn MutEventSubscriber> {
        let this = self.clone();
        self.timer.subscriber(move || {
            let asked = os::lock(&this.asked);
            let Some(asked) = &*asked else { return };
            let left = asked.until.saturating_duration_since(Instant::now());
            // A timer that cannot be set would leave the guest running for ever.
            if left.is_zero() || this.timer.every(left.min(REPEAT)).is_err() {
                outcome.tell(Ending::CutOff { limit: asked.limit });
                return;
            }
            this.say(asked.line.as_deref());
        })
    }

    /// Presses the power button. False if the guest has no driver for it.
    pub fn press(&self) -> bool {
        self.button.press()
    }

    /// Presses the power button, sends the guest the line on COM2 if there is one, and gives it
    /// `limit`, which is not zero, from now on.
    pub fn begin(&self, limit: Duration, line: Option<&str>) -> io::Result<()> {
        let asked = Asked { limit, until: Instant::now() + limit, line: line.map(str::to_owned) };
        *os::lock(&self.asked) = Some(asked);
        self.timer.every(limit.min(REPEAT))?;
        self.button.press();
        self.say(line);
        Ok(())
    }

    /// Gives the guest the line, unless it has yet to read what it was given before.
    fn say(&self, line: Option<&str>) {
        let mut com2 = os::lock(&self.com2);
        if let Some(line) = line
            && com2.is_read()
        {
            // What a client began and did not end is no part of it.
            com2.push(format!("\n{line}\n").as_bytes());
        }
    }
}
