//! ACPI tables: MADT, FADT with its FACS, and a DSDT that names the serial ports, the panic port,
//! the generation (VMGenID, VMClock) and each virtio-mmio device (`LNRO0005`), so that a stock
//! kernel finds everything without being told.
//!
//! The hardware is not called reduced. Of a machine that is, Linux believes that only EFI can reset
//! it, finds no EFI, and jumps to the BIOS instead of writing the reset register that is named
//! beside; and it leaves the 8259 alone, so that with `noapic` on its command line nothing is left
//! to interrupt it.

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use devices::GuestMemory;
use devices::legacy::pm1::{PM1_CONTROL_LEN, PM1_CONTROL_PORT, PM1_EVENT_LEN, PM1_EVENT_PORT};
use devices::legacy::power::{RESET_PORT, RESET_VALUE, SLP_TYP_S5};
use devices::legacy::pvpanic::{PVPANIC_LEN, PVPANIC_PORT};
use vm_memory::{Bytes, GuestAddress};

use super::error::VmError;
use super::platform::*;

const OEM: [u8; 6] = *b"SAMEPG";
const OEM_TABLE: [u8; 8] = *b"SAMEPAGE";
const OEM_REVISION: u32 = 1;

/// FADT `IAPC_BOOT_ARCH`: no VGA, no CMOS clock; the keyboard controller bit stays 0 (absent).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// MADT `Flags`: there are two 8259s, too.
const PCAT_COMPAT: u32 = 1;
/// ACPI says where the FACS lies: at a multiple of this.
const FACS_ALIGN: u64 = 64;

/// Writes all tables and returns the address of the root pointer.
pub fn write(memory: &GuestMemory, vcpus: u8, virtio_devices: usize) -> Result<u64, VmError> {
    let mut at = ACPI + Rsdp::len() as u64;
    let mut put = |table: &dyn Aml| -> Result<u64, VmError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        at = at.next_multiple_of(FACS_ALIGN);
        let here = at;
        at += bytes.len() as u64;
        if at > ACPI_END {
            return Err(VmError::AcpiRoom { bytes: at - ACPI, room: ACPI_END - ACPI });
        }
        memory.write_slice(&bytes, GuestAddress(here)).map_err(VmError::BootData)?;
        Ok(here)
    };
    let dsdt = put(&dsdt(virtio_devices))?;
    let facs = put(&FACS::new())?;
    let fadt = put(&fadt(dsdt, facs))?;
    let madt = put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    memory.write_slice(&root, GuestAddress(ACPI)).map_err(VmError::BootData)?;
    Ok(ACPI)
}

fn madt(vcpus: u8) -> Sdt {
    let mut body = [LOCAL_APIC, PCAT_COMPAT].map(u32::to_le_bytes).concat();
    for id in 0..vcpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(0, IO_APIC, 0).to_aml_bytes(&mut body);
    body.extend(source_override(SCI_IRQ));
    table(*b"APIC", 5, &body)
}

/// An interrupt source override: ISA interrupt `irq` is active high and level-triggered. Without it
/// ISA's are edges.
fn source_override(irq: u32) -> Vec<u8> {
    const INTERRUPT_SOURCE_OVERRIDE: u8 = 2;
    const ISA: u8 = 0;
    const HIGH_AND_LEVEL: u16 = 0b01 | 0b11 << 2;
    let head = [INTERRUPT_SOURCE_OVERRIDE, 10, ISA, irq as u8];
    [&head[..], &irq.to_le_bytes(), &HIGH_AND_LEVEL.to_le_bytes()].concat()
}

