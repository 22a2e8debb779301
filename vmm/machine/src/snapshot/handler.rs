//! The process that fills a guest's memory page by page, by userfaultfd: what it receives, and what
//! happens when it ends.
//!
//! The handshake is Firecracker's: a connection to the handler's socket, on it one message with the
//! descriptor and, as JSON, where the memory's parts are in this process and in the memory file.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use memory::PAGE;
use memory::handler::HandlerFd;
use memory::ram::Ram;
use os::print::errln;
use os::{Peer, Process};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use serde::Serialize;
use wire::packets;

use super::load_error::HandlerError;
use crate::running::Running;

/// How long the handler may take to make room for one message; and the main thread to notice that
/// it has ended.
const LIMIT: Duration = Duration::from_secs(5);

/// A part of RAM, as it is described to the handler. The names are Firecracker's.
#[derive(Debug, Serialize)]
struct Region {
    /// Where it is in this process.
    base_host_virt_addr: u64,
    /// Its bytes.
    size: u64,
    /// Where it begins in the memory file.
    offset: u64,
    /// Bytes of a page,
    page_size: usize,
    /// and again: older handlers know it by this name.
    page_size_kib: usize,
}

/// A connection to a process that will fill memory.
pub(crate) struct Connection {
    stream: UnixStream,
    process: Process,
}

impl Connection {
    /// To the process that listens at `path`.
    pub(super) fn to(path: &Path) -> Result<Self, HandlerError> {
        let stream = UnixStream::connect(path).map_err(HandlerError::Connect)?;
        stream.set_write_timeout(Some(LIMIT)).map_err(HandlerError::Connect)?;
        let process = Peer::process(&stream).map_err(HandlerError::Process)?;
        Ok(Self { stream, process })
    }

    /// Has it fill `ram`, which nothing was written to. From now on a thread that touches `ram`
    /// waits for it.
    pub(crate) fn fill(self, ram: &Ram) -> Result<Handler, HandlerError> {
        let descriptor = ram.fill_by_handler().map_err(HandlerError::Userfaultfd)?;
        let mut offset = 0;
        let regions = ram.extents().into_iter().map(|extent| {
            let region = Region {
                base_host_virt_addr: extent.hva.0,
                size: extent.bytes,
                offset,
                page_size: PAGE,
                page_size_kib: PAGE,
            };
            offset += extent.bytes;
            region
        });
        let text =
            serde_json::to_vec(&regions.collect::<Vec<_>>()).map_err(|e| HandlerError::Send(e.into()))?;
        // Before anything is touched: then its end is seen.
        let handler = Handler::watched(descriptor, self.stream, self.process).map_err(HandlerError::Watch)?;
        packets::send(&handler.stream, &text, Some(handler.descriptor.as_fd()))
            .map_err(HandlerError::Send)?;
        Ok(handler)
    }
}

/// A process that fills the memory of a VM, with a thread that waits for its end: the main thread
/// may sleep on a page itself.
pub(crate) struct Handler {
    /// While it is open, threads that wait for a page go on waiting when the handler is gone.
    descriptor: HandlerFd,
    /// Handlers take its end for the VM's.
    stream: UnixStream,
    process: Arc<Process>,
    /// Readable when the process has ended.
    ended: Arc<OwnedFd>,
    /// Whether the main thread has noticed.
    noticed: Arc<AtomicBool>,
    /// Ends the thread.
    stop: Arc<OwnedFd>,
}

impl Handler {
    fn watched(descriptor: HandlerFd, stream: UnixStream, process: Process) -> io::Result<Self> {
        let event =
            || Ok::<_, io::Error>(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?));
        let handler = Self {
            descriptor,
            stream,
            process: Arc::new(process),
            ended: event()?,
            noticed: Arc::default(),
            stop: event()?,
        };
        let (process, ended) = (handler.process.clone(), handler.ended.clone());
        let (noticed, stop) = (handler.noticed.clone(), handler.stop.clone());
        let watch = thread::Builder::new().name("handler".into()).stack_size(64 << 10);
        watch.spawn(move || {
            jail::enter(jail::Thread::Handler);
            loop {
                let mut events =
                    [PollFd::new(&*process, PollFlags::IN), PollFd::new(&*stop, PollFlags::IN)];
                match poll(&mut events, None) {
                    Err(Errno::INTR) => {}
                    _ if !events[1].revents().is_empty() => return,
                    _ => break,
                }
            }
            let _ = rustix::io::write(&ended, &1u64.to_ne_bytes());
            let until = Instant::now() + LIMIT;
            while !noticed.load(Ordering::SeqCst) {
                let left = until.saturating_duration_since(Instant::now());
                let left = Timespec::try_from(left).unwrap_or_default();
                match poll(&mut [PollFd::new(&*stop, PollFlags::IN)], Some(&left)) {
                    Ok(0) => break,
                    Err(Errno::INTR) => {}
                    _ => return,
                }
            }
            if !noticed.load(Ordering::SeqCst) {
                // It cannot be woken without giving the guest zeros.
                errln!(
                    "error: process {}, which fills guest memory, has ended, and the VM's main thread waits for a page of it: the VM ends",
                    process.pid()
                );
                std::process::exit(1);
            }
        })?;
        Ok(handler)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

/// Stops the VM when the handler ends.
pub(crate) struct Watch {
    handler: Handler,
    running: Running,
}

impl Watch {
    pub(crate) fn new(handler: Handler, running: Running) -> Self {
        Self { handler, running }
    }

    fn events(&self) -> Events {
        Events::new_raw(self.handler.ended.as_raw_fd(), EventSet::IN)
    }
}

impl MutEventSubscriber for Watch {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(self.events());
    }

    fn process(&mut self, _: Events, ops: &mut EventOps) {
        let _ = ops.remove(self.events());
        self.handler.noticed.store(true, Ordering::SeqCst);
        let stands = self.running.handler_has_ended();
        errln!(
            "error: {}: process {}, which fills guest memory, has ended: {}; a page that it had not filled is never there",
            self.running.name(),
            self.handler.process.pid(),
            if stands { "the VM is paused" } else { "a vCPU waits for a page, and the VM stands with it" }
        );
    }
}
