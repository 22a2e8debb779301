//! The state of one vCPU: read from KVM, and given back.

use kvm_bindings::{
    CpuId, KVM_CAP_XSAVE2, KVM_MAX_CPUID_ENTRIES, Xsave, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::StateError;
use super::mirror::{CpuidLeaf, DebugRegisters, Events, Registers, SystemRegisters};
use super::msrs::{self, Savable, TSC_DEADLINE};
use memory::PAGE;

/// Bytes of the local APIC's registers.
const LAPIC_BYTES: usize = size_of::<kvm_lapic_state>();
/// What KVM_GET_XSAVE gives, and the least that KVM_GET_XSAVE2 does.
const XSAVE_BYTES: usize = PAGE;
/// More than any processor's.
const MAX_XSAVE_BYTES: usize = 64 << 10;

/// A paused vCPU, with no access half done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuV1 {
    pub cpuid: Vec<CpuidLeaf>,
    /// None where KVM does not tell.
    pub tsc_khz: Option<u32>,
    pub mp_state: u32,
    pub registers: Registers,
    pub system: SystemRegisters,
    /// The XSAVE area as the processor defines it.
    pub xsave: Vec<u8>,
    /// Extended control registers: number and value.
    pub xcrs: Vec<(u32, u64)>,
    pub debug: DebugRegisters,
    pub lapic: Vec<u8>,
    /// Model-specific registers: number and value.
    pub msrs: Vec<(u32, u64)>,
    pub events: Events,
}

/// Where a vCPU was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saved {
    /// On this host, by this kernel, for a daemon that has kept it since: KVM has what it had.
    Here,
    /// On any host, at any time.
    Anywhere,
}

/// Bytes of the XSAVE area of a vCPU of `vm`.
pub fn xsave_bytes(vm: &VmFd) -> usize {
    let bytes = usize::try_from(vm.check_extension_raw(KVM_CAP_XSAVE2.into())).unwrap_or(0);
    bytes.clamp(XSAVE_BYTES, MAX_XSAVE_BYTES)
}

