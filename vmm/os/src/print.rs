//! Printing. `println!` panics where standard output cannot be written; these do not.
//!
//! A reader that is gone (`| head`) is no error: further output is dropped, and the command ends
//! with its own exit status. Any other failure, such as a full disk, is an error of the command.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use thiserror::Error;

/// How long standard error may take no byte; then the line is dropped.
const ERROR_PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Prints a line on standard output: `outln!("...")?`.
#[macro_export]
macro_rules! outln {
    ($($text:tt)*) => { $crate::print::line(format_args!($($text)*)) };
}
/// Prints on standard output, without ending the line.
#[macro_export]
macro_rules! out {
    ($($text:tt)*) => { $crate::print::text(format_args!($($text)*)) };
}
/// Prints a line on standard error. It never fails: there is nowhere else to report that.
#[macro_export]
macro_rules! errln {
    ($($text:tt)*) => { $crate::print::say(format_args!($($text)*)) };
}
pub use crate::{errln, out, outln};

/// Standard output cannot be written.
#[derive(Debug, Error)]
#[error("standard output cannot be written")]
pub struct PrintError(#[source] io::Error);

/// Lines of different threads do not mix.
static OUT: Mutex<()> = Mutex::new(());
static READER_GONE: AtomicBool = AtomicBool::new(false);
static LOST: Mutex<Option<Lost>> = Mutex::new(None);

/// Lines that standard error did not take, which is a daemon's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// How many times.
    pub times: u64,
    /// Why, the last time.
    pub why: String,
}

/// As [`outln!`].
///
/// # Errors
/// It cannot be written, but for a reader that is gone.
pub fn line(line: fmt::Arguments<'_>) -> Result<(), PrintError> {
    text(format_args!("{line}\n"))
}

/// As [`out!`].
///
/// # Errors
/// As [`line`].
pub fn text(text: fmt::Arguments<'_>) -> Result<(), PrintError> {
    if is_reader_gone() {
        return Ok(());
    }
    let text = text.to_string();
    let _turn = lock(&OUT);
    match write_all(io::stdout(), text.as_bytes(), None) {
        Err(Errno::PIPE | Errno::CONNRESET) => {
            READER_GONE.store(true, Ordering::Relaxed);
            Ok(())
        }
        other => other.map_err(|error| PrintError(error.into())),
    }
}

/// Whether standard output was found to be a pipe that nothing reads any more: a command that would
/// go on printing may end.
pub fn is_reader_gone() -> bool {
    READER_GONE.load(Ordering::Relaxed)
}

/// As [`errln!`].
pub fn say(line: fmt::Arguments<'_>) {
    let _ = Stderr.write_all(format!("{line}\n").as_bytes());
}

/// The lines that standard error did not take so far.
pub fn lost() -> Option<Lost> {
    lock(&LOST).clone()
}

/// Standard error; it never fails, and counts what cannot be written. See [`lost`].
#[derive(Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = write_all(io::stderr(), bytes, Some(&ERROR_PATIENCE)) {
            let mut lost = lock(&LOST);
            let times = lost.as_ref().map_or(0, |lost| lost.times) + 1;
            *lost = Some(Lost { times, why: io::Error::from(error).to_string() });
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all of it, also to a non-blocking descriptor (another process may have made it so): then
/// waits up to `patience` for each part, or for ever.
fn write_all(to: impl AsFd, mut bytes: &[u8], patience: Option<&Timespec>) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(&to, PollFlags::OUT)], patience) {
                Ok(0) => return Err(Errno::AGAIN),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::thread;

    #[test]
    fn all_is_written_to_a_pipe_that_does_not_wait() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let bytes = vec![7; 1 << 20];
        let reading = thread::spawn(move || {
            let (mut all, mut buffer) = (0, [0; 4096]);
            let mut reader = File::from(reader);
            loop {
                match reader.read(&mut buffer) {
                    Ok(0) => return all,
                    Ok(count) => all += count,
                    Err(_) => thread::yield_now(),
                }
            }
        });
        write_all(&writer, &bytes, None).unwrap();
        drop(writer);
        assert_eq!(reading.join().unwrap(), bytes.len());
    }

    #[test]
    fn a_pipe_without_reader_is_distinguished_from_a_full_disk() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        assert_eq!(write_all(&writer, b"x", None), Err(Errno::PIPE));
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(write_all(&full, b"x", None), Err(Errno::NOSPC));
        let (_reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let moment = Timespec { tv_sec: 0, tv_nsec: 1000 };
        assert_eq!(write_all(&writer, &vec![7; 1 << 20], Some(&moment)), Err(Errno::AGAIN));
    }
}
