//! What can go wrong with a fleet.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::check_error::CheckError;
use super::difference::Differences;
use super::problem::Listed;
use super::refusal::ErrorKind;
use super::spec::{MetricsAddress, SpecError};
use kernel_view::host::ReadingError;
use kernel_view::pagemap::PagemapError;
use measure::MeasureError;
use memory::page_out::PageOutError;
use merge::EngineError;
use overcommit::admission::{AdmissionError, Refusal};
use overcommit::capacity::CapacityError;
use wire::LineError;

/// How much of an answer is shown that was not expected: a fleet's status is long.
const UNEXPECTED_CHARS: usize = 200;

/// Why a fleet, or one of its guests, could not do what was asked.
#[derive(Debug, Error)]
pub enum HostError {
    /// The fleet file cannot be read.
    #[error("the fleet file {path} cannot be read", path = path.display())]
    SpecRead {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The fleet file is not one.
    #[error("the fleet file {path} is wrong", path = path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: SpecError,
    },
    /// A directory or file of the runtime directory cannot be used.
    #[error("cannot {what} {path}", path = path.display())]
    Runtime {
        /// What was being done.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host's kernel does not show a VM process's pages.
    #[error("the page table of a VM cannot be read")]
    Pagemap(#[from] PagemapError),
    /// A socket's path is longer than the kernel takes.
    #[error("the socket path {path} is too long: a Unix socket takes at most 107 bytes; set SAMEPAGE_RUNTIME_DIR to a shorter directory", path = path.display())]
    PathLength {
        /// The path.
        path: PathBuf,
    },
    /// Something is missing or wrong that the fleet needs.
    #[error("the fleet cannot come up:{problems}")]
    Preflight {
        /// All of it.
        problems: Listed,
    },
    /// A guest is not admitted.
    #[error("guest {guest} is not admitted: {refusal}; [overcommit] of the fleet file sets the rule")]
    NotAdmitted {
        /// Its name.
        guest: String,
        /// The rule that refuses it.
        refusal: Box<Refusal>,
    },
    /// The rule of admission cannot be followed here.
    #[error("admission failed")]
    Admission(#[from] AdmissionError),
    /// What the host has could not be determined.
    #[error("cannot determine the fleet's memory capacity")]
    Reading(#[from] ReadingError),
    /// It is not what was asked for.
    #[error("cannot determine the fleet's memory capacity")]
    Capacity(#[from] CapacityError),
    /// Another process listens where metrics are to be served.
    #[error(
        "metrics cannot be served at {address}: the address is taken, perhaps by another fleet with the same `metrics`; give this \
         fleet another one, or leave `metrics` out of its file"
    )]
    MetricsTaken {
        /// Where.
        address: MetricsAddress,
    },
    /// Metrics cannot be served for another reason.
    #[error(
        "metrics cannot be served at {address}: `metrics` of the fleet file must be an address of this host that you may use"
    )]
    Metrics {
        /// Where.
        address: MetricsAddress,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The fleet is up already, or coming up.
    #[error(
        "fleet {fleet:?} is up already, or coming up or going down (process {pid}): `samepage fleet status --name {fleet}` shows it, \
         `samepage fleet down --name {fleet}` ends it"
    )]
    UpAlready {
        /// Its name.
        fleet: String,
        /// The process that has claimed it.
        pid: u32,
    },
    /// The fleet is another process's own, which ends it by itself.
    #[error(
        "fleet {fleet:?} belongs to process {pid}, which ends it by itself: wait for it, or end that process"
    )]
    Held {
        /// Its name.
        fleet: String,
        /// The process.
        pid: u32,
    },
    /// The fleet's name could not be claimed.
    #[error("the name of fleet {fleet:?} cannot be claimed")]
    Claim {
        /// Its name.
        fleet: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another user has claimed the fleet's name.
    #[error(
        "the name of fleet {fleet:?} is taken by process {pid} of user {uid}, which is not this user: give the fleet another name, or \
         set SAMEPAGE_RUNTIME_DIR to another directory"
    )]
    ClaimOfOther {
        /// Its name.
        fleet: String,
        /// The process.
        pid: u32,
        /// Its user.
        uid: u32,
    },
    /// What runs of the fleet is not what the file says.
    #[error(
        "what runs of fleet {fleet:?} is not as the fleet file says, and nothing was touched:{differences}\n  Put the file back as it \
         was, or give `fleet up --replace`: it ends these guests, and starts those that are in the file anew"
    )]
    Differs {
        /// Its name.
        fleet: String,
        /// In what.
        differences: Differences,
    },
    /// A directory is not this user's alone.
    #[error(
        "{path} is not safe: {why}, so another user could put sockets there that answer for the fleets in {fleets}; set \
         SAMEPAGE_RUNTIME_DIR to a directory that only this user may write to",
        path = path.display(), fleets = fleets.display()
    )]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What was to be used.
        fleets: PathBuf,
    },
    /// The daemon said that it ended, and has not.
    #[error(
        "the guests of fleet {fleet:?} have ended, but its daemon (process {pid}) still runs after {} s",
        limit.as_secs()
    )]
    DaemonStays {
        /// Its name.
        fleet: String,
        /// The daemon.
        pid: u32,
        /// How long it had.
        limit: Duration,
    },
    /// No such guest.
    #[error("fleet {fleet:?} has no guest {guest:?}; it has: {known}")]
    NoGuest {
        /// The name asked for.
        guest: String,
        /// The fleet's name.
        fleet: String,
        /// Its guests.
        known: String,
    },
    /// No such fleet.
    #[error("no fleet {fleet:?} is up{known}")]
    NotUp {
        /// The name asked for.
        fleet: String,
        /// Those that are, as a clause.
        known: String,
    },
    /// None at all, or more than one to choose from.
    #[error("which fleet? {known}")]
    WhichFleet {
        /// What there is.
        known: String,
    },
    /// A VM process could not be started.
    #[error("guest {guest}: its VM process could not be started")]
    Spawn {
        /// Its name.
        guest: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Clones cannot have the network interfaces that they are to have.
    #[error("the clones cannot be on the network")]
    CloneNet {
        /// What is wrong.
        #[source]
        source: super::spec::SpecError,
    },
    /// No process stands by for clones.
    #[error("the thread that fills the pool cannot be started")]
    Pool {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A VM process ended before it was asked to.
    #[error("guest {guest}: its VM ended ({how}){log}")]
    Ended {
        /// Its name.
        guest: String,
        /// Exit status or signal.
        how: String,
        /// The end of its log, as a clause.
        log: String,
    },
    /// The guest did not say that it is ready.
    #[error("guest {guest} did not answer on COM2 within {} s: is the agent in its initrd? A slow one can be given more with ready_seconds in the fleet file; its console{log}", limit.as_secs())]
    Silent {
        /// Its name.
        guest: String,
        /// How long it had.
        limit: Duration,
        /// The end of its console, as a clause.
        log: String,
    },
    /// The guest did not finish a command.
    #[error("guest {guest} said nothing for {} s after `{command}`", limit.as_secs())]
    Stuck {
        /// Its name.
        guest: String,
        /// The command.
        command: String,
        /// How long it was silent.
        limit: Duration,
    },
    /// The guest did not finish in time what takes many commands.
    #[error("guest {guest} did not get through `{command}` within {} s; it may be busy: try again", limit.as_secs())]
    Slow {
        /// Its name.
        guest: String,
        /// The command, sent again and again.
        command: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The guest cannot answer.
    #[error("guest {guest} is paused; resume it first")]
    Paused {
        /// Its name.
        guest: String,
    },
    /// The guest refused a command.
    #[error("guest {guest} refused `{command}`: {answer}")]
    Refused {
        /// Its name.
        guest: String,
        /// The command.
        command: String,
        /// What it said.
        answer: String,
    },
    /// A VM's control socket answered with an error.
    #[error("the VM of guest {guest} refused: {refusal}")]
    Control {
        /// Its name.
        guest: String,
        /// Which error, and what it said.
        refusal: machine::control::Refusal,
    },
    /// An answer to another question than was asked.
    #[error("{peer} answered something else: {answer}")]
    Unexpected {
        /// Its name.
        peer: String,
        /// What.
        answer: String,
    },
    /// A socket failed.
    #[error("{peer}: its socket failed")]
    Socket {
        /// Whose.
        peer: String,
        /// Why.
        #[source]
        source: LineError,
    },
    /// A process that is there does not answer.
    #[error("{peer} does not answer: its process is stopped, or waits for a disk or a server")]
    Unanswered {
        /// Whose.
        peer: String,
    },
    /// The fleet's daemon is gone.
    #[error(
        "fleet {fleet:?} has no daemon; its guests may still run: `samepage fleet up` with its file takes them over, `samepage fleet down --name {fleet}` ends them"
    )]
    NoDaemon {
        /// The fleet.
        fleet: String,
    },
    /// The daemon said so.
    #[error("the fleet's daemon says: {0}")]
    Daemon(super::refusal::Refusal),
    /// The host's check of a guest's pages could not be made.
    #[error("the pages of guest {guest} could not be checked")]
    Check {
        /// Its name.
        guest: String,
        /// Why.
        #[source]
        source: CheckError,
    },
    /// Measuring failed.
    #[error("measuring the fleet failed")]
    Measure(#[from] MeasureError),
    /// The merging engine failed.
    #[error("merging failed")]
    Engine(#[from] EngineError),
    /// The host's swap could not be taken up.
    #[error("the scenario fills the host's swap, which is not possible")]
    FillSwap(#[source] PageOutError),
    /// Another client has the fleet for longer than a client is kept waiting.
    #[error(
        "fleet {fleet} is busy: its guests are being filled, verified or measured; `samepage top` and `samepage fleet metrics` answer meanwhile"
    )]
    Busy {
        /// Which.
        fleet: String,
    },
    /// A guest that no image can be made of.
    #[error("guest {guest} cannot be captured: {why}")]
    NotCaptured {
        /// Which.
        guest: String,
        /// Why.
        why: &'static str,
    },
    /// What a guest gave of itself could not be kept.
    #[error("guest {guest} was not captured, and runs on: what it gives could not be kept")]
    Keeper {
        /// Which.
        guest: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No name for a snapshot or a clone.
    #[error("that cannot be called so")]
    ImageName {
        /// Why.
        #[source]
        source: SpecError,
    },
    /// The name is taken.
    #[error(
        "there is a snapshot called {name:?}: give this one another name, or `samepage snapshot rm {name}` first"
    )]
    ImageTaken {
        /// The name.
        name: String,
    },
    /// The name is a guest's.
    #[error(
        "there is a guest called {name:?}: give the snapshot another name, so that it is clear what is cloned"
    )]
    ImageOfGuest {
        /// The name.
        name: String,
    },
    /// There are too many.
    #[error("the fleet has {most} snapshots, the most there may be: `samepage snapshot rm` one first")]
    TooManyImages {
        /// How many.
        most: usize,
    },
    /// No such snapshot.
    #[error("fleet {fleet:?} has no snapshot {name:?}; it has: {known}")]
    NoImage {
        /// Which was meant.
        name: String,
        /// Where.
        fleet: String,
        /// Which there are.
        known: String,
    },
    /// The number of clones is out of range.
    #[error("{asked} clones are not possible: expected 1 to {room}; a fleet has at most {most} guests")]
    CloneCount {
        /// How many were asked for.
        asked: usize,
        /// How many there may be.
        room: usize,
        /// How many guests a fleet has at most.
        most: usize,
    },
    /// Not all of the clones are admitted, so none is.
    #[error(
        "{asked} clones are not admitted, {fit} would be: {refusal}; [overcommit] of the fleet file sets the rule"
    )]
    ClonesNotAdmitted {
        /// How many were asked for.
        asked: usize,
        /// How many would be admitted.
        fit: usize,
        /// Why the next would not.
        refusal: Box<Refusal>,
    },
    /// What is on the disk.
    #[error(transparent)]
    Checkpoint(#[from] super::checkpoints::CheckpointError),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl HostError {
    /// `fleet`, whose guests are `known`, has no `guest`.
    pub(crate) fn no_guest(guest: &str, fleet: &str, known: impl IntoIterator<Item: AsRef<str>>) -> Self {
        let known: Vec<_> = known.into_iter().collect();
        let known = known.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
        Self::NoGuest { guest: guest.into(), fleet: fleet.into(), known }
    }

    /// A socket of `peer` failed. That nothing came in time means that `peer` is silent.
    pub(crate) fn socket(peer: String, source: impl Into<LineError>) -> Self {
        match source.into() {
            LineError::Late | LineError::NotYet => Self::Unanswered { peer },
            source => Self::Socket { peer, source },
        }
    }

    /// The VM of `guest` answered another question than it was asked.
    pub fn unexpected_of_vm(guest: &str, answer: &machine::control::Reply) -> Self {
        Self::unexpected(format!("the VM of guest {guest}"), answer)
    }

    /// `peer` answered another question than was asked.
    pub fn unexpected(peer: String, answer: &dyn fmt::Debug) -> Self {
        Self::Unexpected { peer, answer: format!("{answer:?}").chars().take(UNEXPECTED_CHARS).collect() }
    }

    /// Whether a VM refused for this reason. One of a build that names no reasons may have had it, too.
    pub(crate) fn is_refusal(&self, kind: machine::control::ErrorKind) -> bool {
        use machine::control::ErrorKind::Unsaid;
        matches!(self, Self::Control { refusal, .. } if [kind, Unsaid].contains(&refusal.kind))
    }
}

