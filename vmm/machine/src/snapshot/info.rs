//! What is in a state file, for people and programs.

use std::path::Path;

use serde::Serialize;

use super::load::read;
use super::load_error::LoadError;
use crate::state::container;
pub use crate::state::container::FORMAT as STATE_FORMAT;
use crate::state::saved::{VmState, kind_name};

/// A section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionInfo {
    /// What is in it.
    pub kind: &'static str,
    /// In which form.
    pub version: u32,
    /// Its length.
    pub bytes: u64,
    /// Its BLAKE3 digest, which it has.
    pub digest: String,
}

/// A state file whose digests are right and whose sections can be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StateInfo {
    /// The form of the file itself.
    pub format: u32,
    /// The version of Samepage that wrote it.
    pub samepage: String,
    /// `full` or `diff`.
    pub memory_file: &'static str,
    /// When it was written, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// The KVM that it is of.
    pub backend: String,
    pub memory_bytes: u64,
    pub vcpus: u8,
    pub track_dirty_pages: bool,
    /// Virtio devices: their numbers in the virtio standard.
    pub virtio: Vec<u32>,
    pub drives: Vec<DriveInfo>,
    /// In the order of the file.
    pub sections: Vec<SectionInfo>,
}

/// A drive, and the file that it is expected to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DriveInfo {
    pub id: String,
    pub path: String,
    pub read_only: bool,
    pub bytes: u64,
    pub device: u64,
    pub inode: u64,
}

/// Reads the state file at `path`. Whether a VM can go on from it here is not looked at.
pub fn of_file(path: &Path) -> Result<StateInfo, LoadError> {
    let bytes = read(path)?;
    let wrong = |source| LoadError::State { path: path.into(), source };
    let sections = container::read(&bytes).map_err(wrong)?;
    let state = VmState::decode(&bytes).map_err(wrong)?;
    let Some(setup) = state.setup() else { return Err(LoadError::Image { path: path.into() }) };
    let drive = |drive: &crate::state::setup::DriveV1| DriveInfo {
        id: drive.id.clone(),
        path: String::from_utf8_lossy(&drive.path).into_owned(),
        read_only: drive.read_only,
        bytes: drive.file.bytes,
        device: drive.file.device,
        inode: drive.file.inode,
    };
    Ok(StateInfo {
        format: STATE_FORMAT,
        samepage: setup.samepage.clone(),
        memory_file: if setup.is_diff { "diff" } else { "full" },
        realtime_ns: setup.realtime_ns,
        backend: state.machine.backend.clone(),
        memory_bytes: state.machine.memory_bytes,
        vcpus: state.machine.vcpus,
        track_dirty_pages: setup.track_dirty_pages,
        virtio: state.devices.virtio.iter().map(|device| device.device_id).collect(),
        drives: setup.drives.iter().map(drive).collect(),
        sections: sections
            .iter()
            .map(|section| SectionInfo {
                kind: kind_name(section.kind),
                version: section.version,
                bytes: section.bytes().len() as u64,
                digest: blake3::hash(section.bytes()).to_hex().to_string(),
            })
            .collect(),
    })
}
