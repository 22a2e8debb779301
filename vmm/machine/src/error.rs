//! Why a VM could not be built or run.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::config::MAX_VCPUS;
use super::drive::DriveError;
use super::image_error::ImageStartError;
use super::interface::InterfaceError;
use super::listener::ListenerError;
use super::platform::CMDLINE_BYTES;
use super::pmem::PmemError;
use super::vsock::VsockError;
use image::vmlinux::KernelError;
use memory::numa::NumaError;
use memory::ram::RamError;

/// What can go wrong before a guest runs, or with the host under it.
#[derive(Debug, Error)]
pub enum VmError {
    /// There is no KVM here.
    #[error(
        "/dev/kvm is not there: this machine offers no virtualization, or the kvm module is not loaded \
         (`modprobe kvm_intel` or `kvm_amd`); `samepage doctor` says more, and `tests/lab -- samepage ...` runs \
         it under emulation"
    )]
    NoKvm,
    /// KVM is there but closed to this user.
    #[error(
        "/dev/kvm may not be opened by this user: join the group that owns it (`ls -l /dev/kvm`), or run as root"
    )]
    KvmPermission,
    /// A KVM call failed.
    #[error("KVM did not {what}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The vCPU count is out of range.
    #[error("{asked} vCPUs are not possible: expected 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        asked: u8,
    },
    /// Its process cannot be confined.
    #[error("the VM's process cannot be confined")]
    Jail(#[from] jail::JailError),
    /// It was started by a daemon that is not there any more.
    #[error("the daemon {daemon} is gone")]
    DaemonGone {
        /// Its process.
        daemon: i32,
    },
    /// Its process is not to have this standing with the out-of-memory killer.
    #[error(transparent)]
    Numa(#[from] NumaError),
    #[error(
        "cannot set this process's oom_score_adj to {score}: lower than it is now takes root (CAP_SYS_RESOURCE)"
    )]
    OomScore {
        /// What was asked for.
        score: i16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Guest RAM could not be set up.
    #[error("guest RAM could not be set up")]
    Ram(#[from] RamError),
    /// The kernel file cannot be used.
    #[error("the kernel cannot be used")]
    Kernel(#[from] KernelError),
    /// The loader refused the kernel.
    #[error("the kernel could not be loaded")]
    Load(#[source] linux_loader::loader::Error),
    /// The kernel is larger than the guest's memory.
    #[error(
        "the kernel does not fit: it reaches up to {} MiB of guest memory and this guest has {} MiB there; \
         give it more with --memory",
        end.div_ceil(1 << 20), ram >> 20
    )]
    KernelFit {
        /// First guest-physical address after the kernel.
        end: u64,
        /// Bytes of low RAM.
        ram: u64,
    },
    /// The initrd cannot be read.
    #[error("the initrd {path} cannot be read", path = path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An initrd without a Linux kernel to use it.
    #[error("an initrd needs a kernel: the built-in guest has no use for one; add --kernel FILE")]
    InitrdWithoutKernel,
    /// The initrd leaves no room.
    #[error(
        "the initrd {path} does not fit: it has {} MiB and {} MiB of guest memory are left above the kernel; \
         give the guest more with --memory",
        bytes.div_ceil(1 << 20), room >> 20, path = path.display()
    )]
    InitrdFit {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// What is left for it.
        room: u64,
    },
    /// A drive cannot be used.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// Persistent memory cannot be had.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// A guest's sockets cannot be so.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A network interface cannot be had.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// The command line is too long.
    #[error("the kernel command line has {bytes} bytes: expected at most {}", CMDLINE_BYTES - 1)]
    CmdlineLength {
        /// Its length.
        bytes: usize,
    },
    /// The command line holds a byte no kernel reads.
    #[error("the kernel command line holds a zero byte")]
    CmdlineZero,
    /// Boot data could not be written to guest memory.
    #[error("boot data could not be written to guest memory")]
    BootData(#[source] vm_memory::GuestMemoryError),
    /// The guest has no generation.
    #[error("the guest cannot be given a generation")]
    Generation(#[from] super::generation::GenerationError),
    /// The ACPI tables outgrew their room.
    #[error("the ACPI tables take {bytes} bytes and have room for {room}")]
    AcpiRoom {
        /// What they take.
        bytes: u64,
        /// What there is.
        room: u64,
    },
    /// Two devices want the same place.
    #[error("the devices do not fit together")]
    Bus(#[from] devices::bus::BusError),
    /// A socket could not be set up.
    #[error(transparent)]
    Socket(#[from] ListenerError),
    /// The console's file could not be opened.
    #[error("the console file {path} cannot be written", path = path.display())]
    ConsoleFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something of the host's failed under the VM.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is to go on from an image, and cannot.
    #[error(transparent)]
    Image(#[from] Box<ImageStartError>),
    /// The event loop failed.
    #[error("the event loop failed")]
    Events(#[from] event_manager::Error),
}

impl From<ImageStartError> for VmError {
    fn from(error: ImageStartError) -> Self {
        Self::Image(Box::new(error))
    }
}

impl VmError {
    /// Names the KVM call that failed.
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// Names what was being done with the host when it failed.
    pub(crate) fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Host { what, source: source.into() }
    }
}
