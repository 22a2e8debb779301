//! What the daemon is asked and what it answers: the JSON of its socket and of `fleet ... --json`.

use std::path::PathBuf;

use kernel_view::numa::NodePages;
use serde::{Deserialize, Serialize};
use store::Compression;

use super::checkpoints::{CheckpointInfo, Work};
use super::images::ImageInfo;
use super::management::Management;
use super::metrics::Format;
use super::pool::PoolStatus;
pub use super::refusal::{ErrorKind, Refusal};
use super::shutdown::{CutOff, DEFAULT_LIMIT, Left};
use super::spec::NetSpec;
use machine::balloon::BalloonStatus;
use machine::stats::Values;
use measure::audit::Audit;
use measure::content::Content;
use measure::frames::Pages;
use merge::slab::engine::Statistics;
use overcommit::ledger::Ledger;

/// What a client asks the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How the fleet is.
    Status {
        /// With KVM's own statistics of each guest.
        #[serde(default)]
        kvm: bool,
        /// With what could be shared: pauses the guests while every page is hashed and compared.
        #[serde(default)]
        content: bool,
        /// With an audit of the ledger: pauses the guests while every frame is counted by other means.
        #[serde(default)]
        audit: bool,
        /// Wait until merging brings nothing new, at most for these seconds.
        #[serde(default)]
        settle_seconds: Option<u64>,
    },
    /// Check every page, in the guests and from the host.
    Verify,
    /// How the fleet's memory is managed. Answered at once, whatever else goes on.
    Management,
    /// The same and more, for Prometheus. Answered at once too.
    Metrics {
        /// What they are written in.
        #[serde(default)]
        format: Format,
    },
    /// What the kernel of a guest uses its frames for.
    PageTypes {
        /// The guest's name.
        guest: String,
    },
    /// Capture a guest, and keep that under a name.
    Snapshot {
        /// The guest.
        guest: String,
        /// What it is to be called.
        name: String,
        /// On the disk, and not in memory.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disk: Option<OnDisk>,
    },
    /// The snapshots that are kept.
    Snapshots,
    /// Remove one.
    RemoveSnapshot {
        /// Its name.
        name: String,
    },
    /// Start guests that go on from where another one is, or was.
    Clone(Wanted),
    /// Start guests that go on from a checkpoint.
    Restore(Restore),
    /// What is being saved and read, and how far. Answered at once.
    Works,
    /// End all guests and the daemon. Asked again, it can only become shorter.
    Down {
        /// How long the guests may take to power off; 0: they are cut off at once.
        #[serde(default = "default_timeout", skip_serializing_if = "is_default_timeout")]
        timeout_seconds: u64,
        /// Save each guest before, so that the fleet goes on from there when it comes up again. If one cannot be, nothing ends.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        save: Option<OnDisk>,
    },
    /// How far the end has come. Answered at once.
    Ending,
}

/// What a user wants of clones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// A guest that runs, or a snapshot.
    pub of: String,
    /// How many.
    pub count: usize,
    /// How their names begin; else as the guest's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Their network interfaces, one for each of the guest's; else as the guest's are given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetSpec>,
}

/// Where a checkpoint is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnDisk {
    /// The directory with the stores of all domains.
    pub stores: PathBuf,
    /// How its pages are compressed.
    #[serde(default)]
    pub compress: Compression,
}

/// What a user wants of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// Its name.
    pub name: String,
    /// Its trust domain.
    pub domain: String,
    /// The directory with the stores of all domains.
    pub stores: PathBuf,
    /// How many guests go on from there.
    pub count: usize,
    /// How their names begin. Without, they are called as the guest was: one alone exactly so, if that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
}

