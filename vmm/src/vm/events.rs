//! The event loop of a VM's process, and what ends it from outside: signals, or the loss of its lifeline.

use std::io;
use std::os::unix::net::UnixStream;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::console::Lifeline;
use super::error::VmError;
use super::exit::{Ending, Outcome};

/// What is watched on the main thread. It outlives the VM: signals end the program before one is built, too.
pub struct EventLoop {
    subscribers: EventManager<Box<dyn MutEventSubscriber>>,
    outcome: Outcome,
}

impl EventLoop {
    /// A loop that ends at SIGINT, SIGTERM or SIGHUP, and with `lifeline` when standard input ends.
    pub fn new(lifeline: bool) -> Result<Self, VmError> {
        let outcome = Outcome::new().map_err(VmError::host("make an eventfd"))?;
        let mut events = Self { subscribers: EventManager::new()?, outcome: outcome.clone() };
        events.add(Box::new(Signals::new(outcome.clone())?));
        events.add(Box::new(Ended(outcome.clone())));
        if lifeline {
            events.add(Box::new(Lifeline(outcome)));
        }
        Ok(events)
    }

    /// Watches something more.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.subscribers.add_subscriber(subscriber);
    }

    /// Where the end is told.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// Waits for something to happen and deals with it. The ending, once one was told.
    pub fn turn(&mut self) -> Result<Option<Ending>, VmError> {
        self.subscribers.run()?;
        Ok(self.outcome.take())
    }
}

/// Wakes the loop when an ending was told.
struct Ended(Outcome);

impl MutEventSubscriber for Ended {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(self.0.event(), EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.event().read();
    }
}

/// Signals that ask the program to end, end the VM in good order.
struct Signals {
    pipe: UnixStream,
    outcome: Outcome,
}

impl Signals {
    fn new(outcome: Outcome) -> Result<Self, VmError> {
        let failed = VmError::host::<io::Error>;
        let (pipe, end) = UnixStream::pair().map_err(failed("make a pipe for signals"))?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let end = end.try_clone().map_err(failed("make a pipe for signals"))?;
            signal_hook::low_level::pipe::register(signal, end).map_err(failed("watch for signals"))?;
        }
        Ok(Self { pipe, outcome })
    }
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.pipe, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut bytes = [0u8; 16];
        let _ = rustix::io::read(&self.pipe, &mut bytes);
        self.outcome.tell(Ending::Stopped);
    }
}
