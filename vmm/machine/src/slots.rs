//! Guest RAM as KVM's memory slots: slot n is the n-th extent. Files that a guest has as memory have others.
#![expect(unsafe_code, reason = "gives guest RAM to KVM")]

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use memory::file_region::FileRegion;
use memory::ram::Ram;

/// The first slot of those that are not RAM's.
const FIRST_OF_FILES: u32 = 8;

/// Gives `ram` to `vm`, or changes whether KVM logs which of its pages are written. The latter may be done while vCPUs run.
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

/// Gives files to `vm`, in this order.
pub fn set_files<'a>(
    vm: &VmFd,
    files: impl Iterator<Item = &'a FileRegion>,
) -> Result<(), kvm_ioctls::Error> {
    for (slot, file) in (FIRST_OF_FILES..).zip(files) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: file.gpa().0,
            memory_size: file.bytes(),
            userspace_addr: file.hva().0,
            flags: if file.is_read_only() { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: nothing in this process refers to what is in the region. When it is unmapped, the kernel has KVM forget it.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}
