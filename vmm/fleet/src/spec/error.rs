//! What is wrong with a fleet file.

use std::path::PathBuf;

use machine::{InterfaceError, MAX_DRIVES, MAX_PMEM, MAX_VCPUS};
use memory::numa::NumaError;
use memory::size::SizeError;
use thiserror::Error;

use super::limits::{MAX_GUESTS, MAX_NAME_BYTES, MAX_READY_SECONDS};
use super::metrics::MetricsAddressError;
use super::overcommit::OvercommitError;
use super::reservation::ReservationError;

/// What is wrong with a fleet file.
#[derive(Debug, Error)]
pub enum SpecError {
    /// It is not TOML, or has a key that no fleet file has.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// It has no guest.
    #[error("it has no guests: expected at least one [[guest]], or [open] for VMs that others start")]
    NoGuests,
    /// It has too many.
    #[error("it has {0} guests: expected at most {MAX_GUESTS}")]
    TooMany(usize),
    /// A name is used twice.
    #[error("two guests are called {0:?}: give each a name of its own")]
    SameName(String),
    /// A name cannot be part of a path.
    #[error("{0:?} is no name: expected 1 to {MAX_NAME_BYTES} letters, digits, - or _")]
    Name(String),
    /// A guest's memory.
    #[error("guest {guest}: memory")]
    Memory {
        /// Whose.
        guest: String,
        /// What is wrong.
        #[source]
        source: SizeError,
    },
    #[error("guest {guest}: numa")]
    Numa {
        guest: String,
        #[source]
        source: NumaError,
    },
    /// A guest's vCPUs.
    #[error("guest {guest}: {cpus} vCPUs are not possible: expected 1 to {MAX_VCPUS}")]
    Cpus {
        /// Whose.
        guest: String,
        /// How many.
        cpus: u8,
    },
    /// A guest's percentages.
    #[error("guest {guest}: the percentages of its fill make {sum}: expected 100")]
    Mix {
        /// Whose.
        guest: String,
        /// Their sum.
        sum: u32,
    },
    /// A guest's time to become ready.
    #[error("guest {guest}: ready_seconds = {seconds} is not possible: expected 1 to {MAX_READY_SECONDS}")]
    ReadySeconds {
        /// Whose.
        guest: String,
        /// How many.
        seconds: u32,
    },
    /// What the fleet may use.
    #[error("overcommit")]
    Overcommit(#[source] OvercommitError),
    /// Where metrics are to be served.
    #[error(transparent)]
    Metrics(#[from] MetricsAddressError),
    /// A guest's reservation.
    #[error("guest {guest}")]
    Reservation {
        /// Whose.
        guest: String,
        /// What is wrong.
        #[source]
        source: ReservationError,
    },
    /// A clone of what cannot be cloned.
    #[error(
        "guest {guest}: from = {from:?}, {why}: expected a guest of this file that boots, such as from = \"web\""
    )]
    From {
        /// The clone.
        guest: String,
        /// Its origin.
        from: String,
        /// What is wrong with that.
        why: &'static str,
    },
    /// A clone that is to be other than its origin.
    #[error(
        "guest {guest}: it has `from`, and is as its origin is: `{key}` is not possible beside it, only `count` and `net` are"
    )]
    FromKey {
        /// The clone.
        guest: String,
        /// What was said besides.
        key: String,
    },
    /// An initrd without a kernel.
    #[error("guest {guest}: an initrd needs a kernel: the built-in guest has no use for one")]
    InitrdWithoutKernel {
        /// Whose.
        guest: String,
    },
    /// A guest's drives.
    #[error("guest {guest}: {asked} drives are not possible: expected at most {MAX_DRIVES}")]
    Drives { guest: String, asked: usize },
    /// A drive that one of two guests may write.
    #[error(
        "guests {first} and {second} both have the drive {path}, and not both only read it: give each a copy, or \
         both read_only = true, or overlay = true",
        path = path.display()
    )]
    DriveOwners { path: PathBuf, first: String, second: String },
    /// A drive that is not written needs no overlay.
    #[error(
        "guest {guest}: the drive {path} has read_only and overlay: expected one of them",
        path = path.display()
    )]
    ReadOnlyOverlay { guest: String, path: PathBuf },
    /// A guest's files as memory.
    #[error("guest {guest}: {asked} files as memory are not possible: expected at most {MAX_PMEM}")]
    Pmem { guest: String, asked: usize },
    /// Pages would be in common that must not be.
    #[error(
        "guests {first} and {second} have the persistent memory {path} in common, and are of two domains, which share no page: \
         give each domain a copy",
        path = path.display()
    )]
    PmemDomains { path: PathBuf, first: String, second: String },
    /// A guest's network interfaces.
    #[error("guest {guest}: net")]
    Net {
        /// Whose.
        guest: String,
        /// What is wrong.
        #[source]
        source: InterfaceError,
    },
    /// Two interfaces have what is one's.
    #[error(
        "guests {first} and {second} both have the {what}: give each its own ({{n}} in a TAP's name is the guest's number)"
    )]
    NetOwners {
        /// An address or a TAP.
        what: String,
        /// The guest that has it.
        first: String,
        /// The guest that has it, too; maybe the same.
        second: String,
    },
    /// A clone has as many interfaces as its origin.
    #[error(
        "guest {guest}: {asked} network interfaces are given, and its origin has {expected}: expected as many"
    )]
    CloneInterfaces { guest: String, asked: usize, expected: usize },
    /// Two guests cannot have one TAP.
    #[error(
        "guest {guest}: the TAP {tap} is another guest's, and a clone needs one of its own: name them with {{n}} in the fleet file \
         (tap = \"tap{{n}}\"), or say which (`samepage clone --net TAP|auto`, `net` beside `from`)"
    )]
    CloneTap { guest: String, tap: String },
    /// A rule of `[open]` that fits every VM.
    #[error("open: the rule of domain {domain} says neither uid nor cgroup: expected one of them, or both")]
    OpenRule {
        /// The domain.
        domain: String,
    },
    /// A control group that is none.
    #[error("open: {cgroup:?} is no control group: expected its path below /sys/fs/cgroup, beginning with /")]
    Cgroup {
        /// What was given.
        cgroup: String,
    },
    /// More processes stand by than there can be guests.
    #[error("pool = {0} is not possible: expected 0 to {MAX_GUESTS} processes that stand by for clones")]
    Pool(usize),
    /// Another engine knows no VMs but those of the fleet.
    #[error("open: expected engine \"slab\": only its VMs join by themselves")]
    OpenEngine,
    /// KSM merges across everything, which several domains forbid.
    #[error(
        "engine \"ksm\" merges across the whole host and cannot keep the domains {domains} apart: use engine \"slab\" or \"off\", \
         or one domain"
    )]
    Domains {
        /// All domains of the fleet.
        domains: String,
    },
}
