//! The time stamp counters of a VM, and its clock, as of one instant. A guest measures the one by
//! the other, and calls a counter unstable that was off by some hundred microseconds.

use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::{VcpuFd, VmFd};

use super::StateError;
use super::msrs::{self, TSC, TSC_DEADLINE, kvm_msrs};
use super::vcpu::VcpuV1;
use attribute::{set_tsc_offset, tsc_offset};

/// How often the two are read; the quickest reading counts, for the reader may be preempted in
/// between.
const READINGS: usize = 16;
/// Ticks that end the reading early: a few microseconds.
const SOON_TICKS: u64 = 20_000;

/// A vCPU's counter at a time of the VM's clock.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// From the host's counter, where KVM tells.
    offset: Option<u64>,
    ticks: u64,
    /// In nanoseconds.
    clock: u64,
}

impl Reading {
    /// Of `vcpu`, which stands still, by its own thread.
    pub fn take(vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, StateError> {
        let offset = tsc_offset(vcpu).ok();
        let (mut best, mut least) = (Self { offset, ticks: counter(vcpu)?, clock: 0 }, u64::MAX);
        for _ in 0..READINGS {
            let before = counter(vcpu)?;
            let clock = vm.get_clock().map_err(StateError::get("CLOCK"))?.clock;
            let took = counter(vcpu)?.wrapping_sub(before);
            if took < least {
                (best, least) = (Self { offset, ticks: before.wrapping_add(took / 2), clock }, took);
            }
            if least < SOON_TICKS {
                break;
            }
        }
        Ok(best)
    }
}

fn counter(vcpu: &VcpuFd) -> Result<u64, StateError> {
    let mut one = kvm_msrs(&[kvm_msr_entry { index: TSC, ..Default::default() }])?;
    match vcpu.get_msrs(&mut one).map_err(StateError::get("MSRS"))? {
        1 => Ok(one.as_slice().first().map_or(0, |entry| entry.data)),
        _ => Err(StateError::MsrUnread { index: TSC }),
    }
}

/// Ticks in which the clock goes from `from` to `to`, both in nanoseconds; backwards, too.
fn ticks_between(from: u64, to: u64, khz: u32) -> u64 {
    let nanoseconds = i128::from(to) - i128::from(from);
    // Wraps as the counter does.
    (nanoseconds * i128::from(khz) / 1_000_000) as u64
}

/// Gives the saved `vcpus` the counters that they had, or will have, when the clock shows `clock`.
/// What they differ by among each other is kept to the tick. Where KVM does not tell the offsets
/// they stay as they were read.
pub fn pin(vcpus: &mut [VcpuV1], readings: &[Reading], clock: u64) {
    let khz = vcpus.first().and_then(|vcpu| vcpu.tsc_khz);
    let (Some(first), Some(khz)) = (readings.first(), khz) else { return };
    let Some(first_offset) = first.offset else { return };
    let first_ticks = first.ticks.wrapping_add(ticks_between(first.clock, clock, khz));
    for (vcpu, reading) in vcpus.iter_mut().zip(readings) {
        let saved = vcpu.msrs.iter_mut().find(|(index, _)| *index == TSC);
        if let (Some((_, ticks)), Some(offset)) = (saved, reading.offset) {
            *ticks = first_ticks.wrapping_add(offset.wrapping_sub(first_offset));
        }
    }
}

/// Sets the counters of `vcpus`, which were made what `saved` says, by the VM's clock, which was
/// set to `clock` meanwhile: all by one reading, so that they differ among each other as they did.
/// Where KVM has no offsets, it matches counters that are written within a second by itself.
pub fn align(vm: &VmFd, vcpus: &[VcpuFd], saved: &[VcpuV1], clock: u64) -> Result<(), StateError> {
    let (Some(vcpu), Some(first)) = (vcpus.first(), saved.first()) else { return Ok(()) };
    let (Some(khz), Some(first_ticks)) = (first.tsc_khz, tsc(first)) else { return Ok(()) };
    let now = Reading::take(vm, vcpu)?;
    let Some(offset) = now.offset else { return Ok(()) };
    let wanted = first_ticks.wrapping_add(ticks_between(clock, now.clock, khz));
    let offset = offset.wrapping_add(wanted.wrapping_sub(now.ticks));
    for (vcpu, saved) in vcpus.iter().zip(saved) {
        let apart = tsc(saved).map_or(0, |ticks| ticks.wrapping_sub(first_ticks));
        set_tsc_offset(vcpu, offset.wrapping_add(apart)).map_err(StateError::set("TSC_OFFSET"))?;
        // Once more: it was compared with another counter.
        let is_set = |(index, at): &&(u32, u64)| *index == TSC_DEADLINE && *at != 0;
        if let Some((index, data)) = saved.msrs.iter().find(is_set) {
            let deadline = kvm_msr_entry { index: *index, data: *data, ..Default::default() };
            msrs::write(vcpu, &[deadline])?;
        }
    }
    Ok(())
}

/// The counter of a saved vCPU.
pub fn tsc(vcpu: &VcpuV1) -> Option<u64> {
    vcpu.msrs.iter().find(|(index, _)| *index == TSC).map(|(_, value)| *value)
}

mod attribute {
    #![expect(unsafe_code, reason = "kvm-ioctls has no calls for attributes of vCPUs on x86")]

