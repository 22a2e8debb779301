//! The disks of a guest in a fleet file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{GuestSpec, SpecError, resolve};
use machine::{Drive, MAX_DRIVES};

/// A disk of a guest: `/dev/vda` is the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "{ path = \"disk.img\" }, with read_only = true for one that the guest only reads"
)]
pub struct DriveSpec {
    /// A raw image.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// That it is raw, whatever its first bytes are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DriveFormat>,
}

/// What a disk's file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// Sectors, one after the other.
    Raw,
}

/// The drives of `guest` as a file in `dir` gives them.
pub(super) fn of(guest: &str, drives: &[DriveSpec], dir: &Path) -> Result<Vec<Drive>, SpecError> {
    if drives.len() > MAX_DRIVES {
        return Err(SpecError::Drives { guest: guest.into(), asked: drives.len() });
    }
    let drive = |(number, drive): (usize, &DriveSpec)| Drive {
        id: Drive::id(number),
        path: resolve(&drive.path, dir),
        read_only: drive.read_only,
        is_raw: drive.format.is_some(),
    };
    Ok(drives.iter().enumerate().map(drive).collect())
}

/// A drive that a guest may write cannot be shared.
pub(super) fn check_owners(guests: &[GuestSpec]) -> Result<(), SpecError> {
    let mut users: BTreeMap<&Path, (&str, bool)> = BTreeMap::new();
    for guest in guests {
        for drive in &guest.vm.drives {
            let earlier = users.insert(&drive.path, (&guest.name, drive.read_only));
            if let Some((first, read_only)) = earlier
                && !(read_only && drive.read_only)
            {
                let (first, second) = (first.to_owned(), guest.name.clone());
                return Err(SpecError::DriveOwners { path: drive.path.clone(), first, second });
            }
        }
    }
    Ok(())
}
