//! The disks of a guest in a fleet file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::SpecError;
use super::guest::GuestSpec;
use super::paths::numbered;
use machine::{Drive, MAX_DRIVES, Overlay};

/// A disk of a guest: `/dev/vda` is the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "{ path = \"disk.img\" }, with read_only = true for one that the guest only reads, or overlay = true for one that stays as it is"
)]
pub struct DriveSpec {
    /// A raw image or a block device; `{n}` in it is the guest's number.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// Where what the guest writes goes, if not to `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<OverlaySpec>,
    /// That it is raw, whatever its first bytes are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DriveFormat>,
}

/// Where what a guest writes goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "true, or the path of a file for what the guest writes")]
pub enum OverlaySpec {
    /// To a file that ends with the guest, or to the disk itself.
    Temporary(bool),
    /// To this file, which is made if it is not there; `{n}` in it is the guest's number.
    Kept(PathBuf),
}

/// What a disk's file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// Sectors, one after the other.
    Raw,
}

/// The drives of `guest`, which is number `n` of its `count`, as a file in `dir` gives them.
pub(super) fn of(guest: &str, n: usize, drives: &[DriveSpec], dir: &Path) -> Result<Vec<Drive>, SpecError> {
    if drives.len() > MAX_DRIVES {
        return Err(SpecError::Drives { guest: guest.into(), asked: drives.len() });
    }
    let drive = |(number, drive): (usize, &DriveSpec)| Drive {
        id: Drive::id(number),
        path: numbered(&drive.path, n, dir),
        read_only: drive.read_only,
        is_raw: drive.format.is_some(),
        overlay: match &drive.overlay {
            None | Some(OverlaySpec::Temporary(false)) => None,
            Some(OverlaySpec::Temporary(true)) => Some(Overlay::Temporary),
            Some(OverlaySpec::Kept(path)) => Some(Overlay::Kept(numbered(path, n, dir))),
        },
    };
    let drives: Vec<Drive> = drives.iter().enumerate().map(drive).collect();
    match drives.iter().find(|drive| drive.read_only && drive.overlay.is_some()) {
        Some(both) => Err(SpecError::ReadOnlyOverlay { guest: guest.into(), path: both.path.clone() }),
        None => Ok(drives),
    }
}

/// A drive that a guest may write cannot be shared.
pub(super) fn check_owners(guests: &[GuestSpec]) -> Result<(), SpecError> {
    let mut users: BTreeMap<&Path, (&str, bool)> = BTreeMap::new();
    for guest in guests {
        for (path, only_reads) in guest.vm.images() {
            let earlier = users.insert(path, (&guest.name, only_reads));
            if let Some((first, also_only_reads)) = earlier
                && !(only_reads && also_only_reads)
            {
                let (first, second) = (first.to_owned(), guest.name.clone());
                return Err(SpecError::DriveOwners { path: path.into(), first, second });
            }
        }
    }
    Ok(())
}
