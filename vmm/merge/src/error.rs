//! What can go wrong with an engine.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// What can go wrong with an engine.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The kernel was built without it.
    #[error("this kernel has no KSM ({} is missing): boot one with CONFIG_KSM=y, or use --engine off", path.display())]
    NoKsm {
        /// The directory that is missing.
        path: PathBuf,
    },
    /// Pages cannot be frozen.
    #[error(
        "userfaultfd cannot be had: give this user access to {}, or sysctl vm.unprivileged_userfaultfd=1, or use --engine ksm or off",
        memory::userfault::DEVICE
    )]
    NoUserfaultfd(#[source] io::Error),
    /// The matchmaker could not be started.
    #[error("cannot serve the agents of VMs at {}", socket.display())]
    Matchmaker {
        /// Where it was to listen.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// We may not change its settings, and it does not run.
    #[error(
        "KSM is stopped and {} may not be written: run as root, or have root do `echo 1 > {}`, or use --engine off",
        path.display(), path.display()
    )]
    Denied {
        /// The switch.
        path: PathBuf,
    },
    /// Another fleet drives it.
    #[error("KSM is already driven by process {owner} ({} is locked): stop that fleet first, or use --engine off", lock.display())]
    Busy {
        /// The process that has it.
        owner: u32,
        /// The lock file.
        lock: PathBuf,
    },
    /// A setting could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A setting could not be written.
    #[error("cannot write {value:?} to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What we wrote.
        value: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process that puts the settings back could not be started.
    #[error("cannot start the process that guards the KSM settings; nothing was changed")]
    Guard(#[source] io::Error),
    /// The lock file could not be used.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A guest exited.
    #[error("guest {guest:?} (pid {pid}) has exited")]
    GuestGone {
        /// Its name.
        guest: String,
        /// Its process.
        pid: u32,
    },
}
