//! The API's objects, with the names and units of Firecracker's. Unknown keys are refused.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use devices::rate_limiter::Limits;
use devices::virtio::net::Mac;
use serde::{Deserialize, Serialize};

use super::keys::{self, or_default};
use crate::Interface;
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};

/// The least memory of a guest, in MiB.
pub const MIN_MEM_MIB: u64 = MIN_RAM_BYTES >> 20;
/// The most.
pub const MAX_MEM_MIB: u64 = MAX_RAM_BYTES >> 20;
/// The `kernel_image_path` of Samepage's own guest.
pub const BUILT_IN: &str = "builtin";

/// `/boot-source`: what the VM starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// A kernel's file, or [`BUILT_IN`].
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk's file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// What RAM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 4 KiB pages, or what the host chooses by itself.
    #[default]
    None,
    /// Huge pages where the host has them.
    Transparent,
    /// 2 MiB pages of the host's pool.
    #[serde(rename = "2M")]
    Pool2M,
}

/// `/machine-config`: how large the VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// vCPUs.
    pub vcpu_count: u8,
    /// RAM in MiB.
    pub mem_size_mib: u64,
    /// Two threads a core; Samepage's guests have one, which a single vCPU does not see.
    #[serde(default, deserialize_with = "or_default")]
    pub smt: bool,
    /// Log which pages the guest writes; not yet.
    #[serde(default, deserialize_with = "or_default")]
    pub track_dirty_pages: bool,
    /// What RAM is made of.
    #[serde(default, deserialize_with = "or_default")]
    pub huge_pages: HugePages,
    /// What the guest's CPUID is cut down to: nothing.
    #[serde(default, deserialize_with = "keys::cpu_template", skip_serializing)]
    pub cpu_template: Option<()>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
        }
    }
}

/// `PATCH /machine-config`: what is to be different.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    pub vcpu_count: Option<u8>,
    pub mem_size_mib: Option<u64>,
    pub smt: Option<bool>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
    #[serde(default, deserialize_with = "keys::cpu_template")]
    pub cpu_template: Option<()>,
}

impl MachineConfigPatch {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// `config` with what is to be different.
    pub fn apply(&self, config: MachineConfig) -> MachineConfig {
        MachineConfig {
            vcpu_count: self.vcpu_count.unwrap_or(config.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(config.mem_size_mib),
            smt: self.smt.unwrap_or(config.smt),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(config.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(config.huge_pages),
            cpu_template: None,
        }
    }
}

/// `/drives/{drive_id}`: a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name: letters, digits and underscores.
    pub drive_id: String,
    /// A raw image.
    pub path_on_host: PathBuf,
    /// Whether it is the kernel's `root=`. That drive is the first.
    pub is_root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default, deserialize_with = "or_default")]
    pub is_read_only: bool,
    /// The partition that is the root file system, if this is the root device; the whole drive
    /// otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Whether the guest's flushes reach the disk. They always do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_type: Option<CacheType>,
    /// How the file is read and written.
    #[serde(default, deserialize_with = "keys::io_engine", skip_serializing)]
    pub io_engine: (),
    /// How much the guest may read and write.
    #[serde(default, deserialize_with = "keys::rate_limiter", skip_serializing)]
    pub rate_limiter: (),
    /// A process that serves it.
    #[serde(default, deserialize_with = "keys::socket", skip_serializing)]
    pub socket: (),
}

/// `PATCH /drives/{drive_id}`: what is to be different of a disk that a VM has.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    pub drive_id: String,
    /// The image to be read and written from now on. The guest learns its size.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// How much the guest may read and write.
    #[serde(default, deserialize_with = "keys::rate_limiter")]
    pub rate_limiter: (),
}

