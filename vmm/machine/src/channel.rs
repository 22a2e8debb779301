//! COM2: the control channel, as bytes on a Unix socket. One client at a time; what the guest says
//! while no client is there is kept, up to a bound, for the next one.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::feed::Feed;
use super::listener::Listener;

/// Bytes kept for a client that does not read, or is not there; the oldest go first.
const KEPT_BYTES: usize = 64 << 10;
const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
const DRAINED: u32 = 2;
const OUTPUT: u32 = 3;
const KEEPER: u32 = 4;

/// The guest's side: what COM2 writes goes here.
#[derive(Clone)]
pub struct ChannelOutput {
    kept: Arc<Mutex<VecDeque<u8>>>,
    waiting: Arc<EventFd>,
}

impl ChannelOutput {
    /// An empty buffer.
    pub fn new() -> io::Result<Self> {
        Ok(Self { kept: Arc::default(), waiting: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?) })
    }
}

impl Write for ChannelOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = os::lock(&self.kept);
        let was_empty = kept.is_empty();
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..excess);
        if was_empty {
            self.waiting.write(1)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The outside: a listening socket and at most one client.
pub struct Channel {
    listener: Listener,
    client: Option<UnixStream>,
    output: ChannelOutput,
    feed: Arc<Mutex<Feed>>,
    drained: EventFd,
}

impl Channel {
    /// Joins `listener` to COM2; `drained` tells when the guest has read what it was given.
    pub fn new(listener: Listener, output: ChannelOutput, feed: Arc<Mutex<Feed>>, drained: EventFd) -> Self {
        Self { listener, client: None, output, feed, drained }
    }

    fn feed(&self) -> MutexGuard<'_, Feed> {
        os::lock(&self.feed)
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Some(stream) = self.listener.accept() else { return };
        // A second client replaces the first: the first may be a dead program's.
        self.hang_up(ops);
        if stream.set_nonblocking(true).is_ok()
            && ops.add(Events::with_data(&stream, CLIENT, EventSet::IN)).is_ok()
        {
            self.client = Some(stream);
            self.send(ops);
        }
    }

    fn hang_up(&mut self, ops: &mut EventOps) {
        if let Some(client) = self.client.take() {
            let _ = ops.remove(Events::empty_raw(client.as_raw_fd()));
        }
    }

    /// What the client is watched for: input while the guest has room for it, output while some is
    /// kept.
    fn watch(&mut self, ops: &EventOps) {
        if let Some(client) = &self.client {
            let kept = !os::lock(&self.output.kept).is_empty();
            let mut set = EventSet::empty();
            set.set(EventSet::IN, self.feed().room() > 0);
            set.set(EventSet::OUT, kept);
            let _ = ops.modify(Events::with_data(client, CLIENT, set));
        }
    }

    fn send(&mut self, ops: &mut EventOps) {
        let Some(client) = &mut self.client else { return };
        let mut kept = os::lock(&self.output.kept);
        let mut gone = false;
        while !kept.is_empty() {
            match client.write(kept.as_slices().0) {
                Ok(0) => break,
                Ok(n) => {
                    kept.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    gone = true;
                    break;
                }
            }
        }
        drop(kept);
        match gone {
            true => self.hang_up(ops),
            false => self.watch(ops),
        }
    }

    /// Takes what the client sends; `gone` if it does not read any more.
    fn receive(&mut self, gone: bool, ops: &mut EventOps) {
        let mut buffer = [0u8; 1024];
        let room = self.feed().room().min(buffer.len());
        if room == 0 && gone {
            // EPOLLHUP is reported for as long as it is watched, so waiting for room would be
            // spinning.
            return self.hang_up(ops);
        }
        if room == 0 {
            return self.watch(ops);
        }
        let Some(client) = &mut self.client else { return };
        match client.read(&mut buffer[..room]) {
            Ok(0) => self.hang_up(ops),
            Ok(n) => self.feed().push(&buffer[..n]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.hang_up(ops),
        }
    }
}

impl MutEventSubscriber for Channel {
    fn init(&mut self, ops: &mut EventOps) {
        self.listener.watch(ops, LISTENER, KEEPER);
        let _ = ops.add(Events::with_data(&self.drained, DRAINED, EventSet::IN));
        let _ = ops.add(Events::with_data(&*self.output.waiting, OUTPUT, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.accept(ops),
            KEEPER => self.listener.look_after(ops, LISTENER),
            DRAINED => {
                let _ = self.drained.read();
                self.feed().pump();
                self.send(ops);
            }
            OUTPUT => {
                let _ = self.output.waiting.read();
                self.send(ops);
            }
            _ => {
                if events.event_set().contains(EventSet::OUT) {
                    self.send(ops);
                }
                if events.event_set().intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
                    let gone = events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
                    self.receive(gone, ops);
                }
            }
        }
    }
}
