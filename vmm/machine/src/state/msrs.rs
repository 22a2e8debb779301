//! Model-specific registers: which of them are a vCPU's state on this host, and what becomes of
//! those that are not.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::StateError;

/// The time stamp counter.
pub const TSC: u32 = 0x10;
/// When the local APIC's timer goes off, by that counter.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// More than KVM has.
pub const MAX: usize = 1024;

/// What KVM's list leaves out: memory types (fixed, variable, default), and which supervisor states
/// are saved.
fn unlisted() -> impl Iterator<Item = u32> {
    [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f).chain(0x200..=0x20f).chain([0x2ff, XSS])
}

const XSS: u32 = 0xda0;

/// What is not state, though KVM lists it and a guest may have written it: `(first, last)`.
///
/// Async page faults are a promise of this KVM to wake a task of the guest; restored elsewhere it
/// is not kept, and Linux asks for it again on each vCPU only when it starts. Hyper-V's synthetic
/// registers are not offered.
const SKIPPED: [(u32, u32); 1] = [(0x4000_0000, 0x4000_01ff)];

/// Which registers are saved, and what a vCPU has before it has run.
#[derive(Clone, Debug, Default)]
pub struct Savable {
    /// Those that can be read and written.
    both: Vec<u32>,
    /// Those that can only be read, with what a fresh vCPU has.
    read_only: Vec<(u32, u64)>,
}

impl Savable {
    /// Looks what `fresh`, a vCPU on which nothing has run and nothing will, can read and write.
    pub fn find(kvm: &Kvm, fresh: &VcpuFd) -> Result<Self, StateError> {
        let listed = kvm.get_msr_index_list().map_err(StateError::get("MSR_INDEX_LIST"))?;
        let skipped = |index: &u32| SKIPPED.iter().any(|(first, last)| (first..=last).contains(&index));
        let mut all: Vec<u32> = listed.as_slice().iter().copied().chain(unlisted()).collect();
        all.retain(|index| !skipped(index));
        all.sort_unstable();
        all.dedup();
        let mut savable = Self::default();
        for index in all {
            let entry = kvm_msr_entry { index, ..Default::default() };
            let mut one = kvm_msrs(&[entry])?;
            if !matches!(fresh.get_msrs(&mut one), Ok(1)) {
                continue;
            }
            let value = one.as_slice().first().map_or(0, |entry| entry.data);
            match fresh.set_msrs(&one) {
                Ok(1) => savable.both.push(index),
                _ => savable.read_only.push((index, value)),
            }
        }
        Ok(savable)
    }

    /// What `vcpu` has in them.
    ///
    /// # Errors
    /// One that cannot be written has another value than in a vCPU that has not run: it could not
    /// be given to a clone.
    pub fn read(&self, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, StateError> {
        let all: Vec<u32> = self.both.iter().copied().chain(self.read_only.iter().map(|(i, _)| *i)).collect();
        let mut values = Vec::with_capacity(all.len());
        let entry = |index: &u32| kvm_msr_entry { index: *index, ..Default::default() };
        let mut asked = kvm_msrs(&all.iter().map(entry).collect::<Vec<_>>())?;
        let read = vcpu.get_msrs(&mut asked).map_err(StateError::get("MSRS"))?;
        if let Some(index) = all.get(read) {
            return Err(StateError::MsrUnread { index: *index });
        }
        for (entry, fresh) in asked
            .as_slice()
            .iter()
            .zip(self.both.iter().map(|_| None).chain(self.read_only.iter().map(|(_, fresh)| Some(*fresh))))
        {
            match fresh {
                None => values.push((entry.index, entry.data)),
                Some(fresh) if fresh == entry.data => {}
                Some(_) => return Err(StateError::MsrReadOnly { index: entry.index, value: entry.data }),
            }
        }
        Ok(values)
    }
}

/// Gives `vcpu` these, in this order.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let set = vcpu.set_msrs(&kvm_msrs(entries)?).map_err(StateError::set("MSRS"))?;
    match entries.get(set) {
        None => Ok(()),
        Some(entry) => Err(StateError::MsrRefused { index: entry.index, value: entry.data }),
    }
}

/// [`Msrs`] of these.
pub(super) fn kvm_msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    Msrs::from_entries(entries).map_err(|_| StateError::TooLong("list of registers"))
}
