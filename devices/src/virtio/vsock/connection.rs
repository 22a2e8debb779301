//! One connection: a Unix socket of the host's, and what is between it and the guest.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// What the guest may have on its way to the host that the host has not taken.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// Room that is free before the guest is informed of it.
const UPDATE_BYTES: u32 = BUFFER_BYTES / 2;
/// Bytes of `CONNECT PORT\n`.
const MAX_LINE_BYTES: usize = 32;

/// How far a connection has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host is to say `CONNECT PORT`.
    Greeting,
    /// The guest is to answer.
    Requested,
    Established,
}

/// What is to be sent to the guest, each at most once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit_update: bool,
    pub(super) credit_request: bool,
    pub(super) shutdown: bool,
    pub(super) reset: bool,
}

/// What a line of the host's comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// It has not ended.
    More,
    /// `CONNECT PORT`.
    Port(u32),
    /// Something else.
    Wrong,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) stage: Stage,
    pub(super) pending: Pending,
    /// The socket may have something, or room: set by its events, cleared by `WouldBlock`.
    pub(super) readable: bool,
    pub(super) writable: bool,
    line: Vec<u8>,
    /// What the guest has sent and the socket has not taken.
    out: VecDeque<u8>,
    /// Bytes that the socket has taken, and of which the guest has been told.
    taken: u32,
    told: u32,
    /// Bytes that were sent to the guest; its room and what it has taken of them.
    sent: u32,
    peer_room: u32,
    peer_taken: u32,
    /// The host sends nothing more,
    host_ended: bool,
    /// the guest takes nothing more, or sends nothing more.
    guest_deaf: bool,
    guest_ended: bool,
}

impl Connection {
    /// Over `stream`, which is non-blocking.
    pub(super) fn new(stream: UnixStream, stage: Stage) -> Self {
        Self {
            stream,
            stage,
            pending: Pending::default(),
            readable: true,
            writable: true,
            line: Vec::new(),
            out: VecDeque::new(),
            taken: 0,
            told: 0,
            sent: 0,
            peer_room: 0,
            peer_taken: 0,
            host_ended: false,
            guest_deaf: false,
            guest_ended: false,
        }
    }

    /// Reads the host's first line, a byte at a time: what is behind it is the guest's.
    pub(super) fn greet(&mut self) -> Greeting {
        let mut byte = [0];
        while self.line.len() < MAX_LINE_BYTES {
            match self.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => {
                    let line = std::str::from_utf8(&self.line).ok();
                    let port = line.and_then(|line| line.trim_end_matches('\r').strip_prefix("CONNECT "));
                    return port.and_then(|port| port.parse().ok()).map_or(Greeting::Wrong, Greeting::Port);
                }
                Ok(1) => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Greeting::More;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => return Greeting::More,
                _ => return Greeting::Wrong,
            }
        }
        Greeting::Wrong
    }

    /// The guest has accepted: the host's end is sent its port.
    pub(super) fn accepted(&mut self, host_port: u32) {
        self.stage = Stage::Established;
        self.out.extend(format!("OK {host_port}\n").bytes());
        // It counts as none of the guest's.
        self.taken = self.taken.wrapping_sub(self.out.len() as u32);
        self.told = self.taken.wrapping_add(self.out.len() as u32);
        self.flush();
    }

    /// Takes notice of the guest's room, which each of its packets tells.
    pub(super) fn peer(&mut self, header: &Header) {
        (self.peer_room, self.peer_taken) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> usize {
        let on_its_way = self.sent.wrapping_sub(self.peer_taken);
        self.peer_room.saturating_sub(on_its_way) as usize
    }

    /// Whether the guest can be sent data, if the socket has any.
    pub(super) fn wants_to_read(&self) -> bool {
        self.stage == Stage::Established
            && self.readable
            && !self.host_ended
            && !self.guest_deaf
            && !self.pending.reset
    }

    /// Reads for the guest, at most what it has room for: how much. 0 if there is nothing now.
    pub(super) fn read(&mut self, to: &mut [u8]) -> usize {
        let room = self.credit().min(to.len());
        if room == 0 {
            // Until it reports room; that wakes the connection.
            self.readable = false;
            self.pending.credit_request = true;
            return 0;
        }
        match self.stream.read(&mut to[..room]) {
            Ok(0) => {
                self.host_ended = true;
                self.pending.shutdown = true;
                0
            }
            Ok(bytes) => {
                self.sent = self.sent.wrapping_add(bytes as u32);
                bytes
            }
            Err(error) => {
                match error.kind() {
                    ErrorKind::WouldBlock => self.readable = false,
                    ErrorKind::Interrupted => {}
                    _ => self.pending.reset = true,
                }
                0
            }
        }
    }

    /// Takes data of the guest's. False if it had no room for them.
    pub(super) fn take(&mut self, data: &[u8]) -> bool {
        if self.out.len() + data.len() > BUFFER_BYTES as usize || self.guest_ended {
            return false;
        }
        self.out.extend(data);
        self.flush();
        true
    }

    /// Writes what the socket takes.
    pub(super) fn flush(&mut self) {
        while self.writable && !self.out.is_empty() {
            let (first, _) = self.out.as_slices();
            match self.stream.write(first) {
                Ok(0) => self.writable = false,
                Ok(bytes) => {
                    self.out.drain(..bytes);
                    self.taken = self.taken.wrapping_add(bytes as u32);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => self.writable = false,
                    ErrorKind::Interrupted => break,
                    _ => {
                        // The host is gone.
                        self.out.clear();
                        self.pending.reset = true;
                    }
                },
            }
        }
        let news = self.taken.wrapping_sub(self.told);
        if self.stage == Stage::Established && news as i32 >= UPDATE_BYTES as i32 {
            self.pending.credit_update = true;
        }
        if self.out.is_empty() && self.guest_ended {
            let _ = self.stream.shutdown(Shutdown::Write);
            if self.guest_deaf {
                self.pending.reset = true;
            }
        }
    }

    /// The guest sends, or takes, no more.
    pub(super) fn shut_down(&mut self, flags: u32) {
        self.guest_deaf |= flags & SHUTDOWN_RECEIVE != 0;
        self.guest_ended |= flags & SHUTDOWN_SEND != 0;
        self.flush();
    }

    /// What is to be sent to the guest next: the operation and its flags.
    pub(super) fn next(&mut self) -> Option<(u16, u32)> {
        let pending = &mut self.pending;
        let taken = |flag: &mut bool| std::mem::take(flag);
        if pending.reset {
            return Some((op::RST, 0));
        }
        if taken(&mut pending.request) {
            return Some((op::REQUEST, 0));
        }
        if taken(&mut pending.response) {
            return Some((op::RESPONSE, 0));
        }
        if taken(&mut pending.shutdown) {
            return Some((op::SHUTDOWN, SHUTDOWN_SEND));
        }
        if taken(&mut pending.credit_update) {
            return Some((op::CREDIT_UPDATE, 0));
        }
        taken(&mut pending.credit_request).then_some((op::CREDIT_REQUEST, 0))
    }

    /// Whether there is something to tell.
    pub(super) fn has_news(&self) -> bool {
        self.pending != Pending::default()
    }

    /// What this end's packets say of its room.
    pub(super) fn room(&mut self) -> (u32, u32) {
        self.told = self.taken;
        (BUFFER_BYTES, self.taken)
    }
}

/// Makes a stream non-blocking.
pub(super) fn without_waiting(stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    Ok(stream)
}
