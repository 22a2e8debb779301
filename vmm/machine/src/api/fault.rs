//! Why a request was not carried out: what clients read as `fault_message`. Where Firecracker
//! refuses the same, the words are close to its own, for there are clients that look at them.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use devices::virtio::balloon::HintError;
use devices::virtio::net::Mac;
use mmds::StoreError;
use thiserror::Error;

use super::model::{BUILT_IN, MAX_MEM_MIB, MIN_MEM_MIB};
use crate::balloon::BalloonError;
use crate::snapshot::create::CreateError;
use crate::snapshot::load_error::LoadError;
use crate::{
    DriveError, InterfaceError, MAX_DRIVES, MAX_INTERFACES, MAX_PMEM, MAX_VCPUS, PmemError, VmError,
    VsockError,
};
use os::one_line;

/// Why a request was not carried out.
#[derive(Debug, Error)]
pub enum Fault {
    #[error("Invalid request method and/or path: {method} {path}.")]
    Route { method: String, path: String },
    #[error("{method} {path} is not supported by Samepage yet.")]
    NotYet { method: String, path: String },
    #[error("Empty {method} request.")]
    Empty { method: String },
    #[error("{method} request cannot have a body.")]
    Body { method: String },
    #[error("An error occurred when deserializing the json body of a request")]
    Json(#[from] serde_json::Error),
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    #[error(
        "Cannot start microvm without kernel configuration: PUT /boot-source first; kernel_image_path \
         \"{BUILT_IN}\" starts Samepage's own guest."
    )]
    NoBootSource,
    #[error("The microVM could not be started")]
    Start(#[source] VmError),
    #[error("The vCPU number is invalid: {asked}, expected 1 to {MAX_VCPUS}.")]
    Vcpus { asked: u8 },
    #[error("The memory size (MiB) is invalid: {asked}, expected {MIN_MEM_MIB} to {MAX_MEM_MIB}.")]
    Memory { asked: u64 },
    #[error("The memory size (MiB) is invalid: {asked} is not a multiple of the 2 MiB of its huge pages.")]
    HugeMemory { asked: u64 },
    #[error(
        "smt is not supported by Samepage yet with more than one vCPU: each is a core with one thread. Expected false."
    )]
    Smt,
    #[error("Create snapshot error")]
    Create(#[source] Box<CreateError>),
    #[error("Load snapshot error: Failed to restore from snapshot")]
    Load(#[source] Box<LoadError>),
    #[error("Load snapshot error: the microVM could not be started")]
    LoadStart(#[source] VmError),
    #[error("Loading a microVM snapshot not allowed after configuring boot-specific resources.")]
    LoadAfterConfiguring,
    #[error("too many fields: either `mem_backend` or `mem_file_path` exclusively is required.")]
    TwoMemories,
    #[error("missing field: either `mem_backend` or `mem_file_path` is required.")]
    NoMemory,
    #[error("network_overrides: this microVM has no network interface {id:?}.")]
    NoInterface { id: String },
    #[error("vsock_override: this microVM has no vsock device.")]
    NoVsock,
    #[error("The kernel file cannot be opened: {path}", path = path.display())]
    Kernel {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("The initrd file cannot be opened due to invalid path or invalid permissions: {path}", path = path.display())]
    Initrd {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Samepage's own guest (\"{BUILT_IN}\") takes no initrd_path.")]
    BuiltInInitrd,
    #[error("The id from the path [{in_path}] does not match the id from the body [{in_body}]!")]
    Ids { in_path: String, in_body: String },
    #[error("API Resource IDs can only contain alphanumeric characters and underscores: {id:?}.")]
    Id { id: String },
    #[error("A root block device already exists: {id:?}.")]
    SecondRoot { id: String },
    #[error("There are {MAX_DRIVES} drives already, the most that a VM of Samepage's has.")]
    Drives,
    #[error("Unable to create the block device")]
    Drive(#[source] DriveError),
    #[error("There are {MAX_PMEM} files as memory already, the most that a VM of Samepage's has.")]
    Pmems,
    #[error("Unable to create the pmem device")]
    Pmem(#[source] PmemError),
    #[error("There is no pmem device {id:?}.")]
    NoSuchPmem { id: String },
    #[error("A microVM with pmem devices is not saved by Samepage yet.")]
    PmemSnapshot,
    #[error("There are {MAX_INTERFACES} network interfaces already, the most that a VM of Samepage's has.")]
    Interfaces,
    #[error("Could not create the network device")]
    Interface(#[source] InterfaceError),
    #[error("Cannot create the vsock device")]
    Vsock(#[source] VsockError),
    #[error(transparent)]
    Mmds(#[from] StoreError),
    #[error("The network interfaces list provided is empty.")]
    MmdsNowhere,
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface: {id:?}."
    )]
    MmdsInterface { id: String },
    #[error(
        "The MMDS IPv4 address is not link local: {address}, expected one of 169.254.1.0 to 169.254.254.255."
    )]
    MmdsAddress { address: Ipv4Addr },
    #[error("There is no network interface {id:?}.")]
    NoSuchInterface { id: String },
    #[error("The file for the serial console's output cannot be opened: {path}", path = path.display())]
    SerialFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("The MAC address is already in use: {mac}, by {id:?}.")]
    Mac { mac: Mac, id: String },
    #[error("The TAP is already in use: {tap}, by {id:?}.")]
    Tap { tap: String, id: String },
    #[error("The partuuid {partuuid:?} is not one: expected letters, digits and hyphens, or null.")]
    Partuuid { partuuid: String },
    #[error("The log file cannot be opened: {path}", path = path.display())]
    LogFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("The metrics file cannot be opened: {path}", path = path.display())]
    MetricsFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Reinitialization of metrics not allowed.")]
    MetricsAgain,
    #[error("There is no metrics file: PUT /metrics before starting the microVM.")]
    NoMetrics,
    #[error("The metrics could not be written")]
    MetricsWrite(#[source] io::Error),
    #[error(
        "SendCtrlAltDel presses the power button, for there is no keyboard; and the guest has no driver for it yet (in Linux, the module button)."
    )]
    CtrlAltDel,
    #[error("A vCPU did not leave the guest in time, or a drive did not answer; the microVM runs on.")]
    Pause,
    #[error("No balloon device found: PUT /balloon before starting the microVM.")]
    NoBalloon,
    #[error("The balloon's target of {amount_mib} MiB is more than the guest's memory, {mem_size_mib} MiB.")]
    BalloonSize { amount_mib: u64, mem_size_mib: u64 },
    #[error(
        "Balloon statistics are disabled: set stats_polling_interval_s to at least 1 before starting the microVM."
    )]
    NoStatistics,
    #[error("Balloon statistics cannot be enabled or disabled after starting the microVM.")]
    StatisticsSwitch,
    #[error("The timer of balloon statistics could not be set")]
    Timer(#[source] io::Error),
    #[error(
        "Free page hinting is not enabled: PUT /balloon with free_page_hinting before starting the microVM."
    )]
    NoHinting,
    #[error(transparent)]
    Hinting(#[from] HintError),
    #[error(transparent)]
    Balloon(#[from] BalloonError),
}

impl Fault {
    /// The fault and its causes, on one line.
    pub fn message(&self) -> String {
        one_line(self)
    }
}
