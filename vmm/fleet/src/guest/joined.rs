//! A guest whose VM another program started.

use std::path::PathBuf;

use super::{END_LIMIT, Guest, Running, vm};
use crate::HostError;
use crate::runtime::FleetDir;
use crate::spec::{EngineName, GuestSpec};
use os::Process;

impl Guest {
    /// A VM that another program started, and whose control socket is there.
    pub(crate) fn join(
        spec: GuestSpec,
        number: usize,
        dir: &FleetDir,
        vm: Process,
        control: PathBuf,
    ) -> Self {
        Self {
            spec,
            number,
            dir: dir.clone(),
            engine: EngineName::Slab,
            working_set_seconds: None,
            process: Running::Adopted(vm),
            joined: Some(control),
            com2: None,
            ready: None,
            fill: None,
            image: None,
            generation: None,
        }
    }

    /// Whether another program started it, and it came by itself.
    pub fn has_joined(&self) -> bool {
        self.joined.is_some()
    }

    pub(super) fn control_socket(&self) -> Result<PathBuf, HostError> {
        self.joined.clone().map_or_else(|| self.dir.control(&self.spec.name), Ok)
    }

    /// Is removed: its VM runs on, unmanaged.
    pub(super) fn leave(&mut self) {
        if self.ended().is_none() {
            // At the pace that was good for this fleet it need not stay.
            let lift = vm::Request::Throttle { pages_per_second: None };
            let _ = self.control_within(&lift, END_LIMIT);
        }
        self.process = Running::Ended("it left the fleet".into());
    }
}
