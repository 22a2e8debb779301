//! COM1: the console, on the terminal, in a file, or nowhere.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::error::VmError;
use super::exit::{Ending, Outcome};
use super::feed::Feed;
use super::patient::PatientSink;

/// Control-A: the next key is for this program.
const ESCAPE: u8 = 1;
/// Bytes of output that one VM appends to its console's file.
const LOG_BYTES: usize = 16 << 20;
const INPUT: u32 = 0;
const DRAINED: u32 = 1;

/// Where the console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    None,
    /// Output is appended to a file; there is no input.
    File(PathBuf),
}

impl Console {
    /// Opens the output side.
    pub fn output(&self) -> Result<Box<dyn Write + Send>, VmError> {
        Ok(match self {
            // Standard output itself, not the buffered handle: a guest's prompt has no newline.
            Self::Stdio => {
                let stdout =
                    rustix::io::dup(io::stdout()).map_err(VmError::host("duplicate standard output"))?;
                sink(File::from(stdout)).map_err(VmError::host("start the console's thread"))?
            }
            Self::None => Box::new(io::sink()),
            Self::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                file.and_then(sink).map_err(|source| VmError::ConsoleFile { path: path.clone(), source })?
            }
        })
    }
}

/// A regular file takes everything at once; a terminal or a pipe may take its time, so that has a thread.
fn sink(file: File) -> io::Result<Box<dyn Write + Send>> {
    Ok(match file.metadata()?.is_file() {
        true => Box::new(Log { file, room: LOG_BYTES }),
        false => Box::new(PatientSink::new(file)?),
    })
}

/// A console's file, up to a bound: a guest must not fill the host's disk, or the memory under /run.
struct Log {
    file: File,
    room: usize,
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.room > 0 {
            self.room -= self.file.write(&bytes[..bytes.len().min(self.room)])?;
            if self.room == 0 {
                self.file.write_all(b"\n[the console's file is full; what follows is lost]\n")?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard input into COM1. Control-A x ends the VM, Control-A Control-A sends a Control-A.
pub struct ConsoleInput {
    feed: Feed,
    drained: EventFd,
    outcome: Outcome,
    interactive: bool,
    escaped: bool,
    /// Input is not being watched because the guest does not read.
    held: bool,
}

impl ConsoleInput {
    /// Joins standard input to `feed`; `drained` tells when the guest has read what it was given.
    pub fn new(feed: Feed, drained: EventFd, outcome: Outcome, interactive: bool) -> Self {
        Self { feed, drained, outcome, interactive, escaped: false, held: false }
    }

    fn key(&mut self, byte: u8) -> Option<u8> {
        if !self.interactive {
            return Some(byte);
        }
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                None
            }
            (true, b'x' | b'X') => {
                self.outcome.tell(Ending::Stopped);
                None
            }
            (_, other) => Some(other),
        }
    }

    fn watch(&self, ops: &EventOps, set: EventSet) {
        let _ = ops.modify(Events::with_data(&io::stdin(), INPUT, set));
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::with_data(&self.drained, DRAINED, EventSet::IN));
        // A plain file cannot be waited for, but it can be read at once.
        if ops.add(Events::with_data(&io::stdin(), INPUT, EventSet::IN)).is_err() {
            let mut bytes = Vec::new();
            let _ = io::stdin().lock().take(self.feed.room() as u64).read_to_end(&mut bytes);
            self.feed.push(&bytes);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == DRAINED {
            let _ = self.drained.read();
            self.feed.pump();
            if std::mem::take(&mut self.held) {
                self.watch(ops, EventSet::IN);
            }
            return;
        }
        let mut buffer = [0u8; 1024];
        let room = self.feed.room().min(buffer.len());
        if room == 0 {
            self.held = true;
            self.watch(ops, EventSet::empty());
            return;
        }
        match rustix::io::read(io::stdin(), &mut buffer[..room]) {
            Ok(0) => {
                let _ = ops.remove(Events::empty_raw(io::stdin().as_raw_fd()));
            }
            Ok(n) => {
                let keys: Vec<u8> = buffer[..n].iter().filter_map(|b| self.key(*b)).collect();
                self.feed.push(&keys);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => {
                let _ = ops.remove(Events::empty_raw(io::stdin().as_raw_fd()));
            }
        }
    }
}

/// Standard input as a lifeline: the VM ends when whoever holds the other end is gone.
pub struct Lifeline(pub Outcome);

impl MutEventSubscriber for Lifeline {
    fn init(&mut self, ops: &mut EventOps) {
        if ops.add(Events::new(&io::stdin(), EventSet::IN)).is_err() {
            self.0.tell(Ending::Stopped);
        }
    }

    fn process(&mut self, _: Events, ops: &mut EventOps) {
        let mut buffer = [0u8; 64];
        if !matches!(rustix::io::read(io::stdin(), &mut buffer), Ok(1..)) {
            let _ = ops.remove(Events::empty_raw(io::stdin().as_raw_fd()));
            self.0.tell(Ending::Stopped);
        }
    }
}
