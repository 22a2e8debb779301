//! Tells a guest that it is a copy: VMGenID, 128 bits that no other copy has, and VMClock, counters
//! that a program in the guest can map (Linux' `vmclock-abi.h`). Both are in guest memory, on a
//! page each, found by the ACPI tables; an interrupt says that they changed.
//!
//! The built-in guest reads the former alone, and reads zeros until it is a copy: its pages cost
//! nothing before that.

use std::io;

use devices::GuestMemory;
use kvm_ioctls::VmFd;
use memory::{PAGE_BYTES, PageNo};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::platform::{GENERATION, GENERATION_IRQ, VMCLOCK, VMCLOCK_BYTES};

/// Why a guest has no generation of its own.
#[derive(Debug, Error)]
pub enum GenerationError {
    /// There is no random number.
    #[error("the host has no random number")]
    Random(#[source] io::Error),
    /// The pages cannot be written.
    #[error("guest memory at {GENERATION:#x} and {VMCLOCK:#x} cannot be written")]
    Memory(#[from] GuestMemoryError),
    /// KVM does not take the interrupt.
    #[error("interrupt {GENERATION_IRQ} cannot be raised")]
    Interrupt(#[source] kvm_ioctls::Error),
}

/// Where a memory file, and no guest, has the number that its state file has, too: behind VMGenID,
/// in memory that no guest uses.
pub const PAIR: u64 = GENERATION + 16;
/// The page that it is in.
pub const PAIR_PAGE: PageNo = PageNo(PAIR / PAGE_BYTES);

/// Offsets in VMClock's page.
mod vmclock {
    pub const MAGIC: (u64, u32) = (0, u32::from_le_bytes(*b"VCLK"));
    pub const SIZE: u64 = 4;
    pub const VERSION: (u64, u16) = (8, 1);
    /// Which counter the times in it belong to: there are none.
    pub const COUNTER_ID: (u64, u8) = (10, 0xff);
    pub const SEQ_COUNT: u64 = 12;
    pub const DISRUPTION_MARKER: u64 = 16;
    pub const FLAGS: u64 = 24;
    pub const VM_GENERATION_COUNTER: u64 = 104;

    pub const VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;
    pub const NOTIFICATION_PRESENT: u64 = 1 << 9;
}

/// Makes the pages of a guest that boots and reads ACPI tables.
pub fn write(memory: &GuestMemory) -> Result<(), GenerationError> {
    memory.write_slice(&random()?, GuestAddress(GENERATION))?;
    let at = |offset: u64| GuestAddress(VMCLOCK + offset);
    let flags = vmclock::VM_GEN_COUNTER_PRESENT | vmclock::NOTIFICATION_PRESENT;
    memory.write_slice(&(VMCLOCK_BYTES as u32).to_le_bytes(), at(vmclock::SIZE))?;
    memory.write_slice(&vmclock::VERSION.1.to_le_bytes(), at(vmclock::VERSION.0))?;
    memory.write_slice(&vmclock::COUNTER_ID.1.to_le_bytes(), at(vmclock::COUNTER_ID.0))?;
    memory.write_slice(&flags.to_le_bytes(), at(vmclock::FLAGS))?;
    memory.write_slice(&vmclock::MAGIC.1.to_le_bytes(), at(vmclock::MAGIC.0))?;
    Ok(())
}

/// Makes a guest that was restored, and whose vCPUs have not run, another copy: what it reads there
/// is new before its first instruction. The counters are the guest's memory, so they are worth as
/// much as the guest has left there.
pub fn renew(vm: &VmFd, memory: &GuestMemory) -> Result<(), GenerationError> {
    memory.write_slice(&random()?, GuestAddress(GENERATION))?;
    let has_clock =
        memory.read_obj::<u32>(GuestAddress(VMCLOCK + vmclock::MAGIC.0))?.to_le() == vmclock::MAGIC.1;
    if !has_clock {
        return Ok(());
    }
    for counter in [vmclock::DISRUPTION_MARKER, vmclock::VM_GENERATION_COUNTER] {
        let at = GuestAddress(VMCLOCK + counter);
        let last = u64::from_le(memory.read_obj(at)?);
        memory.write_slice(&last.wrapping_add(1).to_le_bytes(), at)?;
    }
    // Odd is one that is being written; a reader that stood in the middle begins again.
    let at = GuestAddress(VMCLOCK + vmclock::SEQ_COUNT);
    let last = u32::from_le(memory.read_obj(at)?);
    memory.write_slice(&(last | 1).wrapping_add(1).to_le_bytes(), at)?;
    for level in [true, false] {
        vm.set_irq_line(GENERATION_IRQ, level).map_err(GenerationError::Interrupt)?;
    }
    Ok(())
}

pub(super) fn random() -> Result<[u8; 16], GenerationError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| GenerationError::Random(io::Error::other(error)))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;
    use memory::ram::{Backing, Ram};

    fn at<const N: usize>(ram: &Ram, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn the_pages_are_what_vmclock_abi_says_and_each_renewal_counts_once() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        write(ram.memory()).unwrap();
        let first: [u8; 16] = at(&ram, GENERATION);
        assert_ne!(first, [0; 16]);
        let page: [u8; 112] = at(&ram, VMCLOCK);
        assert_eq!(page[..16], *b"VCLK\x00\x10\x00\x00\x01\x00\xff\x00\x00\x00\x00\x00");
        assert_eq!(page[16..32], [0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[32..], [0; 80]);
        let Ok(kvm) = Kvm::new() else { return testing::skipped(module_path!(), "no usable /dev/kvm") };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let mut known = vec![first];
        for renewals in 1..=3_u64 {
            if renewals == 3 {
                // Captured while something wrote to it, as a guest may.
                ram.memory().write_slice(&[5], GuestAddress(VMCLOCK + vmclock::SEQ_COUNT)).unwrap();
            }
            renew(&vm, ram.memory()).unwrap();
            let generation = at(&ram, GENERATION);
            assert!(!known.contains(&generation));
            known.push(generation);
            let count = |offset| u64::from_le_bytes(at(&ram, VMCLOCK + offset));
            assert_eq!(count(vmclock::DISRUPTION_MARKER), renewals);
            assert_eq!(count(vmclock::VM_GENERATION_COUNTER), renewals);
            assert_eq!(at(&ram, VMCLOCK + vmclock::SEQ_COUNT), (2 * renewals as u32).to_le_bytes());
        }
    }

    #[test]
    fn a_guest_without_acpi_gets_the_number_and_nothing_else() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let Ok(kvm) = Kvm::new() else { return testing::skipped(module_path!(), "no usable /dev/kvm") };
        // Without interrupt controllers: none is raised.
        renew(&kvm.create_vm().unwrap(), ram.memory()).unwrap();
        assert_ne!(at(&ram, GENERATION), [0; 16]);
        assert_eq!(at(&ram, VMCLOCK), [0; 112]);
    }
}
