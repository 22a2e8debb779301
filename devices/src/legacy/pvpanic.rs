//! The port through which a guest's kernel says that it has panicked (QEMU's `pvpanic`, `QEMU0001`
//! in the DSDT).
//!
//! Reading tells which events are understood, writing sends them. Linux has a driver for it since 3.9.

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::warn::Limited;

/// Its only port.
pub const PVPANIC_PORT: u64 = 0x505;
/// Ports it has.
pub const PVPANIC_LEN: u64 = 1;

/// The guest's kernel has panicked and will do no more.
const PANICKED: u8 = 1 << 0;
/// It has panicked and starts its crash kernel, which goes on in this VM.
const CRASH_LOADED: u8 = 1 << 1;

/// The port.
#[derive(Debug)]
pub struct Pvpanic {
    panicked: EventFd,
    crashes: Limited,
    failures: Limited,
}

impl Pvpanic {
    /// A port that writes to `panicked` when the guest has.
    pub fn new(panicked: EventFd) -> Self {
        Self {
            panicked,
            crashes: Limited::new("pvpanic: guest panicked"),
            failures: Limited::new("pvpanic: panic not delivered"),
        }
    }
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(events) if events & PANICKED != 0 => super::request(&self.panicked, &self.failures),
            Some(events) if events & CRASH_LOADED != 0 => {
                self.crashes.hit(format_args!("its crash kernel takes over"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn only_a_panic_without_a_crash_kernel_is_the_end() {
        let panicked = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut port = Pvpanic::new(panicked.try_clone().unwrap());
        let mut understood = [0];
        port.read(0, &mut understood);
        assert_eq!(understood, [0b11]);
        for events in 0..=u8::MAX {
            port.write(0, &[events]);
            assert_eq!(panicked.read().is_ok(), events & 1 != 0, "{events:#x}");
        }
    }
}
