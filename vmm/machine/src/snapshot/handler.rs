//! The process that fills a guest's memory page by page, by userfaultfd: what it is told, and what happens when it ends.
//!
//! The handshake is Firecracker's: a connection to the handler's socket, on it one message with the descriptor and, as JSON, where the
//! memory's parts are in this process and in the memory file.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use memory::PAGE;
use memory::handler::HandlerFd;
use memory::ram::Ram;
use os::print::errln;
use os::{Peer, Process};
use serde::Serialize;
use thiserror::Error;
use wire::packets;

use crate::running::Running;

/// How long the handler may take to make room for one message.
const LIMIT: Duration = Duration::from_secs(5);

/// Why there is no handler.
#[derive(Debug, Error)]
pub enum HandlerError {
    /// Nobody listens there.
    #[error("Failed to connect to UDS Unix stream")]
    Connect(#[source] io::Error),
    /// It is not told from others.
    #[error(
        "the process that listens there has ended, or cannot be held: a process that fills memory listens itself"
    )]
    Process(#[source] io::Error),
    /// This process may not have its memory filled.
    #[error(
        "Failed to create userfaultfd: check that /dev/userfaultfd may be opened, or that vm.unprivileged_userfaultfd is 1"
    )]
    Userfaultfd(#[source] io::Error),
    /// It did not take the message.
    #[error("Failed to send the memory's regions to the handler")]
    Send(#[source] io::Error),
}

/// A part of RAM, as the handler is told of it. The names are Firecracker's.
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

    /// Has it fill `ram`, which nothing was written to. From now on whoever touches `ram` waits for it.
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
        packets::send(&self.stream, &text, Some(descriptor.as_fd())).map_err(HandlerError::Send)?;
        Ok(Handler { _descriptor: descriptor, _stream: self.stream, process: self.process })
    }
}

/// A process that fills the memory of a VM.
pub(crate) struct Handler {
    /// Ours keeps who waits for a page waiting when the handler is gone.
    _descriptor: HandlerFd,
    /// Handlers take its end for the VM's.
    _stream: UnixStream,
    process: Process,
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
}

impl MutEventSubscriber for Watch {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new_raw(self.handler.process.as_fd().as_raw_fd(), EventSet::IN));
    }

    fn process(&mut self, _: Events, ops: &mut EventOps) {
        let _ = ops.remove(Events::new_raw(self.handler.process.as_fd().as_raw_fd(), EventSet::IN));
        let stands = self.running.handler_has_ended();
        errln!(
            "error: {}: process {}, which fills guest memory, has ended: {}; a page that it had not filled is never there",
            self.running.name(),
            self.handler.process.pid(),
            if stands { "the VM is paused" } else { "a vCPU waits for a page, and the VM stands with it" }
        );
    }
}
