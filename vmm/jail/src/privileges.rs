//! Rights that a process has by its user, given up.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};

use super::JailError;

/// From now on no program that this process starts has more rights than it has.
pub(super) fn gain_none() -> Result<(), JailError> {
    set_no_new_privs(true).map_err(|e| JailError::NoNewPrivileges(e.into()))
}

/// Gives the calling thread's capabilities up. Others keep theirs: each gives up its own.
pub(super) fn drop_capabilities() -> Result<(), JailError> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(|e| JailError::Capabilities(io::Error::from(e)))
}
