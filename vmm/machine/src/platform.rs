//! The machine a guest sees: where its devices and boot data lie, and on which interrupt each
//! device is.

use memory::layout::HOLE_START;

/// I/O ports of COM1, the console.
pub const COM1_PORT: u16 = 0x3f8;
/// I/O ports of COM2, the control channel.
pub const COM2_PORT: u16 = 0x2f8;
/// Ports of a 16550.
pub const COM_PORTS: u16 = 8;
/// Interrupt of COM1.
pub const COM1_IRQ: u32 = 4;
/// Interrupt of COM2.
pub const COM2_IRQ: u32 = 3;
/// A guest that writes milliseconds here parks its vCPU until input arrives or the time is over.
/// The built-in guest waits so, for in ring 3 it cannot halt.
pub const IDLE_PORT: u16 = 0x604;

/// Interrupt of ACPI's fixed events, level-triggered.
pub const SCI_IRQ: u32 = 9;

/// First virtio-mmio window.
pub const VIRTIO_BASE: u64 = HOLE_START + (256 << 20);
/// Distance between windows, and their size.
pub const VIRTIO_BYTES: u64 = 0x1000;
/// Interrupt of the first virtio device.
const VIRTIO_FIRST_IRQ: u32 = 5;
/// Virtio devices there are interrupts for.
pub const VIRTIO_MAX: usize = 16;

/// Interrupt of virtio device number `n`: they follow one another, and leave ACPI's out.
pub const fn virtio_irq(n: usize) -> u32 {
    let irq = VIRTIO_FIRST_IRQ + n as u32;
    if irq < SCI_IRQ { irq } else { irq + 1 }
}

/// Interrupt that says that the generation is another one: the last input of the I/O APIC.
pub const GENERATION_IRQ: u32 = 23;

const _: () = assert!(virtio_irq(VIRTIO_MAX - 1) < GENERATION_IRQ);

/// Three pages that VMX needs for a task state segment when a vCPU is in real mode.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page that VMX needs for an identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The local interrupt controller.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O interrupt controller.
pub const IO_APIC: u32 = 0xfec0_0000;

/// Boot data below 1 MiB: global descriptor table,
pub const GDT: u64 = 0x500;
/// Linux boot parameters,
pub const BOOT_PARAMS: u64 = 0x7000;
/// stack pointer at entry,
pub const BOOT_STACK: u64 = 0x8ff0;
/// page tables (six pages: PML4, PDPT, four directories),
pub const PAGE_TABLES: u64 = 0x9000;
/// command line,
pub const CMDLINE: u64 = 0x2_0000;
/// with its final zero byte at most as long as Linux accepts.
pub const CMDLINE_BYTES: usize = 2048;
/// ACPI tables, root pointer first.
pub const ACPI: u64 = 0xe_0000;
/// End of the ACPI tables' room.
pub const ACPI_END: u64 = 0xe_e000;
/// The number that is another one in each copy of a guest, 16 bytes on a page of its own,
pub const GENERATION: u64 = 0xe_e000;
/// and the page with VMClock.
pub const VMCLOCK: u64 = 0xe_f000;
/// Bytes of the latter.
pub const VMCLOCK_BYTES: u64 = 0x1000;
/// Where a processor in real mode begins after a reset (F000:FFF0), and kernels jump that want one.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of the low memory a guest may use: from here to [`HIGH_START`] belonged to firmware once.
pub const LOW_END: u64 = 0x9_fc00;
/// Where kernels begin.
pub const HIGH_START: u64 = 0x10_0000;
