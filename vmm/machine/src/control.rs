//! A VM's control socket: one JSON object a line in each direction, to each client in order.

mod refusal;
mod serve;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::balloon::{BalloonSize, BalloonStatus};
use super::capture::Captured;
use super::listener::Listener;
use super::stats::Values;
use super::walk::{TablePart, Walked};
use super::working_set::WorkingSet;
use memory::page_out::PagedOut;
use wire::{LineError, Lines};

pub use super::status::Status;
use refusal::host;
pub use refusal::{ErrorKind, Refusal};

/// Clients at a time; a further one is disconnected.
const MAX_CLIENTS: usize = 16;
/// Longest request.
const MAX_REQUEST_BYTES: usize = 4096;
/// How long a client may keep the VM waiting for it to take an answer.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
const KEEPER: u32 = 2;
const DONE: u32 = 3;

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What this VM is and where its memory lies.
    Status,
    /// The same with the frames it has, `{"op":"status","frames":true}`: reading them walks its
    /// page table.
    #[serde(skip)]
    StatusAndFrames,
    /// Stop all vCPUs in place.
    Pause,
    /// Let them run again.
    Resume,
    /// End the VM.
    Stop,
    /// Press the power button.
    PowerButton,
    /// Ask the guest to power off, and end the VM if it does not.
    ShutDown {
        /// How long it may take; 0 is [`Request::Stop`].
        timeout_seconds: u32,
        /// Besides by its power button it is asked by this line on COM2.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        com2: Option<String>,
    },
    /// Give what the VM is, state and memory, to the keeper of images that listens here
    /// ([`crate::capture`]).
    Capture {
        /// The keeper's socket.
        socket: PathBuf,
    },
    /// Allow (or undo) the host kernel's samepage merging of guest RAM.
    Mergeable {
        /// Allow.
        on: bool,
    },
    /// KVM's own statistics.
    KvmStats,
    /// Pace how fast the guest takes frames of the host.
    Throttle {
        /// The pages of 4096 bytes that it may grow by in a second, at least 1; None: any.
        pages_per_second: Option<u64>,
    },
    /// Push pages of the guest's own that were not written lately out to the host's swap.
    PageOut {
        /// How many at the most.
        pages: u64,
    },
    /// How much of its memory the guest uses.
    WorkingSet,
    /// The balloon as it is, with what the page table says of it.
    Balloon,
    /// Its sizes alone, which costs nothing.
    BalloonSize,
    /// Ask the guest for fresh statistics, which [`Request::Balloon`] shows once they have come.
    BalloonStatistics,
    /// Translate an address of the guest's.
    Walk {
        /// The address.
        address: u64,
        /// The vCPU whose page tables are meant; 0 is the first.
        vcpu: u8,
        /// The guest-physical address of other tables.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        root: Option<u64>,
    },
    /// What the guest maps, a part of it.
    PageTable {
        /// The address to begin with: 0, then `next` of the last part.
        from: u64,
        /// As in [`Request::Walk`].
        vcpu: u8,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        root: Option<u64>,
    },
    /// Ask the guest for another balloon size.
    BalloonTarget {
        /// The size, in pages of 4096 bytes.
        pages: u32,
    },
}

impl Request {
    /// Reads one. An operation takes its own keys and no others, which serde does not see to by
    /// itself where it has none.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        let mut value: serde_json::Value = serde_json::from_slice(line)?;
        if value["op"] == "status"
            && let Some(frames) = value.as_object_mut().and_then(|keys| keys.remove("frames"))
        {
            let frames = bool::deserialize(frames)?;
            let status = Self::parse(value.to_string().as_bytes())?;
            return Ok(if frames { Self::StatusAndFrames } else { status });
        }
        let request = Self::deserialize(&value)?;
        let meant = serde_json::to_value(&request)?;
        match meant == value {
            true => Ok(request),
            false => Err(serde::de::Error::custom(format!("unknown key, expected {meant}"))),
        }
    }
}

/// What a VM answers.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::PowerButton`].
    PowerButton(Pressed),
    /// To [`Request::KvmStats`]: sums over all vCPUs where a value is theirs.
    KvmStats(Values),
    /// To [`Request::Balloon`].
    Balloon(Box<BalloonStatus>),
    /// To [`Request::BalloonSize`].
    BalloonSize(BalloonSize),
    /// To [`Request::PageOut`].
    PagedOut(PagedOut),
    /// To [`Request::WorkingSet`].
    WorkingSet(WorkingSet),
    /// To [`Request::Capture`].
    Captured(Captured),
    /// To [`Request::Walk`].
    Walked(Box<Walked>),
    /// To [`Request::PageTable`].
    PageTable(Box<TablePart>),
    /// The request was carried out.
    Done,
}

