//! What merges a fleet's guests.

use std::path::PathBuf;

use crate::HostError;
use crate::runtime::FleetDir;
use crate::spec::{EngineName, FleetSpec};
use merge::Engine;
use merge::ksm::{Ksm, KsmSettings};
use merge::off::Off;
use merge::slab::engine::SlabEngine;

/// Where the slab engine listens.
pub(super) fn merge_socket(spec: &FleetSpec, dir: &FleetDir) -> Result<PathBuf, HostError> {
    match spec.open.as_ref().and_then(|open| open.socket.clone()) {
        Some(socket) => Ok(socket),
        None => dir.merge_socket(),
    }
}

/// The engine that `spec` asks for.
pub(super) fn engine(spec: &FleetSpec, dir: &FleetDir) -> Result<Box<dyn Engine>, HostError> {
    Ok(match spec.engine {
        EngineName::Ksm => Box::new(Ksm::new(KsmSettings::fast())),
        EngineName::Slab => {
            let engine = SlabEngine::for_members(merge_socket(spec, dir)?, &spec.merge);
            Box::new(if spec.open.is_some() { engine.open_to_others() } else { engine })
        }
        EngineName::Off => Box::new(Off),
    })
}
