//! ACPI's fixed hardware (ACPI 6.5, 4.8.3.1 and 4.8.3.2): the power button, and power-off as every
//! PC has it.
//!
//! | offset | register     | width | behaviour |
//! |--------|--------------|-------|-----------|
//! | 0      | `PM1_STS`    | 2     | `PWRBTN_STS` (bit 8): the button was pressed; writing 1 clears it |
//! | 2      | `PM1_EN`     | 2     | `PWRBTN_EN` (bit 8): the button interrupts; `GBL_EN` (bit 5) is kept, and nothing comes of it |
//! | 4      | `PM1_CNT`    | 2     | `SCI_EN` (bit 0) always reads 1; writing `SLP_EN` (bit 13) with `SLP_TYP` 5 asks for power-off |
//!
//! Its interrupt, the SCI, is level-triggered: high while the button was pressed and is to
//! interrupt. There is no PM timer, no sleep button, no alarm clock, and no general-purpose event.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::lock::lock;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::legacy::power::SLP_TYP_S5;
use crate::state::Pm1State;
use crate::warn::Limited;

/// First port of the registers.
pub const PM1_BASE: u64 = 0x608;
/// Ports of the registers.
pub const PM1_LEN: u64 = 6;
/// `PM1a_EVT_BLK` for the FADT: status and enable.
pub const PM1_EVENT_PORT: u64 = PM1_BASE;
/// `PM1_EVT_LEN` for the FADT.
pub const PM1_EVENT_LEN: u8 = 4;
/// `PM1a_CNT_BLK` for the FADT.
pub const PM1_CONTROL_PORT: u64 = PM1_BASE + 4;
/// `PM1_CNT_LEN` for the FADT.
pub const PM1_CONTROL_LEN: u8 = 2;

const POWER_BUTTON: u16 = 1 << 8;
const GLOBAL_LOCK: u16 = 1 << 5;
const WRITABLE_ENABLES: u16 = POWER_BUTTON | GLOBAL_LOCK;

const SCI_EN: u8 = 1;
/// In the upper byte of `PM1_CNT`.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;
const SLP_EN: u8 = 1 << 5;

/// Sets the level of the interrupt.
pub type SetLevel = Box<dyn Fn(bool) + Send>;

struct Events {
    status: u16,
    enable: u16,
    /// The level that the interrupt has.
    level: bool,
    set_level: SetLevel,
}

