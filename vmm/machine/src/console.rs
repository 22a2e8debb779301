//! COM1: the console, on the terminal, in a file, or nowhere.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use signal_hook::consts::SIGCONT;
use vmm_sys_util::eventfd::EventFd;

use super::config::Console;
use super::error::VmError;
use super::exit::{Ending, Outcome};
use super::feed::Feed;
use super::patient::PatientSink;
use super::terminal::Terminal;
use super::timer::Timer;
use super::trouble::Trouble;
use os::print::errln;
use os::terminal::{Holder, holder};
use os::{named_file, signals};

/// Control-A: the next key is for this program.
const ESCAPE: u8 = 1;
/// Bytes of output that one VM appends to its console's file.
const LOG_BYTES: usize = 16 << 20;
/// Bytes of input read at once.
const CHUNK_BYTES: usize = 1024;
/// How often a VM in the background looks whether the terminal is its own now.
const LOOK: Duration = Duration::from_secs(1);
const INPUT: u32 = 0;
const DRAINED: u32 = 1;
const CONTINUED: u32 = 2;
const LOOK_AGAIN: u32 = 3;

impl Console {
    /// Opens the output side; what cannot be written is reported to `trouble`.
    pub fn output(&self, trouble: &Trouble) -> Result<Box<dyn Write + Send>, VmError> {
        Ok(match self {
            // Standard output itself, not the buffered handle: a guest's prompt has no newline.
            Self::Stdio => {
                let stdout =
                    rustix::io::dup(io::stdout()).map_err(VmError::host("duplicate standard output"))?;
                sink(File::from(stdout), trouble).map_err(VmError::host("start the console's thread"))?
            }
            Self::None => Box::new(io::sink()),
            Self::File(path) => named_file::append(path, 0o666)
                .and_then(|file| sink(file, trouble))
                .map_err(|source| VmError::ConsoleFile { path: path.clone(), source })?,
        })
    }
}

/// A regular file takes everything at once; a terminal or a pipe may take its time, so that has a thread.
fn sink(file: File, trouble: &Trouble) -> io::Result<Box<dyn Write + Send>> {
    Ok(match file.metadata()?.is_file() {
        true => Box::new(Log { file, room: LOG_BYTES, trouble: trouble.clone() }),
        false => Box::new(PatientSink::new(file, trouble.clone())?),
    })
}

/// A console's file, up to a bound: a guest must not fill the host's disk, or the memory under /run.
struct Log {
    file: File,
    room: usize,
    trouble: Trouble,
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.room > 0 {
            let written = self.file.write(&bytes[..bytes.len().min(self.room)]);
            let written = written.inspect_err(|error| self.trouble.note(error))?;
            self.room -= written;
            if self.room == 0 {
                self.file.write_all(b"\n[the console's file is full; what follows is lost]\n")?;
            }
            return Ok(written);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard input into COM1. On a terminal Control-A x ends the VM, Control-A Control-A sends a Control-A.
pub struct ConsoleInput {
    feed: Feed,
    drained: EventFd,
    outcome: Outcome,
    terminal: Option<Job>,
    escaped: bool,
    reading: Reading,
}

/// How standard input is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// Not: another job has the terminal.
    Not,
    /// When it has something.
    Watched,
    /// When the guest has read what it was given: there is no room for more.
    Held,
    /// The same, for a file cannot be waited for.
    File,
    /// No more: it has ended.
    Ended,
}

/// What tells that the terminal is ours again: the shell continues a job that it brings to the foreground, if it was stopped. One that ran in
/// the background it may not tell, so that has to look.
struct Job {
    terminal: Terminal,
    continued: UnixStream,
    look: Timer,
    /// The note that there is no input was printed.
    noted: bool,
}

impl Job {
    fn new(terminal: Terminal) -> io::Result<Self> {
        let (continued, end) = UnixStream::pair()?;
        continued.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGCONT, end)?;
        Ok(Self { terminal, continued, look: Timer::new()?, noted: false })
    }
}

impl ConsoleInput {
    /// Joins standard input to `feed`; `drained` tells when the guest has read what it was given.
    pub fn new(feed: Feed, drained: EventFd, outcome: Outcome) -> io::Result<Self> {
        let terminal = Terminal::of_input().map(Job::new).transpose()?;
        Ok(Self { feed, drained, outcome, terminal, escaped: false, reading: Reading::Not })
    }

