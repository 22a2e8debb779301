//! The process that puts KSM's settings back when its owner is gone, however it went.
//!
//! The owner starts it with one end of a socket pair as standard input and sends one line, the
//! `Request`. The guard leaves the owner's session, takes the lock, saves the settings *under* the
//! lock (so that it never saves what another fleet has set), and answers one line, the `Answer`.
//! Only then does the owner change anything. When the owner's end closes, be it by its own hand or
//! by SIGKILL, the guard restores, says what it has left, and exits; the lock goes with it.
//!
//! Should the guard be killed, too, a record of what was changed stands beside the lock, which is
//! free then: the owner, the next guard, and `samepage doctor` go by it.

#![expect(
    unsafe_code,
    reason = "setsid, signal and flock have no safe wrapper in std at our minimum version"
)]

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::settings::{Kept, Knobs, KsmSettings, Saved};
use crate::EngineError;

/// The longest line either side takes.
const MAX_LINE: u64 = 64 * 1024;

/// What the owner asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    /// The process that asks; its id goes into the lock file.
    pub(super) owner: u32,
    /// The lock file.
    pub(super) lock: PathBuf,
    /// The knobs to guard.
    pub(super) knobs: Knobs,
    /// What they will be set to.
    pub(super) settings: KsmSettings,
}

/// What was changed, and for which process: kept beside the lock while it is so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The process that merges.
    pub owner: u32,
    /// What the settings were.
    pub saved: Saved,
    /// What they were set to.
    pub written: Saved,
}

impl Record {
    fn path(lock: &Path) -> PathBuf {
        lock.with_extension("changed.json")
    }

    /// The one beside `lock`, if there is one that can be read.
    pub(super) fn beside(lock: &Path) -> Option<Self> {
        let text = fs::read(Self::path(lock)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Whole, or not at all.
    fn write(&self, lock: &Path) -> io::Result<()> {
        let path = Self::path(lock);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, path)
    }

    fn remove(lock: &Path) {
        // It is not there, or the next guard finds that everything is as it was.
        let _ = fs::remove_file(Self::path(lock));
    }

    /// Puts back what can be, and says what was left.
    fn restore(&self, knobs: &Knobs, lock: &Path) -> Result<Vec<Kept>, EngineError> {
        let kept = knobs.restore(&self.saved, &self.written)?;
        Self::remove(lock);
        Ok(kept)
    }
}

/// Puts back what a process and its guard, both killed, have left changed. None: there is nothing
/// of the kind.
pub(super) fn recover(lock: &Path, knobs: &Knobs) -> Result<Option<(Record, Vec<Kept>)>, EngineError> {
    let _held = take_lock(lock, std::process::id())?;
    recover_locked(lock, knobs)
}

fn recover_locked(lock: &Path, knobs: &Knobs) -> Result<Option<(Record, Vec<Kept>)>, EngineError> {
    let Some(record) = Record::beside(lock) else { return Ok(None) };
    let kept = record.restore(knobs, lock)?;
    Ok(Some((record, kept)))
}

/// What the guard answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// The settings are saved; change them.
    Ready {
        /// To this.
        wanted: Saved,
        /// Settings that an earlier fleet had left changed were put back first.
        recovered: Option<Record>,
    },
    /// The settings are put back, but for these.
    Restored(Vec<Kept>),
    /// Another process has the lock.
    Busy {
        /// The process that has it.
        owner: u32,
    },
    /// It did not work.
    Failed {
        /// Why, for people.
        reason: String,
    },
}

/// The hidden subcommand `samepage ksm-guard`: [`run`] on standard input, which must be a socket.
pub fn run_on_stdin() -> Result<(), EngineError> {
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(EngineError::Guard)?;
    run(UnixStream::from(socket))
}

/// Guards the settings until the other end of `owner` is closed, then puts them back.
pub fn run(owner: UnixStream) -> Result<(), EngineError> {
    detach();
    let request: Request = receive(&mut BufReader::new(&owner)).map_err(EngineError::Guard)?;
    let prepared = prepare(&request);
    let answer = match &prepared {
        Ok((_, record, recovered)) => {
            Answer::Ready { wanted: record.written.clone(), recovered: recovered.clone() }
        }
        Err(EngineError::Busy { owner, .. }) => Answer::Busy { owner: *owner },
        Err(error) => Answer::Failed { reason: os::one_line(error) },
    };
    send(&mut &owner, &answer).map_err(EngineError::Guard)?;
    // The owner knows why and says so.
    let Ok((lock, record, _)) = prepared else {
        return Ok(());
    };
    // Whatever ends the reading, the owner is gone.
    let _ = io::copy(&mut &owner, &mut io::sink());
    let restored = record.restore(&request.knobs, &request.lock);
    // Under the lock: its next holder must not find our owner's name.
    let _ = lock.set_len(0);
    let answer = match &restored {
        Ok(kept) => Answer::Restored(kept.clone()),
        Err(error) => Answer::Failed { reason: os::one_line(error) },
    };
    // An owner that was killed hears nothing.
    let _ = send(&mut &owner, &answer);
    restored.map(drop)
}

/// The lock, what will be changed, and what was found changed.
fn prepare(request: &Request) -> Result<(File, Record, Option<Record>), EngineError> {
    let Request { owner, lock: path, knobs, settings } = request;
    let lock = take_lock(path, *owner)?;
    let recovered = recover_locked(path, knobs)?.map(|(record, _)| record);
    let saved = knobs.save()?;
    let record = Record { owner: *owner, written: knobs.wanted(settings, &saved), saved };
    record.write(path).map_err(|source| EngineError::Lock { path: path.clone(), source })?;
    Ok((lock, record, recovered))
}

/// Takes the lock for `owner`, or names the process that has it.
pub(super) fn take_lock(path: &Path, owner: u32) -> Result<File, EngineError> {
    let failed = |source| EngineError::Lock { path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    let mut file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(failed)?;
    // SAFETY: a lock on a descriptor that `file` owns for longer than the call.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(failed(error));
        }
        let mut text = String::new();
        let _ = file.take(MAX_LINE).read_to_string(&mut text);
        let owner = text.trim().parse().unwrap_or(0);
        return Err(EngineError::Busy { owner, lock: path.to_owned() });
    }
    file.set_len(0).and_then(|()| writeln!(file, "{owner}")).map_err(failed)?;
    Ok(file)
}

/// Out of reach of the terminal's signals, and of a service manager's polite ones: the guard ends
/// when its owner does.
fn detach() {
    // SAFETY: no memory is involved. It fails for a process group leader, which is then out of
    // reach already.
    unsafe { libc::setsid() };
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE] {
        // SAFETY: ignoring a signal installs no handler of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Sends one value as a line of JSON.
pub(super) fn send(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Receives one line of JSON.
pub(super) fn receive<T: for<'de> Deserialize<'de>>(from: &mut impl BufRead) -> io::Result<T> {
    let mut line = String::new();
    from.take(MAX_LINE).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}
