//! Takes a VM from files: checked as far as that can be done before there is a VM.

use std::ffi::OsStr;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use devices::virtio::balloon;
use memory::PAGE_BYTES;
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use os::named_file;

use super::create::realtime_ns;
use super::handler::Connection;
use super::load_error::LoadError;
use super::memory_file::{MemoryFile, Stamp};
use crate::config::{MAX_VCPUS, VmConfig};
use crate::drive::{Drive, MAX_DRIVES};
use crate::restore::{Content, Image};
use crate::state::container::{ContainerError, MAX_BYTES};
use crate::state::saved::{Around, VmState};
use crate::state::setup::{DriveV1, MmdsV1, SetupV1};

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
