//! Writes to a port that KVM keeps in a ring while the guest runs on, instead of an exit for each
//! (coalesced port I/O, Linux 4.20).
//!
//! For output that the guest does not wait for: the built-in guest's. It asks neither for the state
//! of the port nor for an interrupt, and exits soon after in any case, to wait. Linux's driver
//! waits for an interrupt that the port would never raise, so for other guests there is no ring.
#![expect(unsafe_code, reason = "reads a ring that the kernel writes")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use memory::PAGE;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Writes that fit in the ring; of one that is full each write is an exit.
const ENTRIES: usize = (PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

/// The ring of a VM of which the first vCPU alone writes to these ports: it takes out what that has
/// put in, each time that it has left the guest. What another one writes after all is taken out
/// then, too.
pub(super) struct Ring {
    page: NonNull<kvm_coalesced_mmio_ring>,
}

// SAFETY: the page is reached through its owner alone, which is moved to the vCPU's thread; the
// kernel writes it during KVM_RUN there.
unsafe impl Send for Ring {}

impl Ring {
    /// Has writes to these ports kept in the ring of `vm`. None where KVM cannot: then each is an
    /// exit.
    pub(super) fn of(vm: &VmFd, vcpu: &VcpuFd, ports: &[u16]) -> Option<Self> {
        if !vm.check_extension(Cap::CoalescedPio) {
            return None;
        }
        let ring = Self::map(vcpu).ok()?;
        let keeps = |port: &u16| vm.register_coalesced_mmio(IoEventAddress::Pio((*port).into()), 1).is_ok();
        // Where a later one is refused, its writes stay exits.
        (ports.iter().filter(|port| keeps(port)).count() > 0).then_some(ring)
    }

    fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as u64;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: it is open as long as `vcpu`, which is borrowed.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping where the kernel likes.
        let page = unsafe { mmap(std::ptr::null_mut(), PAGE, prot, flags, vcpu, offset) }?;
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { page })
    }

    /// Takes out what is in it, in order: for each write its port and its bytes.
    pub(super) fn drain(&mut self, mut write: impl FnMut(u64, &[u8])) {
        let ring = self.page.as_ptr();
        // SAFETY: the ring is mapped as long as `self`; this makes pointers into it and reads
        // nothing.
        let (first, last) = unsafe { (&raw mut (*ring).first, &raw mut (*ring).last) };
        // SAFETY: both are aligned, mapped as long as `self`, and only this process and the kernel
        // access them, four bytes at a time.
        let (first, last) = unsafe { (AtomicU32::from_ptr(first), AtomicU32::from_ptr(last)) };
        // The guest's other vCPUs may run and write meanwhile: what the ring holds is enough for
        // once.
        for _ in 0..ENTRIES {
            let at = first.load(Ordering::Relaxed);
            if at == last.load(Ordering::Acquire) || at as usize >= ENTRIES {
                return;
            }
            // SAFETY: the entry is in the page, which was just checked, and the kernel has finished
            // with it.
            let entry = unsafe {
                let entries = (&raw const (*ring).coalesced_mmio).cast::<kvm_coalesced_mmio>();
                entries.add(at as usize).read()
            };
            write(entry.phys_addr, entry.data.get(..entry.len as usize).unwrap_or_default());
            first.store((at + 1) % ENTRIES as u32, Ordering::Release);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing keeps a pointer into it.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{create_vcpus, create_vm};
    use crate::registers;
    use kvm_ioctls::{Kvm, VcpuExit};
    use memory::ram::{Backing, Ram};
    use vm_memory::{Bytes, GuestAddress};

    const PORT: u16 = 0x2f8;
    const END_PORT: u16 = 0x604;
    const CODE_GPA: u64 = 1 << 20;
    const WRITES: usize = 400;
    /// The bytes 0, 1, 2 and so on to one port, 400 of them, and then something to the other.
    const CODE: [u8; 23] = [
        0x66, 0xba, 0xf8, 0x02, // mov dx, PORT
        0x31, 0xc0, // xor eax, eax
        0xb9, 0x90, 0x01, 0x00, 0x00, // mov ecx, 400
        0xee, // out dx, al
        0xfe, 0xc0, // inc al
        0xff, 0xc9, // dec ecx
        0x75, 0xf9, // jnz to the out
        0x66, 0xba, 0x04, 0x06, // mov dx, END_PORT
        0xef, // out dx, eax
    ];

    #[test]
    fn writes_arrive_in_order_with_the_exits_when_it_is_full_and_before_the_next_exit() {
        let Ok(kvm) = Kvm::new() else { return testing::skipped(module_path!(), "no usable /dev/kvm") };
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        registers::write_tables(ram.memory()).unwrap();
        ram.memory().write_slice(&CODE, GuestAddress(CODE_GPA)).unwrap();
        let vm = create_vm(&kvm, &ram).unwrap();
        let mut vcpu = create_vcpus(&kvm, &vm, 1).unwrap().remove(0);
        registers::enter(&vcpu, CODE_GPA, 0).unwrap();
        let Some(mut ring) = Ring::of(&vm, &vcpu, &[PORT]) else {
            return testing::skipped(module_path!(), "this KVM keeps no port writes");
        };
        let (mut seen, mut exits) = (Vec::new(), 0);
        loop {
            let ran = vcpu.run().unwrap();
            exits += 1;
            ring.drain(|port, data| {
                assert_eq!(port, u64::from(PORT));
                seen.extend_from_slice(data);
            });
            match ran {
                VcpuExit::IoOut(PORT, data) => seen.extend_from_slice(data),
                VcpuExit::IoOut(END_PORT, _) => break,
                other => panic!("{other:?}"),
            }
        }
        let all: Vec<u8> = (0..WRITES).map(|n| n as u8).collect();
        assert_eq!(seen, all);
        assert!(exits <= 1 + WRITES / (ENTRIES - 1), "{exits} exits");
        ring.drain(|_, _| panic!("it is empty"));
    }
}
