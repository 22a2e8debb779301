//! Takes a VM from files: checked as far as that can be done before there is a VM.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use devices::virtio::balloon;
use devices::virtio::block::Disk;
use memory::PAGE_BYTES;
use memory::flat::FlatError;
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use memory::ram::Ram;
use os::named_file;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::create::{identity, realtime_ns};
use super::handler::{Connection, HandlerError};
use super::lease::FileLease;
use crate::VmConfig;
use crate::drive::{Drive, MAX_DRIVES};
use crate::error::MAX_VCPUS;
use crate::generation;
use crate::restore::{Content, Image};
use crate::state::container::{ContainerError, MAX_BYTES};
use crate::state::saved::{Around, PairV1, VmState};
use crate::state::setup::{DriveV1, FileV1, MmdsV1, SetupV1};

/// Why a VM is not loaded. Nothing was started.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The state file.
    #[error("Failed to get snapshot state from file: Failed to open snapshot file {path}", path = path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is none.
    #[error("Failed to get snapshot state from file: {path} cannot be used", path = path.display())]
    State {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: ContainerError,
    },
    /// Somebody writes to it.
    #[error("{path} was changed while it was read: load it when nobody writes to it", path = path.display())]
    Changed {
        /// Which.
        path: PathBuf,
    },
    /// What a daemon keeps.
    #[error("{path} is the state of an image that a daemon keeps: expected one that PUT /snapshot/create wrote", path = path.display())]
    Image {
        /// Which.
        path: PathBuf,
    },
    /// It says what no VM is.
    #[error("the state file says that the VM has {what} {found}: expected {expected}")]
    Machine {
        /// What.
        what: &'static str,
        /// What it says.
        found: String,
        /// What is possible.
        expected: String,
    },
    /// The memory file.
    #[error(
        "Failed to load guest memory: Error creating guest memory from file: Failed to load guest memory {path}",
        path = path.display()
    )]
    MemoryFile {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("Failed to load guest memory: Error creating guest memory from file {path}", path = path.display())]
    Memory {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: FlatError,
    },
    /// It belongs to another state file.
    #[error(
        "{path} is the memory of another snapshot than the state file: expected the file that was written with that. A host that died while \
         both were replaced leaves them so, and then neither is of use",
        path = path.display()
    )]
    Pair {
        /// Which.
        path: PathBuf,
    },
    /// The process that is to fill it.
    #[error("Failed to load guest memory: Error creating guest memory from uffd")]
    Handler(#[from] HandlerError),
    /// It is to be used with what replaces or moves pages.
    #[error(
        "memory that a process fills cannot be used with {0}: each page can have one userfaultfd, and it is that process's; leave {0} out, or \
         load it from a file"
    )]
    HandlerWith(&'static str),
    /// A drive is another file.
    #[error(
        "drive {id:?}: {path} is another file than when the snapshot was taken: it has {} bytes, device {}, inode {}, and had {} bytes, \
         device {}, inode {}; put that file there again",
        found.bytes, found.device, found.inode, expected.bytes, expected.device, expected.inode, path = path.display()
    )]
    Drive {
        /// Which.
        id: String,
        /// Where it is.
        path: PathBuf,
        /// What is there.
        found: Box<FileV1>,
        /// What was.
        expected: Box<FileV1>,
    },
    /// A drive cannot be looked at.
    #[error("drive {id:?} cannot be looked at")]
    DriveFile {
        /// Which.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Where the memory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemorySource {
    /// In a flat file, which is mapped or copied.
    File(PathBuf),
    /// At a process that listens on this socket, and fills it page by page.
    Handler(PathBuf),
}

/// How a VM goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// It runs at once.
    pub resume: bool,
    /// Its kvmclock goes on from the time of day, and not from where it was.
    pub clock_realtime: bool,
}

/// A state file that was read: its digests are right, and what is in it can be a VM as far as that is seen without KVM.
pub struct StateFile {
    state: VmState,
    setup: SetupV1,
}