impl VcpuV1 {
    /// The state of `vcpu`, which is paused, and has completed what it exited for.
    pub fn save(vcpu: &VcpuFd, savable: &Savable, xsave_bytes: usize) -> Result<Self, StateError> {
        let mp_state = vcpu.get_mp_state().map_err(StateError::get("MP_STATE"))?.mp_state;
        let registers = vcpu.get_regs().map_err(StateError::get("REGS"))?.into();
        let system = vcpu.get_sregs().map_err(StateError::get("SREGS"))?.into();
        let xsave = xsave::get(vcpu, xsave_bytes).map_err(StateError::get("XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(StateError::get("XCRS"))?;
        let xcrs = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).map(|xcr| (xcr.xcr, xcr.value)).collect();
        let debug = vcpu.get_debug_regs().map_err(StateError::get("DEBUGREGS"))?.into();
        let lapic = vcpu.get_lapic().map_err(StateError::get("LAPIC"))?;
        let lapic = lapic.regs.iter().map(|byte| byte.cast_unsigned()).collect();
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(StateError::get("CPUID2"))?;
        let cpuid = cpuid.as_slice().iter().map(|leaf| (*leaf).into()).collect();
        let msrs = savable.read(vcpu)?;
        let events = vcpu.get_vcpu_events().map_err(StateError::get("VCPU_EVENTS"))?.into();
        let tsc_khz = vcpu.get_tsc_khz().ok();
        Ok(Self { cpuid, tsc_khz, mp_state, registers, system, xsave, xcrs, debug, lapic, msrs, events })
    }

    /// Makes `vcpu`, on which nothing has run yet, what was saved. One that was saved elsewhere
    /// needs a vCPU with the CPUID of a new guest, with which the saved one is compared. The memory
    /// slots must be there, for some registers point into them; the time stamp counter goes on from
    /// where it was.
    pub fn restore(&self, vcpu: &VcpuFd, saved: Saved, xsave_bytes: usize) -> Result<(), StateError> {
        self.check(xsave_bytes)?;
        if saved == Saved::Anywhere {
            // What it says itself, not what it was given: PVM shows a guest more of the processor.
            let here = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(StateError::get("CPUID2"))?;
            super::cpuid::check_subset(&self.cpuid, &here)?;
        }
        let leaves: Vec<_> = self.cpuid.iter().map(|leaf| (*leaf).into()).collect();
        let cpuid = CpuId::from_entries(&leaves).map_err(|_| StateError::TooLong("CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(StateError::set("CPUID2"))?;
        if let Some(khz) = self.tsc_khz
            && vcpu.get_tsc_khz().ok() != Some(khz)
        {
            vcpu.set_tsc_khz(khz).map_err(StateError::set("TSC_KHZ"))?;
        }
        let mp_state = kvm_mp_state { mp_state: self.mp_state };
        vcpu.set_mp_state(mp_state).map_err(StateError::set("MP_STATE"))?;
        vcpu.set_regs(&self.registers.into()).map_err(StateError::set("REGS"))?;
        vcpu.set_sregs(&self.system.into()).map_err(StateError::set("SREGS"))?;
        xsave::set(vcpu, &self.xsave, xsave_bytes).map_err(StateError::set("XSAVE"))?;
        // A host without XSAVE has none, and refuses even an empty list.
        if !self.xcrs.is_empty() {
            vcpu.set_xcrs(&self.kvm_xcrs()).map_err(StateError::set("XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug.into()).map_err(StateError::set("DEBUGREGS"))?;
        vcpu.set_lapic(&self.kvm_lapic()).map_err(StateError::set("LAPIC"))?;
        // The counter before the time that is compared with it.
        let is_late = |(index, _): &&(u32, u64)| *index == TSC_DEADLINE;
        let early = self.msrs.iter().filter(|msr| !is_late(msr));
        let entries: Vec<_> = early.chain(self.msrs.iter().filter(is_late)).map(msr_entry).collect();
        msrs::write(vcpu, &entries)?;
        vcpu.set_vcpu_events(&self.events.into()).map_err(StateError::set("VCPU_EVENTS"))?;
        Ok(())
    }

    /// What can be seen to be wrong without KVM.
    fn check(&self, xsave_bytes: usize) -> Result<(), StateError> {
        if self.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(StateError::TooLong("CPUID"));
        }
        if self.xsave.len() > xsave_bytes {
            return Err(StateError::Xsave { bytes: self.xsave.len(), host: xsave_bytes });
        }
        if self.xsave.len() < XSAVE_BYTES || !self.xsave.len().is_multiple_of(4) {
            return Err(StateError::Length {
                what: "XSAVE area",
                bytes: self.xsave.len(),
                expected: XSAVE_BYTES,
            });
        }
        if self.lapic.len() != LAPIC_BYTES {
            return Err(StateError::Length {
                what: "local APIC",
                bytes: self.lapic.len(),
                expected: LAPIC_BYTES,
            });
        }
        match self.xcrs.len() > kvm_xcrs::default().xcrs.len() || self.msrs.len() > msrs::MAX {
            true => Err(StateError::TooLong("list of registers")),
            false => Ok(()),
        }
    }

    fn kvm_xcrs(&self) -> kvm_xcrs {
        let mut xcrs = kvm_xcrs { nr_xcrs: self.xcrs.len() as u32, ..Default::default() };
        for (to, (number, value)) in xcrs.xcrs.iter_mut().zip(&self.xcrs) {
            (to.xcr, to.value) = (*number, *value);
        }
        xcrs
    }

    fn kvm_lapic(&self) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs.iter_mut().zip(&self.lapic).for_each(|(to, byte)| *to = byte.cast_signed());
        lapic
    }
}

fn msr_entry(&(index, data): &(u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

mod xsave {
    #![expect(unsafe_code, reason = "the XSAVE area is as long as the host's processor says")]

    use super::*;

    /// `bytes` are as many as KVM_CAP_XSAVE2 says, 4096 at the least.
    pub fn get(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, kvm_ioctls::Error> {
        let words = |region: &[u32]| region.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        if bytes <= XSAVE_BYTES {
            return Ok(words(&vcpu.get_xsave()?.region));
        }
        let mut area =
            Xsave::new((bytes - XSAVE_BYTES) / 4).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        // SAFETY: it has room for as much as KVM says that it writes.
        unsafe { vcpu.get_xsave2(&mut area) }?;
        let mut all = words(&area.as_fam_struct_ref().xsave.region);
        all.extend(words(area.as_slice()));
        Ok(all)
    }

    /// `saved` is not longer than `bytes`, which are as many as KVM_CAP_XSAVE2 says.
    pub fn set(vcpu: &VcpuFd, saved: &[u8], bytes: usize) -> Result<(), kvm_ioctls::Error> {
        let extra = bytes.saturating_sub(XSAVE_BYTES) / 4;
        let mut area = Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        let mut words = saved.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
        let mut region = kvm_xsave::default();
        region.region.iter_mut().zip(&mut words).for_each(|(to, word)| *to = word);
        // SAFETY: the length of the area, which is not changed, is no part of what is replaced.
        unsafe { area.as_mut_fam_struct() }.xsave.region = region.region;
        area.as_mut_slice().iter_mut().zip(words).for_each(|(to, word)| *to = word);
        // SAFETY: it is as long as KVM says that it reads.
        unsafe { vcpu.set_xsave2(&area) }
    }
}
