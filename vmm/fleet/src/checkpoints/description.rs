//! What a checkpoint says of itself: the guest that it is of.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use guest::protocol::{Command, Fill, Ready, Reply};
use machine::capture::Captured;
use machine::{MAX_DRIVES, MAX_INTERFACES, MAX_VCPUS, VmConfig};
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use memory::ram::Backing;
use serde::{Deserialize, Serialize};
use store::{Name, Reading};

use super::CheckpointError;
use crate::images::Image;
use crate::spec::{GuestSpec, check_name};

/// What this build writes. One that is not known is not guessed at.
const VERSION: u32 = 1;

/// What a checkpoint is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    version: u32,
    /// The build that wrote it.
    pub samepage: String,
    /// When, in seconds since 1970.
    pub saved_at: u64,
    /// The guest.
    pub guest: GuestSpec,
    /// What was taken, and how long that took.
    pub captured: Captured,
    /// The fleet that is to go on from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended: Option<String>,
    /// It came from elsewhere: then it names no files of this host.
    #[serde(default)]
    imported: bool,
    drives: Vec<DriveIdentity>,
    ready: Option<String>,
    fill: Option<String>,
}

/// Which file a drive was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveIdentity {
    path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
}

impl DriveIdentity {
    fn of(path: PathBuf) -> io::Result<Self> {
        let found = path.metadata()?;
        Ok(Self { path, device: found.dev(), inode: found.ino(), bytes: found.len() })
    }
}

impl Description {
    /// Of an image that is saved now.
    pub(super) fn of(name: &str, image: &Image, suspended: Option<String>) -> Result<Self, CheckpointError> {
        let identity = |path: &PathBuf| {
            DriveIdentity::of(path.clone()).map_err(|source| CheckpointError::Drive {
                name: name.into(),
                path: path.clone(),
                why: source.to_string(),
            })
        };
        let drives = image.spec.vm.drives.iter().map(|drive| identity(&drive.path));
        let saved_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        Ok(Self {
            version: VERSION,
            samepage: env!("CARGO_PKG_VERSION").into(),
            saved_at,
            guest: image.spec.clone(),
            captured: image.captured,
            suspended,
            imported: false,
            drives: drives.collect::<Result<_, _>>()?,
            ready: image.ready.map(|ready| Reply::Ready(ready).to_string()),
            fill: image.fill.map(|fill| Command::Fill(fill).to_string()),
        })
    }

    /// That of the checkpoint `name`, checked as far as it can be without a VM.
    pub fn read(reading: &Reading<'_>, name: &Name) -> Result<Self, CheckpointError> {
        Self::parse(name.as_str(), &reading.meta(name)?)
    }

    /// From bytes that are not trusted.
    pub(super) fn parse(name: &str, bytes: &[u8]) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct Form {
            version: u32,
        }
        let wrong = |why: String| CheckpointError::Description { name: name.into(), why };
        // First, for another form may have other keys.
        let form: Form = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if form.version != VERSION {
            let found = form.version;
            return Err(wrong(format!(
                "it is of version {found}, and this build of samepage reads {VERSION}"
            )));
        }
        let read: Self = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        let GuestSpec { name: guest, domain, vm, .. } = &read.guest;
        for name in [guest, domain] {
            check_name(name).map_err(|error| wrong(error.to_string()))?;
        }
        let is_possible = (MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&vm.memory_bytes)
            && (1..=MAX_VCPUS).contains(&vm.cpus)
            && vm.drives.len() <= MAX_DRIVES
            && vm.net.len() <= MAX_INTERFACES
            && vm.drives.iter().all(|drive| drive.read_only && drive.overlay.is_none());
        match is_possible {
            true => Ok(read),
            false => Err(wrong(
                "its guest has memory, vCPUs, drives or interfaces that no checkpoint can have".into(),
            )),
        }
    }

    /// The same, of a checkpoint that comes from elsewhere to `domain`, or to the one that it says: what it says of files of another host means
    /// nothing here. The domain, and what it says from now on.
    pub fn imported(
        name: &str,
        bytes: &[u8],
        domain: Option<&str>,
    ) -> Result<(String, Vec<u8>), CheckpointError> {
        let mut read = Self::parse(name, bytes)?;
        if let Some(domain) = domain {
            read.guest.domain = domain.into();
        }
        let vm = &read.guest.vm;
        if !vm.drives.is_empty() || !vm.net.is_empty() || vm.vsock.is_some() {
            let why = "it comes from elsewhere, and its guest has drives, network interfaces or sockets of that host".into();
            return Err(CheckpointError::Unfit { name: name.into(), why });
        }
        let imported = Self { imported: true, suspended: None, ..read };
        Ok((imported.guest.domain.clone(), imported.encode(name)?))
    }

    /// The guest that goes on from it. Of what a VM can be told, that alone is taken over which a guest has; and each drive is the file that
    /// it was.
    pub(super) fn guest(&self, name: &str) -> Result<GuestSpec, CheckpointError> {
        for drive in &self.drives {
            let differs = |why| CheckpointError::Drive { name: name.into(), path: drive.path.clone(), why };
            let now = DriveIdentity::of(drive.path.clone()).map_err(|error| differs(error.to_string()))?;
            if now != *drive {
                return Err(differs(format!(
                    "it was inode {} of {} bytes, and is inode {} of {}",
                    drive.inode, drive.bytes, now.inode, now.bytes
                )));
            }
        }
        let vm = &self.guest.vm;
        let named: Vec<_> = vm.drives.iter().map(|drive| &drive.path).collect();
        if named != self.drives.iter().map(|drive| &drive.path).collect::<Vec<_>>() {
            let why = "it does not say of each drive which file it was".into();
            return Err(CheckpointError::Unfit { name: name.into(), why });
        }
        let vm = VmConfig {
            name: vm.name.clone(),
            kernel: vm.kernel.clone(),
            unpack: vm.unpack,
            initrd: vm.initrd.clone(),
            cmdline: vm.cmdline.clone(),
            memory_bytes: vm.memory_bytes,
            backing: Backing::Anonymous,
            cpus: vm.cpus,
            drives: vm.drives.clone(),
            net: vm.net.clone(),
            vsock: vm.vsock.clone(),
            entropy: vm.entropy,
            balloon: vm.balloon,
            huge_pages: vm.huge_pages,
            ..VmConfig::default()
        };
        Ok(GuestSpec { vm, ..self.guest.clone() })
    }

    /// What the guest said when it was ready.
    pub(super) fn ready(&self) -> Option<Ready> {
        match Reply::parse(self.ready.as_deref()?) {
            Ok(Reply::Ready(ready)) => Some(ready),
            _ => None,
        }
    }

    /// What it was filled with.
    pub(super) fn fill(&self) -> Option<Fill> {
        match Command::parse(self.fill.as_deref()?) {
            Ok(Command::Fill(fill)) => Some(fill),
            _ => None,
        }
    }

    /// As bytes.
    pub(super) fn encode(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        serde_json::to_vec(self)
            .map_err(|error| CheckpointError::Description { name: name.into(), why: error.to_string() })
    }
}