impl StateFile {
    /// Reads one.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let bytes = read(path)?;
        let state =
            VmState::decode(&bytes).map_err(|source| LoadError::State { path: path.into(), source })?;
        let Around::File(setup) = &state.around else { return Err(LoadError::Image { path: path.into() }) };
        let file = Self { setup: setup.clone(), state };
        file.check()?;
        Ok(file)
    }

    fn check(&self) -> Result<(), LoadError> {
        let machine = &self.state.machine;
        let is = |right: bool, what, found: String, expected: String| match right {
            true => Ok(()),
            false => Err(LoadError::Machine { what, found, expected }),
        };
        let cpus = machine.vcpus;
        let range = format!("1 to {MAX_VCPUS}");
        is((1..=MAX_VCPUS).contains(&cpus), "vCPUs", cpus.to_string(), range)?;
        let saved = self.state.vcpus.len();
        is(saved == usize::from(cpus), "vCPUs whose state was saved", saved.to_string(), cpus.to_string())?;
        let bytes = machine.memory_bytes;
        let whole = (MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&bytes) && bytes.is_multiple_of(PAGE_BYTES);
        let sizes = format!("{MIN_RAM_BYTES} to {MAX_RAM_BYTES} in whole pages of {PAGE_BYTES}");
        is(whole, "memory of bytes", bytes.to_string(), sizes)?;
        let address = self.state.mmds.as_ref().and_then(|mmds| mmds.address).map(Ipv4Addr::from);
        if let Some(address) = address {
            let possible = "a link-local address".into();
            is(mmds::is_possible(address), "a metadata service at", address.to_string(), possible)?;
        }
        let drives = self.setup.drives.len();
        is(drives <= MAX_DRIVES, "drives", drives.to_string(), format!("at most {MAX_DRIVES}"))
    }

    /// How it was built.
    pub(crate) fn setup(&self) -> &SetupV1 {
        &self.setup
    }

    /// Its metadata service.
    pub(crate) fn mmds(&self) -> Option<&MmdsV1> {
        self.state.mmds.as_ref()
    }

    /// vCPUs.
    pub(crate) fn vcpus(&self) -> u8 {
        self.state.machine.vcpus
    }

    /// Bytes of RAM.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.state.machine.memory_bytes
    }

    /// The VM's configuration: what is in the file, and of `rest` what is not.
    pub(crate) fn config(&self, rest: VmConfig) -> VmConfig {
        VmConfig {
            memory_bytes: self.memory_bytes(),
            cpus: self.vcpus(),
            drives: self.setup.drives.iter().map(drive).collect(),
            balloon: self.setup.balloon.map(|balloon| balloon::Config {
                // What it was is in the device's state.
                target_pages: 0,
                deflate_on_oom: balloon.deflate_on_oom,
                statistics: balloon.stats_polling_interval_s > 0,
                hinting: balloon.hinting,
                reporting: balloon.reporting,
            }),
            ..rest
        }
    }

    /// What the VM of `config` goes on from: with the memory file open, or the handler connected.
    pub(crate) fn image(
        mut self,
        config: &VmConfig,
        memory: &MemorySource,
        how: How,
    ) -> Result<Image, LoadError> {
        if let MemorySource::Handler(_) = memory {
            let with =
                [(config.merge.is_some(), "--merge"), (config.sampling.is_some(), "--sample-working-set")];
            if let Some((_, option)) = with.into_iter().find(|(is_used, _)| *is_used) {
                return Err(LoadError::HandlerWith(option));
            }
        }
        let content = match memory {
            MemorySource::File(path) => {
                Content::File(MemoryFile::open(path, self.memory_bytes(), self.state.pair)?)
            }
            MemorySource::Handler(path) => Content::Handler(Connection::to(path)?),
        };
        if how.clock_realtime {
            let clock = &mut self.state.chips.clock;
            *clock = clock.saturating_add(realtime_ns().saturating_sub(self.setup.realtime_ns));
        }
        Ok(Image::new(self.state, content, !how.resume))
    }
}

