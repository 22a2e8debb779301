//! How a VM takes part in Samepage's own merging: the agent in its process, started by a fleet or
//! not.

use std::path::PathBuf;

use memory::ram::Ram;
use merge::slab::agent::{Agent, FoundSlabs};

use super::config::VmConfig;
use super::dirty::DirtyLog;

/// The agent of a VM whose vCPUs do not run yet.
pub(super) struct Merging {
    agent: Agent,
    socket: PathBuf,
    name: String,
}

impl Merging {
    /// For RAM with everything in it that the VM starts from, which is shared here and now if the
    /// matchmaker is there. None if the VM is not to be merged; if it cannot be, it runs all the
    /// same, and says so.
    pub(super) fn prepare(config: &VmConfig, ram: &Ram, found: FoundSlabs) -> Option<Self> {
        let socket = config.merge.clone()?;
        let agent = Agent::new(ram, found).inspect_err(|error| not_merged(&config.name, error));
        let mut agent = agent.ok()?;
        agent.share_at_birth(&socket);
        Some(Self { agent, socket, name: config.name.clone() })
    }

    /// From now on the guest writes, and `log` says what.
    pub(super) fn start(self, log: DirtyLog) {
        let Self { agent, socket, name } = self;
        if let Err(error) = agent.start(Box::new(log), socket, || jail::enter(jail::Thread::Merge)) {
            not_merged(&name, &error);
        }
    }
}

fn not_merged(name: &str, error: &std::io::Error) {
    tracing::warn!("{name}: its pages are not merged: {error}");
}
