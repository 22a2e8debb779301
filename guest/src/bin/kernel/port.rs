//! Port I/O, and the VMM's own ports. Each access is an exit to the VMM: tens of microseconds, so
//! count them.
#![expect(unsafe_code, reason = "in and out")]

use core::arch::asm;

use guest::service::{Power, Wait};

/// Parks this vCPU in the VMM until input is pending on a serial port, or for the milliseconds
/// written.
const IDLE: u16 = 0x604;

/// ACPI sleep control: SLP_EN and the sleep type of S5.
const SLEEP: u16 = 0x600;
const SLEEP_S5: u8 = 0x20 | 5 << 2;

/// ACPI reset register.
const RESET: u16 = 0x602;
const RESET_NOW: u8 = 1;

/// The panic port.
const PANIC: u16 = 0x505;
const PANICKED: u8 = 1;

pub(crate) fn write_u8(port: u16, value: u8) {
    // SAFETY: the ports that this program names are the VMM's devices, none of which reaches into
    // memory; the compiler must take memory as read, since the VMM may look at it now.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

pub(crate) fn read_u8(port: u16) -> u8 {
    let value;
    // SAFETY: as for `write_u8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

fn write_u32(port: u16, value: u32) {
    // SAFETY: as for `write_u8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

/// Waits for this time, or until input is pending.
pub(crate) fn wait(wait: Wait) {
    match wait {
        Wait::No => {}
        Wait::Millis(millis) => write_u32(IDLE, millis),
        Wait::Forever => write_u32(IDLE, u32::MAX),
    }
}

/// Ends the guest, which has failed.
pub(crate) fn panicked() -> ! {
    write_u8(PANIC, PANICKED);
    // A VMM without such a port takes an end of any kind.
    end(Power::Off)
}

pub(crate) fn end(power: Power) -> ! {
    match power {
        Power::Off => write_u8(SLEEP, SLEEP_S5),
        Power::Reset => write_u8(RESET, RESET_NOW),
    }
    // A VMM that resumes this vCPU has no such ports. Do not burn its time.
    loop {
        wait(Wait::Forever);
    }
}
