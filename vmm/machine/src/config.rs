//! What a VM is to be, said once. The command line, the API and a fleet file each make a [`VmConfig`], and nothing else
//! describes a VM; `build` makes one of it. A fleet's daemon passes it to the VM's process as data ([`crate::handover`]).
//!
//! An option is added here, where `build` obeys it, and where it can be given: `samepage run`, fleet files, the API.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use devices::rate_limiter::Limits;
use devices::virtio::balloon;
use image::vmlinux::Unpack;
use jail::Mode;
use memory::numa::Placement;
use memory::ram::Backing;
use serde::{Deserialize, Serialize};

use super::drive::Drive;
use super::interface::{Interface, Mmds};
use super::pmem::Pmem;
use super::vsock::Vsock;
use super::working_set::Sampling;

/// The default command line of a Linux guest.
pub const LINUX_CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// The default memory of a VM.
pub const MEMORY_BYTES: u64 = 128 << 20;
/// The most vCPUs a VM may have.
pub const MAX_VCPUS: u8 = 32;

/// What a VM is to be. As data it has every key or the default's value, and no others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Its name, for people.
    pub name: String,

    /// The kernel's file; None is Samepage's own guest.
    pub kernel: Option<PathBuf>,
    /// Where it is decompressed.
    pub unpack: Unpack,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; None is [`LINUX_CMDLINE`].
    pub cmdline: Option<String>,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What RAM is made of.
    pub backing: Backing,
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub cpus: u8,
    /// Its disks, at most [`super::MAX_DRIVES`].
    pub drives: Vec<Drive>,
    /// The files that it has as memory beside its RAM, at most [`super::MAX_PMEM`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<Pmem>,
    /// Its network interfaces, at most [`super::MAX_INTERFACES`].
    pub net: Vec<Interface>,
    /// Its sockets, if it has any.
    pub vsock: Option<Vsock>,
    /// The metadata service, and on which of the interfaces it is.
    #[serde(skip)]
    pub mmds: Option<Mmds>,
    /// How many random bytes it gets.
    #[serde(skip_serializing_if = "Limits::is_none")]
    pub entropy: Limits,
    /// Its balloon.
    pub balloon: Option<balloon::Config>,

    /// Ask for (or forbid) huge pages; None leaves it to the host.
    pub huge_pages: Option<bool>,
    /// The NUMA node that its memory comes from and its process runs on; None leaves it to the host.
    pub numa: Option<Placement>,
    /// Let the host kernel's samepage merging have the RAM from the start.
    pub mergeable: bool,
    /// Let Samepage's own merging have the RAM: the socket of its matchmaker, which may come later.
    pub merge: Option<PathBuf>,
    /// Log which pages are written, for snapshots of those alone.
    pub track_dirty_pages: bool,
    /// How its working set is sampled, if it is.
    pub sampling: Option<Sampling>,
    /// How fast it may take frames, in pages a second, until its control socket says otherwise.
    pub throttle: Option<u64>,

    /// The image that it goes on from, on descriptors of its process; None boots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageFds>,

    /// Where COM1 goes.
    pub console: Console,
    /// Where the control socket is made.
    pub control: Option<PathBuf>,
    /// Where COM2's socket is made.
    pub com2: Option<PathBuf>,

    /// What becomes of a system call that its process does not need.
    pub seccomp: Mode,
    /// Whether a client of its API may name files while it runs.
    pub has_api: bool,
    /// How much sooner than by its size the kernel's out-of-memory killer takes its process.
    pub oom_score_adj: Option<i16>,
    /// End the VM when standard input ends; then it is no console input.
    pub lifeline: bool,
    /// The daemon that starts it, with which it ends until it runs. Later ones find it by its sockets, which are made again when their
    /// files are removed.
    pub daemon: Option<i32>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: "vm".into(),
            kernel: None,
            unpack: Unpack::default(),
            initrd: None,
            cmdline: None,
            memory_bytes: MEMORY_BYTES,
            backing: Backing::default(),
            cpus: 1,
            drives: Vec::new(),
            pmem: Vec::new(),
            net: Vec::new(),
            vsock: None,
            mmds: None,
            entropy: Limits::default(),
            balloon: Some(balloon::Config { statistics: true, ..balloon::Config::default() }),
            huge_pages: None,
            numa: None,
            mergeable: false,
            merge: None,
            track_dirty_pages: false,
            sampling: None,
            throttle: None,
            image: None,
            console: Console::Stdio,
            control: None,
            com2: None,
            seccomp: Mode::default(),
            has_api: false,
            oom_score_adj: None,
            lifeline: false,
            daemon: None,
        }
    }
}

impl VmConfig {
    /// The files that its disks and its persistent memory are, and whether each is only read.
    pub fn images(&self) -> impl Iterator<Item = (&Path, bool)> {
        let drives = self.drives.iter().flat_map(Drive::files);
        drives.chain(self.pmem.iter().map(|pmem| (pmem.path.as_path(), pmem.read_only)))
    }

    /// The kernel's command line.
    pub fn cmdline(&self) -> &str {
        self.cmdline.as_deref().unwrap_or(LINUX_CMDLINE)
    }
}

/// Where the console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Nowhere.
    None,
    /// Output is appended to a file; there is no input.
    File(PathBuf),
}

/// The descriptors of an image, with which a VM process is started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageFds {
    /// The state, in a sealed memfd.
    pub state: RawFd,
    /// The slabs, by number.
    pub slabs: Vec<RawFd>,
    /// What it had written to drives with overlays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskFds>,
    /// It comes from a disk: of another host, maybe, or from before this one was started anew.
    #[serde(default)]
    pub from_disk: bool,
}

/// The descriptors of what a guest had written to a drive with an overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFds {
    /// Which drive.
    pub drive: u32,
    /// The blocks at their places, for this VM alone.
    pub top: RawFd,
    /// Which blocks those are, in a sealed memfd; None: the whole disk.
    pub map: Option<RawFd>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_have_the_default_command_line() {
        let quoted = format!("`{LINUX_CMDLINE}`");
        for document in [
            include_str!("../../../resources/docs/reference/fleet-file.md"),
            include_str!("../../../resources/docs/reference/guests.md"),
        ] {
            assert!(document.contains(&quoted), "{quoted} is not in {:?}...", &document[..40]);
        }
    }

    #[test]
    fn what_is_not_said_is_as_by_default_and_what_is_not_known_is_refused() {
        assert_eq!(serde_json::from_str::<VmConfig>("{}").unwrap(), VmConfig::default());
        let text = r#"{"backing": "hugetlb", "balloon": {"deflate_on_oom": true}, "drives": [{"path": "d", "read_only": true}]}"#;
        let config: VmConfig = serde_json::from_str(text).unwrap();
        assert_eq!((config.backing, config.drives[0].read_only), (Backing::Hugetlb, true));
        assert_eq!(config.balloon, Some(balloon::Config { deflate_on_oom: true, ..Default::default() }));
        for (text, said) in [
            (r#"{"kernle": "k"}"#, "unknown field `kernle`"),
            (r#"{"balloon": {"target": 1}}"#, "unknown field `target`"),
            (r#"{"drives": [{"path": "d", "file": "e"}]}"#, "unknown field `file`"),
            (r#"{"drives": [{"read_only": true}]}"#, "missing field `path`"),
        ] {
            let error = serde_json::from_str::<VmConfig>(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
