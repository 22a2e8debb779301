//! CPUID as a guest sees it: what KVM supports, with this VM's topology, the TSC deadline timer,
//! and without nested virtualization.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::error::VmError;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF8000_0001_ECX_SVM: u32 = 1 << 2;

/// What every vCPU of this host can offer, before topology.
pub fn supported(kvm: &Kvm) -> Result<(CpuId, bool), VmError> {
    let cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmError::kvm("read the CPUID it supports"))?;
    Ok((cpuid, kvm.check_extension(Cap::TscDeadlineTimer)))
}

/// The CPUID of vCPU `id` among `count`: one socket, one thread a core.
pub fn for_vcpu(supported: &CpuId, deadline_timer: bool, id: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    let (id32, count32) = (u32::from(id), u32::from(count));
    let core_bits = u32::from(count).next_power_of_two().trailing_zeros();
    for e in cpuid.as_mut_slice() {
        match e.function {
            0x1 => leaf1(e, deadline_timer, id32, count32),
            // Deterministic cache parameters: cores in the package (31:26), threads sharing a cache
            // (25:14).
            0x4 if e.eax & 0x1f != 0 => {
                let level = (e.eax >> 5) & 7;
                let sharing = if level >= 3 { count32 - 1 } else { 0 };
                e.eax = (e.eax & 0x3fff) | ((count32 - 1).min(63) << 26) | (sharing << 14);
            }
            0xb | 0x1f => topology(e, id32, count32, core_bits),
            0x8000_0001 => e.ecx &= !LEAF8000_0001_ECX_SVM,
            // AMD: number of cores less one, and how many bits of the APIC id they take.
            0x8000_0008 => e.ecx = (e.ecx & !0xf0ff) | (core_bits << 12) | (count32 - 1),
            0x8000_001e => {
                e.eax = id32;
                e.ebx = id32;
                e.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

fn leaf1(e: &mut kvm_cpuid_entry2, deadline_timer: bool, id: u32, count: u32) {
    e.ebx = (e.ebx & 0x0000_ffff) | (id << 24) | (count << 16);
    // Merging must know every mapping of guest RAM; a nested guest's it would not.
    e.ecx = (e.ecx & !LEAF1_ECX_VMX) | LEAF1_ECX_HYPERVISOR;
    if deadline_timer {
        e.ecx |= LEAF1_ECX_TSC_DEADLINE;
    }
    e.edx = if count > 1 { e.edx | LEAF1_EDX_HTT } else { e.edx & !LEAF1_EDX_HTT };
}

/// Extended topology: level 0 is threads (one a core), level 1 is cores.
fn topology(e: &mut kvm_cpuid_entry2, id: u32, count: u32, core_bits: u32) {
    e.edx = id;
    (e.eax, e.ebx, e.ecx) = match e.index {
        0 => (0, 1, (1 << 8) | e.index),
        1 => (core_bits, count, (2 << 8) | e.index),
        _ => (0, 0, e.index),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: 0x63, ecx: u32::MAX, edx: u32::MAX, ..Default::default() }
    }

    proptest! {
        #[test]
        fn every_vcpu_has_its_own_id_and_no_nested_virtualization(count in 1u8..=32, pick in 0u8..32) {
            let id = pick % count;
            let leaves = [entry(1, 0), entry(4, 3), entry(0xb, 0), entry(0xb, 1), entry(0x8000_0001, 0)];
            let all = CpuId::from_entries(&leaves).unwrap();
            let seen = for_vcpu(&all, true, id, count);
            let leaf = |n: usize| seen.as_slice()[n];
            prop_assert_eq!(leaf(0).ebx >> 24, u32::from(id));
            prop_assert_eq!(leaf(0).ecx & LEAF1_ECX_VMX, 0);
            prop_assert_ne!(leaf(0).ecx & LEAF1_ECX_TSC_DEADLINE, 0);
            prop_assert_eq!(leaf(3).ebx, u32::from(count));
            prop_assert!(1u32 << leaf(3).eax >= u32::from(count));
            prop_assert_eq!(leaf(4).ecx & LEAF8000_0001_ECX_SVM, 0);
        }
    }
}