fn default_timeout() -> u64 {
    DEFAULT_LIMIT.as_secs()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_default_timeout(seconds: &u64) -> bool {
    *seconds == default_timeout()
}

/// What came of a request for clones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cloned {
    /// Their names, in order.
    pub guests: Vec<String>,
    /// How long it took until all had answered, in seconds: without the capture, but with reading what is on the disk.
    pub seconds: f64,
    /// The image that they went on from.
    pub image: Option<ImageInfo>,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<FleetStatus>),
    /// To [`Request::Verify`].
    Verified(Verified),
    /// To [`Request::Management`].
    Management(Box<Management>),
    /// To [`Request::Metrics`]: text in the format asked for.
    Metrics(String),
    /// To [`Request::PageTypes`]: runs of frames from guest frame 0 on, as the guest protocol writes them.
    PageTypes(String),
    /// To [`Request::Snapshot`].
    Snapshot(Box<ImageInfo>),
    /// To [`Request::Snapshot`], on the disk.
    Checkpoint(Box<CheckpointInfo>),
    /// To [`Request::Works`].
    Works(Vec<Work>),
    /// To [`Request::Snapshots`].
    Snapshots(Vec<ImageInfo>),
    /// To [`Request::Clone`] and [`Request::Restore`].
    Cloned(Box<Cloned>),
    /// It was carried out.
    Done,
    /// To [`Request::Down`]: it is.
    Down {
        /// The guests that did not end in good order.
        cut_off: Vec<CutOff>,
        /// What of the host's settings was left otherwise than it was found.
        notes: Vec<String>,
    },
    /// To [`Request::Ending`].
    Ending(Left),
}

/// A reply, or why there is none.
pub type Answer = Result<Reply, Refusal>;

/// The result of checking every page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Pages that their guests checked.
    pub verified_pages: u64,
    /// Pages that were wrong, in the guests' or the host's eyes.
    pub mismatched_pages: u64,
    /// Guests that were not asked: they are paused, do not answer, or joined by themselves.
    #[serde(default)]
    pub skipped: Vec<String>,
}

/// A guest's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are paused.
    Paused,
    /// Its VM process does not answer; what it says of itself is from before.
    Silent,
    /// Its VM process is gone.
    Dead,
    /// Its kernel panicked. Its VM process is gone, or does nothing more.
    Panicked,
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Its name.
    pub name: String,
    /// Does it run?
    pub state: State,
    /// How it ended, if it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ended: Option<String>,
    /// For how long its VM process has not answered, in seconds, where that is long.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub silent_seconds: Option<f64>,
    /// Why its kernel panicked, if it has, as it said on its console, and its VM has not ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub panic: Option<String>,
    /// Its process.
    pub pid: Option<u32>,
    /// `builtin` or `linux`; None until it was ready.
    pub kind: Option<String>,
    /// vCPUs.
    pub cpus: u8,
    /// Its trust domain.
    pub domain: String,
    /// The guest or snapshot that it went on from; absent of one that booted.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub clone_of: Option<String>,
    /// The number by which it differs from other copies, as it said itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub generation: Option<u64>,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Its pages by class.
    pub pages: Pages,
    /// Its part of the frames: a frame shared by n counts 1/n.
    pub frames: f64,
    /// Its pages with a frame by NUMA node, where the host has several or its memory is placed.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub nodes: Vec<NodePages>,
    /// Its balloon.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub balloon: Option<BalloonStatus>,
    /// KVM's own statistics, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kvm: Option<Values>,
}

/// A fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FleetStatus {
    /// Its name.
    pub fleet: String,
    /// The daemon's process.
    pub pid: u32,
    /// The KVM the guests run on.
    pub backend: String,
    /// What merges.
    pub engine: String,
    /// Its guests.
    pub guests: Vec<GuestStatus>,
    /// Memory promised to all guests, in bytes.
    pub promised_bytes: u64,
    /// All guests' pages by class.
    pub pages: Pages,
    /// Frames they have together.
    pub frames: u64,
    /// What sharing saves: pages on shared frames less these frames. Zeros are apart: on the zero frame in `pages`, given back in `merge`.
    pub saved_pages: u64,
    /// Figures are estimates: this user may not see which frame a page is on.
    pub estimated: bool,
    /// The accounts: what is promised, owed, and what could pay.
    pub ledger: Ledger,
    /// How long the ledger took to read, in seconds.
    pub ledger_seconds: f64,
    /// The ledger, checked by other means, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub audit: Option<Audit>,
    /// What could be shared, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub content: Option<Content>,
    /// What the slab engine counts; absent with another one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub merge: Option<Statistics>,
    /// Processor time of the engine so far, where it can be seen.
    pub merge_cpu_seconds: Option<f64>,
    /// Complete passes of the engine.
    pub full_passes: u64,
    /// The processes that stand by for clones; absent of a fleet without a pool.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pool: Option<PoolStatus>,
    /// What a reader of the numbers should know.
    pub notes: Vec<String>,
}
