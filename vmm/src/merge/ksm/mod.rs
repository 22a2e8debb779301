//! The host kernel's own merging (KSM) as an engine: its settings, its counters, its cost.
//!
//! Merges whatever on the host opted in, across all processes; rescans for as long as it runs. Its
//! settings belong to the whole host, so they are changed under a lock and put back on every way out,
//! also by SIGKILL: see [`guard`].

pub mod guard;
mod ksmd;
pub mod settings;

use std::ffi::OsString;
use std::io::BufReader;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use guard::{Answer, Request};
use ksmd::Ksmd;
pub use settings::{Knobs, KsmSettings};

use super::{Engine, EngineError, Progress};
use crate::measure::Space;
use crate::memory::ksm_stat::{self, KsmStat};
use crate::process::executable;

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

    /// Has the settings saved and locked by a guard.
    fn protect(&self) -> Result<Guard, EngineError> {
        let mut guard = self.spawn_guard()?;
        let request =
            Request { owner: std::process::id(), lock: self.lock.clone(), knobs: self.knobs.clone() };
        let answer = guard::send(&mut &guard.socket, &request)
            .and_then(|()| guard::receive(&mut BufReader::new(&guard.socket)));
        match answer {
            Ok(Answer::Ready(_)) => Ok(guard),
            Ok(Answer::Busy { owner }) => {
                guard.close();
                Err(EngineError::Busy { owner, lock: self.lock.clone() })
            }
            Ok(Answer::Failed { reason }) => {
                guard.close();
                Err(EngineError::Guard(std::io::Error::other(reason)))
            }
            Err(error) => {
                guard.close();
                Err(EngineError::Guard(error))
            }
        }
    }

    fn counter(&self, name: &str) -> Option<u64> {
        ksm_stat::counter(&self.knobs.0, name)
    }
}

impl Guard {
    /// Lets the guard restore, and waits until it has.
    fn close(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        match self.process.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!("the guard of the KSM settings ended with {status}"),
            Err(error) => tracing::warn!("cannot wait for the guard of the KSM settings: {error}"),
        }
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
            self.guard = Some(self.protect()?);
            if let Err(error) = self.knobs.apply(&self.settings) {
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
        if let Some(mut guard) = self.guard.take() {
            guard.close();
        }
        self.run = None;
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
