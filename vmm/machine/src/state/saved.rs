//! All that a VM is: what travels from a VM that is captured to one that goes on from there.

use devices::state::{PciState, Pm1State, SerialState, TransportState};
use memory::image::ImageRun;
use memory::{PageNo, SlabPage};
use serde::{Deserialize, Serialize};

use super::chips::ChipsV1;
use super::container::{self, ContainerError, Section};
use super::setup::{MmdsV1, SetupV1};
use super::vcpu::VcpuV1;

const MACHINE: u32 = 1;
const CHIPS: u32 = 2;
const VCPU: u32 = 3;
const DEVICES: u32 = 4;
const MEMORY: u32 = 5;
// 6 is kept for the generation.
const SETUP: u32 = 7;
const PAIR: u32 = 8;
const MMDS: u32 = 9;

/// What the VM was built as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineV1 {
    /// The KVM it ran on, e.g. `svm+npt`.
    pub backend: String,
    pub memory_bytes: u64,
    pub vcpus: u8,
}

/// Its devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesV1 {
    pub com1: SerialState,
    pub com2: SerialState,
    pub pm1: Pm1State,
    pub pci: PciState,
    /// In the order of their windows.
    pub virtio: Vec<TransportState>,
}

/// Its memory: what is not in a run is zeros.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryV1 {
    /// Pages of each slab.
    pub slabs: Vec<u32>,
    /// Page, pages, slab, page of the slab.
    pub runs: Vec<(u64, u32, u32, u32)>,
}

impl MemoryV1 {
    /// The runs as they are taken and mapped.
    pub fn runs(&self) -> Vec<ImageRun> {
        let run = |&(page, pages, slab, slab_page): &(u64, u32, u32, u32)| ImageRun {
            page: PageNo(page),
            pages: pages.into(),
            slab,
            slab_page: SlabPage(slab_page),
        };
        self.runs.iter().map(run).collect()
    }
}

/// The memory file that belongs to a state file: both have the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairV1 {
    pub number: [u8; 16],
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmState {
    pub machine: MachineV1,
    pub chips: ChipsV1,
    pub vcpus: Vec<VcpuV1>,
    pub devices: DevicesV1,
    pub around: Around,
    /// None of an image, and of a state file that an older build wrote.
    pub pair: Option<PairV1>,
    /// The metadata service of a VM that went to files, if it had one.
    pub mmds: Option<MmdsV1>,
}

/// What is with the state, by the way it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Around {
    /// An image: where its memory is in slabs.
    Image(MemoryV1),
    /// A state file: how the VM is built. Its memory is in another one.
    File(SetupV1),
}

/// The runs of memory in an image's state, from bytes that are not trusted, and the pages of each slab.
pub fn image_runs(state: &[u8]) -> Result<(Vec<ImageRun>, Vec<u32>), ContainerError> {
    let state = VmState::decode(state)?;
    let memory = state.memory().ok_or(ContainerError::Missing("memory"))?;
    Ok((memory.runs(), memory.slabs.clone()))
}

/// The name of a kind of section.
pub fn kind_name(kind: u32) -> &'static str {
    match kind {
        MACHINE => "machine",
        CHIPS => "chips",
        VCPU => "vcpu",
        DEVICES => "devices",
        MEMORY => "memory",
        SETUP => "setup",
        PAIR => "pair",
        MMDS => "mmds",
        _ => "unknown",
    }
}

impl VmState {
    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        let mut sections = vec![Section::of(MACHINE, 1, &self.machine)?, Section::of(CHIPS, 1, &self.chips)?];
        for vcpu in &self.vcpus {
            sections.push(Section::of(VCPU, 1, vcpu)?);
        }
        sections.push(Section::of(DEVICES, 1, &self.devices)?);
        sections.push(match &self.around {
            Around::Image(memory) => Section::of(MEMORY, 1, memory)?,
            Around::File(setup) => Section::of(SETUP, 1, setup)?,
        });
        if let Some(pair) = &self.pair {
            sections.push(Section::of(PAIR, 1, pair)?);
        }
        if let Some(mmds) = &self.mmds {
            sections.push(Section::of(MMDS, 1, mmds)?);
        }
        Ok(container::write(&sections))
    }

    /// The memory of an image.
    pub fn memory(&self) -> Option<&MemoryV1> {
        match &self.around {
            Around::Image(memory) => Some(memory),
            Around::File(_) => None,
        }
    }

    /// How the VM of a state file is built.
    pub fn setup(&self) -> Option<&SetupV1> {
        match &self.around {
            Around::File(setup) => Some(setup),
            Around::Image(_) => None,
        }
    }

    /// From bytes that are not trusted. What is in it is plain data: it is checked when a VM is made of it.
    pub fn decode(bytes: &[u8]) -> Result<Self, ContainerError> {
        let (mut machine, mut chips, mut vcpus, mut devices) = (None, None, Vec::new(), None);
        let (mut around, mut pair, mut mmds) = (None, None, None);
        for section in container::read(bytes)? {
            match section.kind {
                MACHINE => once(&mut machine, "description", section.decode("description", 1)?)?,
                CHIPS => once(&mut chips, "set of chips", section.decode("set of chips", 1)?)?,
                VCPU => vcpus.push(section.decode("vCPU", 1)?),
                DEVICES => once(&mut devices, "set of devices", section.decode("set of devices", 1)?)?,
                MEMORY => once(&mut around, "memory", Around::Image(section.decode("memory", 1)?))?,
                SETUP => once(&mut around, "setup", Around::File(section.decode("setup", 1)?))?,
                PAIR => once(&mut pair, "pair", section.decode("pair", 1)?)?,
                MMDS => once(&mut mmds, "metadata service", section.decode("metadata service", 1)?)?,
                other => return Err(ContainerError::Kind(other)),
            }
        }
        Ok(Self {
            machine: machine.ok_or(ContainerError::Missing("description"))?,
            chips: chips.ok_or(ContainerError::Missing("set of chips"))?,
            vcpus,
            devices: devices.ok_or(ContainerError::Missing("set of devices"))?,
            around: around.ok_or(ContainerError::Missing("memory, and no setup"))?,
            pair,
            mmds,
        })
    }
}

fn once<T>(place: &mut Option<T>, what: &'static str, value: T) -> Result<(), ContainerError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(ContainerError::Twice(what)),
    }
}

#[cfg(test)]
#[path = "saved_tests.rs"]
mod tests;
