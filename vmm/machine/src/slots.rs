//! Guest RAM as KVM's memory slots: slot n is the n-th extent.
#![expect(unsafe_code, reason = "gives guest RAM to KVM")]

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use memory::ram::Ram;

/// Gives `ram` to `vm`, or changes whether KVM logs which of its pages are written. The latter may
/// be done while vCPUs run.
pub fn set(vm: &VmFd, ram: &Ram, log_writes: bool) -> Result<(), kvm_ioctls::Error> {
    for (slot, stretch) in (0..).zip(ram.stretches()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: stretch.gpa().0,
            memory_size: stretch.pages().bytes(),
            userspace_addr: stretch.hva().0,
            flags: if log_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        };
        // SAFETY: the region is of guest RAM, which is not unmapped while there is a handle of it:
        // the VM has one.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}
