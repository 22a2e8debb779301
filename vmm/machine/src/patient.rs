//! Console output to something that may block: a terminal, a pipe.
//!
//! vCPUs hold the serial port's lock while they write, and the event loop takes it, so neither may
//! ever wait for the console's reader. A thread waits instead. A reader that is merely slow slows
//! the guest down, as a real line would; output for one that does not read at all is lost.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::trouble::Trouble;

/// Bytes that wait for the reader.
const KEPT_BYTES: usize = 64 << 10;
/// Bytes written at once: a reader that takes as many within [`PATIENCE`] is slow, not stuck.
const CHUNK_BYTES: usize = 4096;
/// How long the guest is held up by a reader that takes nothing; then it is not held up again
/// before the reader takes something.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long the last words may take when the VM has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The guest's side of the console.
pub struct PatientSink(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    kept: VecDeque<u8>,
    /// Bytes that the thread has taken and not yet written.
    on_the_way: usize,
    /// The reader took nothing for as long as there is patience.
    stuck: bool,
    /// The reader is gone, or the guest is.
    closed: bool,
}

impl PatientSink {
    /// Starts the thread that writes to `file`; what goes wrong later is reported to `trouble`.
    pub fn new(file: File, trouble: Trouble) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let its = shared.clone();
        // Never joined: it may wait for a reader that never comes, and ends with the process.
        thread::Builder::new().name("console".into()).stack_size(64 << 10).spawn(move || {
            jail::enter(jail::Thread::Console);
            its.write_to(&file, &trouble);
        })?;
        Ok(Self(shared))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        os::lock(&self.state)
    }

    fn write_to(&self, file: &File, trouble: &Trouble) {
        let mut chunk = Vec::new();
        loop {
            {
                let mut state = self.state();
                state.on_the_way = 0;
                state.stuck = false;
                self.changed.notify_all();
                while state.kept.is_empty() && !state.closed {
                    state = os::unpoisoned(self.changed.wait(state));
                }
                if state.kept.is_empty() {
                    return;
                }
                chunk.clear();
                let taken = state.kept.len().min(CHUNK_BYTES);
                chunk.extend(state.kept.drain(..taken));
                state.on_the_way = chunk.len();
            }
            if let Err(error) = write_all(file, &chunk) {
                self.state().closed = true;
                // A reader that has gone is no trouble.
                if !matches!(error, Errno::PIPE | Errno::CONNRESET) {
                    tracing::warn!("the console cannot be written: {error}");
                    trouble.note(&error.into());
                }
            }
        }
    }
}

/// Writes all of it, however long that takes. A terminal or pipe may be non-blocking: it is shared
/// with other processes.
fn write_all(file: &File, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(file, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(file, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Write for PatientSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Self(shared) = self;
        let full = |s: &mut State| s.kept.len() + s.on_the_way >= KEPT_BYTES && !s.stuck && !s.closed;
        let waited = shared.changed.wait_timeout_while(shared.state(), PATIENCE, full);
        let (mut state, waited) = os::unpoisoned(waited);
        if waited.timed_out() {
            state.stuck = true;
        }
        if state.closed {
            return Ok(bytes.len());
        }
        let room = KEPT_BYTES.saturating_sub(state.kept.len() + state.on_the_way);
        let taken = bytes.len().min(room);
        state.kept.extend(&bytes[..taken]);
        shared.changed.notify_all();
        // What is lost counts as taken: the writer must not keep it for later.
        Ok(if state.stuck { bytes.len() } else { taken })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for PatientSink {
    fn drop(&mut self) {
        let Self(shared) = self;
        let mut state = shared.state();
        state.closed = true;
        shared.changed.notify_all();
        let busy = |s: &mut State| s.on_the_way + s.kept.len() > 0;
        drop(shared.changed.wait_timeout_while(state, LAST_WORDS, busy));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    fn pair() -> (PatientSink, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (PatientSink::new(File::from(OwnedFd::from(ours)), Trouble::default()).unwrap(), theirs)
    }

    #[test]
    fn a_slow_reader_gets_everything() {
        let (mut sink, mut reader) = pair();
        let reading = thread::spawn(move || {
            let (mut all, mut buffer) = (Vec::<u8>::new(), [0; 8192]);
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                all.extend(&buffer[..n]);
                thread::sleep(Duration::from_micros(200));
            }
            all
        });
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        for part in sent.chunks(1000) {
            sink.write_all(part).unwrap();
        }
        drop(sink);
        assert!(reading.join().unwrap() == sent);
    }

    #[test]
    fn a_reader_that_does_not_read_holds_no_writer_up_for_long() {
        let (mut sink, _reader) = pair();
        let begin = Instant::now();
        for _ in 0..10_000 {
            sink.write_all(&[b'x'; 100]).unwrap();
        }
        assert!(sink.0.state().kept.len() <= KEPT_BYTES);
        drop(sink);
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (mut sink, reader) = pair();
        drop(reader);
        for _ in 0..10_000 {
            sink.write_all(&[b'x'; 100]).unwrap();
        }
    }

    #[test]
    fn a_pipe_that_does_not_wait_gets_everything_as_well() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let mut sink = PatientSink::new(File::from(writer), Trouble::default()).unwrap();
        let reading = thread::spawn(move || {
            let (mut all, mut buffer) = (Vec::<u8>::new(), [0; 8192]);
            loop {
                match rustix::io::read(&reader, &mut buffer) {
                    Ok(0) => return all,
                    Ok(n) => all.extend(&buffer[..n]),
                    Err(_) => thread::yield_now(),
                }
            }
        });
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        sent.chunks(1000).for_each(|part| sink.write_all(part).unwrap());
        drop(sink);
        assert!(reading.join().unwrap() == sent);
    }

    #[test]
    fn what_cannot_be_written_is_told_and_a_reader_that_is_gone_is_not() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let trouble = Trouble::default();
        let mut sink = PatientSink::new(full, trouble.clone()).unwrap();
        sink.write_all(b"x").unwrap();
        drop(sink);
        assert!(trouble.why().unwrap().contains("No space left"), "{trouble:?}");
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let trouble = Trouble::default();
        let mut sink = PatientSink::new(File::from(writer), trouble.clone()).unwrap();
        sink.write_all(b"x").unwrap();
        drop(sink);
        assert_eq!(trouble.why(), None);
    }
}