/// `/pmem/{id}`: a file as memory beside RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Its name: letters, digits and underscores.
    pub id: String,
    /// A raw image.
    pub path_on_host: PathBuf,
    /// Whether it is the kernel's `root=`.
    #[serde(default, deserialize_with = "or_default")]
    pub root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default, deserialize_with = "or_default")]
    pub read_only: bool,
    /// How often the guest may flush it.
    #[serde(default, deserialize_with = "keys::rate_limiter", skip_serializing)]
    pub rate_limiter: (),
}

impl Pmem {
    /// What the VM has that it describes.
    pub(super) fn pmem(&self) -> crate::Pmem {
        crate::Pmem { id: self.id.clone(), path: self.path_on_host.clone(), read_only: self.read_only }
    }
}

/// `PATCH /pmem/{id}`: what is to be different: nothing can be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    pub id: String,
    #[serde(default, deserialize_with = "keys::rate_limiter")]
    pub rate_limiter: (),
}

/// `/network-interfaces/{iface_id}`: a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name: letters, digits and underscores.
    pub iface_id: String,
    /// A TAP, taken when the VM starts.
    pub host_dev_name: String,
    /// Its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<Mac>,
    /// The longest packet that the guest may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How much may be sent to the guest.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Limits::is_none")]
    pub rx_rate_limiter: Limits,
    /// How much the guest may send.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Limits::is_none")]
    pub tx_rate_limiter: Limits,
}

/// `PATCH /network-interfaces/{iface_id}`: other limits. A bucket that is not given stays as it is;
/// one of no size is removed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    pub iface_id: String,
    #[serde(default, deserialize_with = "or_default")]
    pub rx_rate_limiter: Limits,
    #[serde(default, deserialize_with = "or_default")]
    pub tx_rate_limiter: Limits,
}

impl NetworkInterfacePatch {
    /// Changes the description as the device is changed.
    pub fn apply(&self, interface: &mut NetworkInterface) {
        interface.rx_rate_limiter.apply(self.rx_rate_limiter);
        interface.tx_rate_limiter.apply(self.tx_rate_limiter);
    }
}

/// `/mmds/config`: the metadata service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// How the guest has to ask.
    #[serde(default, deserialize_with = "or_default")]
    pub version: mmds::Version,
    /// The interfaces that it is on.
    pub network_interfaces: Vec<String>,
    /// Where it is; a link-local address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answer as EC2's service does, whatever the guest accepts.
    #[serde(default, deserialize_with = "or_default")]
    pub imds_compat: bool,
}

impl MmdsConfig {
    pub(super) fn config(&self) -> mmds::Config {
        let address = self.ipv4_address.unwrap_or(mmds::ADDRESS);
        mmds::Config { version: self.version, address, imds_compat: self.imds_compat }
    }
}

/// `/entropy`: the limits of the entropy device, which every VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Limits::is_none")]
    pub rate_limiter: Limits,
}

/// `/serial`: where the console's output goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file, made if it is not there, or a FIFO; else it is the program's standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// How much may be written.
    #[serde(default, deserialize_with = "keys::serial_rate_limiter", skip_serializing)]
    pub rate_limiter: (),
}

/// `/cpu-config`: what is to differ from the processor that KVM offers: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    #[serde(default, deserialize_with = "keys::kvm_capabilities", skip_serializing)]
    pub kvm_capabilities: (),
    #[serde(default, deserialize_with = "keys::cpuid_modifiers", skip_serializing)]
    pub cpuid_modifiers: (),
    #[serde(default, deserialize_with = "keys::msr_modifiers", skip_serializing)]
    pub msr_modifiers: (),
}

impl NetworkInterface {
    /// The interface of the VM that it describes.
    pub(super) fn interface(&self) -> Interface {
        let tap = Some(self.host_dev_name.clone());
        Interface {
            tap,
            bridge: None,
            mac: self.guest_mac,
            mtu: self.mtu,
            rx_rate_limiter: self.rx_rate_limiter,
            tx_rate_limiter: self.tx_rate_limiter,
        }
    }
}

