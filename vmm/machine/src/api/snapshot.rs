//! `/snapshot/create` and `/snapshot/load`: the objects, and between them and what the VM understands.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::fault::Fault;
use super::keys::or_default;
use super::model::{Balloon, BootSource, Drive, HugePages, MachineConfig, Spec};
use crate::snapshot::create::Kind;
use crate::snapshot::load::{How, MemorySource, StateFile};
use crate::state::setup::{BalloonV1, BootV1, DriveV1, HugePagesV1, SetupV1};

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Which pages the memory file has.
    #[serde(default, deserialize_with = "or_default")]
    pub snapshot_type: SnapshotType,
    /// Where the state goes.
    pub snapshot_path: PathBuf,
    /// Where the memory goes.
    pub mem_file_path: PathBuf,
}

/// Which pages a memory file has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SnapshotType {
    /// All.
    #[default]
    Full,
    /// Those written since the last one.
    Diff,
}

impl SnapshotType {
    pub fn kind(self) -> Kind {
        match self {
            Self::Full => Kind::Full,
            Self::Diff => Kind::Diff,
        }
    }
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// Where the state is.
    pub snapshot_path: PathBuf,
    /// Where the memory is; or
    #[serde(default)]
    pub mem_backend: Option<MemBackend>,
    /// its file.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Log which pages are written from now on.
    #[serde(default, deserialize_with = "or_default")]
    pub track_dirty_pages: bool,
    /// The same, by its old name.
    #[serde(default, deserialize_with = "or_default")]
    pub enable_diff_snapshots: bool,
    /// Let it run at once.
    #[serde(default, deserialize_with = "or_default")]
    pub resume_vm: bool,
    /// Set its clock by the time of day.
    #[serde(default, deserialize_with = "or_default")]
    pub clock_realtime: bool,
    /// Other TAP devices for its network interfaces, of which it has none.
    #[serde(default, deserialize_with = "or_default")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket for its vsock device, which it has not.
    #[serde(default)]
    pub vsock_override: Option<Value>,
    /// What RAM is made of.
    #[serde(default, deserialize_with = "or_default")]
    pub huge_pages: LoadHugePages,
}

/// Where memory is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    pub backend_type: BackendType,
    /// A file, or a socket.
    pub backend_path: PathBuf,
}

/// What that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum BackendType {
    /// A memory file.
    File,
    /// A process that fills memory by userfaultfd.
    Uffd,
}

/// Another TAP device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: String,
}

/// What RAM is made of after a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum LoadHugePages {
    /// The same as before.
    #[default]
    Snapshot,
    None,
    Transparent,
    #[serde(rename = "2M")]
    Pool2M,
}

impl LoadSnapshot {
    /// Of these files; all else as by default.
    pub fn of_files(snapshot_path: PathBuf, memory: PathBuf, resume_vm: bool) -> Self {
        Self {
            snapshot_path,
            mem_backend: Some(MemBackend { backend_type: BackendType::File, backend_path: memory }),
            mem_file_path: None,
            track_dirty_pages: false,
            enable_diff_snapshots: false,
            resume_vm,
            clock_realtime: false,
            network_overrides: Vec::new(),
            vsock_override: None,
            huge_pages: LoadHugePages::Snapshot,
        }
    }

    /// Where the memory is, which is said once.
    pub fn memory(&self) -> Result<MemorySource, Fault> {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(_), Some(_)) => Err(Fault::TwoMemories),
            (None, None) => Err(Fault::NoMemory),
            (None, Some(path)) => Ok(MemorySource::File(path.clone())),
            (Some(MemBackend { backend_type, backend_path }), None) => Ok(match backend_type {
                BackendType::File => MemorySource::File(backend_path.clone()),
                BackendType::Uffd => MemorySource::Handler(backend_path.clone()),
            }),
        }
    }

    pub fn how(&self) -> How {
        How { resume: self.resume_vm, clock_realtime: self.clock_realtime }
    }

    /// What is asked of devices that there are none of.
    pub fn check_overrides(&self) -> Result<(), Fault> {
        if let Some(first) = self.network_overrides.first() {
            return Err(Fault::NoInterface { id: first.iface_id.clone() });
        }
        self.vsock_override.as_ref().map_or(Ok(()), |_| Err(Fault::NoVsock))
    }
}

