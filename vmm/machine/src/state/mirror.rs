//! KVM's structures of registers as our own: named fields, without padding, with a form that stays
//! when KVM's bindings change.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_pic_state, kvm_pit_channel_state, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1, kvm_vcpu_events__bindgen_ty_2,
    kvm_vcpu_events__bindgen_ty_3, kvm_vcpu_events__bindgen_ty_4, kvm_vcpu_events__bindgen_ty_5,
};
use serde::{Deserialize, Serialize};

/// A structure with fields of the same names as KVM's, and the way to and fro. What KVM reserves is 0.
macro_rules! mirror {
    ($name:ident = $kvm:ident { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name { $(pub $field: $type),* }

        impl From<$kvm> for $name {
            fn from(kvm: $kvm) -> Self {
                Self { $($field: kvm.$field.into()),* }
            }
        }

        impl From<$name> for $kvm {
            #[allow(clippy::needless_update, reason = "not all of KVM's have reserved fields")]
            fn from(own: $name) -> Self {
                Self { $($field: own.$field.into(),)* ..Default::default() }
            }
        }
    };
}

mirror!(
    Registers = kvm_regs {
        rax: u64,
        rbx: u64,
        rcx: u64,
        rdx: u64,
        rsi: u64,
        rdi: u64,
        rsp: u64,
        rbp: u64,
        r8: u64,
        r9: u64,
        r10: u64,
        r11: u64,
        r12: u64,
        r13: u64,
        r14: u64,
        r15: u64,
        rip: u64,
        rflags: u64,
    }
);

mirror!(
    Segment = kvm_segment {
        base: u64,
        limit: u32,
        selector: u16,
        type_: u8,
        present: u8,
        dpl: u8,
        db: u8,
        s: u8,
        l: u8,
        g: u8,
        avl: u8,
        unusable: u8,
    }
);

mirror!(Table = kvm_dtable { base: u64, limit: u16 });

mirror!(
    SystemRegisters = kvm_sregs {
        cs: Segment,
        ds: Segment,
        es: Segment,
        fs: Segment,
        gs: Segment,
        ss: Segment,
        tr: Segment,
        ldt: Segment,
        gdt: Table,
        idt: Table,
        cr0: u64,
        cr2: u64,
        cr3: u64,
        cr4: u64,
        cr8: u64,
        efer: u64,
        apic_base: u64,
        interrupt_bitmap: [u64; 4],
    }
);

mirror!(DebugRegisters = kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64 });

mirror!(
    Exception = kvm_vcpu_events__bindgen_ty_1 {
        injected: u8,
        nr: u8,
        has_error_code: u8,
        pending: u8,
        error_code: u32,
    }
);
mirror!(Injected = kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8 });
mirror!(Nmi = kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8 });
mirror!(Smi = kvm_vcpu_events__bindgen_ty_4 { smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8 });
mirror!(TripleFault = kvm_vcpu_events__bindgen_ty_5 { pending: u8 });

mirror!(
    Events = kvm_vcpu_events {
        exception: Exception,
        interrupt: Injected,
        nmi: Nmi,
        sipi_vector: u32,
        flags: u32,
        smi: Smi,
        triple_fault: TripleFault,
        exception_has_payload: u8,
        exception_payload: u64,
    }
);

mirror!(
    CpuidLeaf =
        kvm_cpuid_entry2 { function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32 }
);

mirror!(
    Pic = kvm_pic_state {
        last_irr: u8,
        irr: u8,
        imr: u8,
        isr: u8,
        priority_add: u8,
        irq_base: u8,
        read_reg_select: u8,
        poll: u8,
        special_mask: u8,
        init_state: u8,
        auto_eoi: u8,
        rotate_on_auto_eoi: u8,
        special_fully_nested_mode: u8,
        init4: u8,
        elcr: u8,
        elcr_mask: u8,
    }
);

mirror!(
    PitChannel = kvm_pit_channel_state {
        count: u32,
        latched_count: u16,
        count_latched: u8,
        status_latched: u8,
        status: u8,
        read_state: u8,
        write_state: u8,
        write_latch: u8,
        rw_mode: u8,
        mode: u8,
        bcd: u8,
        gate: u8,
        count_load_time: i64,
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mirrored_comes_back_as_it_was() {
        let segment = kvm_segment { base: 1, limit: 2, selector: 3, unusable: 4, ..Default::default() };
        let sregs = kvm_sregs { tr: segment, efer: 5, interrupt_bitmap: [6, 7, 8, 9], ..Default::default() };
        assert_eq!(kvm_sregs::from(SystemRegisters::from(sregs)), sregs);
        let regs = kvm_regs { rax: 1, r15: 2, rip: 3, rflags: 4, ..Default::default() };
        assert_eq!(kvm_regs::from(Registers::from(regs)), regs);
        let mut events = kvm_vcpu_events { exception_payload: 7, flags: 13, ..Default::default() };
        events.smi.latched_init = 1;
        assert_eq!(kvm_vcpu_events::from(Events::from(events)), events);
    }
}