impl Events {
    fn update(&mut self) {
        let level = self.status & self.enable & POWER_BUTTON != 0;
        if level != self.level {
            self.level = level;
            (self.set_level)(level);
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {:#x}, enable {:#x}, level {}", self.status, self.enable, self.level)
    }
}

/// The register block.
#[derive(Debug)]
pub struct Pm1 {
    events: Arc<Mutex<Events>>,
    off: EventFd,
    unknown_sleep: Limited,
    failures: Limited,
}

/// The button. Clones are the same one.
#[derive(Clone, Debug)]
pub struct PowerButton(Arc<Mutex<Events>>);

impl PowerButton {
    /// Presses it. False if the guest has no driver for it, which may yet come: then it learns of
    /// it.
    pub fn press(&self) -> bool {
        let mut events = lock(&self.0);
        events.status |= POWER_BUTTON;
        events.update();
        events.enable & POWER_BUTTON != 0
    }
}

impl Pm1 {
    /// Registers that set the interrupt by `set_level` and write to `off` for a power-off.
    pub fn new(off: EventFd, set_level: SetLevel) -> Self {
        Self {
            events: Arc::new(Mutex::new(Events { status: 0, enable: 0, level: false, set_level })),
            off,
            unknown_sleep: Limited::new("pm1: guest asked for a sleep state that does not exist"),
            failures: Limited::new("pm1: request not delivered"),
        }
    }

    /// The button of this machine.
    pub fn button(&self) -> PowerButton {
        PowerButton(self.events.clone())
    }

    /// What it is.
    pub fn save(&self) -> Pm1State {
        let events = lock(&self.events);
        Pm1State { status: events.status, enable: events.enable }
    }

    /// Makes it what was saved, and sets the interrupt's level.
    pub fn restore(&mut self, state: Pm1State) {
        let mut events = lock(&self.events);
        (events.status, events.enable) = (state.status & POWER_BUTTON, state.enable & WRITABLE_ENABLES);
        events.update();
    }

    fn sleep(&self, control: u8) {
        if control & SLP_EN == 0 {
            return;
        }
        match (control & SLP_TYP_MASK) >> SLP_TYP_SHIFT {
            SLP_TYP_S5 => super::request(&self.off, &self.failures),
            other => self.unknown_sleep.hit(format_args!("SLP_TYP {other}, only {SLP_TYP_S5} (S5) is known")),
        }
    }
}

impl BusDevice for Pm1 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let events = lock(&self.events);
        let [status, enable] = [events.status, events.enable].map(u16::to_le_bytes);
        let registers = [status[0], status[1], enable[0], enable[1], SCI_EN, 0];
        for (register, byte) in (offset..).zip(data) {
            *byte = usize::try_from(register).ok().and_then(|r| registers.get(r)).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut events = lock(&self.events);
        for (register, &byte) in (offset..).zip(data) {
            let (low, high) = (u16::from(byte), u16::from(byte) << 8);
            match register {
                0 => events.status &= !low,
                1 => events.status &= !high,
                2 => events.enable = (events.enable & 0xff00 | low) & WRITABLE_ENABLES,
                3 => events.enable = (events.enable & 0x00ff | high) & WRITABLE_ENABLES,
                5 => self.sleep(byte),
                _ => {}
            }
        }
        events.update();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn machine() -> (Pm1, EventFd, Arc<AtomicBool>) {
        let off = EventFd::new(EFD_NONBLOCK).unwrap();
        let sci = Arc::new(AtomicBool::new(false));
        let level = sci.clone();
        let set = Box::new(move |high| level.store(high, Ordering::SeqCst));
        (Pm1::new(off.try_clone().unwrap(), set), off, sci)
    }

    fn read(pm1: &mut Pm1, offset: u64) -> u16 {
        let mut data = [0; 2];
        pm1.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_button_interrupts_until_it_is_cleared() {
        let (mut pm1, _off, sci) = machine();
        let button = pm1.button();
        assert!(!button.press(), "there is no driver yet");
        assert!(!sci.load(Ordering::SeqCst));
        // A driver that comes late learns of it.
        pm1.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(sci.load(Ordering::SeqCst));
        assert_eq!(read(&mut pm1, 0), POWER_BUTTON);
        // Other bits do not clear it, byte by byte neither.
        pm1.write(0, &(!POWER_BUTTON).to_le_bytes());
        assert!(sci.load(Ordering::SeqCst));
        pm1.write(1, &[1]);
        assert!(!sci.load(Ordering::SeqCst));
        assert_eq!(read(&mut pm1, 0), 0);
        assert!(button.press());
        assert!(sci.load(Ordering::SeqCst));
        pm1.write(2, &[0, 0]);
        assert!(!sci.load(Ordering::SeqCst), "masked");
    }

    #[test]
    fn enables_read_back_as_acpica_wants_them_and_no_others() {
        let (mut pm1, _off, sci) = machine();
        pm1.write(2, &[0xff, 0xff]);
        assert_eq!(read(&mut pm1, 2), WRITABLE_ENABLES);
        assert_eq!(read(&mut pm1, 4), 1, "SCI_EN, and SLP_EN is never read back");
        assert!(!sci.load(Ordering::SeqCst));
    }

    #[test]
    fn exactly_one_control_value_powers_off() {
        let (mut pm1, off, _sci) = machine();
        for high in 0..=u8::MAX {
            for control in [[0x01, high], [0x00, high]] {
                pm1.write(4, &control);
                assert_eq!(off.read().is_ok(), high & 0x3c == 0x34, "{high:#x}");
            }
        }
        assert_eq!(pm1.unknown_sleep.count(), 7 * 16 * 2);
    }
}