/// A reply, or why there is none.
pub type Answer = Result<Reply, Refusal>;

/// Whether a press of the power button is of use.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Pressed {
    /// Has the guest a driver for it? If one comes later, it learns of it then.
    pub driver: bool,
}

/// What carries requests out.
pub trait Serve {
    /// Answers one request, now or later.
    fn serve(&mut self, request: Request) -> Served;
}

/// What becomes of a request.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and it is moved once")]
pub enum Served {
    /// It is answered.
    Now(Answer),
    /// It takes long: this is done on a thread of its own, while others are served.
    Later(Work),
}

/// Work for a thread; what it leaves to do is done where requests are served, and answers.
pub type Work = Box<dyn FnOnce() -> Rest + Send>;
/// What is left to do.
pub type Rest = Box<dyn FnOnce() -> Answer + Send>;

struct Client {
    lines: Lines,
    /// Differs from that of each other client there ever was.
    number: u64,
    /// It waits for an answer, and nothing that it says is read.
    waits: bool,
}

/// The socket and its clients.
pub struct Control<S> {
    listener: Listener,
    clients: HashMap<RawFd, Client>,
    /// How many there ever were.
    count: u64,
    done: Done,
    server: S,
}

impl<S: Serve> Control<S> {
    /// Serves `listener` with `server`.
    pub fn new(listener: Listener, server: S) -> io::Result<Self> {
        Ok(Self { listener, clients: HashMap::new(), count: 0, done: Done::new()?, server })
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Some(stream) = self.listener.accept() else { return };
        if self.clients.len() < MAX_CLIENTS
            && ops.add(Events::with_data(&stream, CLIENT, EventSet::IN)).is_ok()
        {
            self.count += 1;
            let (fd, lines) = (stream.as_raw_fd(), Lines::new(stream, MAX_REQUEST_BYTES));
            self.clients.insert(fd, Client { lines, number: self.count, waits: false });
        }
    }

    /// Takes what has come and answers every whole line. An error when the client is to be
    /// disconnected.
    fn talk(&mut self, fd: RawFd) -> Result<(), LineError> {
        let Some(client) = self.clients.get_mut(&fd) else { return Ok(()) };
        match client.lines.take() {
            Err(LineError::NotYet) => Ok(()),
            taken => taken.and_then(|()| self.answer_lines(fd)),
        }
    }

    /// Answers the lines that have been taken, until one is answered later.
    fn answer_lines(&mut self, fd: RawFd) -> Result<(), LineError> {
        let Some(client) = self.clients.get_mut(&fd) else { return Ok(()) };
        while !client.waits
            && let Some(line) = client.lines.next_line()?
        {
            let served = match Request::parse(&line) {
                Ok(request) => self.server.serve(request),
                Err(e) => {
                    Served::Now(Err(Refusal::new(ErrorKind::NotARequest, format!("not a request: {e}"))))
                }
            };
            let answer = match served {
                Served::Now(answer) => answer,
                Served::Later(work) => match self.done.begin(fd, client.number, work) {
                    Ok(()) => {
                        client.waits = true;
                        continue;
                    }
                    Err(error) => Err(host("a thread cannot be started")(error)),
                },
            };
            client.lines.answer(&answer, Instant::now() + WRITE_LIMIT)?;
        }
        Ok(())
    }

    /// Does what threads have left to do, and answers. A client that is gone wants no answer, and
    /// nothing is done for it.
    fn end_work(&mut self, ops: &mut EventOps) {
        for (fd, number, rest) in self.done.take() {
            let client = self.clients.get_mut(&fd).filter(|client| client.number == number);
            let Some(client) = client else { continue };
            client.waits = false;
            let answer = rest();
            let answered = client.lines.answer(&answer, Instant::now() + WRITE_LIMIT);
            if answered.and_then(|()| self.answer_lines(fd)).is_err() {
                self.disconnect(fd, ops);
            } else {
                self.watch(fd, ops);
            }
        }
    }

