//! The event loop of a VM's process, and what ends it from outside: signals, or the loss of its
//! lifeline.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use super::console::Lifeline;
use super::error::VmError;
use super::exit::{Ending, Outcome};
use os::print::errln;
use os::signals;

/// What is watched on the main thread. It outlives the VM: signals end the program before one is
/// built, too.
pub struct EventLoop {
    subscribers: EventManager<Box<dyn MutEventSubscriber>>,
    outcome: Outcome,
}

impl EventLoop {
    /// A loop that ends at SIGINT, SIGTERM or SIGHUP, where these were not ignored when the program
    /// was started, and with `lifeline` when standard input ends.
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

    /// Where the ending is set.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// Waits for events and deals with them. The ending, once one is set.
    pub fn turn(&mut self) -> Result<Option<Ending>, VmError> {
        self.subscribers.run()?;
        Ok(self.outcome.take())
    }
}

/// Wakes the loop when an ending is set.
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
    /// Which came last.
    last: Arc<AtomicUsize>,
    outcome: Outcome,
}

impl Signals {
    fn new(outcome: Outcome) -> Result<Self, VmError> {
        let failed = VmError::host::<io::Error>;
        let (pipe, end) = UnixStream::pair().map_err(failed("make a pipe for signals"))?;
        let last = Arc::new(AtomicUsize::new(0));
        for signal in signals::ending() {
            let end = end.try_clone().map_err(failed("make a pipe for signals"))?;
            // In this order: once the pipe is readable, `last` says which it was.
            signal_hook::flag::register_usize(signal, last.clone(), signal as usize)
                .map_err(failed("watch for signals"))?;
            signal_hook::low_level::pipe::register(signal, end).map_err(failed("watch for signals"))?;
        }
        Ok(Self { pipe, last, outcome })
    }
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.pipe, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut bytes = [0u8; 16];
        let _ = rustix::io::read(&self.pipe, &mut bytes);
        errln!("note: {}: the VM ends", signals::name(self.last.load(Ordering::SeqCst) as i32));
        self.outcome.tell(Ending::Stopped);
    }
}