/// `/vsock`: sockets between guest and host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's number.
    pub guest_cid: u32,
    /// Where the host's socket is made when the VM starts.
    pub uds_path: PathBuf,
    /// A name of no use, which old callers give.
    #[serde(default, skip_serializing)]
    pub vsock_id: Option<String>,
}

impl Vsock {
    /// The sockets of the VM that it describes.
    pub(super) fn sockets(&self) -> crate::Vsock {
        crate::Vsock { cid: self.guest_cid, path: self.uds_path.clone() }
    }
}

/// Whether a guest's flushes have to reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// They need not.
    Unsafe,
    /// They have to.
    Writeback,
}

/// `/metrics`: where metrics go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file, made if it is not there, or a FIFO.
    pub metrics_path: PathBuf,
    /// Whether samples have the VM's name. They always have.
    #[serde(default, deserialize_with = "or_default", skip_serializing)]
    pub emit_id: bool,
    /// What else samples are to have.
    #[serde(default, deserialize_with = "keys::properties", skip_serializing)]
    pub properties: (),
}

impl Metrics {
    /// To this file.
    pub fn to(metrics_path: PathBuf) -> Self {
        Self { metrics_path, emit_id: false, properties: () }
    }
}

/// `/logger`: where the program's own messages go. What is not given stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file, made if it is not there, or a FIFO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// What is worth a line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether lines have their level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether lines say where in the source they come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines of this module and those below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// The least that is worth a line. Names in any case; `Warn` is `Warning`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub enum LogLevel {
    /// Nothing is.
    Off,
    /// What went wrong.
    Error,
    /// What may be wrong.
    Warning,
    /// What was done.
    Info,
    /// How.
    Debug,
    /// And in which steps.
    Trace,
}

/// What there is instead of a level that there is not.
#[derive(Debug, thiserror::Error)]
#[error("unknown level {0:?}: expected Off, Error, Warning, Info, Debug or Trace")]
pub struct UnknownLevel(String);

impl TryFrom<String> for LogLevel {
    type Error = UnknownLevel;

    fn try_from(text: String) -> Result<Self, UnknownLevel> {
        text.parse()
    }
}

impl std::str::FromStr for LogLevel {
    type Err = UnknownLevel;

    fn from_str(text: &str) -> Result<Self, UnknownLevel> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warning,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return Err(UnknownLevel(text.to_owned())),
        })
    }
}

/// What `/actions` can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum ActionType {
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
}

/// `/actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// What a VM is to be by `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum VmState {
    Paused,
    Resumed,
}

/// `/vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// What it is to be.
    pub state: VmState,
}

/// `/balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// The target in MiB.
    pub amount_mib: u32,
    /// Let the guest take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0 for none.
    #[serde(default, deserialize_with = "or_default")]
    pub stats_polling_interval_s: u16,
    /// Offer free page hinting.
    #[serde(default, deserialize_with = "or_default")]
    pub free_page_hinting: bool,
    /// Offer free page reporting.
    #[serde(default, deserialize_with = "or_default")]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// The new target in MiB.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatisticsPatch {
    /// As in [`Balloon`].
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// Tell the guest that the run is done as soon as it has reported everything: yes, if nothing
    /// is said.
    #[serde(default)]
    pub acknowledge_on_stop: Option<bool>,
}

/// Everything a VM is to be, as `GET /vm/config` shows it and as a config file has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Spec {
    pub machine_config: MachineConfig,
    pub boot_source: Option<BootSource>,
    /// The root device first.
    pub drives: Vec<Drive>,
    pub pmem: Vec<Pmem>,
    pub network_interfaces: Vec<NetworkInterface>,
    pub vsock: Option<Vsock>,
    pub balloon: Option<Balloon>,
    pub mmds_config: Option<MmdsConfig>,
    pub entropy: Option<Entropy>,
    pub serial: Option<Serial>,
    pub logger: Option<Logger>,
    pub metrics: Option<Metrics>,
}
