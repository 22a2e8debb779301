//! What a checkpoint says of itself: the guest that it is of.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use guest::protocol::{Command, Fill, Ready, Reply};
use machine::capture::Captured;
use machine::{MAX_DRIVES, MAX_INTERFACES, MAX_PMEM, MAX_VCPUS, VmConfig};
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
        let identity = |path: &Path| {
            DriveIdentity::of(path.into()).map_err(|source| CheckpointError::Drive {
                name: name.into(),
                path: path.into(),
                why: source.to_string(),
            })
        };
        let drives = image.spec.vm.images().map(|(path, _)| identity(path));
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
            && vm.pmem.len() <= MAX_PMEM
            && vm.pmem.iter().all(|pmem| pmem.read_only)
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
            check_name(domain).map_err(|error| CheckpointError::Description {
                name: name.into(),
                why: error.to_string(),
            })?;
            read.guest.domain = domain.into();
        }
        let vm = &read.guest.vm;
        if vm.images().next().is_some() || !vm.net.is_empty() || vm.vsock.is_some() {
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
        let named: Vec<_> = vm.images().map(|(path, _)| path).collect();
        if named != self.drives.iter().map(|drive| drive.path.as_path()).collect::<Vec<_>>() {
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
            pmem: vm.pmem.clone(),
            net: vm.net.clone(),
            vsock: vm.vsock.clone(),
            entropy: vm.entropy,
            balloon: vm.balloon,
            huge_pages: vm.huge_pages,
            numa: vm.numa,
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

#[cfg(test)]
mod tests {
    use machine::{Console, Drive, ImageFds, Pmem};
    use proptest::prelude::*;

    use super::*;

    fn described(vm: VmConfig) -> Description {
        Description {
            version: VERSION,
            samepage: "0".into(),
            saved_at: 7,
            guest: GuestSpec::new("web".into(), "webs".into(), vm),
            captured: Captured::default(),
            suspended: Some("webs".into()),
            imported: false,
            drives: Vec::new(),
            ready: None,
            fill: None,
        }
    }

    fn refused(description: &Description) -> String {
        Description::parse("c", &description.encode("c").unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn what_it_says_comes_back() {
        let description = described(VmConfig::default());
        let bytes = description.encode("c").unwrap();
        assert_eq!(Description::parse("c", &bytes).unwrap(), description);
        assert_eq!(description.guest("c").unwrap(), description.guest);
    }

    #[test]
    fn what_no_checkpoint_can_have_is_refused() {
        let drive = |read_only| Drive { path: "/d".into(), read_only, ..Drive::default() };
        for vm in [
            VmConfig { memory_bytes: 4096, ..VmConfig::default() },
            VmConfig { memory_bytes: u64::MAX, ..VmConfig::default() },
            VmConfig { cpus: 0, ..VmConfig::default() },
            VmConfig { drives: vec![drive(false)], ..VmConfig::default() },
            VmConfig { drives: vec![drive(true); MAX_DRIVES + 1], ..VmConfig::default() },
            VmConfig { pmem: vec![Pmem::default()], ..VmConfig::default() },
        ] {
            assert!(refused(&described(vm)).contains("no checkpoint can have"));
        }
        let named = |name: &str, domain: &str| {
            let guest = GuestSpec::new(name.into(), domain.into(), VmConfig::default());
            refused(&Description { guest, ..described(VmConfig::default()) })
        };
        assert!(named("../a", "d").contains("is no name") && named("a", "/d").contains("is no name"));
        let newer = Description { version: 2, ..described(VmConfig::default()) };
        assert!(refused(&newer).contains("of version 2"));
    }

    /// Paths of sockets and logs, and descriptors, are its daemon's to say.
    #[test]
    fn of_a_vm_s_configuration_only_what_a_guest_has_is_taken_over() {
        let vm = VmConfig {
            console: Console::File("/etc/passwd".into()),
            control: Some("/c".into()),
            com2: Some("/c2".into()),
            merge: Some("/m".into()),
            image: Some(ImageFds { state: 0, ..ImageFds::default() }),
            daemon: Some(1),
            has_api: true,
            oom_score_adj: Some(-1000),
            cpus: 2,
            ..VmConfig::default()
        };
        let bytes = described(vm).encode("c").unwrap();
        let guest = Description::parse("c", &bytes).unwrap().guest("c").unwrap();
        assert_eq!(guest.vm, VmConfig { name: "web".into(), cpus: 2, ..VmConfig::default() });
    }

    #[test]
    fn a_drive_must_be_the_file_that_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        std::fs::write(&path, [0; 512]).unwrap();
        let drives = vec![Drive { path: path.clone(), read_only: true, ..Drive::default() }];
        let plain = described(VmConfig { drives, ..VmConfig::default() });
        // One of which it is not said which file it was is not opened.
        assert!(plain.guest("c").unwrap_err().to_string().contains("which file it was"));
        let identity = DriveIdentity::of(path.clone()).unwrap();
        let whole = Description { drives: vec![identity], ..plain };
        assert_eq!(whole.guest("c").unwrap().vm.drives.len(), 1);
        assert!(
            Description::imported("c", &whole.encode("c").unwrap(), None).is_err(),
            "it is another host's"
        );
        std::fs::write(&path, [0; 1024]).unwrap();
        assert!(whole.guest("c").unwrap_err().to_string().contains("1024"));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(whole.guest("c"), Err(CheckpointError::Drive { .. })));
    }

    #[test]
    fn what_comes_from_elsewhere_is_of_the_domain_that_it_comes_to() {
        let bytes = described(VmConfig::default()).encode("c").unwrap();
        let (domain, same) = Description::imported("c", &bytes, None).unwrap();
        assert_eq!((domain.as_str(), Description::parse("c", &same).unwrap().suspended), ("webs", None));
        let (domain, other) = Description::imported("c", &bytes, Some("others")).unwrap();
        assert_eq!(domain, "others");
        assert_eq!(Description::parse("c", &other).unwrap().guest.domain, "others");
        assert!(Description::imported("c", &bytes, Some("a/b")).is_err());
    }

    proptest! {
        #[test]
        fn damaged_ones_are_refused_or_are_possible(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let whole = described(VmConfig::default()).encode("c").unwrap();
            let mut bytes = whole.clone();
            let at = at.index(whole.len());
            bytes[at] = byte;
            if let Ok(read) = Description::parse("c", &bytes) {
                prop_assert!(check_name(&read.guest.name).is_ok() && read.guest.vm.memory_bytes <= MAX_RAM_BYTES);
                let _ = read.guest("c");
            }
            prop_assert!(Description::parse("c", &whole[..cut.index(whole.len())]).is_err());
        }
    }
}
