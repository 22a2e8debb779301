//! The VM that a command is about.

use std::path::{Path, PathBuf};

use super::HostError;
use super::living::choose;
use super::runtime::FleetDir;
use super::vm_handle::VmHandle;

/// A VM with a control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name, for people.
    pub guest: String,
    /// The fleet that it is of; None of a VM that was found by its socket.
    pub fleet: Option<String>,
    pub(super) socket: PathBuf,
}

impl Target {
    /// The guest called `guest` of a fleet; or, with a `/` in it, the VM whose control socket that
    /// is.
    pub fn find(guest: &str, fleet: Option<String>) -> Result<Self, HostError> {
        let path = Path::new(guest);
        if guest.contains('/') {
            return Ok(Self { guest: guest.into(), fleet: None, socket: path.into() });
        }
        let fleet = choose(fleet)?;
        let dir = FleetDir::of(&fleet);
        let socket = dir.control(guest)?;
        let sockets = dir.control_sockets();
        if sockets.contains(&socket) {
            return Ok(Self { guest: guest.into(), fleet: Some(fleet), socket });
        }
        let mut known: Vec<_> =
            sockets.iter().filter_map(|socket| Some(socket.file_stem()?.to_string_lossy())).collect();
        known.sort();
        Err(HostError::no_guest(guest, &fleet, known))
    }

    /// Its control socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The guest of this handle.
    pub fn of(handle: &VmHandle) -> Self {
        Self { guest: handle.guest.clone(), fleet: None, socket: handle.socket.clone() }
    }
}
