//! The guests and the limits, the same for all contenders.

use std::path::PathBuf;
use std::time::Duration;

use fleet::spec::{AdmissionName, FillSpec, FleetSpec, GuestSpec, Overcommit};
use machine::VmConfig;
use merge::slab::engine::Tuning;

use lab::contender::Contender;

/// How long a Linux guest may take to start.
const LINUX_READY_SECONDS: u32 = 900;

/// The setting of all contenders.
#[derive(Clone, Debug)]
pub struct Setting {
    pub guests: u16,
    /// RAM of each, in bytes.
    pub memory_bytes: u64,
    /// A Linux kernel and its initrd; None is the built-in guest.
    pub linux: Option<(PathBuf, PathBuf)>,
    /// How long each window is in which processor time is counted.
    pub window: Duration,
    /// How long merging may take.
    pub limit: Duration,
    /// Ends the course once merging has got there.
    pub merging_only: bool,
}

impl Setting {
    /// The fleet that `contender` gets.
    #[must_use]
    pub fn fleet(&self, contender: Contender) -> FleetSpec {
        let vm = VmConfig {
            memory_bytes: self.memory_bytes,
            kernel: self.linux.as_ref().map(|(kernel, _)| kernel.clone()),
            initrd: self.linux.as_ref().map(|(_, initrd)| initrd.clone()),
            ..VmConfig::default()
        };
        let guest = |n| GuestSpec {
            // In the lab all of them share one emulated processor.
            ready_seconds: self.linux.is_some().then_some(LINUX_READY_SECONDS),
            fill: Some(FillSpec { zero: 0, common: 50, duplicate: 0, unique: 50, pages: None }),
            ..GuestSpec::new(format!("guest-{n}"), "bench".into(), vm.clone())
        };
        FleetSpec {
            name: format!("merge-bench-{}", std::process::id()),
            engine: contender.kind(),
            merge: Tuning::default(),
            overcommit: Overcommit { admission: AdmissionName::Off, ..Overcommit::default() },
            metrics: None,
            open: None,
            pool: 0,
            guests: (0..self.guests).map(guest).collect(),
        }
    }
}
