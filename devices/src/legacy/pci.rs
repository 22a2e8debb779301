//! PCI's configuration mechanism 1 with one device behind it, a host bridge; and the reset port
//! between its ports.
//!
//! No device of ours is on PCI. But a kernel that has a PCI driver looks for configuration space,
//! and where there is none Linux says `PCI: Fatal: No config space access function found` at each
//! boot. It takes the mechanism for real when bus 0 has a host bridge. Everything else reads as all
//! ones: no device is there.
//!
//! | port            | register         | behaviour |
//! |-----------------|------------------|-----------|
//! | `0xcf8`         | `CONFIG_ADDRESS` | 4 bytes, taken whole; narrower accesses are not for it |
//! | `0xcf9`         | reset control    | 1 byte; bit 2 going up resets, as chipsets since 1996 have it |
//! | `0xcfc`-`0xcff` | `CONFIG_DATA`    | the register that the address names, in any width; writes are ignored |

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::state::PciState;
use crate::warn::Limited;

/// First port: the address.
pub const PCI_BASE: u64 = 0xcf8;
/// Ports 0xcf8 to 0xcff.
pub const PCI_LEN: u64 = 8;

const RESET_OFFSET: u64 = 1;
const DATA_OFFSET: u64 = 4;

/// In the address: the access is one to configuration space.
const ENABLE: u32 = 1 << 31;
/// In the address: bus, device and function. All are 0 for the host bridge.
const DEVICE_MASK: u32 = 0x00ff_ff00;
/// In the address: the register, a multiple of 4.
const REGISTER_MASK: u32 = 0xfc;

const RESET_CPU: u8 = 1 << 2;
const RESET_MASK: u8 = 0b1110;

/// The host bridge's header by 4 bytes: vendor 0x8086 and device 0x0d57, which Firecracker's and
/// Cloud Hypervisor's bridges have too; no command, no status; class 0x0600 (host bridge). The rest
/// are zeros.
const HOST_BRIDGE: [u32; 3] = [0x0d57_8086, 0, 0x0600_0000];

/// The ports.
#[derive(Debug)]
pub struct Pci {
    address: u32,
    reset_control: u8,
    reset: EventFd,
    failures: Limited,
}

impl Pci {
    /// Ports that write to `reset` when the guest asks for a reset.
    pub fn new(reset: EventFd) -> Self {
        Self {
            address: 0,
            reset_control: 0,
            reset,
            failures: Limited::new("pci: reset request not delivered"),
        }
    }

    /// What it is.
    pub fn save(&self) -> PciState {
        PciState { address: self.address, reset_control: self.reset_control }
    }

    /// Makes it what was saved.
    pub fn restore(&mut self, state: PciState) {
        (self.address, self.reset_control) = (state.address, state.reset_control & RESET_MASK);
    }

    fn register(&self) -> u32 {
        if self.address & ENABLE == 0 || self.address & DEVICE_MASK != 0 {
            return u32::MAX;
        }
        let number = (self.address & REGISTER_MASK) / 4;
        HOST_BRIDGE.get(number as usize).copied().unwrap_or(0)
    }
}

impl BusDevice for Pci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (RESET_OFFSET, 1) => data.fill(self.reset_control),
            (DATA_OFFSET.., _) => {
                let register = self.register().to_le_bytes();
                let wanted = register.iter().skip((offset - DATA_OFFSET) as usize);
                data.iter_mut().zip(wanted).for_each(|(byte, value)| *byte = *value);
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]),
            (RESET_OFFSET, &[value]) => {
                let goes_up = value & !self.reset_control & RESET_CPU != 0;
                self.reset_control = value & RESET_MASK;
                if goes_up {
                    super::request(&self.reset, &self.failures);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn with_event() -> (Pci, EventFd) {
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        (Pci::new(fd.try_clone().unwrap()), fd)
    }

    fn read(pci: &mut Pci, offset: u64, bytes: usize) -> u32 {
        let mut data = [0; 4];
        pci.read(offset, &mut data[..bytes]);
        u32::from_le_bytes(data)
    }

    /// What pci_check_type1() and pci_sanity_check() of Linux look at.
    #[test]
    fn linux_finds_the_mechanism_and_one_bridge() {
        let (mut pci, reset) = with_event();
        pci.write(3, &[0x01]);
        pci.write(0, &ENABLE.to_le_bytes());
        assert_eq!(read(&mut pci, 0, 4), ENABLE);
        pci.write(0, &(ENABLE | 0x08).to_le_bytes());
        assert_eq!(read(&mut pci, DATA_OFFSET + 2, 2), 0x0600, "a host bridge");
        assert_eq!(read(&mut pci, DATA_OFFSET + 3, 1), 0x06);
        let mut found = 0;
        for device in 0..0x1_0000 {
            pci.write(0, &(ENABLE | device << 8).to_le_bytes());
            found += u32::from(read(&mut pci, DATA_OFFSET, 4) != u32::MAX);
        }
        assert_eq!(found, 1);
        pci.write(0, &0_u32.to_le_bytes());
        assert_eq!(read(&mut pci, DATA_OFFSET, 4), u32::MAX, "not enabled");
        assert!(reset.read().is_err());
    }

    /// What native_machine_emergency_restart() of Linux writes with `reboot=pci`.
    #[test]
    fn the_reset_port_resets_when_its_bit_goes_up() {
        let (mut pci, reset) = with_event();
        let before = read(&mut pci, RESET_OFFSET, 1) as u8 & !0x0e;
        pci.write(RESET_OFFSET, &[before | 2]);
        assert!(reset.read().is_err());
        pci.write(RESET_OFFSET, &[before | 0x0e]);
        assert_eq!(reset.read().unwrap(), 1);
        // The address has the same ports, and does not reset.
        pci.write(0, &u32::MAX.to_le_bytes());
        pci.write(RESET_OFFSET, &[0xff, 0xff]);
        assert!(reset.read().is_err());
    }
}
