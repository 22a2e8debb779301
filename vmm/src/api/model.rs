//! The API's objects, with the names and units of Firecracker's. Unknown keys are refused.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};

/// The least memory of a guest, in MiB.
pub const MIN_MEM_MIB: u64 = MIN_RAM_BYTES >> 20;
/// The most.
pub const MAX_MEM_MIB: u64 = MAX_RAM_BYTES >> 20;
/// The `kernel_image_path` that means Samepage's own guest.
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
    /// Two threads a core; Samepage's guests have one.
    #[serde(default)]
    pub smt: bool,
    /// Log which pages the guest writes; not yet.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// What RAM is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
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
    /// Whether the kernel is told that its root file system is there. That drive is the first.
    pub is_root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub is_read_only: bool,
}

/// `/metrics`: where metrics go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file, made if it is not there, or a FIFO that somebody reads.
    pub metrics_path: PathBuf,
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
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Offer free page hinting.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Offer free page reporting.
    #[serde(default)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// Tell the guest that the run is done as soon as it has reported everything.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> Self {
        Self { acknowledge_on_stop: true }
    }
}

fn yes() -> bool {
    true
}

/// Everything a VM is to be, as `GET /vm/config` shows it and as a config file has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Spec {
    pub machine_config: MachineConfig,
    pub boot_source: Option<BootSource>,
    /// The root device first.
    pub drives: Vec<Drive>,
    pub balloon: Option<Balloon>,
    pub metrics: Option<Metrics>,
}
