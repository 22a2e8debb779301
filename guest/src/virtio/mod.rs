//! The driver's side of virtio-mmio, version 2 (Virtio 1.2, sections 3.1 and 4.2), and of the
//! devices behind it.
//!
//! Polled: nothing here needs an interrupt. Registers are reached through a [`Transport`], shared
//! memory is a slice of atomic words with its guest-physical address, so all of it runs on a host
//! against a device of a test's own.

pub mod balloon;
pub mod ring;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod ring_tests;

/// "virt", what [`register::MAGIC_VALUE`] reads as.
pub const MAGIC: u32 = 0x7472_6976;
/// What [`register::VERSION`] reads as.
pub const VERSION: u32 = 2;
/// Bytes from one device's registers to the next one's.
pub const WINDOW_BYTES: u64 = 0x1000;

/// Offsets of registers, in bytes. All are words of 32 bits.
pub mod register {
    pub const MAGIC_VALUE: u32 = 0x000;
    pub const VERSION: u32 = 0x004;
    pub const DEVICE_ID: u32 = 0x008;
    pub const DEVICE_FEATURES: u32 = 0x010;
    pub const DEVICE_FEATURES_SEL: u32 = 0x014;
    pub const DRIVER_FEATURES: u32 = 0x020;
    pub const DRIVER_FEATURES_SEL: u32 = 0x024;
    pub const QUEUE_SEL: u32 = 0x030;
    pub const QUEUE_NUM_MAX: u32 = 0x034;
    pub const QUEUE_NUM: u32 = 0x038;
    pub const QUEUE_READY: u32 = 0x044;
    pub const QUEUE_NOTIFY: u32 = 0x050;
    pub const INTERRUPT_STATUS: u32 = 0x060;
    pub const INTERRUPT_ACK: u32 = 0x064;
    pub const STATUS: u32 = 0x070;
    pub const QUEUE_DESC_LOW: u32 = 0x080;
    pub const QUEUE_DESC_HIGH: u32 = 0x084;
    pub const QUEUE_DRIVER_LOW: u32 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u32 = 0x094;
    pub const QUEUE_DEVICE_LOW: u32 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u32 = 0x0a4;
    pub const CONFIG: u32 = 0x100;
}

/// Bits of [`register::STATUS`].
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// [`register::INTERRUPT_STATUS`]: the configuration changed, or the device needs a reset.
pub const INTERRUPT_CONFIG: u32 = 2;

/// Feature bit VIRTIO_F_VERSION_1, without which there is no virtio 1.
pub const F_VERSION_1: u64 = 1 << 32;

/// How often the status is read until a reset must be over. Each read is an exit to the VMM.
const RESET_READS_MAX: usize = 1000;

/// Whether all of a register at `offset`, a word of 32 bits, is in a device's window and aligned.
pub const fn is_register(offset: u32) -> bool {
    offset.is_multiple_of(4) && (offset as u64) < WINDOW_BYTES
}

/// A device's registers. Every access may take as long as an exit to the VMM.
pub trait Transport {
    /// Reads the register at `offset`.
    fn read(&mut self, offset: u32) -> u32;
    /// Writes the register at `offset`.
    fn write(&mut self, offset: u32, value: u32);
}

/// The transport of a guest that drives no device: there is none of these.
#[derive(Debug)]
pub enum NoDevice {}

impl Transport for NoDevice {
    fn read(&mut self, _offset: u32) -> u32 {
        match *self {}
    }

    fn write(&mut self, _offset: u32, _value: u32) {
        match *self {}
    }
}

/// Why a device could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError {
    /// It does not finish its reset.
    Reset,
    /// It is older than virtio 1.
    NotVersion1,
    /// It does not take these features.
    Features(u64),
    /// It has no queue of this number, or says it is not usable.
    Queue(u32),
}

impl core::fmt::Display for StartError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Reset => f.write_str("the device does not finish its reset"),
            Self::NotVersion1 => f.write_str("the device is no virtio 1 device"),
            Self::Features(features) => write!(f, "the device refuses features {features:#x}"),
            Self::Queue(queue) => write!(f, "the device refuses queue {queue}"),
        }
    }
}

impl core::error::Error for StartError {}

/// Resets the device and waits, a bounded time, until it has done so.
///
/// # Errors
/// [`StartError::Reset`].
pub fn reset(transport: &mut impl Transport) -> Result<(), StartError> {
    transport.write(register::STATUS, 0);
    let done = (0..RESET_READS_MAX).any(|_| transport.read(register::STATUS) == 0);
    if done { Ok(()) } else { Err(StartError::Reset) }
}

/// Resets the device and agrees on those of its features that are in `known`. Returns them.
///
/// # Errors
/// [`StartError`], with FAILED set.
pub fn negotiate(transport: &mut impl Transport, known: u64) -> Result<u64, StartError> {
    reset(transport)?;
    transport.write(register::STATUS, status::ACKNOWLEDGE);
    transport.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    let mut offered = 0;
    for word in 0..2 {
        transport.write(register::DEVICE_FEATURES_SEL, word);
        offered |= u64::from(transport.read(register::DEVICE_FEATURES)) << (32 * word);
    }
    if offered & F_VERSION_1 == 0 {
        fail(transport);
        return Err(StartError::NotVersion1);
    }
    let features = offered & (known | F_VERSION_1);
    for word in 0..2 {
        transport.write(register::DRIVER_FEATURES_SEL, word);
        transport.write(register::DRIVER_FEATURES, (features >> (32 * word)) as u32);
    }
    let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    transport.write(register::STATUS, wanted);
    if transport.read(register::STATUS) & status::FEATURES_OK == 0 {
        fail(transport);
        return Err(StartError::Features(features));
    }
    Ok(features)
}

/// Lets the device begin. To be called when its queues are set up.
pub fn drive(transport: &mut impl Transport) {
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
    transport.write(register::STATUS, ready);
}

/// Sets FAILED: the driver has given up.
pub fn fail(transport: &mut impl Transport) {
    let before = transport.read(register::STATUS);
    transport.write(register::STATUS, before | status::FAILED);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_is_a_whole_word_of_the_window() {
        let last = WINDOW_BYTES as u32 - 4;
        assert!(is_register(register::MAGIC_VALUE) && is_register(register::CONFIG) && is_register(last));
        for offset in [2, register::CONFIG + 1, last + 1, last + 4, u32::MAX, u32::MAX - 3] {
            assert!(!is_register(offset), "{offset:#x}");
        }
    }
}
