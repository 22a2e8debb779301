//! The host kernel's own merging (KSM) as an engine: its settings, its counters, its cost.
//!
//! Merges whatever on the host opted in, across all processes; rescans for as long as it runs. Its
//! settings belong to the whole host, so they are changed under a lock and put back on every way
//! out, also by SIGKILL: see [`guard`].

pub mod guard;
mod ksmd;
pub mod settings;

use std::ffi::OsString;
use std::io::BufReader;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use guard::{Answer, Record, Request};
use ksmd::Ksmd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use settings::Saved;
pub use settings::{Knobs, KsmSettings};

use super::{Engine, EngineError, Progress};
use kernel_view::ksm_stat::{self, KsmStat};
use measure::Space;
use os::executable;

/// Held, by the guard, while a fleet of ours drives KSM.
pub const LOCK: &str = "/run/samepage/ksm.lock";

/// What KSM can do for us here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// We may drive it.
    Full,
    /// It runs, with settings that we may not change.
    AsItIs,
    /// It is stopped and we may not start it.
    Stopped,
    /// The kernel does not have it.
    Missing,
}

impl Availability {
    /// Whether [`Ksm`] can start.
    pub fn usable(self) -> bool {
        matches!(self, Self::Full | Self::AsItIs)
    }
}

/// What KSM can do for us here; changes nothing.
pub fn available() -> Availability {
    let knobs = Knobs::default();
    match (knobs.exist(), knobs.writable(), knobs.running().unwrap_or(false)) {
        (false, ..) => Availability::Missing,
        (_, true, _) => Availability::Full,
        (.., true) => Availability::AsItIs,
        (.., false) => Availability::Stopped,
    }
}

/// Settings that a process and its guard, both killed, have left changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// The process.
    pub owner: u32,
    /// The settings, as `NAME=VALUE (was VALUE)`.
    pub settings: Vec<String>,
    /// Shell commands that put them back.
    pub mend: String,
}

/// Settings that a fleet of ours has left changed, if one has; changes nothing.
pub fn left_behind() -> Option<LeftBehind> {
    left_behind_in(&Knobs::default(), Path::new(LOCK))
}

/// As [`left_behind`], of the KSM of which `knobs` are the files.
pub fn left_behind_in(knobs: &Knobs, lock: &Path) -> Option<LeftBehind> {
    let Record { owner, saved, written } = Record::beside(lock)?;
    // A fleet that merges has a guard, and that has the lock.
    let file = std::fs::File::open(lock).ok()?;
    flock(&file, FlockOperation::NonBlockingLockShared).ok()?;
    let left = knobs.left(&saved, &written).ok()?;
    let now = knobs.save().ok()?;
    let is = |name: &str| now.knobs.iter().find(|(knob, _)| knob == name).map_or("", |(_, value)| value);
    let settings: Vec<String> =
        left.iter().map(|(name, was)| format!("{name}={} (was {was})", is(name))).collect();
    let set = |(name, was): &(&str, String)| format!("echo {was} > {}", knobs.path(name).display());
    let mend = left.iter().map(set).collect::<Vec<_>>().join("; ");
    (!settings.is_empty()).then_some(LeftBehind { owner, settings, mend })
}

/// The engine.
#[derive(Debug)]
pub struct Ksm {
    settings: KsmSettings,
    knobs: Knobs,
    lock: PathBuf,
    /// Command line of the guard; empty: ourselves with `ksm-guard`.
    guard_command: Vec<OsString>,
    guard: Option<Guard>,
    run: Option<Run>,
    notes: Vec<String>,
}

/// The guard process; closing the socket ends it.
#[derive(Debug)]
struct Guard {
    process: Child,
    socket: UnixStream,
}

/// What is remembered of the start.
#[derive(Debug)]
struct Run {
    guests: Vec<Space>,
    ksmd: Option<Ksmd>,
    cpu_seconds: Option<f64>,
    full_scans: u64,
}

impl Ksm {
    /// An engine that will run KSM with `settings`.
    pub fn new(settings: KsmSettings) -> Self {
        Self {
            settings,
            knobs: Knobs::default(),
            lock: PathBuf::from(LOCK),
            guard_command: Vec::new(),
            guard: None,
            run: None,
            notes: Vec::new(),
        }
    }

    /// Uses another program as the guard than `ksm-guard` of our own executable: one that calls
    /// [`guard::run_on_stdin`].
    pub fn with_guard_command(mut self, command: Vec<OsString>) -> Self {
        self.guard_command = command;
        self
    }

    /// Drives the KSM whose files are `knobs`; `lock` names the process that does.
    pub fn with_host(mut self, knobs: Knobs, lock: PathBuf) -> Self {
        (self.knobs, self.lock) = (knobs, lock);
        self
    }

    /// The process that puts the settings back, while there are any to put back.
    pub fn guard_pid(&self) -> Option<u32> {
        self.guard.as_ref().map(|guard| guard.process.id())
    }