    fn key(&mut self, byte: u8) -> Option<u8> {
        if self.terminal.is_none() {
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

    fn watch(&mut self, ops: &mut EventOps) {
        self.reading = match ops.add(Events::with_data(&io::stdin(), INPUT, EventSet::IN)) {
            Ok(()) => Reading::Watched,
            Err(_) => Reading::File,
        };
        if self.reading == Reading::File {
            self.read_file();
        }
    }

    /// Removed, not only masked: its end would be reported again and again.
    fn unwatch(&mut self, then: Reading, ops: &mut EventOps) {
        if self.reading == Reading::Watched {
            let _ = ops.remove(Events::empty_raw(io::stdin().as_raw_fd()));
        }
        self.reading = then;
    }

    /// Takes the terminal if it is ours to take, and leaves it alone if it is not.
    fn look_at_terminal(&mut self, ops: &mut EventOps) {
        let Some(job) = &mut self.terminal else { return };
        let holder = job.terminal.take();
        let _ = job.look.every(if holder == Holder::Others { LOOK } else { Duration::ZERO });
        match (holder, self.reading) {
            (Holder::Us, Reading::Not) => self.watch(ops),
            (Holder::Us, _) => {}
            (Holder::Others, _) => {
                if !std::mem::replace(&mut job.noted, true) {
                    errln!(
                        "note: in the background of its terminal, so that the console has no input; `fg` gives it some"
                    );
                }
                self.unwatch(Reading::Not, ops);
            }
            // One in the background runs on without it, as jobs do that a shell leaves.
            (Holder::None, Reading::Not) => self.reading = Reading::Ended,
            (Holder::None, _) => self.terminal_is_gone(ops),
        }
    }

    /// Without its terminal a VM in the foreground ends, as by the SIGHUP that comes with it; where that is ignored it runs on.
    fn terminal_is_gone(&mut self, ops: &mut EventOps) {
        self.unwatch(Reading::Ended, ops);
        if signals::is_heeded(libc::SIGHUP) {
            errln!("note: the VM ends, for its terminal is gone");
            self.outcome.tell(Ending::Stopped);
        }
    }

    fn read(&mut self, ops: &mut EventOps) {
        let mut buffer = [0u8; CHUNK_BYTES];
        let room = self.feed.room().min(buffer.len());
        if room == 0 {
            return self.unwatch(Reading::Held, ops);
        }
        match (rustix::io::read(io::stdin(), &mut buffer[..room]), self.terminal.is_some()) {
            (Ok(n @ 1..), _) => {
                let keys: Vec<u8> = buffer[..n].iter().filter_map(|b| self.key(*b)).collect();
                self.feed.push(&keys);
            }
            (Err(Errno::INTR | Errno::AGAIN), _) => {}
            // A terminal in raw mode has no end of file. It is gone, or has another job in its foreground now.
            (Ok(0) | Err(Errno::IO), true) => match holder() {
                Holder::Others => self.look_at_terminal(ops),
                Holder::Us | Holder::None => self.terminal_is_gone(ops),
            },
            (Ok(_) | Err(_), _) => self.unwatch(Reading::Ended, ops),
        }
    }

    /// As much as there is room for; the rest when the guest has read that.
    fn read_file(&mut self) {
        let mut buffer = [0u8; CHUNK_BYTES];
        loop {
            let room = self.feed.room().min(buffer.len());
            if room == 0 {
                return;
            }
            match rustix::io::read(io::stdin(), &mut buffer[..room]) {
                Ok(n @ 1..) => self.feed.push(&buffer[..n]),
                Err(Errno::INTR) => {}
                _ => {
                    self.reading = Reading::Ended;
                    return;
                }
            }
        }
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::with_data(&self.drained, DRAINED, EventSet::IN));
        let Some(job) = &self.terminal else { return self.watch(ops) };
        let _ = ops.add(Events::with_data(&job.continued, CONTINUED, EventSet::IN));
        let _ = ops.add(Events::with_data(&job.look, LOOK_AGAIN, EventSet::IN));
        self.look_at_terminal(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            DRAINED => {
                let _ = self.drained.read();
                self.feed.pump();
                match self.reading {
                    Reading::Held => self.watch(ops),
                    Reading::File => self.read_file(),
                    Reading::Not | Reading::Watched | Reading::Ended => {}
                }
            }
            CONTINUED | LOOK_AGAIN => {
                if let Some(job) = &self.terminal {
                    let _ = rustix::io::read(&job.continued, &mut [0u8; 16]);
                    job.look.clear();
                }
                if self.reading != Reading::Ended {
                    self.look_at_terminal(ops);
                }
            }
            _ => self.read(ops),
        }
    }
}

/// Standard input as a lifeline: the VM ends when the other end is closed.
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
