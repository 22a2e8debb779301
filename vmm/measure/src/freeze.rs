//! Stops processes while they are measured, and resumes them whatever happens.
//!
//! A second process, the guard, stops them and resumes them when its standard input ends: because
//! we close it, or because we have died, by a panic or by SIGKILL. The terminal's signals do not
//! reach it. If the guard itself is killed, we resume them. Both hold the processes by pidfds, so
//! that a process that gets the number later is not affected. A process that was stopped before
//! stays stopped.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use os::executable;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use thiserror::Error;

/// How long all threads may take to stop.
const LIMIT: Duration = Duration::from_secs(5);
/// How often they are checked.
const POLL: Duration = Duration::from_millis(1);
/// What the guard writes when all have stopped.
const READY: &str = "ready";

/// Why processes could not be stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// There is no such process.
    #[error("process {pid} cannot be stopped")]
    Open {
        pid: u32,
        /// Why: it is gone, or another user's.
        #[source]
        source: io::Error,
    },
    /// It would wait for itself.
    #[error("process {pid} is this measurement itself, which would stop too")]
    Ourselves { pid: u32 },
    /// A thread waits in the kernel.
    #[error(
        "thread {thread} of process {pid} does not stop, it waits in the kernel; measure without --freeze, or later"
    )]
    Busy { pid: u32, thread: u32 },
    /// The guard could not be started.
    #[error("cannot start the guard that resumes stopped processes")]
    Guard(#[source] io::Error),
    /// The guard said no.
    #[error("nothing was stopped: {answer}")]
    Refused { answer: Box<str> },
}

/// A process that is held by a descriptor.
struct Held {
    pid: u32,
    fd: OwnedFd,
    was_stopped: bool,
}

impl Held {
    fn new(pid: u32) -> Result<Self, FreezeError> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let opened = number.ok_or(io::ErrorKind::NotFound.into());
        let fd = opened.and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        let fd = fd.map_err(|source| FreezeError::Open { pid, source })?;
        Ok(Self { pid, fd, was_stopped: moving_thread(pid).is_none() })
    }

    fn signal(&self, signal: Signal) -> Result<(), FreezeError> {
        let sent = pidfd_send_signal(&self.fd, signal);
        sent.map_err(|e| FreezeError::Open { pid: self.pid, source: e.into() })
    }

    fn stop(&self) -> Result<(), FreezeError> {
        self.signal(Signal::STOP)?;
        let until = Instant::now() + LIMIT;
        while let Some(thread) = moving_thread(self.pid) {
            if Instant::now() > until {
                return Err(FreezeError::Busy { pid: self.pid, thread });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    fn resume(&self) {
        if !self.was_stopped {
            // It may have been killed meanwhile, which is as well.
            let _ = self.signal(Signal::CONT);
        }
    }
}

/// A thread of the process that has not stopped.
fn moving_thread(pid: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let mut threads = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
    threads.find(|thread: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap_or_default();
        // The name before it may hold anything but the last parenthesis.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        !matches!(state, None | Some('T' | 't' | 'Z' | 'X'))
    })
}

/// Processes that stay stopped while this lives.
pub struct Frozen {
    held: Vec<Held>,
    guard: Child,
    line: Option<ChildStdin>,
}

impl Frozen {
    /// Stops `pids`; when it returns none of their threads runs.
    ///
    /// # Errors
    ///
    /// One cannot be stopped; then none is.
    pub fn new(pids: &[u32]) -> Result<Self, FreezeError> {
        if let Some(pid) = pids.iter().find(|pid| **pid == std::process::id()) {
            return Err(FreezeError::Ourselves { pid: *pid });
        }
        let held = pids.iter().map(|pid| Held::new(*pid)).collect::<Result<Vec<_>, _>>()?;
        let mut guard = executable::command()
            .arg("freeze-guard")
            .args(pids.iter().map(u32::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(FreezeError::Guard)?;
        let line = guard.stdin.take();
        let mut answer = String::new();
        let said = guard.stdout.take().map(|out| BufReader::new(out).take(4096).read_line(&mut answer));
        let frozen = Self { held, guard, line };
        match said {
            Some(Ok(_)) if answer.trim() == READY => Ok(frozen),
            Some(Ok(_)) => Err(FreezeError::Refused { answer: answer.trim().into() }),
            Some(Err(e)) => Err(FreezeError::Guard(e)),
            None => Err(FreezeError::Guard(io::ErrorKind::BrokenPipe.into())),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.line.take());
        if !self.guard.wait().is_ok_and(|status| status.success()) {
            self.held.iter().for_each(Held::resume);
        }
    }
}

/// The hidden subcommand `samepage freeze-guard PID...`: stops the processes, says so, and resumes
/// them at the end of standard input.
///
/// # Errors
/// Standard output cannot be written.
pub fn guard(pids: &[u32]) -> io::Result<()> {
    // A process group leader cannot leave its session, but then has one of its own.
    let _ = rustix::process::setsid();
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    let held = pids.iter().map(|pid| Held::new(*pid)).collect::<Result<Vec<_>, _>>();
    let (held, stopped) = match held {
        Ok(held) => {
            let stopped = held.iter().try_for_each(Held::stop);
            (held, stopped)
        }
        Err(e) => (Vec::new(), Err(e)),
    };
    let said = match &stopped {
        Ok(()) => writeln!(io::stdout(), "{READY}"),
        Err(e) => writeln!(io::stdout(), "{e}"),
    };
    if stopped.is_ok() && said.is_ok() {
        // Any end of the reading means that the owner is gone.
        let _ = io::copy(&mut fs::File::from(io::stdin().as_fd().try_clone_to_owned()?), &mut io::sink());
    }
    held.iter().for_each(Held::resume);
    said
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_stopped_and_started_and_one_that_stood_still_stays_so() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let state = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
        };
        let held = Held::new(child.id()).unwrap();
        held.stop().unwrap();
        assert_eq!(state(child.id()), 'T');
        let again = Held::new(child.id()).unwrap();
        assert!(again.was_stopped && !held.was_stopped);
        again.resume();
        assert_eq!(state(child.id()), 'T');
        held.resume();
        let until = Instant::now() + LIMIT;
        while moving_thread(child.id()).is_none() && Instant::now() < until {
            thread::sleep(POLL);
        }
        assert_ne!(state(child.id()), 'T');
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(Held::new(child.id()), Err(FreezeError::Open { .. })));
        assert!(matches!(Frozen::new(&[std::process::id()]), Err(FreezeError::Ourselves { .. })));
    }
}