fn drive(drive: &DriveV1) -> Drive {
    let path = OsStr::from_bytes(&drive.path).into();
    Drive { id: drive.id.clone(), path, read_only: drive.read_only, is_raw: drive.is_raw, overlay: None }
}

/// Whether these, opened by the paths in `setup`, are the files that they were.
pub(crate) fn check_drives(setup: &SetupV1, disks: &[Disk]) -> Result<(), LoadError> {
    for (drive, disk) in setup.drives.iter().zip(disks) {
        let found = identity(disk.medium.file())
            .map_err(|source| LoadError::DriveFile { id: drive.id.clone(), source })?;
        if found != drive.file {
            return Err(LoadError::Drive {
                id: drive.id.clone(),
                path: OsStr::from_bytes(&drive.path).into(),
                found: Box::new(found),
                expected: Box::new(drive.file),
            });
        }
    }
    Ok(())
}

/// The bytes of a state file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let failed = |source| LoadError::Open { path: path.into(), source };
    let (file, meta) = named_file::regular(path).map_err(failed)?;
    if meta.len() > MAX_BYTES as u64 {
        let bytes = usize::try_from(meta.len()).unwrap_or(usize::MAX);
        return Err(LoadError::State {
            path: path.into(),
            source: ContainerError::Length { bytes, least: 0 },
        });
    }
    let mut bytes = Vec::new();
    (&file).take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    match Stamp::of(&file.metadata().map_err(failed)?) == Stamp::of(&meta) {
        true => Ok(bytes),
        false => Err(LoadError::Changed { path: path.into() }),
    }
}

/// By which a file that was written to meanwhile is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// A memory file, open, and as long as RAM.
pub(crate) struct MemoryFile {
    file: File,
    path: PathBuf,
    stamp: Stamp,
}

impl MemoryFile {
    fn open(path: &Path, expected: u64, pair: Option<PairV1>) -> Result<Self, LoadError> {
        let failed = |source| LoadError::MemoryFile { path: path.into(), source };
        let (file, meta) = named_file::regular(path).map_err(failed)?;
        let found = meta.len();
        if found != expected {
            return Err(LoadError::Memory {
                path: path.into(),
                source: FlatError::Length { found, expected },
            });
        }
        if let Some(pair) = pair {
            let mut number = pair.number;
            file.read_exact_at(&mut number, generation::PAIR).map_err(failed)?;
            if number != pair.number {
                return Err(LoadError::Pair { path: path.into() });
            }
        }
        Ok(Self { file, path: path.into(), stamp: Stamp::of(&meta) })
    }

    /// Has `ram` hold what it does: by mapping it, if it `may_be_mapped` and nobody else can write to it without our being told, else by copying.
    pub(crate) fn fill(&self, ram: &Ram, may_be_mapped: bool) -> Result<Option<FileLease>, LoadError> {
        let lease = may_be_mapped.then(|| FileLease::take(&self.file));
        let lease = lease.and_then(|taken| {
            taken.inspect_err(|error| tracing::debug!("the memory file is copied: no lease: {error}")).ok()
        });
        let filled = match &lease {
            Some(_) => ram.map_flat(&self.file),
            None => ram.load_flat(&self.file),
        };
        let now = self.file.metadata().map(|meta| Stamp::of(&meta));
        if now.is_ok_and(|now| now != self.stamp) {
            return Err(LoadError::Changed { path: self.path.clone() });
        }
        let filled = filled.map_err(|source| LoadError::Memory { path: self.path.clone(), source })?;
        // The guest has no part in it.
        let zeros = [0; size_of::<PairV1>()];
        ram.memory().write_slice(&zeros, GuestAddress(generation::PAIR)).map_err(|error| {
            let source = FlatError::Io { what: "fill guest memory", source: io::Error::other(error) };
            LoadError::Memory { path: self.path.clone(), source }
        })?;
        tracing::debug!(
            pages = filled,
            of = ram.pages().pages(),
            mapped = lease.is_some(),
            "memory is loaded"
        );
        Ok(lease)
    }
}
