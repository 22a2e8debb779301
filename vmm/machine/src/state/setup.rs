//! How a VM that is loaded from files is built again. For a clone the daemon knows; here only the file does.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

/// What the VM was built as, and of what of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupV1 {
    /// The version of Samepage that wrote it, for people.
    pub samepage: String,
    /// The host's CLOCK_REALTIME, in nanoseconds.
    pub realtime_ns: u64,
    /// Whether the memory file beside it has only pages that were written since the last one.
    pub is_diff: bool,
    pub huge_pages: HugePagesV1,
    pub smt: bool,
    /// Whether which pages are written was logged.
    pub track_dirty_pages: bool,
    /// What it once booted.
    pub boot: Option<BootV1>,
    /// In the guest's order.
    pub drives: Vec<DriveV1>,
    pub balloon: Option<BalloonV1>,
    /// In the guest's order.
    pub interfaces: Vec<InterfaceV1>,
    pub vsock: Option<VsockV1>,
}

/// The metadata service. What it shows is not saved: as in Firecracker, it is put there again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmdsV1 {
    /// Whether the guest needs a token.
    pub is_v2: bool,
    /// Where it is, if that was said.
    pub address: Option<[u8; 4]>,
    pub imds_compat: bool,
    /// IDs of the interfaces that it is on.
    pub interfaces: Vec<String>,
}

/// How a VM that goes to files is built: two sections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    pub vm: SetupV1,
    /// None without a metadata service.
    pub mmds: Option<MmdsV1>,
}

/// What RAM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePagesV1 {
    #[default]
    None,
    Transparent,
    Pool2M,
}

/// A kernel. Paths are bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootV1 {
    pub kernel: Vec<u8>,
    pub initrd: Option<Vec<u8>>,
    pub args: Option<String>,
}

/// A drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveV1 {
    pub id: String,
    /// Where its file was: a name, under which the same file is to be found.
    pub path: Vec<u8>,
    pub read_only: bool,
    pub is_raw: bool,
    pub is_root: bool,
    pub partuuid: Option<String>,
    pub file: FileV1,
}

/// Which file it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileV1 {
    pub bytes: u64,
    pub device: u64,
    pub inode: u64,
}

impl FileV1 {
    /// Which file this is.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { bytes: meta.len(), device: meta.dev(), inode: meta.ino() })
    }
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceV1 {
    pub id: String,
    /// The TAP that it was on.
    pub tap: String,
    pub mac: Option<[u8; 6]>,
    pub mtu: Option<u16>,
}

/// Sockets between guest and host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockV1 {
    pub cid: u32,
    /// Where the host's socket was.
    pub path: Vec<u8>,
}

/// What a balloon offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonV1 {
    pub deflate_on_oom: bool,
    pub hinting: bool,
    pub reporting: bool,
    /// 0 without statistics.
    pub stats_polling_interval_s: u16,
}
