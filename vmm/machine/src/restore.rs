//! A VM that goes on from where another one was captured: its image, on descriptors, checked and put under a VM on which nothing has run.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;

use devices::GuestMemory;
use devices::state::RestoreError;
use devices::virtio::block::Disk;
use kvm_ioctls::{VcpuFd, VmFd};
use memory::image::ImageError;
use memory::ram::{Backing, Ram};
use memory::slab::{Slab, SlabError};
use rustix::fs::fcntl_get_seals;
use thiserror::Error;

use super::board::Board;
use super::config::VmConfig;
use super::generation::{self, GenerationError};
use super::handover::SEALS;
use super::probe;
use super::snapshot::load::{LoadError, MemoryFile, check_drives};
use super::snapshot::{Connection, FileLease, Handler};
use super::state::StateError;
use super::state::container::{ContainerError, MAX_BYTES};
use super::state::counters;
use super::state::saved::VmState;
use super::state::trace::Trace;
use super::state::vcpu::{Saved, xsave_bytes};
use os::handed;

/// Why a VM does not go on from an image.
#[derive(Debug, Error)]
pub enum ImageStartError {
    /// A descriptor is not there, or cannot be read.
    #[error("descriptor {fd} of the image cannot be read")]
    Read {
        /// Its number.
        fd: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It may still be changed.
    #[error("descriptor {0} is no state: expected a memfd that is sealed against writing and resizing")]
    Unsealed(RawFd),
    /// It is no state.
    #[error("the image's state cannot be used")]
    State(#[from] ContainerError),
    /// There are other slabs than the state says.
    #[error("the image has {found} slabs, and its state speaks of {expected}")]
    Slabs {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// A slab is not what it should be.
    #[error("slab {number} of the image cannot be used")]
    Slab {
        /// Which.
        number: usize,
        /// Why.
        #[source]
        source: SlabError,
    },
    /// The VM is to be another one.
    #[error("the image is of a VM with {what} {found}, and this one has {expected}")]
    Other {
        /// In what they differ.
        what: &'static str,
        /// What the image's had.
        found: String,
        /// What this one has.
        expected: String,
    },
    /// Its memory cannot be mapped.
    #[error("the image's memory cannot be mapped")]
    Memory(#[from] ImageError),
    /// This KVM does not take the state.
    #[error("the image's vCPUs cannot be restored")]
    Vcpus(#[from] StateError),
    /// The guest cannot learn that it is a copy.
    #[error("the guest cannot be given a generation of its own")]
    Generation(#[from] GenerationError),
    /// It comes from files, and these cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The devices cannot be what it says.
    #[error("the image's devices cannot be restored")]
    Devices(#[from] RestoreError),
}

/// Where the memory of an image is.
pub(crate) enum Content {
    /// In slabs, which are mapped.
    Slabs(Vec<Slab>),
    /// In a file, which is mapped, or copied.
    File(MemoryFile),
    /// At a process, which fills it.
    Handler(Connection),
}

/// What a VM goes on from: taken over and checked as far as that can be done without a VM.
pub struct Image {
    state: VmState,
    content: Content,
    saved: Saved,
    /// Its vCPUs stand still until they are resumed.
    pub(crate) is_paused: bool,
}

impl Image {
    /// Takes over the descriptors of the image of `config`, if it has one.
    pub fn take(config: &VmConfig) -> Result<Option<Self>, ImageStartError> {
        let Some(fds) = &config.image else { return Ok(None) };
        let taken = |fd: RawFd| handed::take(fd).map_err(|source| ImageStartError::Read { fd, source });
        let state = read(File::from(taken(fds.state)?), fds.state)?;
        let files = fds.slabs.iter().map(|fd| taken(*fd)).collect::<Result<Vec<_>, _>>()?;
        let state = VmState::decode(&state)?;
        let memory = state.memory().ok_or(ContainerError::Missing("memory"))?;
        let (found, expected) = (files.len(), memory.slabs.len());
        if found != expected {
            return Err(ImageStartError::Slabs { found, expected });
        }
        let slab = |(number, (file, pages)): (usize, (_, &u32))| {
            Slab::receive(file, (*pages).into()).map_err(|source| ImageStartError::Slab { number, source })
        };
        let slabs = files.into_iter().zip(&memory.slabs).enumerate().map(slab);
        let content = Content::Slabs(slabs.collect::<Result<_, _>>()?);
        // What a daemon keeps in memory is gone when its host is.
        let saved = if fds.from_disk { Saved::Anywhere } else { Saved::Here };
        Ok(Some(Self { state, content, saved, is_paused: false }))
    }

    /// Of state and memory from anywhere.
    pub(crate) fn new(state: VmState, content: Content, is_paused: bool) -> Self {
        Self { state, content, saved: Saved::Anywhere, is_paused }
    }

    /// Whether it is of the VM that is to be.
    pub(crate) fn check(&self, config: &VmConfig) -> Result<(), ImageStartError> {
        let machine = &self.state.machine;
        let same = |what, found: String, expected: String| match found == expected {
            true => Ok(()),
            false => Err(ImageStartError::Other { what, found, expected }),
        };
        same("backend", machine.backend.clone(), probe::backend_name().to_owned())?;
        same("memory of bytes", machine.memory_bytes.to_string(), config.memory_bytes.to_string())?;
        same("vCPUs", machine.vcpus.to_string(), config.cpus.to_string())?;
        same("vCPUs", self.state.vcpus.len().to_string(), config.cpus.to_string())
    }

    /// Whether the drives that were opened for it are the files that it had.
    pub(crate) fn check_drives(&self, disks: &[Disk]) -> Result<(), ImageStartError> {
        Ok(self.state.setup().map_or(Ok(()), |setup| check_drives(setup, disks))?)
    }

    /// Gives a VM that has no memory slot yet its memory.
    pub(crate) fn map(self, ram: &Ram, config: &VmConfig) -> Result<Mapped, ImageStartError> {
        let mut mapped = Mapped::default();
        match self.content {
            Content::Slabs(slabs) => {
                let runs = self.state.memory().map(|memory| memory.runs()).unwrap_or_default();
                ram.map_image(&runs, &slabs)?;
                mapped.slabs = slabs;
            }
            Content::File(file) => mapped.lease = file.fill(ram, leaves_alone(config))?,
            Content::Handler(connection) => {
                mapped.handler = Some(connection.fill(ram).map_err(LoadError::from)?);
            }
        }
        Ok(Mapped { saved: Some((self.state, self.saved)), ..mapped })
    }
}

/// An image whose memory a VM has.
#[derive(Default)]
pub(crate) struct Mapped {
    /// What else the VM is to be, and where that was saved; None of a VM that boots.
    pub saved: Option<(VmState, Saved)>,
    /// The slabs in its memory.
    pub slabs: Vec<Slab>,
    /// The process that fills its memory from now on.
    pub handler: Option<Handler>,
    /// That on the file in which its memory lies.
    pub lease: Option<FileLease>,
}

/// Whether nothing of a VM of `config` replaces or moves pages, or wants them to be of one kind: then they may be a file's.
fn leaves_alone(config: &VmConfig) -> bool {
    let VmConfig { merge, mergeable, sampling, huge_pages, backing, .. } = config;
    let wants = merge.is_some() || *mergeable || sampling.is_some() || huge_pages.is_some();
    !wants && *backing == Backing::Anonymous
}

impl VmState {
    /// Makes a VM on which nothing has run what was captured, but for its memory. Afterwards its devices are to be woken.
    pub(crate) fn restore(
        &self,
        saved: Saved,
        vm: &VmFd,
        vcpus: &[VcpuFd],
        board: &Board,
        memory: &GuestMemory,
    ) -> Result<(), ImageStartError> {
        let (mut trace, bytes) = (Trace::default(), xsave_bytes(vm));
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            state.restore(vcpu, saved, bytes, &mut trace)?;
        }
        self.chips.restore(vm, &mut trace)?;
        counters::align(vm, vcpus, &self.vcpus, self.chips.clock, &mut trace)?;
        board.restore(&self.devices)?;
        // So that a guest with a kvmclock does not take the pause for a lockup; without one KVM refuses.
        vcpus.iter().for_each(|vcpu| _ = vcpu.kvmclock_ctrl());
        Ok(generation::renew(vm, memory)?)
    }
}

fn read(file: File, fd: RawFd) -> Result<Vec<u8>, ImageStartError> {
    let failed = |source| ImageStartError::Read { fd, source };
    if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SEALS)) {
        return Err(ImageStartError::Unsealed(fd));
    }
    // Each clone has the same place in the file: it is read by place, and no place is changed.
    let length = file.metadata().map_err(failed)?.len();
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(MAX_BYTES + 1)];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    Ok(bytes)
}
