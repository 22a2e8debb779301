//! All connections of a device, and the events of their sockets.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use super::connection::{Connection, Greeting, Stage, without_waiting};
use super::packet::{HEADER_BYTES, HOST_CID, Header, STREAM, op};

/// The most connections at once, those included that have not said where to.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Finds the program on the host that serves a port, without waiting.
pub type Dial = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// The most answers to packets of no connection that wait for buffers; what is more is dropped.
const MAX_STRAYS: usize = 64;
/// Sockets that are looked at in a turn.
const MAX_EVENTS: usize = 64;
/// The first port that the host's ends get.
const FIRST_PORT: u32 = 1 << 30;
/// The number of the listener among the sockets; connections have others.
const LISTENER: u64 = 0;

/// Which connection: the guest's port and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    guest_port: u32,
    host_port: u32,
}

/// Why a packet was dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum Dropped {
    #[error("it is from {src_cid} to {dst_cid}, not from this guest to the host")]
    Address { src_cid: u64, dst_cid: u64 },
    #[error("type {0}")]
    Kind(u16),
    #[error("operation {0}")]
    Operation(u16),
    #[error("too many packets of no connection")]
    Strays,
}

pub(super) struct Mux {
    cid: u64,
    epoll: OwnedFd,
    listener: UnixListener,
    dial: Dial,
    connections: BTreeMap<Key, (u64, Connection)>,
    /// By the number of their sockets; that of one that is gone is never another's.
    keys: BTreeMap<u64, Key>,
    /// Connections whose host has not said where to.
    greeting: BTreeMap<u64, Connection>,
    next_number: u64,
    next_port: u32,
    /// Connections that are, or may be, worth a look, in turn.
    last: Option<Key>,
    /// Resets of what is no connection.
    strays: VecDeque<Header>,
}

