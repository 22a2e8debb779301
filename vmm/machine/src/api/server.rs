//! The API's thread: accepts clients, reads requests, sends answers. It touches nothing of the VM, so a client that is
//! slow, stuck or hostile costs the guest nothing.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::call::{Caller, ConnectionId, Inbox, Wake, way};
use super::connection::{Connection, Step};
use super::http::{Response, Status};
use super::request::Request;

/// Clients at a time. One more takes the place of the one that has been idle longest, or is turned away.
pub const MAX_CONNECTIONS: usize = 256;
/// Requests of one client that are dealt with before it is the next client's turn.
const MAX_REQUESTS_A_TURN: usize = 16;
/// Clients taken in before it is the turn of those that are there.
const MAX_ACCEPTS_A_TURN: usize = 32;
/// How long nobody is let in after the host had no descriptor for one.
const SHORTAGE: Duration = Duration::from_millis(100);

/// The thread. Dropped, it is ended and waited for.
#[derive(Debug)]
pub struct Server {
    thread: Option<JoinHandle<()>>,
    wake: Wake,
    stop: Arc<AtomicBool>,
}

impl Server {
    /// Starts the thread on `listener` (non-blocking). What is asked, in bodies of at most so many bytes, comes out of the inbox.
    pub fn start(listener: UnixListener, max_body_bytes: usize) -> io::Result<(Self, Inbox)> {
        let (wake, stop) = (Wake::new()?, Arc::new(AtomicBool::new(false)));
        let (caller, inbox) = way(wake.clone())?;
        let its_stop = stop.clone();
        let thread = thread::Builder::new().name("api".into()).stack_size(256 << 10).spawn(move || {
            let mut clients =
                Clients { listener, caller, max_body_bytes, all: HashMap::new(), next: 0, shut_until: None };
            while !its_stop.load(Ordering::SeqCst) {
                clients.turn();
            }
            clients.send_last_answers();
        })?;
        Ok((Self { thread: Some(thread), wake, stop }, inbox))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Client {
    connection: Connection<UnixStream>,
    /// It has more to say that needs no waiting for.
    more: bool,
}

struct Clients {
    listener: UnixListener,
    caller: Caller,
    max_body_bytes: usize,
    all: HashMap<ConnectionId, Client>,
    next: ConnectionId,
    /// Nobody is let in before.
    shut_until: Option<Instant>,
}

impl Clients {
    /// Waits until there is something to do, and does it.
    fn turn(&mut self) {
        let (accepts, mut ready) = self.wait();
        let now = Instant::now();
        ready.extend(self.all.iter().filter(|(_, c)| c.more).map(|(id, _)| *id));
        self.caller.wake().clear();
        while let Some((id, response)) = self.caller.next_answer() {
            if let Some(client) = self.all.get_mut(&id) {
                client.connection.answer(&response, now);
                ready.push(id);
            }
        }
        for id in ready {
            self.go_on(id, now);
        }
        let is_late = |c: &Client| c.connection.deadline().is_some_and(|d| d <= now);
        let late: Vec<_> = self.all.iter().filter(|(_, c)| is_late(c)).map(|(id, _)| *id).collect();
        for id in late {
            match self.all.get_mut(&id).is_some_and(|c| c.connection.expire(now)) {
                true => self.go_on(id, now),
                false => _ = self.all.remove(&id),
            }
        }
        if accepts {
            self.accept(now);
        }
    }

    /// Waits for clients, answers and deadlines: whether somebody wants in, and who is ready.
    fn wait(&mut self) -> (bool, Vec<ConnectionId>) {
        let now = Instant::now();
        let shut = self.shut_until.filter(|until| *until > now);
        self.shut_until = shut;
        let at_once = self.all.values().any(|c| c.more).then_some(now);
        let deadlines = self.all.values().filter_map(|c| c.connection.deadline());
        let until = deadlines.chain(shut).chain(at_once).min();
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(now);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let mut ids = Vec::new();
        let mut watched = vec![PollFd::new(self.caller.wake(), PollFlags::IN)];
        if shut.is_none() {
            watched.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let own = watched.len();
        for (id, client) in &self.all {
            let mut flags = PollFlags::empty();
            let (reads, writes) = client.connection.interest();
            flags.set(PollFlags::IN, reads);
            flags.set(PollFlags::OUT, writes);
            if !flags.is_empty() {
                ids.push(*id);
                watched.push(PollFd::from_borrowed_fd(client.connection.stream().as_fd(), flags));
            }
        }
        if poll(&mut watched, timeout.as_ref()).is_err() {
            // A signal, which another thread deals with.
            return (false, Vec::new());
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let accepts = own == 2 && watched.get(1).is_some_and(is_ready);
        let ready = watched.iter().skip(own).zip(ids).filter(|(fd, _)| is_ready(fd)).map(|(_, id)| id);
        (accepts, ready.collect())
    }

    /// Goes on with one client as far as it goes now.
    fn go_on(&mut self, id: ConnectionId, now: Instant) {
        let Some(client) = self.all.get_mut(&id) else { return };
        client.more = false;
        for _ in 0..MAX_REQUESTS_A_TURN {
            match client.connection.advance(now) {
                Step::Wait => return,
                Step::Close => {
                    self.all.remove(&id);
                    return;
                }
                Step::Ask(asked) => {
                    tracing::info!("the API is asked for {} {:?}", asked.method, asked.path);
                    match Request::parse(&asked.method, &asked.path, &asked.body) {
                        // Nobody there: the VM has ended, and so does this thread.
                        Ok(request) => self.caller.call(id, request),
                        Err(fault) => client.connection.answer(&Response::fault(fault.message()), now),
                    }
                }
            }
        }
        client.more = true;
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..MAX_ACCEPTS_A_TURN {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    return;
                }
                Err(e) => {
                    // The client waits on in the queue. Asking again at once would be spinning.
                    tracing::debug!(error = %e, "no API client can be let in for now");
                    self.shut_until = Some(now + SHORTAGE);
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let mut connection = Connection::new(stream, self.max_body_bytes, now);
            if self.all.len() >= MAX_CONNECTIONS && !self.make_room() {
                let mut busy = Response::fault(format_args!("{MAX_CONNECTIONS} clients are being served."));
                busy.status = Status::Unavailable;
                connection.end_with(&busy, now);
                // One attempt: there is no room to remember it.
                let _ = connection.advance(now);
                continue;
            }
            let id = self.next;
            self.next += 1;
            self.all.insert(id, Client { connection, more: false });
            self.go_on(id, now);
        }
    }

    /// Closes the connection that has been idle longest, if one is idle.
    fn make_room(&mut self) -> bool {
        let idle = self.all.iter().filter(|(_, c)| c.connection.is_idle());
        let longest = idle.min_by_key(|(_, c)| c.connection.since()).map(|(id, _)| *id);
        longest.is_some_and(|id| self.all.remove(&id).is_some())
    }

    /// Answers that were given before the end, to whoever takes them at once.
    fn send_last_answers(&mut self) {
        let now = Instant::now();
        while let Some((id, response)) = self.caller.next_answer() {
            if let Some(client) = self.all.get_mut(&id) {
                client.connection.answer(&response, now);
                let _ = client.connection.advance(now);
            }
        }
    }
}
