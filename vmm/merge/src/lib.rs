//! Merging the pages that guests have in common: the engines, behind one trait so that they can be
//! measured against each other on the same guests.
//!
//! An engine drives what merges; it knows a guest as "this process, these ranges" and must not know fleets, devices or
//! KVM. It maps no guest memory: what is done to pages is done by the `memory` crate, inside each VM process. Marking guest
//! RAM as mergeable is the VM process's own work and comes before [`Engine::start`].
//!
//! Begin with [`Engine`], then [`slab`]: `agent.rs` in each VM process, `hub.rs`, `domain.rs` and `matchmaker.rs` in the
//! daemon, `wire.rs` between them. [`ksm`] is the host kernel's. `resources/docs/internals/merging.md` has the whole.

pub mod ksm;
pub mod off;
mod settled;
pub mod slab;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use measure::Space;
pub use settled::Settling;

/// What merges.
pub trait Engine: Send {
    /// Its name on the command line and in reports.
    fn name(&self) -> &'static str;

    /// Makes it ready for guests that are yet to start. Idempotent; [`Engine::start`] does it too.
    fn open(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Admits process `pid`, the VM of a guest, to a trust domain. Only for an engine that keeps domains apart.
    fn admit(&mut self, _guest: &str, _pid: u32, _domain: &str, _memory_bytes: u64) {}

    /// VMs that apply and were neither admitted nor refused, each returned once. Only an engine that is open to others has any.
    fn applicants(&mut self) -> Vec<slab::Applicant> {
        Vec::new()
    }

    /// Refuses an applicant, by the number of its connection, and sends it the reason.
    fn refuse(&mut self, _applicant: u64, _why: slab::Refusal) {}

    /// The process of a guest that was admitted has ended.
    fn remove(&mut self, _guest: &str) {}

    /// Starts merging the memory of `guests`. On an error nothing has been changed.
    fn start(&mut self, guests: &[Space]) -> Result<(), EngineError>;

    /// How far it has come.
    fn progress(&mut self) -> Result<Progress, EngineError>;

    /// What the slab engine knows of its guests; None from any other.
    fn statistics(&self) -> Option<slab::engine::Statistics> {
        None
    }

    /// A way to ask from any thread how many pages all slabs have; None from an engine that has none.
    fn slab_pages(&self) -> Option<SlabPages> {
        None
    }

    /// What images have to do with its slabs; None from an engine that has none.
    fn images(&self) -> Option<slab::engine::ImageSlabs> {
        None
    }

    /// Merges at urgent priority while memory is short, whatever it costs. An engine without a limit does nothing.
    fn set_priority(&mut self, _urgent: bool) {}

    /// Stops merging and puts back every host setting; what is merged stays merged. Idempotent; dropping
    /// an engine does the same.
    fn stop(&mut self);

    /// Why nothing merges any more, though it was started; None while something does or may.
    fn stalled(&self) -> Option<String> {
        None
    }

    /// What a reader of its numbers should know.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// See [`Engine::slab_pages`].
pub type SlabPages = Box<dyn Fn() -> u64 + Send>;

/// How far an engine has come since [`Engine::start`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Pages of the guests on shared or zero frames now, the first page of each frame included.
    pub merged_pages: u64,
    /// Processor time the engine took. `None` where it cannot be seen.
    pub cpu_seconds: Option<f64>,
    /// Complete passes over all memory offered for merging. 0 for an engine that does not scan.
    pub full_passes: u64,
}

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