    /// A client that waits is not watched: what it says is not taken before it has its answer.
    fn watch(&self, fd: RawFd, ops: &mut EventOps) {
        if let Some(client) = self.clients.get(&fd) {
            let set = if client.waits { EventSet::empty() } else { EventSet::IN };
            let _ = ops.modify(Events::with_data(&client.lines.as_fd(), CLIENT, set));
        }
    }

    fn disconnect(&mut self, fd: RawFd, ops: &mut EventOps) {
        let _ = ops.remove(Events::empty_raw(fd));
        self.clients.remove(&fd);
    }
}

/// Work that threads have done, and what is left to do.
struct Done {
    rests: Arc<Mutex<Vec<(RawFd, u64, Rest)>>>,
    some: Arc<EventFd>,
}

impl Done {
    fn new() -> io::Result<Self> {
        Ok(Self { rests: Arc::default(), some: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?) })
    }

    /// Has a thread do `work` for the client `number` at `fd`.
    fn begin(&self, fd: RawFd, number: u64, work: Work) -> io::Result<()> {
        let (rests, some) = (self.rests.clone(), self.some.clone());
        let work = move || {
            let rest = work();
            os::lock(&rests).push((fd, number, rest));
            let _ = some.write(1);
        };
        std::thread::Builder::new().name("capture".into()).spawn(work).map(drop)
    }

    fn take(&self) -> Vec<(RawFd, u64, Rest)> {
        let _ = self.some.read();
        std::mem::take(&mut *os::lock(&self.rests))
    }
}

impl<S: Serve> MutEventSubscriber for Control<S> {
    fn init(&mut self, ops: &mut EventOps) {
        self.listener.watch(ops, LISTENER, KEEPER);
        let _ = ops.add(Events::with_data(&*self.done.some, DONE, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == LISTENER {
            self.accept(ops);
        } else if events.data() == KEEPER {
            self.listener.look_after(ops, LISTENER);
        } else if events.data() == DONE {
            self.end_work(ops);
        } else if self.clients.get(&events.fd()).is_some_and(|client| client.waits) {
            // The client has disconnected, which is reported whatever is watched.
            self.disconnect(events.fd(), ops);
        } else {
            match self.talk(events.fd()) {
                Ok(()) if self.clients.get(&events.fd()).is_some_and(|client| client.waits) => {
                    self.watch(events.fd(), ops);
                }
                Ok(()) => {}
                Err(_) => self.disconnect(events.fd(), ops),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::throttle::Throttled;

    #[test]
    fn requests_and_replies_are_one_json_object_each() {
        let ask = |s: &str| Request::parse(s.as_bytes());
        assert_eq!(ask(r#"{"op":"pause"}"#).unwrap(), Request::Pause);
        assert_eq!(ask(r#"{"op":"mergeable","on":true}"#).unwrap(), Request::Mergeable { on: true });
        let throttle = Request::Throttle { pages_per_second: Some(7) };
        assert_eq!(ask(r#"{"op":"throttle","pages_per_second":7}"#).unwrap(), throttle);
        let lift = Request::Throttle { pages_per_second: None };
        assert_eq!(ask(r#"{"op":"throttle","pages_per_second":null}"#).unwrap(), lift);
        assert!(
            ask(r#"{"op":"throttle"}"#).is_err()
                && ask(r#"{"op":"throttle","pages_per_second":-1}"#).is_err()
        );
        assert!(ask(r#"{"op":"pause","now":1}"#).is_err());
        assert_eq!(ask(r#"{"op":"status","frames":true}"#).unwrap(), Request::StatusAndFrames);
        assert_eq!(ask(r#"{"op":"status","frames":false}"#).unwrap(), Request::Status);
        for wrong in [r#"{"op":"status","frames":1}"#, r#"{"op":"status","frames":true,"now":1}"#, "[]", "7"]
        {
            assert!(ask(wrong).is_err(), "{wrong}");
        }
        assert!(ask(r#"{"op":"explode"}"#).is_err());
        assert_eq!(serde_json::to_string(&Reply::Done).unwrap(), r#""done""#);
    }

    #[test]
    fn the_status_of_an_older_vm_is_understood() {
        let older = r#"{"name":"vm","pid":1,"paused":false,"vcpus":1,"memory_bytes":4096,"backend":"pvm","extents":[]}"#;
        let status: Status = serde_json::from_str(older).unwrap();
        assert_eq!((status.throttle, status.parked_pages), (Throttled::default(), 0));
    }
}
