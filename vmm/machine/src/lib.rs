//! One VM: what it is made of, in the order in which it is built, and the loop it runs in.
//!
//! This is the only place that names KVM. It must not know that there is a fleet, a daemon or an engine: what others do to a
//! VM they do through [`control`], [`api`] or [`Running`]. Whatever its guest does, it does not panic; every loop over
//! what a guest gave is bounded.
//!
//! Begin with [`Vm`] in `build.rs` (the order matters, and is explained there), then `vcpu.rs` (threads and exits), `events.rs`
//! (the loop), `machine.rs` (which devices are where). `resources/docs/internals/vm.md` has the same in words.

mod acpi;
pub mod api;
pub mod balloon;
mod board;
mod boot;
mod build;
pub mod capture;
mod channel;
pub mod cmdline;
mod coalesced;
mod config;
mod console;
pub mod control;
mod cpuid;
mod create;
mod dirty;
mod drive;
mod error;
mod events;
mod exit;
mod feed;
mod generation;
mod guest_end;
pub mod handover;
mod image_error;
mod interface;
mod last_words;
mod listener;
mod machine;
mod merging;
mod own_process;
mod pacer;
pub mod paging;
mod patient;
mod platform;
mod pmem;
pub mod probe;
mod queues;
mod registers;
mod restore;
mod run;
mod run_page;
mod running;
mod serial_ports;
mod shut_down;
mod slice;
mod slots;
pub mod snapshot;
pub mod standby;
pub mod state;
pub mod stats;
mod status;
mod sweep;
mod terminal;
pub mod throttle;
mod timer;
mod tracking;
mod trouble;
mod vcpu;
mod virtio;
mod vsock;
pub mod walk;
pub mod working_set;

pub use boot::check_cmdline;
pub use build::Vm;
pub use config::{Console, DiskFds, ImageFds, LINUX_CMDLINE, MAX_VCPUS, MEMORY_BYTES, VmConfig};
pub use dirty::DirtyLog;
pub use drive::{Drive, DriveError, MAX_DRIVES, Overlay};
pub use error::VmError;
pub use events::EventLoop;
pub use exit::{Ending, FaultReport, PANICKED};
pub use image::vmlinux::Unpack;
pub use image_error::ImageStartError;
pub use interface::{AUTO, Interface, InterfaceError, MAX_INTERFACES, Mmds};
pub use listener::Listener;
pub use mmds::SIZE_LIMIT as MMDS_SIZE_LIMIT;
pub use pmem::{MAX_PMEM, Pmem, PmemError};
pub use run::run;
pub use running::Running;
pub use state::container::ContainerError;
pub use state::saved::image_runs;
pub use timer::Timer;
pub use vsock::{Vsock, VsockError};

use devices::legacy::{pm1, power};

const _: () = assert!(power::POWER_BASE + power::POWER_LEN <= platform::IDLE_PORT as u64);
const _: () = assert!(platform::IDLE_PORT as u64 + 4 <= pm1::PM1_BASE);
