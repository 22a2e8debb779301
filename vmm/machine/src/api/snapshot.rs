//! `/snapshot/create` and `/snapshot/load`: the objects, and between them and what the VM understands.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use devices::rate_limiter::Limits;
use devices::virtio::net::Mac;
use mmds::Version;
use serde::Deserialize;

use super::fault::Fault;
use super::keys::or_default;
use super::model::{
    Balloon, BootSource, Drive, HugePages, MachineConfig, MmdsConfig, NetworkInterface, Spec, Vsock,
};
use crate::snapshot::create::Kind;
use crate::snapshot::load::{How, MemorySource, StateFile};
use crate::state::setup::{
    BalloonV1, BootV1, DriveV1, HugePagesV1, InterfaceV1, MmdsV1, Setup, SetupV1, VsockV1,
};

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
    /// Other TAP devices for its network interfaces.
    #[serde(default, deserialize_with = "or_default")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket for its vsock device.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
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

/// Another socket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    pub uds_path: PathBuf,
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

    /// Puts other TAPs and another socket in the place of those that `spec` had.
    pub fn apply_overrides(&self, spec: &mut Spec) -> Result<(), Fault> {
        for other in &self.network_overrides {
            let id = &other.iface_id;
            let interface = spec.network_interfaces.iter_mut().find(|interface| interface.iface_id == *id);
            interface.ok_or_else(|| Fault::NoInterface { id: id.clone() })?.host_dev_name =
                other.host_dev_name.clone();
        }
        match (&self.vsock_override, &mut spec.vsock) {
            (None, _) => Ok(()),
            (Some(_), None) => Err(Fault::NoVsock),
            (Some(other), Some(vsock)) => {
                vsock.uds_path = other.uds_path.clone();
                Ok(())
            }
        }
    }
}

/// How the VM of `spec` is built again.
pub fn setup(spec: &Spec) -> Setup {
    let mmds = spec.mmds_config.as_ref().map(|config| MmdsV1 {
        is_v2: config.version == Version::V2,
        address: config.ipv4_address.map(|address| address.octets()),
        imds_compat: config.imds_compat,
        interfaces: config.network_interfaces.clone(),
    });
    Setup { vm: built(spec), mmds }
}

fn built(spec: &Spec) -> SetupV1 {
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
    let interface = |interface: &NetworkInterface| InterfaceV1 {
        id: interface.iface_id.clone(),
        tap: interface.host_dev_name.clone(),
        mac: interface.guest_mac.map(|mac| mac.0),
        mtu: interface.mtu,
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
        interfaces: spec.network_interfaces.iter().map(interface).collect(),
        vsock: spec
            .vsock
            .as_ref()
            .map(|vsock| VsockV1 { cid: vsock.guest_cid, path: bytes(&vsock.uds_path) }),
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
        // A VM with any is not saved.
        pmem: Vec::new(),
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
        network_interfaces: setup
            .interfaces
            .iter()
            .map(|interface| NetworkInterface {
                iface_id: interface.id.clone(),
                host_dev_name: interface.tap.clone(),
                guest_mac: interface.mac.map(Mac),
                mtu: interface.mtu,
                rx_rate_limiter: Limits::default(),
                tx_rate_limiter: Limits::default(),
            })
            .collect(),
        vsock: setup.vsock.as_ref().map(|vsock| Vsock {
            guest_cid: vsock.cid,
            uds_path: path(&vsock.path),
            vsock_id: None,
        }),
        // It is what the devices say.
        entropy: None,
        mmds_config: file.mmds().map(|saved| MmdsConfig {
            version: if saved.is_v2 { Version::V2 } else { Version::V1 },
            network_interfaces: saved.interfaces.clone(),
            ipv4_address: saved.address.map(Into::into),
            imds_compat: saved.imds_compat,
        }),
        serial: None,
        logger: before.logger.clone(),
        metrics: before.metrics.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_taps_and_another_socket_are_taken() {
        let interface = |tap: &str| NetworkInterface {
            iface_id: "eth0".into(),
            host_dev_name: tap.into(),
            guest_mac: Some(Mac([2; 6])),
            mtu: None,
            rx_rate_limiter: Limits::default(),
            tx_rate_limiter: Limits::default(),
        };
        let vsock = |path: &str| Vsock { guest_cid: 3, uds_path: path.into(), vsock_id: None };
        let mut spec =
            Spec { network_interfaces: vec![interface("tap0")], vsock: Some(vsock("a")), ..Spec::default() };
        let text = r#"{"snapshot_path":"s","mem_file_path":"m","vsock_override":{"uds_path":"b"},
            "network_overrides":[{"iface_id":"eth0","host_dev_name":"tap1"}]}"#;
        let load: LoadSnapshot = serde_json::from_str(text).unwrap();
        load.apply_overrides(&mut spec).unwrap();
        assert_eq!(
            (&spec.network_interfaces[0], spec.vsock.as_ref()),
            (&interface("tap1"), Some(&vsock("b")))
        );
        let saved = setup(&spec).vm;
        assert_eq!((saved.interfaces[0].tap.as_str(), saved.vsock.unwrap().cid), ("tap1", 3));
        spec.vsock = None;
        assert!(matches!(load.apply_overrides(&mut spec), Err(Fault::NoVsock)));
        spec.network_interfaces.clear();
        assert!(matches!(load.apply_overrides(&mut spec), Err(Fault::NoInterface { id }) if id == "eth0"));
    }
}
