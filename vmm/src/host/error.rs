//! What can go wrong with a fleet.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::spec::MetricsAddress;
use crate::measure::MeasureError;
use crate::memory::page_out::PageOutError;
use crate::merge::EngineError;
use crate::overcommit::admission::{AdmissionError, Refusal};
use crate::overcommit::readings::ReadingError;

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
        source: super::spec::SpecError,
    },
    /// A scenario file is not one.
    #[error("the scenario {path} is wrong", path = path.display())]
    Scenario {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: super::stress::scenario::ScenarioError,
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
    /// A socket's path is longer than the kernel takes.
    #[error("the socket path {path} is too long: a Unix socket takes at most 107 bytes; set SAMEPAGE_RUNTIME_DIR to a shorter directory", path = path.display())]
    PathLength {
        /// The path.
        path: PathBuf,
    },
    /// A guest is not let in.
    #[error("guest {guest} is not let in: {refusal}; [overcommit] of the fleet file sets the rule")]
    NotAdmitted {
        /// Who.
        guest: String,
        /// By what.
        refusal: Box<Refusal>,
    },
    /// The rule for letting guests in makes no sense here.
    #[error("guests cannot be let in")]
    Admission(#[from] AdmissionError),
    /// What the host has could not be told, or is not enough.
    #[error("what the fleet may use cannot be told")]
    Reading(#[from] ReadingError),
    /// Somebody else listens where metrics are to be served.
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
    /// The fleet is up already.
    #[error(
        "fleet {fleet:?} is up already: `samepage fleet status --name {fleet}` shows it, `samepage fleet down --name {fleet}` ends it"
    )]
    UpAlready {
        /// Its name.
        fleet: String,
    },
    /// No such guest.
    #[error("fleet {fleet:?} has no guest {guest:?}; it has: {known}")]
    NoGuest {
        /// Who was meant.
        guest: String,
        /// Where.
        fleet: String,
        /// Who is there.
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
    /// A VM process ended before it was told to.
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
        /// What it was told.
        command: String,
        /// How long it was silent.
        limit: Duration,
    },
    /// The guest did not finish in time what takes many commands.
    #[error("guest {guest} did not get through `{command}` within {} s; it may be busy: try again", limit.as_secs())]
    Slow {
        /// Its name.
        guest: String,
        /// What it was told, again and again.
        command: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The guest cannot answer.
    #[error("guest {guest} stands still and cannot be asked; resume it first")]
    StandsStill {
        /// Its name.
        guest: String,
    },
    /// The guest refused a command.
    #[error("guest {guest} refused `{command}`: {answer}")]
    Refused {
        /// Its name.
        guest: String,
        /// What it was told.
        command: String,
        /// What it said.
        answer: String,
    },
    /// A VM's control socket answered with an error.
    #[error("the VM of guest {guest} refused: {answer}")]
    Control {
        /// Its name.
        guest: String,
        /// What it said.
        answer: String,
    },
    /// A socket failed.
    #[error("{who}: its socket failed")]
    Socket {
        /// Whose.
        who: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The fleet's daemon is gone.
    #[error(
        "the daemon of fleet {fleet:?} is gone; its guests may still run: `samepage fleet up` with its file takes them over, `samepage fleet down --name {fleet}` ends them"
    )]
    NoDaemon {
        /// The fleet.
        fleet: String,
    },
    /// The daemon said so.
    #[error("the fleet's daemon says: {0}")]
    Daemon(String),
    /// The host's check of a guest's pages could not be made.
    #[error("the pages of guest {guest} could not be checked")]
    Check {
        /// Its name.
        guest: String,
        /// Why.
        #[source]
        source: super::check::CheckError,
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
    /// Somebody else has the fleet for longer than a client is kept waiting.
    #[error(
        "fleet {fleet} is busy: its guests are being filled, verified or measured; `samepage top` and `samepage fleet metrics` answer meanwhile"
    )]
    Busy {
        /// Which.
        fleet: String,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}
