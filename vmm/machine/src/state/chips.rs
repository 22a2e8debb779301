//! What KVM keeps for the VM as a whole: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::StateError;
use super::mirror::{Pic, PitChannel};

/// Inputs of the I/O APIC.
const IOAPIC_PINS: usize = 24;

/// The I/O APIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ioapic {
    pub base_address: u64,
    pub ioregsel: u32,
    pub id: u32,
    pub irr: u32,
    /// The redirection table.
    pub redirtbl: [u64; IOAPIC_PINS],
}

/// What a VM has one of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsV1 {
    pub pics: [Pic; 2],
    pub ioapic: Ioapic,
    pub pit: [PitChannel; 3],
    pub pit_flags: u32,
    /// The guest's kvmclock, in nanoseconds.
    pub clock: u64,
}

impl ChipsV1 {
    /// Those of `vm`, which is paused.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let pics = [
            union::pic(&get_chip(vm, "PIC 1", KVM_IRQCHIP_PIC_MASTER)?).into(),
            union::pic(&get_chip(vm, "PIC 2", KVM_IRQCHIP_PIC_SLAVE)?).into(),
        ];
        let ioapic = union::ioapic(&get_chip(vm, "IOAPIC", KVM_IRQCHIP_IOAPIC)?);
        let pit = vm.get_pit2().map_err(StateError::get("PIT2"))?;
        let clock = vm.get_clock().map_err(StateError::get("CLOCK"))?.clock;
        Ok(Self { pics, ioapic, pit: pit.channels.map(Into::into), pit_flags: pit.flags, clock })
    }

    /// Makes those of `vm` be these. The clock goes on from where it was.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        let pit = kvm_pit_state2 {
            channels: self.pit.map(kvm_pit_channel_state::from),
            flags: self.pit_flags,
            ..Default::default()
        };
        vm.set_pit2(&pit).map_err(StateError::set("PIT2"))?;
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(StateError::set("CLOCK"))?;
        let [first, second] = self.pics.map(kvm_pic_state::from);
        vm.set_irqchip(&union::of_pic(KVM_IRQCHIP_PIC_MASTER, first)).map_err(StateError::set("PIC 1"))?;
        vm.set_irqchip(&union::of_pic(KVM_IRQCHIP_PIC_SLAVE, second)).map_err(StateError::set("PIC 2"))?;
        vm.set_irqchip(&union::of_ioapic(&self.ioapic)).map_err(StateError::set("IOAPIC"))
    }
}

fn get_chip(vm: &VmFd, what: &'static str, chip_id: u32) -> Result<kvm_irqchip, StateError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(StateError::get(what))?;
    Ok(chip)
}

mod union {
    #![expect(unsafe_code, reason = "KVM's interrupt controllers share a union, of plain data")]

    use kvm_bindings::{
        kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1, kvm_irqchip__bindgen_ty_1, kvm_pic_state,
    };

    use super::*;

    pub fn pic(chip: &kvm_irqchip) -> kvm_pic_state {
        // SAFETY: every bit pattern is one.
        unsafe { chip.chip.pic }
    }

    pub fn of_pic(chip_id: u32, pic: kvm_pic_state) -> kvm_irqchip {
        kvm_irqchip { chip_id, chip: kvm_irqchip__bindgen_ty_1 { pic }, ..Default::default() }
    }

    pub fn ioapic(chip: &kvm_irqchip) -> Ioapic {
        // SAFETY: every bit pattern is one.
        let ioapic = unsafe { chip.chip.ioapic };
        // SAFETY: as above.
        let redirtbl = ioapic.redirtbl.map(|entry| unsafe { entry.bits });
        let kvm_ioapic_state { base_address, ioregsel, id, irr, .. } = ioapic;
        Ioapic { base_address, ioregsel, id, irr, redirtbl }
    }

    pub fn of_ioapic(own: &Ioapic) -> kvm_irqchip {
        let redirtbl = own.redirtbl.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits });
        let Ioapic { base_address, ioregsel, id, irr, .. } = *own;
        let ioapic = kvm_ioapic_state { base_address, ioregsel, id, irr, redirtbl, ..Default::default() };
        let chip = kvm_irqchip__bindgen_ty_1 { ioapic };
        kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, chip, ..Default::default() }
    }
}