impl Mux {
    pub(super) fn new(cid: u64, listener: UnixListener, dial: Dial) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        Ok(Self {
            cid,
            epoll,
            listener,
            dial,
            connections: BTreeMap::new(),
            keys: BTreeMap::new(),
            greeting: BTreeMap::new(),
            next_number: LISTENER + 1,
            next_port: FIRST_PORT,
            last: None,
            strays: VecDeque::new(),
        })
    }

    /// What is readable when a socket has an event.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Takes notice of what sockets say: of all of them, or false if there may be more.
    pub(super) fn look(&mut self) -> bool {
        let mut found: Vec<Event> = Vec::with_capacity(MAX_EVENTS);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut found), Some(&now));
        let mut all = found.len() < MAX_EVENTS;
        for event in &found {
            match event.data.u64() {
                LISTENER => all &= (0..MAX_EVENTS).any(|_| !self.accept()),
                number => self.happened(number, event.flags),
            }
        }
        all
    }

    /// Takes one connection of the host's. False if none waits.
    fn accept(&mut self) -> bool {
        let Ok((stream, _)) = self.listener.accept() else { return false };
        if self.connections.len() + self.greeting.len() >= MAX_CONNECTIONS {
            return true;
        }
        let number = self.next_number;
        if let Ok(connection) = without_waiting(stream).map(|stream| Connection::new(stream, Stage::Greeting))
            && self.watch(number, &connection.stream).is_ok()
        {
            self.greeting.insert(number, connection);
            // Most have said something already.
            self.happened(number, EventFlags::IN);
        }
        true
    }

    fn watch(&mut self, number: u64, stream: &UnixStream) -> io::Result<()> {
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, stream, EventData::new_u64(number), edges)?;
        self.next_number += 1;
        Ok(())
    }

    fn happened(&mut self, number: u64, flags: EventFlags) {
        let gone = EventFlags::HUP | EventFlags::ERR;
        let readable = flags.intersects(EventFlags::IN | EventFlags::RDHUP | gone);
        if let Some(mut connection) = self.greeting.remove(&number) {
            connection.readable |= readable;
            match connection.greet() {
                Greeting::More if !flags.intersects(gone) => _ = self.greeting.insert(number, connection),
                Greeting::More | Greeting::Wrong => {}
                Greeting::Port(guest_port) => {
                    let key = Key { guest_port, host_port: self.free_port(guest_port) };
                    connection.stage = Stage::Requested;
                    connection.pending.request = true;
                    self.keys.insert(number, key);
                    self.connections.insert(key, (number, connection));
                }
            }
            return;
        }
        let Some((_, connection)) = self.keys.get(&number).and_then(|key| self.connections.get_mut(key))
        else {
            return;
        };
        connection.readable |= readable;
        if flags.intersects(EventFlags::OUT | gone) {
            connection.writable = true;
            connection.flush();
        }
    }

    /// A port of the host's that has no connection with `guest_port`: there are far more than
    /// connections.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&Key { guest_port, host_port }) {
                return host_port;
            }
        }
    }

    /// Carries out what a packet of the guest's says, which has this data.
    pub(super) fn take(&mut self, header: &Header, data: &[u8]) -> Result<(), Dropped> {
        let Header { src_cid, dst_cid, .. } = *header;
        if src_cid != self.cid || dst_cid != HOST_CID {
            return Err(Dropped::Address { src_cid, dst_cid });
        }
        if header.kind != STREAM {
            self.refuse(header)?;
            return Err(Dropped::Kind(header.kind));
        }
        let key = Key { guest_port: header.src_port, host_port: header.dst_port };
        if header.op == op::REQUEST {
            return self.request(key, header);
        }
        let Some((_, connection)) = self.connections.get_mut(&key) else {
            return match header.op {
                op::RST => Ok(()),
                _ => self.refuse(header),
            };
        };
        connection.peer(header);
        // It may have told of room.
        connection.readable = true;
        match (header.op, connection.stage) {
            (op::RST, _) => self.remove(key),
            (op::RESPONSE, Stage::Requested) => connection.accepted(key.host_port),
            (op::RW, Stage::Established) => {
                if !connection.take(data) {
                    connection.pending.reset = true;
                }
            }
            (op::SHUTDOWN, Stage::Established) => connection.shut_down(header.flags),
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, Stage::Established) => connection.pending.credit_update = true,
            (operation, _) => {
                connection.pending.reset = true;
                return Err(Dropped::Operation(operation));
            }
        }
        Ok(())
    }

    /// The guest wants to connect.
    fn request(&mut self, key: Key, header: &Header) -> Result<(), Dropped> {
        if let Some((_, connection)) = self.connections.get_mut(&key) {
            connection.pending.reset = true;
            return Err(Dropped::Operation(op::REQUEST));
        }
        if self.connections.len() + self.greeting.len() >= MAX_CONNECTIONS {
            return self.refuse(header);
        }
        let number = self.next_number;
        let stream = (self.dial)(key.host_port).and_then(without_waiting);
        let watched = stream.and_then(|stream| self.watch(number, &stream).map(|()| stream));
        let Ok(stream) = watched else { return self.refuse(header) };
        let mut connection = Connection::new(stream, Stage::Established);
        connection.peer(header);
        connection.pending.response = true;
        self.keys.insert(number, key);
        self.connections.insert(key, (number, connection));
        Ok(())
    }

    /// The guest is to be sent that there is no such connection.
    fn refuse(&mut self, header: &Header) -> Result<(), Dropped> {
        if self.strays.len() >= MAX_STRAYS {
            return Err(Dropped::Strays);
        }
        let (kind, op, flags) = (header.kind, op::RST, 0);
        let (src_port, dst_port) = (header.dst_port, header.src_port);
        let stray = Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port,
            dst_port,
            kind,
            op,
            flags,
            ..Header::default()
        };
        self.strays.push_back(stray);
        Ok(())
    }

    /// Closes a connection, whose socket is no longer watched then.
    fn remove(&mut self, key: Key) {
        if let Some((number, _)) = self.connections.remove(&key) {
            self.keys.remove(&number);
        }
    }

    /// There is no driver any more: the host's programs see their connections end.
    pub(super) fn close_all(&mut self) {
        self.connections.clear();
        self.keys.clear();
        self.strays.clear();
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_work(&self) -> bool {
        !self.strays.is_empty()
            || self.connections.values().any(|(_, one)| one.has_news() || one.wants_to_read())
    }

    /// The next packet for the guest, in `packet`, of at most `room` bytes, which are a header's at
    /// least: how many it has. None if there is none after all.
    pub(super) fn give(&mut self, packet: &mut Vec<u8>, room: usize) -> Option<usize> {
        if let Some(stray) = self.strays.pop_front() {
            packet.clear();
            packet.extend(stray.bytes());
            return Some(HEADER_BYTES);
        }
        // Each has its turn: from the one after the last.
        let after = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        let works = |(_, (_, one)): &(&Key, &(u64, Connection))| one.has_news() || one.wants_to_read();
        let next = self.connections.range((after, Bound::Unbounded)).find(works);
        let key = *next.or_else(|| self.connections.iter().find(works))?.0;
        self.last = Some(key);
        let (_, connection) = self.connections.get_mut(&key)?;
        let (mut op, mut flags, mut len) = (op::RW, 0, 0);
        match connection.next() {
            Some(told) => (op, flags) = told,
            None => {
                packet.resize(room, 0);
                len = connection.read(packet.get_mut(HEADER_BYTES..)?);
                if len == 0 {
                    // What came of it may be something to tell.
                    (op, flags) = connection.next()?;
                }
            }
        }
        let (buf_alloc, fwd_cnt) = connection.room();
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len: len as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        };
        packet.resize(packet.len().max(HEADER_BYTES), 0);
        packet.get_mut(..HEADER_BYTES)?.copy_from_slice(&header.bytes());
        if op == op::RST {
            self.remove(key);
        }
        Some(HEADER_BYTES + len)
    }
}