    fn spawn_guard(&self) -> Result<Guard, EngineError> {
        let mut command = match self.guard_command.as_slice() {
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments);
                command
            }
            [] => {
                let mut command = executable::command();
                command.arg("ksm-guard");
                command
            }
        };
        let (socket, theirs) = UnixStream::pair().map_err(EngineError::Guard)?;
        let process = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(EngineError::Guard)?;
        Ok(Guard { process, socket })
    }

    /// Has the settings saved and locked by a guard, which says what to set.
    fn protect(&mut self) -> Result<(Guard, Saved), EngineError> {
        let mut guard = self.spawn_guard()?;
        let request = Request {
            owner: std::process::id(),
            lock: self.lock.clone(),
            knobs: self.knobs.clone(),
            settings: self.settings.clone(),
        };
        let answer = guard::send(&mut &guard.socket, &request).and_then(|()| guard.answer());
        let error = match answer {
            Ok(Answer::Ready { wanted, recovered }) => {
                self.notes.extend(recovered.map(|record| {
                    format!(
                        "KSM still had the settings of process {}, which was killed with its guard: they were put back before these were made",
                        record.owner
                    )
                }));
                return Ok((guard, wanted));
            }
            Ok(Answer::Busy { owner }) => EngineError::Busy { owner, lock: self.lock.clone() },
            Ok(Answer::Failed { reason }) => EngineError::Guard(std::io::Error::other(reason)),
            Ok(Answer::Restored(_)) => EngineError::Guard(std::io::ErrorKind::InvalidData.into()),
            Err(error) => EngineError::Guard(error),
        };
        guard.close();
        Err(error)
    }

    /// Has the settings put back; by ourselves, if the guard was killed.
    fn put_back(&mut self, mut guard: Guard) {
        let kept = match guard.close() {
            Some(Answer::Restored(kept)) => kept,
            Some(Answer::Failed { reason }) => {
                self.notes.push(format!("KSM's settings could not all be put back: {reason}"));
                return;
            }
            _ => match guard::recover(&self.lock, &self.knobs) {
                Ok(recovered) => recovered.map(|(_, kept)| kept).unwrap_or_default(),
                Err(error) => {
                    self.notes.push(format!(
                        "the process that puts KSM's settings back was killed, and they could not be put back: {error}; `samepage doctor` says \
                         what they were"
                    ));
                    return;
                }
            },
        };
        self.notes.extend(kept.iter().map(ToString::to_string));
    }

    fn counter(&self, name: &str) -> Option<u64> {
        ksm_stat::counter(&self.knobs.0, name)
    }
}

impl Guard {
    fn answer(&self) -> std::io::Result<Answer> {
        guard::receive(&mut BufReader::new(&self.socket))
    }

    /// Lets the guard restore, and waits until it has. None: it was killed before.
    fn close(&mut self) -> Option<Answer> {
        let _ = self.socket.shutdown(Shutdown::Write);
        let answer = self.answer().ok();
        match self.process.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!("the guard of the KSM settings ended with {status}"),
            Err(error) => tracing::warn!("cannot wait for the guard of the KSM settings: {error}"),
        }
        answer
    }

    /// Whether it is there. Until it is released it sends nothing, so anything to be read is its
    /// end.
    fn is_alive(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::IN)];
        !matches!(poll(&mut socket, Some(&Timespec::default())), Ok(1..))
    }
}

impl Engine for Ksm {
    fn name(&self) -> &'static str {
        "ksm"
    }

    fn start(&mut self, guests: &[Space]) -> Result<(), EngineError> {
        self.stop();
        self.notes.clear();
        if !self.knobs.exist() {
            return Err(EngineError::NoKsm { path: self.knobs.0.clone() });
        }
        let ksmd = Ksmd::find();
        let run = Run {
            guests: guests.to_vec(),
            ksmd,
            cpu_seconds: ksmd.and_then(Ksmd::cpu_seconds),
            full_scans: self.counter("full_scans").unwrap_or(0),
        };
        if self.knobs.writable() {
            let (guard, wanted) = self.protect()?;
            self.guard = Some(guard);
            if let Err(error) = self.knobs.apply(&wanted) {
                self.stop();
                return Err(error);
            }
        } else if self.knobs.running()? {
            self.notes.push(
                "KSM runs with the host's own settings, which this user may not change: merging may take long"
                    .to_owned(),
            );
        } else {
            return Err(EngineError::Denied { path: self.knobs.path("run") });
        }
        if run.cpu_seconds.is_none() {
            self.notes
                .push("the thread ksmd cannot be seen from here: its processor time is unknown".to_owned());
        }
        self.run = Some(run);
        Ok(())
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        let Some(run) = &self.run else {
            return Ok(Progress::default());
        };
        let mut merged_pages = 0;
        for guest in &run.guests {
            match KsmStat::of(guest.pid) {
                Ok(stat) => merged_pages += stat.merging_pages + stat.zero_pages,
                Err(_) if !PathBuf::from(format!("/proc/{}/stat", guest.pid)).exists() => {
                    return Err(EngineError::GuestGone { guest: guest.name.clone(), pid: guest.pid });
                }
                Err(_) => {
                    // No counters for one process here: those of the host are the next best.
                    let host = ["pages_shared", "pages_sharing", "ksm_zero_pages"];
                    merged_pages = host.iter().filter_map(|name| self.counter(name)).sum();
                    break;
                }
            }
        }
        let now = run.ksmd.and_then(Ksmd::cpu_seconds);
        Ok(Progress {
            merged_pages,
            cpu_seconds: now.zip(run.cpu_seconds).map(|(now, before)| now - before),
            full_passes: self.counter("full_scans").unwrap_or(0).saturating_sub(run.full_scans),
        })
    }

    fn stop(&mut self) {
        if let Some(guard) = self.guard.take() {
            self.put_back(guard);
        }
        self.run = None;
    }

    fn stalled(&self) -> Option<String> {
        self.run.as_ref().and_then(|_| self.knobs.stalled())
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        notes.extend(self.stalled());
        if self.guard.as_ref().is_some_and(|guard| !guard.is_alive()) {
            notes.push(
                "the process that puts KSM's settings back was killed: they are put back when merging ends, unless this process is killed, too"
                    .to_owned(),
            );
        }
        notes
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
