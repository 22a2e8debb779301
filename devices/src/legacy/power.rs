//! Power-off and reset by ACPI: the hardware-reduced sleep registers (ACPI 6.5, 4.8.3.7) and the
//! reset register (4.8.3.6).
//!
//! | offset | register                  | width | behaviour |
//! |--------|---------------------------|-------|-----------|
//! | 0      | `SLEEP_CONTROL_REG`       | 1     | writing `SLP_EN` with `SLP_TYP` 5 asks for power-off |
//! | 1      | `SLEEP_STATUS_REG`        | 1     | `WAK_STS` (bit 7), always 0: this platform never sleeps, so it never wakes |
//! | 2      | `RESET_REG`               | 1     | writing [`RESET_VALUE`] asks for a reset |
//! | 3      | reserved                  | 1     | reads as 0 |
//!
//! The FADT must name these ports and the DSDT must give `_S5` the type [`SLP_TYP_S5`]. Only S5
//! exists.

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::warn::Limited;

/// First port of the block.
pub const POWER_BASE: u64 = 0x600;
/// Ports in the block.
pub const POWER_LEN: u64 = 4;
/// `SLEEP_CONTROL_REG` for the FADT.
pub const SLEEP_CONTROL_PORT: u64 = POWER_BASE + SLEEP_CONTROL_OFFSET;
/// `SLEEP_STATUS_REG` for the FADT.
pub const SLEEP_STATUS_PORT: u64 = POWER_BASE + 1;
/// `RESET_REG` for the FADT.
pub const RESET_PORT: u64 = POWER_BASE + RESET_OFFSET;
/// `RESET_VALUE` for the FADT.
pub const RESET_VALUE: u8 = 0x01;
/// The sleep type of S5 (soft off), for `_S5`.
pub const SLP_TYP_S5: u8 = 5;

const SLEEP_CONTROL_OFFSET: u64 = 0;
const RESET_OFFSET: u64 = 2;

const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;
const SLP_EN: u8 = 1 << 5;

/// The register block.
#[derive(Debug)]
pub struct Power {
    off: EventFd,
    reset: EventFd,
    unknown_sleep: Limited,
    failures: Limited,
}

impl Power {
    /// A block that writes to `off` for a power-off and to `reset` for a reset.
    pub fn new(off: EventFd, reset: EventFd) -> Self {
        Self {
            off,
            reset,
            unknown_sleep: Limited::new("power: guest asked for a sleep state that does not exist"),
            failures: Limited::new("power: request not delivered"),
        }
    }

    fn write_sleep_control(&self, value: u8) {
        if value & SLP_EN == 0 {
            return;
        }
        match (value & SLP_TYP_MASK) >> SLP_TYP_SHIFT {
            SLP_TYP_S5 => super::request(&self.off, &self.failures),
            other => self.unknown_sleep.hit(format_args!("SLP_TYP {other}, only {SLP_TYP_S5} (S5) is known")),
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, &value) in (offset..).zip(data) {
            match register {
                SLEEP_CONTROL_OFFSET => self.write_sleep_control(value),
                RESET_OFFSET if value == RESET_VALUE => super::request(&self.reset, &self.failures),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn exactly_one_value_powers_off_and_one_resets() {
        let off = EventFd::new(EFD_NONBLOCK).unwrap();
        let reset = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut power = Power::new(off.try_clone().unwrap(), reset.try_clone().unwrap());
        for value in 0..=u8::MAX {
            for offset in 0..POWER_LEN {
                power.write(offset, &[value]);
                let expect_off = offset == 0 && value & 0x3c == 0x34;
                assert_eq!(off.read().is_ok(), expect_off, "{value:#x} at +{offset}");
                assert_eq!(reset.read().is_ok(), offset == 2 && value == 1, "{value:#x} at +{offset}");
            }
        }
        // SLP_EN with the seven types that are not S5, and the two other bits of the register in
        // all values.
        assert_eq!(power.unknown_sleep.count(), 7 * 16);
    }

    #[test]
    fn reads_show_no_wake() {
        let off = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut power = Power::new(off.try_clone().unwrap(), off);
        let mut data = [0xff; 4];
        power.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
