//! Processes held by pidfds: a number may become another process's, a pidfd does not.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// How long a process may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Identifies a process for good: no other has had this number since that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: u32,
    /// When it was started, in clock ticks since the machine was (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
}

#[derive(Debug)]
pub struct Process {
    fd: OwnedFd,
    identity: Identity,
}

impl Process {
    /// Holds the process that has this number now.
    pub fn open(pid: u32) -> io::Result<Self> {
        Self::from_pidfd(pidfd(pid)?, pid)
    }

    /// Holds a child that was not waited for, even if it has ended.
    pub fn of_child(child: &Child) -> io::Result<Self> {
        let pid = child.id();
        Ok(Self { fd: pidfd(pid)?, identity: Identity { pid, start_ticks: start_ticks(pid)? } })
    }

    /// What `fd`, a pidfd, refers to; its number is `pid`.
    pub(super) fn from_pidfd(fd: OwnedFd, pid: u32) -> io::Result<Self> {
        let process = Self { fd, identity: Identity { pid, start_ticks: start_ticks(pid)? } };
        // /proc shows its number only while it lives; later it may be another's.
        match process.has_ended() {
            true => Err(io::ErrorKind::NotFound.into()),
            false => Ok(process),
        }
    }

    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Which one it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether it has given up its memory and is about to end, as one that was killed; its sockets
    /// may exist for a moment.
    pub fn is_ending(&self) -> bool {
        fs::read(format!("/proc/{}/cmdline", self.pid())).is_ok_and(|words| words.is_empty())
    }

    /// Whether it has ended; its parent may not have waited for it.
    pub fn has_ended(&self) -> bool {
        self.ends_within(Duration::ZERO)
    }

    /// Ends it: by `ask`, by a signal if that returned false, or by force.
    pub fn end(&self, ask: impl FnOnce() -> bool) {
        if !ask() {
            let _ = self.signal(Signal::TERM);
        }
        if !self.ends_within(END_LIMIT) {
            let _ = self.signal(Signal::KILL);
            self.ends_within(END_LIMIT);
        }
    }

    /// Waits for its end. False if it has not ended within `limit`.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&time)) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Sends it a signal. Not an error if it has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.fd, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Its arguments, the program first; none if it has ended.
    pub fn arguments(&self) -> Vec<String> {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.pid())).unwrap_or_default();
        if self.has_ended() {
            return Vec::new();
        }
        // More than one zero at the end is room that [`super::arguments::show`] has not used.
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let text = bytes.get(..end).unwrap_or_default();
        text.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
    }

    /// Whether it runs this program, in this build or another.
    pub fn is_this_program(&self) -> bool {
        let program = |pid: &str| fs::read_link(format!("/proc/{pid}/exe")).ok().map(without_mark);
        match (program(&self.pid().to_string()), program("self")) {
            (Some(theirs), Some(ours)) => theirs == ours || theirs.ends_with("samepage"),
            _ => false,
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// All processes of this user that are visible here.
pub fn of_this_user() -> impl Iterator<Item = Process> {
    let user = rustix::process::getuid().as_raw();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        // Most are ruled out by this alone.
        .filter(move |entry| entry.metadata().is_ok_and(|meta| meta.uid() == user))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Process::open(pid).ok())
        .filter(move |process| user_of(process.pid()) == Some(user) && !process.has_ended())
}

/// The real user. The owner of `/proc/PID` is root for a process that may not be looked into.
fn user_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name before it may hold anything but the last parenthesis; the state after it is field 3.
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(22 - 3));
    field.and_then(|ticks| ticks.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The path of a program whose file may have been replaced since.
fn without_mark(path: PathBuf) -> PathBuf {
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(before) => before.into(),
        None => path,
    }
}

/// Does the process exist and is it more than a zombie?
pub fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Processor time of this thread.
pub fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_held_beyond_its_end() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let held = Process::of_child(&child).unwrap();
        let again = Process::open(child.id()).unwrap();
        assert_eq!(held.identity(), again.identity());
        assert!(held.identity().start_ticks > 0 && !held.has_ended());
        assert!(!held.ends_within(Duration::from_millis(10)));
        assert!(of_this_user().any(|process| process.identity() == held.identity()));
        held.signal(Signal::KILL).unwrap();
        assert!(again.ends_within(Duration::from_secs(60)));
        // Its parent has not waited for it: the number is still its own, but it is no longer a
        // process.
        assert!(Process::open(child.id()).is_err() && Process::of_child(&child).is_ok());
        child.wait().unwrap();
        assert!(held.has_ended() && held.arguments().is_empty());
        held.signal(Signal::TERM).unwrap();
    }

    #[test]
    fn a_program_is_known_by_its_file() {
        let ours = Process::open(std::process::id()).unwrap();
        assert!(ours.is_this_program());
        assert!(ours.arguments().first().is_some_and(|program| !program.is_empty()));
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let held = Process::of_child(&other).unwrap();
        // Until it is another program, it is this one; and for a moment it has no arguments.
        let until = Instant::now() + Duration::from_secs(60);
        while (held.is_this_program() || held.arguments() != ["sleep", "60"]) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!held.is_this_program());
        assert_eq!(held.arguments(), ["sleep", "60"]);
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(without_mark("/bin/a (deleted)".into()), PathBuf::from("/bin/a"));
    }
}
