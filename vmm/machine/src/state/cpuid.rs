//! Whether this host has the features in a guest's CPUID.

use kvm_bindings::CpuId;

use super::StateError;
use super::mirror::CpuidLeaf;

/// Leaves whose bits are features, one by one: what the guest has must be here too. `(function,
/// index, registers)` with a letter for each of eax, ebx, ecx, edx whose bits count.
const FEATURES: [(u32, u32, &str); 8] = [
    (0x1, 0, "cd"),
    (0x7, 0, "bcd"),
    (0x7, 1, "a"),
    (0xd, 0, "ad"),
    (0xd, 1, "acd"),
    (0x8000_0001, 0, "cd"),
    (0x8000_0007, 0, "d"),
    (0x8000_0008, 0, "b"),
];

/// Bits that the VMM sets itself, or that follow the guest's own registers: CPUID 1 ecx
/// TSC_DEADLINE, OSXSAVE, HYPERVISOR; edx HTT; 7 ecx OSPKE.
const OWN: [(u32, char, u32); 3] =
    [(0x1, 'c', 1 << 24 | 1 << 27 | 1 << 31), (0x1, 'd', 1 << 28), (0x7, 'c', 1 << 4)];

/// An error, if the guest's CPUID has a feature that `supported` has not.
pub fn check_subset(guest: &[CpuidLeaf], supported: &CpuId) -> Result<(), StateError> {
    for (function, index, registers) in FEATURES {
        let is_it = |f: u32, i: u32| f == function && i == index;
        let Some(leaf) = guest.iter().find(|leaf| is_it(leaf.function, leaf.index)) else { continue };
        let here = supported.as_slice().iter().find(|leaf| is_it(leaf.function, leaf.index));
        let here: CpuidLeaf = here.copied().unwrap_or_default().into();
        for register in registers.chars() {
            let of = |leaf: &CpuidLeaf| match register {
                'a' => leaf.eax,
                'b' => leaf.ebx,
                'c' => leaf.ecx,
                _ => leaf.edx,
            };
            let own: u32 =
                OWN.iter().filter(|(f, r, _)| (*f, *r) == (function, register)).map(|(.., bits)| bits).sum();
            let missing = of(leaf) & !of(&here) & !own;
            if missing != 0 {
                return Err(StateError::Cpuid { function, index, register, missing });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn a_feature_that_is_not_here_is_named_and_our_own_bits_are_not() {
        let host = kvm_cpuid_entry2 { function: 7, ebx: 0b1010, ..Default::default() };
        let supported = CpuId::from_entries(&[host]).unwrap();
        let guest = |ebx| [CpuidLeaf { function: 7, ebx, ..Default::default() }];
        assert!(check_subset(&guest(0b0010), &supported).is_ok());
        let error = check_subset(&guest(0b0110), &supported).unwrap_err();
        assert!(
            matches!(error, StateError::Cpuid { function: 7, index: 0, register: 'b', missing: 0b100 }),
            "{error}"
        );
        let own = [CpuidLeaf { function: 1, ecx: 1 << 31 | 1 << 24, ..Default::default() }];
        assert!(check_subset(&own, &supported).is_ok());
        let vmx = [CpuidLeaf { function: 1, ecx: 1 << 5, ..Default::default() }];
        assert!(check_subset(&vmx, &supported).is_err(), "nested virtualization is not offered");
    }
}
