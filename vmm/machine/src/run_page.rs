//! A vCPU's `kvm_run` as seen beside its file descriptor: a second mapping of the same page.
//!
//! What the descriptor's own mapping is reached by is borrowed anew with every call, so no pointer
//! into it may be kept. This one is its own, and is mapped for as long as it is referenced,
//! wherever its vCPU's thread has got to.
#![expect(unsafe_code, reason = "reads and writes kvm_run beside the kernel")]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::{KvmRunWrapper, VcpuFd};
use memory::PAGE;

// The kernel's page of it has room for all of it.
const _: () = assert!(size_of::<kvm_run>() <= PAGE);

/// What a vCPU's thread and those that interrupt it share of its `kvm_run`.
#[derive(Debug)]
pub(super) struct RunPage {
    immediate_exit: NonNull<AtomicU8>,
    io_size: NonNull<u8>,
    /// What both are in; none in tests without a vCPU.
    _mapping: Option<KvmRunWrapper>,
}

// SAFETY: `immediate_exit` is an atomic. `io_size` is read only, by volatile accesses, and written
// by the kernel alone.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps that of `vcpu`.
    pub(super) fn of(vcpu: &VcpuFd) -> io::Result<Arc<Self>> {
        let mut mapping = KvmRunWrapper::mmap_from_fd(vcpu, PAGE)?;
        // The only time that it is borrowed: from here on these pointers are the way to it.
        let run: *mut kvm_run = mapping.as_mut_ref();
        // SAFETY: this makes a pointer into the structure and reads nothing.
        let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: as above; every member of the union is plain data.
        let io_size = unsafe { &raw mut (*run).__bindgen_anon_1.io.size };
        let pointers = (NonNull::new(immediate_exit.cast()), NonNull::new(io_size));
        let (Some(immediate_exit), Some(io_size)) = pointers else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        Ok(Arc::new(Self { immediate_exit, io_size, _mapping: Some(mapping) }))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: it is mapped as long as `self`, and the kernel and this process only do
        // single-byte accesses to it.
        unsafe { self.immediate_exit.as_ref() }
    }

    /// Makes the next (or current, once a signal has interrupted it) KVM_RUN return at once. May be
    /// called by a signal handler.
    pub(super) fn interrupt(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Lets KVM_RUN go on again.
    pub(super) fn go_on(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Whether the next KVM_RUN returns at once.
    #[cfg(test)]
    pub(super) fn is_interrupted(&self) -> bool {
        self.immediate_exit().load(Ordering::SeqCst) != 0
    }

    /// Bytes of one access of the port exit that KVM_RUN has just returned on this thread. A string
    /// instruction makes many to the same port, of which KVM reports as many as it has at once.
    pub(super) fn operand_bytes(&self) -> usize {
        // SAFETY: it is mapped as long as `self`, and KVM writes it only during KVM_RUN.
        let bytes = unsafe { self.io_size.read_volatile() };
        usize::from(bytes.max(1))
    }
}

#[cfg(test)]
impl RunPage {
    /// One of no vCPU, for ever.
    pub(super) fn alone() -> Arc<Self> {
        let byte = || NonNull::from(Box::leak(Box::new(0u8)));
        Arc::new(Self { immediate_exit: byte().cast(), io_size: byte(), _mapping: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;

    #[test]
    fn it_is_the_vcpus_own_page_and_outlives_the_vcpu() {
        let Ok(kvm) = Kvm::new() else {
            return testing::skipped(module_path!(), "no usable /dev/kvm");
        };
        let vm = kvm.create_vm().unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let page = RunPage::of(&vcpu).unwrap();
        page.interrupt();
        assert_eq!(vcpu.get_kvm_run().immediate_exit, 1);
        let error = io::Error::from(vcpu.run().unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}");
        page.go_on();
        assert_eq!(vcpu.get_kvm_run().immediate_exit, 0);
        vcpu.get_kvm_run().__bindgen_anon_1.io.size = 4;
        assert_eq!(page.operand_bytes(), 4);
        // Interrupting a vCPU that has ended, or whose thread unwinds, writes to memory that is
        // still there.
        drop((vcpu, vm));
        page.interrupt();
        assert!(page.is_interrupted());
    }
}