impl From<&HostError> for ErrorKind {
    fn from(error: &HostError) -> Self {
        match error {
            HostError::Busy { .. } => Self::Busy,
            HostError::Interrupted => Self::Interrupted,
            HostError::NoGuest { .. } => Self::NoSuchGuest,
            HostError::Paused { .. } => Self::GuestPaused,
            HostError::Ended { .. } => Self::GuestEnded,
            HostError::Silent { .. }
            | HostError::Stuck { .. }
            | HostError::Slow { .. }
            | HostError::Unanswered { .. } => Self::GuestSilent,
            HostError::Refused { .. } | HostError::Control { .. } | HostError::Unexpected { .. } => {
                Self::GuestRefused
            }
            HostError::NotCaptured { .. } | HostError::Keeper { .. } => Self::NotCaptured,
            HostError::ImageName { .. }
            | HostError::ImageTaken { .. }
            | HostError::ImageOfGuest { .. }
            | HostError::TooManyImages { .. }
            | HostError::NoImage { .. } => Self::Snapshot,
            HostError::Checkpoint(_) => Self::Checkpoint,
            HostError::CloneCount { .. }
            | HostError::ClonesNotAdmitted { .. }
            | HostError::CloneNet { .. } => Self::NotCloned,
            HostError::Socket { .. } => Self::GuestUnreachable,
            HostError::Check { .. } | HostError::Measure(_) | HostError::Pagemap(_) => Self::Measuring,
            HostError::Engine(_) => Self::Merging,
            HostError::SpecRead { .. }
            | HostError::Spec { .. }
            | HostError::Runtime { .. }
            | HostError::PathLength { .. }
            | HostError::Preflight { .. }
            | HostError::NotAdmitted { .. }
            | HostError::Admission(_)
            | HostError::Reading(_)
            | HostError::Capacity(_)
            | HostError::MetricsTaken { .. }
            | HostError::Metrics { .. }
            | HostError::UpAlready { .. }
            | HostError::Held { .. }
            | HostError::Claim { .. }
            | HostError::ClaimOfOther { .. }
            | HostError::Differs { .. }
            | HostError::Untrusted { .. }
            | HostError::DaemonStays { .. }
            | HostError::NotUp { .. }
            | HostError::WhichFleet { .. }
            | HostError::Spawn { .. }
            | HostError::Pool { .. }
            | HostError::NoDaemon { .. }
            | HostError::Daemon(_)
            | HostError::FillSwap(_) => Self::Host,
        }
    }
}
