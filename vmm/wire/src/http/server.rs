//! A server's thread: accepts clients, reads requests, sends answers. A slow, stuck or hostile
//! client does not delay the others.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::connection::{Connection, Rules, Step, Stream};
use super::{HttpRequest, Response};

/// Requests of one client that are served before the next client's turn.
const MAX_REQUESTS_A_TURN: usize = 16;
/// Clients accepted in one turn.
const MAX_ACCEPTS_A_TURN: usize = 32;
/// How long no client is accepted after the host had no descriptor for one.
const SHORTAGE: Duration = Duration::from_millis(100);

/// One client's connection, for the life of the process.
pub type ConnectionId = u64;

pub trait Service: Send {
    /// Called once, on the thread, before it has clients.
    fn begin(&mut self) {}

    /// The answer; None if it comes later, from [`Self::answers`].
    fn serve(&mut self, connection: ConnectionId, request: HttpRequest) -> Option<Response>;

    /// Readable while there are answers for [`Self::answers`].
    fn wake(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The answers that are ready, to requests that were not answered at once.
    fn answers(&mut self) -> Vec<(ConnectionId, Response)> {
        Vec::new()
    }
}

/// Where clients connect; non-blocking.
#[derive(Debug)]
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Socket> {
        let socket = match self {
            Self::Unix(listener) => Socket::Unix(listener.accept()?.0),
            Self::Tcp(listener) => Socket::Tcp(listener.accept()?.0),
        };
        Ok(socket)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A connected client.
#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(true),
            Self::Tcp(stream) => stream.set_nonblocking(true),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Socket {
    fn end_output(&mut self) {
        // It may be closed already, which does no harm.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// The thread. Dropping it stops the thread and waits for it.
#[derive(Debug)]
pub struct Server {
    thread: Option<JoinHandle<()>>,
    /// Readable once it is to end.
    stop: Arc<OwnedFd>,
}

impl Server {
    /// Starts the thread, made by `builder`, on `listener` (non-blocking): `service` answers its
    /// requests, under `rules`.
    ///
    /// # Errors
    /// No thread or no descriptor is left.
    pub fn start(
        builder: thread::Builder,
        listener: Listener,
        rules: Rules,
        mut service: impl Service + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let its_stop = stop.clone();
        let thread = builder.spawn(move || {
            service.begin();
            let mut clients =
                Clients { listener, rules, service, all: HashMap::new(), next: 0, shut_until: None };
            while clients.turn(&its_stop) {}
            clients.send_last_answers();
        })?;
        Ok(Self { thread: Some(thread), stop })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It fails only if the counter is at its limit: then it is readable.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Client {
    connection: Connection<Socket>,
    /// It has more requests buffered.
    more: bool,
}

struct Clients<S> {
    listener: Listener,
    rules: Rules,
    service: S,
    all: HashMap<ConnectionId, Client>,
    next: ConnectionId,
    /// No client is accepted before.
    shut_until: Option<Instant>,
}

impl<S: Service> Clients<S> {
    /// Waits for events, and handles them. False when the thread is to end.
    fn turn(&mut self, stop: &OwnedFd) -> bool {
        let Some((accepts, mut ready)) = self.wait(stop) else { return false };
        let now = Instant::now();
        ready.extend(self.all.iter().filter(|(_, c)| c.more).map(|(id, _)| *id));
        for (id, response) in self.service.answers() {
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
        true
    }

    /// Waits for clients, answers and deadlines: whether a client has connected, and which
    /// connections are ready. None when the thread is to end.
    fn wait(&mut self, stop: &OwnedFd) -> Option<(bool, Vec<ConnectionId>)> {
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
        let mut watched = vec![PollFd::new(stop, PollFlags::IN)];
        // Polled for nothing while no client is accepted, so that each entry keeps its place.
        let accepted = if shut.is_none() { PollFlags::IN } else { PollFlags::empty() };
        watched.push(PollFd::new(&self.listener, accepted));
        watched.extend(self.service.wake().map(|wake| PollFd::from_borrowed_fd(wake, PollFlags::IN)));
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
            // A signal, which another thread handles.
            return Some((false, Vec::new()));
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if watched.first().is_some_and(is_ready) {
            return None;
        }
        let accepts = shut.is_none() && watched.get(1).is_some_and(is_ready);
        let ready = watched.iter().skip(own).zip(ids).filter(|(fd, _)| is_ready(fd)).map(|(_, id)| id);
        Some((accepts, ready.collect()))
    }

    /// Advances one client as far as possible now.
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
                    if let Some(response) = self.service.serve(id, asked) {
                        client.connection.answer(&response, now);
                    }
                }
            }
        }
        client.more = true;
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..MAX_ACCEPTS_A_TURN {
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    return;
                }
                Err(_) => {
                    // The client stays in the queue. Accepting again at once would spin.
                    self.shut_until = Some(now + SHORTAGE);
                    return;
                }
            };
            if stream.set_nonblocking().is_err() {
                continue;
            }
            let mut connection = Connection::new(stream, self.rules, now);
            if self.all.len() >= self.rules.connections && !self.make_room() {
                connection.end_with(&(self.rules.turn_away)(), now);
                // One attempt: it is not kept.
                let _ = connection.advance(now);
                continue;
            }
            let id = self.next;
            self.next += 1;
            self.all.insert(id, Client { connection, more: false });
            self.go_on(id, now);
        }
    }

    /// Closes the connection that has been idle longest, if there is one and the rules allow it.
    fn make_room(&mut self) -> bool {
        if !self.rules.evicts_idle {
            return false;
        }
        let idle = self.all.iter().filter(|(_, c)| c.connection.is_idle());
        let longest = idle.min_by_key(|(_, c)| c.connection.since()).map(|(id, _)| *id);
        longest.is_some_and(|id| self.all.remove(&id).is_some())
    }

    /// Sends the answers that are ready at the end, to clients that take them at once.
    fn send_last_answers(&mut self) {
        let now = Instant::now();
        for (id, response) in self.service.answers() {
            if let Some(client) = self.all.get_mut(&id) {
                client.connection.answer(&response, now);
                let _ = client.connection.advance(now);
            }
        }
    }
}
