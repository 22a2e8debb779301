//! An i8042 keyboard controller that knows one command: pulse the reset line (0xFE to port 0x64).
//!
//! `vm_superio::I8042Device` is not used because its status reads as 0, "a controller is here and
//! idle": Linux then sends commands and waits half a second for the answers. Here the status shows
//! an output buffer that never empties, which makes Linux's probe give up after its 16 reads, while
//! the input buffer looks free, so that a kernel that waits for it before a reset does not wait.
//!
//! There is no keyboard, no mouse, no A20 gate.

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::warn::Limited;

/// First port: data.
pub const I8042_BASE: u64 = 0x60;
/// Ports 0x60 to 0x64.
pub const I8042_LEN: u64 = 5;

/// Port 0x61, the NMI status and speaker port, lies inside the range.
const PORT_B_OFFSET: u64 = 1;
/// Port 0x64: status when read, command when written.
const COMMAND_OFFSET: u64 = 4;

const CMD_RESET_CPU: u8 = 0xfe;
const STATUS_OUTPUT_FULL: u8 = 0x01;
/// The output of PIT channel 2. It reads as high because kernels that calibrate their clock with it
/// spin until it is.
const PORT_B_TIMER2_OUT: u8 = 0x20;

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    reset: EventFd,
    failures: Limited,
}

impl I8042 {
    /// A controller that writes to `reset` when the guest asks for a reset.
    pub fn new(reset: EventFd) -> Self {
        Self { reset, failures: Limited::new("i8042: reset request not delivered") }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = match port {
                PORT_B_OFFSET => PORT_B_TIMER2_OUT,
                COMMAND_OFFSET => STATUS_OUTPUT_FULL,
                _ => 0,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // A wide access to a byte-wide ISA device is split into neighbouring ports.
        for (port, &byte) in (offset..).zip(data) {
            if port == COMMAND_OFFSET && byte == CMD_RESET_CPU {
                super::request(&self.reset, &self.failures);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn with_event() -> (I8042, EventFd) {
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        (I8042::new(fd.try_clone().unwrap()), fd)
    }

    #[test]
    fn only_the_reset_command_at_the_command_port_resets() {
        let (mut device, reset) = with_event();
        device.write(0, &[CMD_RESET_CPU]);
        for command in 0..=0xfd {
            device.write(COMMAND_OFFSET, &[command]);
        }
        device.write(COMMAND_OFFSET, &[0xff]);
        assert!(reset.read().is_err());
        device.write(COMMAND_OFFSET, &[CMD_RESET_CPU]);
        assert_eq!(reset.read().unwrap(), 1);
    }

    #[test]
    fn a_wide_write_is_split_into_ports() {
        let (mut device, reset) = with_event();
        device.write(COMMAND_OFFSET - 1, &[0, CMD_RESET_CPU]);
        assert_eq!(reset.read().unwrap(), 1);
    }

    /// What Linux's i8042_flush() and kb_wait() look at.
    #[test]
    fn linux_gives_up_probing_but_never_waits_to_reset() {
        let (mut device, _reset) = with_event();
        let mut status = [0];
        for _ in 0..100 {
            device.read(COMMAND_OFFSET, &mut status);
            assert_eq!(status[0] & 0x01, 0x01, "the output buffer never empties");
            assert_eq!(status[0] & 0x02, 0, "the input buffer is always free");
            device.read(0, &mut [0]);
        }
    }
}
