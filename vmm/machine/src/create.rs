//! Has KVM create a VM and its vCPUs, as they are before anything has run.

use std::io;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memory::ram::Ram;

use super::error::VmError;
use super::platform::{KVM_IDENTITY_MAP, KVM_TSS};
use super::{cpuid, probe, registers, slots};

/// A VM without memory, and those of its vCPUs that are there already.
pub(super) struct BareVm {
    pub(super) kvm: Kvm,
    pub(super) vm: VmFd,
    pub(super) vcpus: Vec<VcpuFd>,
}

impl BareVm {
    /// One without vCPUs.
    pub(super) fn new() -> Result<Self, VmError> {
        let kvm = open_kvm()?;
        let vm = create_bare_vm(&kvm)?;
        Ok(Self { kvm, vm, vcpus: Vec::new() })
    }

    /// One made before it is known for what: with the first vCPU, which each has.
    pub(super) fn ahead() -> Result<Self, VmError> {
        let mut bare = Self::new()?;
        bare.vcpus = create_bare_vcpus(&bare.vm, 0, 1)?;
        // Found out once for the process.
        let _ = probe::backend();
        Ok(bare)
    }
}

fn open_kvm() -> Result<Kvm, VmError> {
    Kvm::new().map_err(|source| match io::Error::from(source).kind() {
        io::ErrorKind::NotFound => VmError::NoKvm,
        io::ErrorKind::PermissionDenied => VmError::KvmPermission,
        _ => VmError::Kvm { what: "open /dev/kvm", source },
    })
}

#[cfg(test)]
pub(super) fn create_vm(kvm: &Kvm, ram: &Ram) -> Result<VmFd, VmError> {
    let vm = create_bare_vm(kvm)?;
    give_memory(&vm, ram)?;
    Ok(vm)
}

/// Gives a VM its memory.
pub(super) fn give_memory(vm: &VmFd, ram: &Ram) -> Result<(), VmError> {
    slots::set(vm, ram, false).map_err(VmError::kvm("take the guest's memory"))
}

fn create_bare_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    let vm = loop {
        match kvm.create_vm() {
            // Creating a VM waits for other work of the host and can be interrupted.
            Err(e) if e.errno() == libc::EINTR => {}
            other => break other.map_err(VmError::kvm("create a VM"))?,
        }
    };
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(VmError::kvm("set the identity map's place"))?;
    vm.set_tss_address(KVM_TSS as usize).map_err(VmError::kvm("set the task segment's place"))?;
    vm.create_irq_chip().map_err(VmError::kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(VmError::kvm("create the timer"))?;
    Ok(vm)
}

/// vCPUs `first` and so on of `count`, which are to be made what others were, CPUID and all. What KVM supports is not asked: it takes a
/// third of a millisecond where a hypervisor below has to answer each of its questions to the processor.
pub(super) fn create_bare_vcpus(vm: &VmFd, first: u8, count: u8) -> Result<Vec<VcpuFd>, VmError> {
    (first..count).map(|id| vm.create_vcpu(id.into()).map_err(VmError::kvm("create a vCPU"))).collect()
}

/// vCPUs as after a reset.
pub(super) fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, VmError> {
    let (supported, deadline_timer) = cpuid::supported(kvm)?;
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(VmError::kvm("create a vCPU"))?;
            vcpu.set_cpuid2(&cpuid::for_vcpu(&supported, deadline_timer, id, count))
                .map_err(VmError::kvm("set the CPUID"))?;
            registers::reset(&vcpu)?;
            Ok(vcpu)
        })
        .collect()
}
