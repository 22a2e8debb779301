//! A vCPU's registers at entry: 64-bit long mode, flat segments, the first 4 GiB mapped one to one
//! (Linux x86 boot protocol, "64-bit boot protocol").

use devices::GuestMemory;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::error::VmError;
use super::platform::{BOOT_PARAMS, BOOT_STACK, GDT, PAGE_TABLES};

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT_WRITABLE: u64 = 0b11;
const PDE_HUGE: u64 = 1 << 7;

/// Null, null, 64-bit code, data: selectors 0x10 and 0x18 as Linux wants them.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const LAPIC_MODE_EXT_INT: u32 = 0x7 << 8;
const LAPIC_MODE_NMI: u32 = 0x4 << 8;

/// Writes the descriptor table and the page tables that [`enter`] points the vCPU at.
pub fn write_tables(memory: &GuestMemory) -> Result<(), VmError> {
    let mut at = GDT;
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).map_err(VmError::BootData);
    for entry in GDT_ENTRIES {
        put(at, entry)?;
        at += 8;
    }
    let pdpt = PAGE_TABLES + 0x1000;
    put(PAGE_TABLES, pdpt | PTE_PRESENT_WRITABLE)?;
    for gib in 0..4 {
        let directory = pdpt + 0x1000 * (gib + 1);
        put(pdpt + gib * 8, directory | PTE_PRESENT_WRITABLE)?;
        for n in 0..512 {
            let address = (gib << 30) | (n << 21);
            put(directory + n * 8, address | PTE_PRESENT_WRITABLE | PDE_HUGE)?;
        }
    }
    Ok(())
}

/// Sets what every vCPU needs: FPU, model-specific registers, interrupt pins.
pub fn reset(vcpu: &VcpuFd) -> Result<(), VmError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(VmError::kvm("set the FPU"))?;
    // Not every KVM has each of these; a guest boots without them too.
    for (index, data) in
        [(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK), (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING)]
    {
        if let Ok(msrs) = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]) {
            let _ = vcpu.set_msrs(&msrs);
        }
    }
    let mut lapic = vcpu.get_lapic().map_err(VmError::kvm("read the local APIC"))?;
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LAPIC_MODE_EXT_INT);
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT1, LAPIC_MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(VmError::kvm("set the local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    // The register page is declared as C chars; the value is a little-endian u32.
    let mut bytes = [0u8; 4];
    for (b, r) in bytes.iter_mut().zip(&lapic.regs[register..register + 4]) {
        *b = *r as u8;
    }
    let value = (u32::from_le_bytes(bytes) & !0x700) | mode;
    for (r, b) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
        *r = b as _;
    }
}

/// Points vCPU `number` at the kernel's 64-bit entry. One that is not the first runs then, too,
/// instead of waiting for its startup interrupt.
pub fn enter(vcpu: &VcpuFd, entry: u64, number: u64) -> Result<(), VmError> {
    let mut sregs = vcpu.get_sregs().map_err(VmError::kvm("read the special registers"))?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(VmError::kvm("set the special registers"))?;
    let regs = kvm_regs {
        rip: entry,
        rdi: number,
        rsi: BOOT_PARAMS,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rflags: 0x2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(VmError::kvm("set the registers"))?;
    if number > 0 {
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        vcpu.set_mp_state(runnable).map_err(VmError::kvm("start a vCPU"))?;
    }
    Ok(())
}

fn long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x18, type_: 0x3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    // VMX demands a busy task segment.
    sregs.tr = kvm_segment { limit: 0xffff, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}
