//! What a guest's addresses mean: asked of a vCPU that stands still for that, while the others do,
//! too.

use std::sync::{Arc, Mutex};

use devices::GuestMemory;
use kvm_ioctls::VcpuFd;
use memory::{Gpa, PAGE_BYTES};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::paging::{End, Paging, Runs, Walk};
use super::running::Running;

/// Why an address is not translated.
#[derive(Debug, Error)]
pub enum WalkError {
    #[error("there is no vCPU {vcpu}: this VM has {vcpus}, from 0 on")]
    NoVcpu { vcpu: u8, vcpus: u8 },
    #[error("a vCPU did not leave the guest in time; the VM runs on")]
    Pause,
    #[error(
        "vCPU {0} does not translate by 64-bit page tables: it has not booted so far, or runs 32-bit code"
    )]
    NotLong(u8),
    #[error("{address:#x} is no address of this guest: expected bits {bits} to 63 to be as bit {}", bits - 1)]
    NotCanonical { address: u64, bits: u32 },
}

/// Which tables are meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// The vCPU whose rules hold, and whose tables are meant if no others are.
    pub vcpu: u8,
    /// The guest-physical address of a topmost table, as another process of the guest's has it in
    /// CR3.
    pub root: Option<u64>,
}

/// What came of an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walked {
    pub paging: Paging,
    #[serde(flatten)]
    pub walk: Walk,
    /// Where the VM process has it; None if it is no RAM.
    pub hva: Option<u64>,
}

/// What came of looking through tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablePart {
    pub paging: Paging,
    #[serde(flatten)]
    pub part: Runs,
}

impl Running {
    /// Translates an address of the guest's.
    pub fn walk(&self, address: u64, tables: Tables) -> Result<Walked, WalkError> {
        let paging = self.paging(tables)?;
        if !paging.is_canonical(address) {
            let bits = if paging.levels == 5 { 57 } else { 48 };
            return Err(WalkError::NotCanonical { address, bits });
        }
        let walk = paging.walk(address, reader(self.ram().memory()));
        let hva = match walk.end {
            End::Page { gpa, .. } => self.hva_of(gpa),
            End::NotPresent | End::NoTable { .. } => None,
        };
        Ok(Walked { paging, walk, hva })
    }

    /// What is mapped from `from` on, a part of it.
    pub fn page_table(&self, from: u64, tables: Tables) -> Result<TablePart, WalkError> {
        let paging = self.paging(tables)?;
        Ok(TablePart { paging, part: paging.runs(from, reader(self.ram().memory())) })
    }

    fn hva_of(&self, gpa: u64) -> Option<u64> {
        self.ram().extents().iter().find_map(|extent| extent.hva_of(Gpa(gpa))).map(|hva| hva.0)
    }

    /// A vCPU's control registers, for which the VM is paused for a moment if it runs.
    fn paging(&self, tables: Tables) -> Result<Paging, WalkError> {
        let Tables { vcpu, root } = tables;
        let vcpus = self.vcpu_count;
        if vcpu >= vcpus {
            return Err(WalkError::NoVcpu { vcpu, vcpus });
        }
        let was_paused = self.is_paused();
        if !was_paused && !self.pause() {
            return Err(WalkError::Pause);
        }
        let read = Arc::new(Mutex::new(None));
        let slot = read.clone();
        let sent = self.vcpus().send(Arc::new(move |n, fd: &VcpuFd| {
            if n == usize::from(vcpu) {
                *os::lock(&slot) = fd.get_sregs().ok();
            }
        }));
        if !was_paused {
            self.resume();
        }
        let sregs = os::lock(&read).take().filter(|_| sent).ok_or(WalkError::Pause)?;
        let paging =
            Paging::of(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer).ok_or(WalkError::NotLong(vcpu))?;
        Ok(Paging { root: root.map_or(paging.root, |root| root & !(PAGE_BYTES - 1)), ..paging })
    }
}

/// Reads entries of tables in `memory`.
fn reader(memory: &GuestMemory) -> impl Fn(u64) -> Option<u64> {
    |at| memory.read_obj(GuestAddress(at)).ok()
}
