//! A VM that goes on from where another one was captured: its image, on descriptors, checked and put under a VM on which nothing has run.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use devices::GuestMemory;
use devices::virtio::block::Disk;
use kvm_ioctls::{VcpuFd, VmFd};
use memory::ram::{Backing, Ram};
use memory::slab::Slab;
use rustix::fs::fcntl_get_seals;

use super::board::Board;
use super::config::{DiskFds, VmConfig};
use super::drive::Layer;
use super::generation;
use super::handover::SEALS;
use super::image_error::ImageStartError;
use super::probe;
use super::snapshot::load_error::LoadError;
use super::snapshot::{Connection, FileLease, Handler, MemoryFile};
use super::state::container::{ContainerError, MAX_BYTES};
use super::state::counters;
use super::state::saved::VmState;
use super::state::setup::FileV1;
use super::state::vcpu::{Saved, xsave_bytes};
use os::handed;

/// Where the memory of an image is.
pub(crate) enum Content {
    /// In slabs, which are mapped.
    Slabs(Vec<Slab>),
    /// In a file, which is mapped, or copied.
    File(MemoryFile),
    /// At a process, which fills it.
    Handler(Connection),
}

/// What a guest had written to a drive with an overlay, as another process has sent it.
pub(crate) struct ReceivedDisk {
    pub(crate) drive: u32,
    pub(crate) top: OwnedFd,
    /// Which blocks, in a sealed memfd; None: all of them.
    pub(crate) map: Option<OwnedFd>,
}

/// What a VM goes on from: taken over and checked as far as that can be done without a VM.
pub struct Image {
    state: VmState,
    content: Content,
    /// What the guest had written to drives with overlays.
    layers: Vec<Layer>,
    saved: Saved,
    /// Its vCPUs stand still until they are resumed.
    pub(crate) is_paused: bool,
}

impl Image {
    /// Takes over the descriptors of the image of `config`, if it has one.
    pub fn take(config: &VmConfig) -> Result<Option<Self>, ImageStartError> {
        let Some(fds) = &config.image else { return Ok(None) };
        let taken = |fd: RawFd| handed::take(fd).map_err(|source| ImageStartError::Read { fd, source });
        let state = File::from(taken(fds.state)?);
        let slabs = fds.slabs.iter().map(|fd| taken(*fd)).collect::<Result<_, _>>()?;
        let disk = |disk: &DiskFds| {
            let map = disk.map.map(taken).transpose()?;
            Ok(ReceivedDisk { drive: disk.drive, top: taken(disk.top)?, map })
        };
        let disks = fds.disks.iter().map(disk).collect::<Result<_, ImageStartError>>()?;
        // What a daemon keeps in memory is gone when its host is.
        let saved = if fds.from_disk { Saved::Anywhere } else { Saved::Here };
        Self::received(state, slabs, disks, saved).map(Some)
    }

    /// Of a state, of slabs and of disks that another process has sent.
    pub(crate) fn received(
        state: File,
        files: Vec<OwnedFd>,
        disks: Vec<ReceivedDisk>,
        saved: Saved,
    ) -> Result<Self, ImageStartError> {
        let state = VmState::decode(&read(state)?)?;
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
        let layer = |ReceivedDisk { drive, top, map }: ReceivedDisk| {
            let map = map.map(|map| read(map.into())).transpose()?;
            Ok(Layer { drive, top: top.into(), map })
        };
        let layers = disks.into_iter().map(layer).collect::<Result<_, ImageStartError>>()?;
        Ok(Self { layers, saved, ..Self::new(state, content, false) })
    }

    /// Of state and memory from anywhere.
    pub(crate) fn new(state: VmState, content: Content, is_paused: bool) -> Self {
        Self { state, content, layers: Vec::new(), saved: Saved::Anywhere, is_paused }
    }

    /// What overlays of drives begin with.
    pub(crate) fn take_layers(&mut self) -> Vec<Layer> {
        std::mem::take(&mut self.layers)
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
        let drives = self.state.setup().map(|setup| setup.drives.as_slice()).unwrap_or_default();
        for (drive, disk) in drives.iter().zip(disks) {
            let found = FileV1::of(disk.medium.file())
                .map_err(|source| LoadError::DriveFile { id: drive.id.clone(), source })?;
            if found != drive.file {
                let (found, expected) = (Box::new(found), Box::new(drive.file));
                let path = OsStr::from_bytes(&drive.path).into();
                return Err(LoadError::Drive { id: drive.id.clone(), path, found, expected }.into());
            }
        }
        Ok(())
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
        let bytes = xsave_bytes(vm);
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            state.restore(vcpu, saved, bytes)?;
        }
        self.chips.restore(vm)?;
        counters::align(vm, vcpus, &self.vcpus, self.chips.clock)?;
        board.restore(&self.devices)?;
        // So that a guest with a kvmclock does not take the pause for a lockup; without one KVM refuses.
        vcpus.iter().for_each(|vcpu| _ = vcpu.kvmclock_ctrl());
        Ok(generation::renew(vm, memory)?)
    }
}

fn read(file: File) -> Result<Vec<u8>, ImageStartError> {
    let fd = file.as_raw_fd();
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
