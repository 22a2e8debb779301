//! How requests get from the API's thread to the VM's main thread, and answers back: channels, and
//! events that wake a thread that waits in poll.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{EventfdFlags, eventfd};

use wire::http::ConnectionId;

use super::request::Request;
use super::response::Response;

/// An event that is readable from [`Wake::ring`] to [`Wake::clear`].
#[derive(Clone, Debug)]
pub struct Wake(Arc<OwnedFd>);

impl Wake {
    /// One that is not readable.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)))
    }

    /// Makes it readable.
    pub fn ring(&self) {
        // It fails only if it has been rung more often than it can count: then it is readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it wait for the next ring.
    pub fn clear(&self) {
        // It fails only if there was none.
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Turns the main thread's event loop when calls have come; they are served between its turns.
impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(self, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.clear();
    }
}

/// A request that waits for its answer.
#[derive(Debug)]
pub struct Call {
    request: Request,
    connection: ConnectionId,
    answers: AnswerSender,
}

impl Call {
    /// Has it carried out, and answers it.
    pub fn carry_out(self, serve: impl FnOnce(Request) -> Response) {
        let response = serve(self.request);
        // The thread may have ended, and its clients with it.
        let _ = self.answers.answers.send((self.connection, response));
        self.answers.wake.ring();
    }
}

#[derive(Clone, Debug)]
struct AnswerSender {
    answers: Sender<(ConnectionId, Response)>,
    wake: Wake,
}

/// The API thread's side.
#[derive(Debug)]
pub struct Caller {
    calls: Sender<Call>,
    called: Wake,
    answer_sender: AnswerSender,
    answers: Receiver<(ConnectionId, Response)>,
}

impl Caller {
    /// Asks. If the VM has ended, no answer comes.
    pub fn call(&self, connection: ConnectionId, request: Request) {
        let call = Call { request, connection, answers: self.answer_sender.clone() };
        let _ = self.calls.send(call);
        self.called.ring();
    }

    /// Readable when there are answers.
    pub fn wake(&self) -> &Wake {
        &self.answer_sender.wake
    }

    /// An answer, if there is one.
    pub fn next_answer(&self) -> Option<(ConnectionId, Response)> {
        self.answers.try_recv().ok()
    }
}

/// The main thread's side.
#[derive(Debug)]
pub struct Inbox {
    calls: Receiver<Call>,
    called: Wake,
}

impl Inbox {
    /// At most `most` calls; for those beyond, the event is rung again.
    pub fn take(&self, most: usize) -> Vec<Call> {
        let calls: Vec<Call> = self.calls.try_iter().take(most).collect();
        if calls.len() == most {
            self.called.ring();
        }
        calls
    }

    /// Readable when there are calls.
    pub fn called(&self) -> &Wake {
        &self.called
    }
}

/// Both sides of a new way. `wake` is what wakes the API's thread.
pub fn way(wake: Wake) -> io::Result<(Caller, Inbox)> {
    let called = Wake::new()?;
    let (calls, inbox) = mpsc::channel();
    let (answers_in, answers) = mpsc::channel();
    let answer_sender = AnswerSender { answers: answers_in, wake };
    let caller = Caller { calls, called: called.clone(), answer_sender, answers };
    Ok((caller, Inbox { calls: inbox, called }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_ready(wake: &Wake) -> bool {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(wake, PollFlags::IN)], Some(&at_once)).unwrap() > 0
    }

    #[test]
    fn calls_and_answers_cross_and_wake() {
        let (caller, inbox) = way(Wake::new().unwrap()).unwrap();
        assert!(!is_ready(inbox.called()) && !is_ready(caller.wake()));
        for connection in [7, 8, 9] {
            caller.call(connection, Request::GetVersion);
        }
        assert!(is_ready(inbox.called()));
        inbox.called().clear();
        let first = inbox.take(2);
        assert_eq!(first.len(), 2);
        assert!(is_ready(inbox.called()), "the third call would be forgotten");
        inbox.called().clear();
        let rest = inbox.take(2);
        assert!(!is_ready(inbox.called()));
        for call in first.into_iter().chain(rest) {
            call.carry_out(|_| Response::done());
        }
        assert!(is_ready(caller.wake()));
        let answered: Vec<_> = std::iter::from_fn(|| caller.next_answer()).map(|(id, _)| id).collect();
        assert_eq!(answered, [7, 8, 9]);
        drop(inbox);
        caller.call(1, Request::GetVersion);
        assert!(caller.next_answer().is_none());
    }
}
