//! What a VM's configuration says about the process that it is in.

use std::path::PathBuf;

use jail::Files;
use memory::own;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use super::config::VmConfig;
use super::error::VmError;
use memory::numa::Placement;
use os::signals;

impl VmConfig {
    /// Does what it says about this process. To be called early, in the process's first thread.
    pub fn prepare_process(&self) -> Result<(), VmError> {
        if let Some(daemon) = self.daemon {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(VmError::host("watch the daemon"))?;
            // It may have ended before.
            if getppid().map(Pid::as_raw_pid) != Some(daemon) {
                return Err(VmError::DaemonGone { daemon });
            }
            // It outlives its daemon, also while it is stopped.
            signals::ignore_hang_up();
        }
        // Before anything is mapped and any thread started.
        self.numa.map_or(Ok(()), Placement::apply)?;
        if let Some(score) = self.oom_score_adj {
            own::set_oom_score_adj(score).map_err(|source| VmError::OomScore { score, source })?;
        }
        Ok(jail::prepare(&self.name, self.seccomp)?)
    }

    /// Files that its process opens while it runs.
    pub(super) fn files(&self) -> Files {
        if self.has_api {
            return Files::Named;
        }
        let sockets =
            [&self.control, &self.com2].into_iter().flatten().chain(self.vsock.iter().map(|v| &v.path));
        let directory = |path: &PathBuf| match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => ".".into(),
        };
        Files::Sockets(sockets.map(directory).collect())
    }

    /// The VM runs: from now on there is a socket through which the next daemon finds it.
    pub(super) fn outlive_daemon(&self) {
        if self.daemon.is_some() {
            let _ = set_parent_process_death_signal(None);
        }
    }
}
