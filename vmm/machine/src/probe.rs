//! Which KVM this host has and what it can do. Creates one empty VM to be sure, and nothing else.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_BINARY_STATS_FD, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
};
use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;
use thiserror::Error;

/// The device KVM is reached by.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// Why KVM cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The device cannot be opened.
    #[error("cannot open {KVM_DEVICE}")]
    Open(#[source] kvm_ioctls::Error),
    /// Another API than the one every kernel since 2.6.22 has.
    #[error("{KVM_DEVICE} speaks API version {found}, expected {KVM_API_VERSION}")]
    Version {
        /// What it answered.
        found: i32,
    },
    /// No VM can be created.
    #[error("{KVM_DEVICE} opens but creates no VM: is another hypervisor using the processor's extensions?")]
    Create(#[source] kvm_ioctls::Error),
}

/// How KVM runs guest code here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// Intel VMX; with extended page tables, or shadow paging.
    Vmx {
        /// Nested paging is on.
        ept: bool,
    },
    /// AMD SVM; with nested page tables, or shadow paging.
    Svm {
        /// Nested paging is on.
        npt: bool,
    },
    /// No processor extension: guest user mode runs natively, guest ring 0 is emulated, shadow
    /// paging.
    Pvm,
}

impl Backend {
    /// A short name for reports.
    pub fn short_name(self) -> &'static str {
        match self {
            Self::Vmx { ept: true } => "vmx+ept",
            Self::Vmx { ept: false } => "vmx shadow",
            Self::Svm { npt: true } => "svm+npt",
            Self::Svm { npt: false } => "svm shadow",
            Self::Pvm => "pvm",
        }
    }

    /// Whether an unmodified kernel can run: it needs ring 0 at full instruction coverage.
    pub fn runs_stock_kernels(self) -> bool {
        self != Self::Pvm
    }

    /// Whether the processor walks the guest's page tables.
    pub fn nested_paging(self) -> bool {
        matches!(self, Self::Vmx { ept: true } | Self::Svm { npt: true })
    }
}

/// The backend of the loaded KVM module; `None` without one.
pub fn backend() -> Option<Backend> {
    // A VM's process tells it later, too, when it opens no file of the host's any more.
    static BACKEND: OnceLock<Option<Backend>> = OnceLock::new();
    *BACKEND.get_or_init(|| backend_in(Path::new("/sys/module")))
}

/// The backend's short name for reports; "none" without KVM.
pub fn backend_name() -> &'static str {
    backend().map_or("none", Backend::short_name)
}

fn backend_in(modules: &Path) -> Option<Backend> {
    let on = |parameter: &str| {
        let text = fs::read_to_string(modules.join(parameter)).unwrap_or_default();
        matches!(text.trim(), "Y" | "1")
    };
    let loaded = |module: &str| modules.join(module).is_dir();
    // A kernel with PVM has it instead of the others, which may be built in without being in use.
    if loaded("kvm_pvm") {
        Some(Backend::Pvm)
    } else if loaded("kvm_intel") {
        Some(Backend::Vmx { ept: on("kvm_intel/parameters/ept") })
    } else if loaded("kvm_amd") {
        Some(Backend::Svm { npt: on("kvm_amd/parameters/npt") })
    } else {
        None
    }
}

/// What this KVM can do, of what Samepage asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// KVM_GET_API_VERSION.
    pub api_version: i32,
    /// Most vCPUs of a VM.
    pub max_vcpus: usize,
    /// Most memory slots of a VM.
    pub memslots: usize,
    /// Interrupt controllers in the kernel.
    pub irqchip: bool,
    /// Guest memory from our own mappings.
    pub user_memory: bool,
    /// An eventfd that raises an interrupt.
    pub irqfd: bool,
    /// A guest write that signals an eventfd.
    pub ioeventfd: bool,
    /// KVM_RUN that returns at once, for clean pauses.
    pub immediate_exit: bool,
    /// Dirty log with explicit clearing.
    pub manual_dirty_log: bool,
    /// Largest dirty ring in bytes; 0 without.
    pub dirty_ring_bytes: u32,
    /// Binary statistics of VMs and vCPUs.
    pub stats_fd: bool,
    /// Guest time stamp counters may run at another frequency.
    pub tsc_control: bool,
}

impl Capabilities {
    /// The capabilities without which no VM of ours runs, and whether each is there.
    pub fn required(&self) -> [(&'static str, bool); 5] {
        [
            ("irqchip", self.irqchip),
            ("user memory", self.user_memory),
            ("irqfd", self.irqfd),
            ("ioeventfd", self.ioeventfd),
            ("immediate exit", self.immediate_exit),
        ]
    }
}

/// Opens KVM, creates an empty VM, and asks for its capabilities.
pub fn capabilities() -> Result<Capabilities, ProbeError> {
    let kvm = Kvm::new().map_err(ProbeError::Open)?;
    let api_version = kvm.get_api_version();
    if api_version != KVM_API_VERSION as i32 {
        return Err(ProbeError::Version { found: api_version });
    }
    let vm = kvm.create_vm().map_err(ProbeError::Create)?;
    let raw = |capability: u32| vm.check_extension_raw(capability.into()).max(0) as u32;
    let ring = raw(KVM_CAP_DIRTY_LOG_RING).max(raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL));
    Ok(Capabilities {
        api_version,
        max_vcpus: kvm.get_max_vcpus(),
        memslots: kvm.get_nr_memslots(),
        irqchip: vm.check_extension(Cap::Irqchip),
        user_memory: vm.check_extension(Cap::UserMemory),
        irqfd: vm.check_extension(Cap::Irqfd),
        ioeventfd: vm.check_extension(Cap::Ioeventfd),
        immediate_exit: vm.check_extension(Cap::ImmediateExit),
        manual_dirty_log: raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) != 0,
        dirty_ring_bytes: ring,
        stats_fd: raw(KVM_CAP_BINARY_STATS_FD) != 0,
        tsc_control: vm.check_extension(Cap::TscControl),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(parameters: &[(&str, &str)]) -> Option<Backend> {
        let directory = tempfile::tempdir().unwrap();
        for (path, value) in parameters {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        backend_in(directory.path())
    }

    #[test]
    fn the_module_and_its_parameters_name_the_backend() {
        let name = |parameters: &[(&str, &str)]| modules(parameters).map(Backend::short_name);
        assert_eq!(name(&[("kvm_intel/parameters/ept", "Y\n")]), Some("vmx+ept"));
        assert_eq!(name(&[("kvm_intel/parameters/ept", "N\n")]), Some("vmx shadow"));
        assert_eq!(name(&[("kvm_amd/parameters/npt", "1\n")]), Some("svm+npt"));
        assert_eq!(name(&[("kvm_amd/parameters/nested", "1\n")]), Some("svm shadow"));
        assert_eq!(name(&[("kvm_pvm/parameters/force", "N\n")]), Some("pvm"));
        assert_eq!(name(&[("kvm/parameters/tdp_mmu", "N\n")]), None);
    }

    #[test]
    fn this_hosts_kvm_answers_or_says_why_not() {
        match capabilities() {
            Ok(found) => assert!(found.max_vcpus >= 1 && found.memslots >= 1, "{found:?}"),
            Err(error) => assert!(error.to_string().contains(KVM_DEVICE)),
        }
    }
}