/// How the VM of `spec` is built again.
pub fn setup(spec: &Spec) -> SetupV1 {
    let machine = spec.machine_config;
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let drive = |drive: &Drive| DriveV1 {
        id: drive.drive_id.clone(),
        path: bytes(&drive.path_on_host),
        read_only: drive.is_read_only,
        is_raw: false,
        is_root: drive.is_root_device,
        partuuid: drive.partuuid.clone(),
        // Of the file that is open.
        file: Default::default(),
    };
    SetupV1 {
        huge_pages: match machine.huge_pages {
            HugePages::None => HugePagesV1::None,
            HugePages::Transparent => HugePagesV1::Transparent,
            HugePages::Pool2M => HugePagesV1::Pool2M,
        },
        smt: machine.smt,
        boot: spec.boot_source.as_ref().map(|source| BootV1 {
            kernel: bytes(&source.kernel_image_path),
            initrd: source.initrd_path.as_deref().map(bytes),
            args: source.boot_args.clone(),
        }),
        drives: spec.drives.iter().map(drive).collect(),
        balloon: spec.balloon.map(|balloon| BalloonV1 {
            deflate_on_oom: balloon.deflate_on_oom,
            hinting: balloon.free_page_hinting,
            reporting: balloon.free_page_reporting,
            stats_polling_interval_s: balloon.stats_polling_interval_s,
        }),
        ..SetupV1::default()
    }
}

/// What a VM is that goes on from `file`. `before` has what may be said before a load.
pub fn spec(file: &StateFile, load: &LoadSnapshot, before: &Spec) -> Spec {
    let setup = file.setup();
    let path = |bytes: &Vec<u8>| PathBuf::from(OsStr::from_bytes(bytes));
    let saved = match setup.huge_pages {
        HugePagesV1::None => HugePages::None,
        HugePagesV1::Transparent => HugePages::Transparent,
        HugePagesV1::Pool2M => HugePages::Pool2M,
    };
    Spec {
        machine_config: MachineConfig {
            vcpu_count: file.vcpus(),
            mem_size_mib: file.memory_bytes() >> 20,
            smt: setup.smt,
            track_dirty_pages: load.track_dirty_pages || load.enable_diff_snapshots,
            huge_pages: match load.huge_pages {
                LoadHugePages::Snapshot => saved,
                LoadHugePages::None => HugePages::None,
                LoadHugePages::Transparent => HugePages::Transparent,
                LoadHugePages::Pool2M => HugePages::Pool2M,
            },
            cpu_template: None,
        },
        boot_source: setup.boot.as_ref().map(|boot| BootSource {
            kernel_image_path: path(&boot.kernel),
            initrd_path: boot.initrd.as_ref().map(path),
            boot_args: boot.args.clone(),
        }),
        drives: setup
            .drives
            .iter()
            .map(|drive| Drive {
                drive_id: drive.id.clone(),
                path_on_host: path(&drive.path),
                is_root_device: drive.is_root,
                is_read_only: drive.read_only,
                partuuid: drive.partuuid.clone(),
                cache_type: None,
                io_engine: (),
                rate_limiter: (),
                socket: (),
            })
            .collect(),
        balloon: setup.balloon.map(|balloon| Balloon {
            // It is what the device says.
            amount_mib: 0,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_polling_interval_s: balloon.stats_polling_interval_s,
            free_page_hinting: balloon.hinting,
            free_page_reporting: balloon.reporting,
        }),
        logger: before.logger.clone(),
        metrics: before.metrics.clone(),
    }
}
