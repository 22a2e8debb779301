//! One VM: what it is made of, in the order it is built, and the loop it runs in.
//!
//! This is the only place that names KVM. It never knows that there is a fleet.

mod acpi;
pub mod api;
pub mod balloon;
mod boot;
mod build;
mod channel;
pub mod cmdline;
mod console;
pub mod control;
mod cpuid;
mod dirty;
mod drive;
mod error;
mod events;
mod exit;
mod feed;
mod guest_end;
mod last_words;
mod listener;
mod machine;
mod pacer;
mod patient;
mod platform;
pub mod probe;
mod registers;
mod run;
mod run_page;
mod running;
mod shut_down;
mod slice;
mod slots;
pub mod stats;
mod sweep;
mod terminal;
pub mod throttle;
mod timer;
mod vcpu;
pub mod working_set;

pub use boot::{KernelSource, Unpack, check_cmdline};
pub use build::Vm;
pub use console::Console;
pub use dirty::DirtyLog;
pub use drive::{Drive, DriveError, MAX_DRIVES};
pub use error::{MAX_VCPUS, VmError};
pub use events::EventLoop;
pub use exit::{Ending, FaultReport, PANICKED};
pub use listener::Listener;
pub use run::run;
pub use running::{Running, chain};
pub use timer::Timer;

use std::path::PathBuf;

use devices::legacy::{pm1, power};
use devices::virtio::balloon as device;

use memory::ram::Backing;

const _: () = assert!(power::POWER_BASE + power::POWER_LEN <= platform::IDLE_PORT as u64);
const _: () = assert!(platform::IDLE_PORT as u64 + 4 <= pm1::PM1_BASE);

/// The command line a Linux guest gets unless told otherwise.
pub const LINUX_CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// What a VM is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its name, for people.
    pub name: String,
    /// What it starts.
    pub kernel: KernelSource,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What RAM is made of.
    pub backing: Backing,
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Where COM1 goes.
    pub console: Console,
    /// Where the control socket is made.
    pub control: Option<PathBuf>,
    /// Where COM2's socket is made.
    pub com2: Option<PathBuf>,
    /// Make the sockets again when their files are removed.
    pub keep_sockets: bool,
    /// Let the host kernel's samepage merging have the RAM from the start.
    pub mergeable: bool,
    /// Its disks, at most [`MAX_DRIVES`].
    pub drives: Vec<Drive>,
    /// Its balloon.
    pub balloon: Option<device::Config>,
    /// Ask for (or forbid) huge pages; None leaves it to the host.
    pub huge_pages: Option<bool>,
    /// How its working set is sampled, if it is.
    pub sampling: Option<working_set::Sampling>,
    /// End the VM when standard input ends; then it is no console input.
    pub lifeline: bool,
}

#[cfg(test)]
mod tests {
    use super::LINUX_CMDLINE;

    #[test]
    fn the_documents_have_the_default_command_line() {
        let quoted = format!("`{LINUX_CMDLINE}`");
        for document in
            [include_str!("../../../README.md"), include_str!("../../../resources/docs/guests.md")]
        {
            assert!(document.contains(&quoted), "{quoted} is not in {:?}...", &document[..40]);
        }
    }
}