    use std::os::fd::AsRawFd;

    use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
    use kvm_ioctls::VcpuFd;

    /// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`.
    const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
    /// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`.
    const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
    const _: () = assert!(size_of::<kvm_device_attr>() == 24);

    /// The offset of its time stamp counter from the host's.
    pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, kvm_ioctls::Error> {
        let mut offset = 0;
        ask(vcpu, KVM_GET_DEVICE_ATTR, &mut offset).map(|()| offset)
    }

    /// Sets it.
    pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), kvm_ioctls::Error> {
        ask(vcpu, KVM_SET_DEVICE_ATTR, &mut offset)
    }

    fn ask(vcpu: &VcpuFd, request: libc::c_ulong, offset: &mut u64) -> Result<(), kvm_ioctls::Error> {
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: KVM_VCPU_TSC_OFFSET.into(),
            addr: std::ptr::from_mut(offset).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: KVM reads or writes one u64 at the address in it, which is that of `offset`.
        match unsafe { libc::ioctl(vcpu.as_raw_fd(), request, &attribute) } {
            0 => Ok(()),
            _ => Err(kvm_ioctls::Error::last()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_pinned_to_the_clock_and_keep_their_distance() {
        let saved = |ticks| VcpuV1 { msrs: vec![(TSC, ticks)], ..blank() };
        let mut vcpus = [saved(1), saved(2)];
        let reading = |offset, ticks, clock| Reading { offset: Some(offset), ticks, clock };
        // Two ticks a nanosecond; the second was read later, and is 7 ticks behind.
        let readings = [reading(u64::MAX, 1000, 500), reading(u64::MAX - 7, 999_999, 9000)];
        pin(&mut vcpus, &readings, 400);
        assert_eq!(vcpus.each_ref().map(|vcpu| tsc(vcpu).unwrap()), [800, 793]);
        let untold = readings.map(|reading| Reading { offset: None, ..reading });
        pin(&mut vcpus, &untold, 500);
        assert_eq!(vcpus.each_ref().map(|vcpu| tsc(vcpu).unwrap()), [800, 793]);
    }

    fn blank() -> VcpuV1 {
        VcpuV1 {
            cpuid: Vec::new(),
            tsc_khz: Some(2_000_000),
            mp_state: 0,
            registers: Default::default(),
            system: Default::default(),
            xsave: Vec::new(),
            xcrs: Vec::new(),
            debug: Default::default(),
            lapic: Vec::new(),
            msrs: Vec::new(),
            events: Default::default(),
        }
    }
}
