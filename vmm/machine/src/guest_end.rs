//! The guest's own end: through the power, the reset or the panic register.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::exit::{Ending, Outcome};
use super::last_words::LastWords;

/// What a guest asks for.
#[derive(Clone, Copy)]
enum Asks {
    PowerOff,
    Reset,
    /// It has panicked, and does no more.
    Nothing,
}

/// Tells how the guest ends, once it has asked for it. Clones are the same.
#[derive(Clone)]
pub struct GuestEnd(Arc<Mutex<Asked>>);

struct Asked {
    events: [(EventFd, Asks); 3],
    last_words: LastWords,
    outcome: Outcome,
}

impl GuestEnd {
    /// By these non-blocking events: for power-off, for a reset, and for a panic.
    pub fn new([off, reset, panicked]: [EventFd; 3], last_words: LastWords, outcome: Outcome) -> Self {
        let events = [(off, Asks::PowerOff), (reset, Asks::Reset), (panicked, Asks::Nothing)];
        Self(Arc::new(Mutex::new(Asked { events, last_words, outcome })))
    }

    /// Sets the ending that the guest has asked for, if it is not set yet; the event loop does so
    /// by itself. True if there was one.
    pub fn tell(&self) -> bool {
        let asked = os::lock(&self.0);
        // Under one lock: a caller that finds no event here finds the ending set.
        let Some((_, asks)) = asked.events.iter().find(|(event, _)| event.read().is_ok()) else {
            return false;
        };
        asked.outcome.tell(match (asks, asked.last_words.panic()) {
            (Asks::PowerOff, _) => Ending::PowerOff,
            (Asks::Reset, None) => Ending::Reset,
            // A kernel resets itself when it has panicked.
            (Asks::Reset | Asks::Nothing, reason) => Ending::Panicked(reason),
        });
        true
    }
}

impl MutEventSubscriber for GuestEnd {
    fn init(&mut self, ops: &mut EventOps) {
        let asked = os::lock(&self.0);
        for (event, _) in &asked.events {
            let _ = ops.add(Events::new(event, EventSet::IN));
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.tell();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// How it ends when the guest has said this and asks so.
    fn ends(said: &str, asks: usize) -> Option<Ending> {
        let events = [(); 3].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
        let asked = events[asks].try_clone().unwrap();
        let (words, outcome) = (LastWords::default(), Outcome::new().unwrap());
        words.listen(Box::new(std::io::sink())).write_all(said.as_bytes()).unwrap();
        let end = GuestEnd::new(events, words, outcome.clone());
        assert!(!end.tell() && outcome.take().is_none());
        asked.write(1).unwrap();
        assert!(end.tell() && !end.tell());
        // A fault that comes of it comes later, and does not count.
        outcome.tell(Ending::Stopped);
        outcome.take()
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let panic = "Kernel panic - not syncing: oops\n";
        assert!(matches!(ends("", 0), Some(Ending::PowerOff)));
        assert!(matches!(ends("", 1), Some(Ending::Reset)));
        assert!(matches!(ends("", 2), Some(Ending::Panicked(None))));
        assert!(matches!(ends(panic, 0), Some(Ending::PowerOff)));
        assert!(matches!(ends(panic, 1), Some(Ending::Panicked(Some(why))) if why == "oops"));
        assert!(matches!(ends(panic, 2), Some(Ending::Panicked(Some(why))) if why == "oops"));
    }
}