fn fadt(dsdt: u64, facs: u64) -> impl Aml {
    let port = |port: u64| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port);
    let block =
        |port: u64, bytes: u8| GAS::new(AddressSpace::SystemIo, bytes * 8, 0, AccessSize::WordAccess, port);
    // Set, SlpButton says that there is none; PwrButton is clear: the power button is in PM1.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.sci_int = (SCI_IRQ as u16).into();
    (fadt.pm1a_evt_blk, fadt.pm1_evt_len) = ((PM1_EVENT_PORT as u32).into(), PM1_EVENT_LEN);
    (fadt.pm1a_cnt_blk, fadt.pm1_cnt_len) = ((PM1_CONTROL_PORT as u32).into(), PM1_CONTROL_LEN);
    fadt.x_pm1a_evt_blk = block(PM1_EVENT_PORT, PM1_EVENT_LEN);
    fadt.x_pm1a_cnt_blk = block(PM1_CONTROL_PORT, PM1_CONTROL_LEN);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn dsdt(virtio_devices: usize) -> Sdt {
    let mut body = Vec::new();
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&SLP_TYP_S5, &0u8, &0u8, &0u8]))
        .to_aml_bytes(&mut body);
    serial("_SB_.COM1", "COM1", 1, COM1_PORT, COM1_IRQ, &mut body);
    serial("_SB_.COM2", "COM2", 2, COM2_PORT, COM2_IRQ, &mut body);
    pvpanic(&mut body);
    generation(&mut body);
    for n in 0..virtio_devices {
        virtio(n, &mut body);
    }
    table(*b"DSDT", 6, &body)
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

fn pvpanic(out: &mut Vec<u8>) {
    let port = PVPANIC_PORT as u16;
    aml::Device::new(
        "_SB_.PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::IO::new(port, port, 1, PVPANIC_LEN as u8)]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// VMGenID and VMClock, and the event by which both are said to have changed.
fn generation(out: &mut Vec<u8>) {
    /// "Device check" of a device's own: what changed is for its driver to know.
    const CHANGED: u8 = 0x80;
    let page = |at: u64, bytes: u64| aml::Memory32Fixed::new(false, at as u32, bytes as u32);
    let (low, high) = (GENERATION as u32, (GENERATION >> 32) as u32);
    // The range is in _CRS too: a guest's kernel shows its users that, as in /proc/iomem, and not
    // what ADDR says.
    aml::Device::new(
        "_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&page(GENERATION, 16)])),
        ],
    )
    .to_aml_bytes(out);
    aml::Device::new(
        "_SB_.VCLK".into(),
        vec![
            &aml::Name::new("_HID".into(), &"AMZNC10C"),
            &aml::Name::new("_CID".into(), &"VMCLOCK"),
            &aml::Name::new("_DDN".into(), &"VMCLOCK"),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&page(VMCLOCK, VMCLOCK_BYTES)])),
        ],
    )
    .to_aml_bytes(out);
    aml::Device::new(
        "_SB_.GED0".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    GENERATION_IRQ,
                )]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &aml::Notify::new(&aml::Path::new("\\_SB_.VGEN"), &CHANGED),
                    &aml::Notify::new(&aml::Path::new("\\_SB_.VCLK"), &CHANGED),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn serial(path: &str, label: &'static str, uid: u8, port: u16, irq: u32, out: &mut Vec<u8>) {
    aml::Device::new(
        path.into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &uid),
            &aml::Name::new("_DDN".into(), &label),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(port, port, 1, COM_PORTS as u8),
                    &aml::Interrupt::new(true, true, false, false, irq),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn virtio(n: usize, out: &mut Vec<u8>) {
    let base = VIRTIO_BASE + n as u64 * VIRTIO_BYTES;
    aml::Device::new(
        format!("_SB_.V{n:03}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &n),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, base as u32, VIRTIO_BYTES as u32),
                    &aml::Interrupt::new(true, true, false, false, virtio_irq(n)),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::ram::{Backing, Ram};

    #[test]
    fn every_table_sums_to_zero_and_the_largest_machine_fits() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let root = write(ram.memory(), 32, VIRTIO_MAX).unwrap();
        let mut header = [0u8; 36];
        ram.memory().read_slice(&mut header, GuestAddress(root)).unwrap();
        assert_eq!(&header[..8], b"RSD PTR ");
        let xsdt: u64 = ram.memory().read_obj(GuestAddress(root + 24)).unwrap();
        let xsdt_len: u32 = ram.memory().read_obj(GuestAddress(xsdt + 4)).unwrap();
        let mut tables = vec![xsdt];
        for entry in 0..(u64::from(xsdt_len) - 36) / 8 {
            tables.push(ram.memory().read_obj(GuestAddress(xsdt + 36 + entry * 8)).unwrap());
        }
        assert_eq!(tables.len(), 3);
        for at in tables {
            let len: u32 = ram.memory().read_obj(GuestAddress(at + 4)).unwrap();
            let mut bytes = vec![0u8; len as usize];
            ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
            assert_eq!(bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0, "{:?}", &bytes[..4]);
        }
    }
}
