//! ACPI tables: MADT, hardware-reduced FADT, and a DSDT that names the serial ports and each
//! virtio-mmio device (`LNRO0005`), so that a stock kernel finds everything without being told.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use devices::GuestMemory;
use devices::legacy::power::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLP_TYP_S5};
use vm_memory::{Bytes, GuestAddress};

use super::error::VmError;
use super::platform::*;

const OEM: [u8; 6] = *b"SAMEPG";
const OEM_TABLE: [u8; 8] = *b"SAMEPAGE";
const OEM_REVISION: u32 = 1;

/// FADT `IAPC_BOOT_ARCH`: no VGA, no CMOS clock; the keyboard controller bit stays 0 (absent).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Writes all tables and returns the address of the root pointer.
pub fn write(memory: &GuestMemory, vcpus: u8, virtio_devices: usize) -> Result<u64, VmError> {
    let mut at = ACPI + Rsdp::len() as u64;
    let mut put = |table: &dyn Aml| -> Result<u64, VmError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        at = at.next_multiple_of(16);
        let here = at;
        at += bytes.len() as u64;
        if at > ACPI_END {
            return Err(VmError::AcpiRoom { bytes: at - ACPI, room: ACPI_END - ACPI });
        }
        memory.write_slice(&bytes, GuestAddress(here)).map_err(VmError::BootData)?;
        Ok(here)
    };
    let dsdt = put(&dsdt(virtio_devices))?;
    let fadt = put(&fadt(dsdt))?;
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

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u64| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
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
    for n in 0..virtio_devices {
        virtio(n, &mut body);
    }
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
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
                    &aml::Interrupt::new(true, true, false, false, VIRTIO_IRQ + n as u32),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::{Backing, Ram};

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
