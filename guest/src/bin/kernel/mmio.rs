//! Registers of virtio-mmio devices, and the memory that the balloon's device shares.
#![expect(unsafe_code, reason = "device registers are reached through pointers, once their page is mapped")]

use core::ptr;
use core::sync::atomic::AtomicU32;

use guest::virtio::balloon::{DEVICE_ID, SHARED_WORDS};
use guest::virtio::{MAGIC, Transport, VERSION, WINDOW_BYTES, is_register, register};

use crate::memory::{self, DEVICE_BYTES};

#[derive(Debug)]
pub(crate) struct Window {
    /// Mapped uncached by [`find_balloon`], and never unmapped.
    base: u64,
}

impl Transport for Window {
    fn read(&mut self, offset: u32) -> u32 {
        assert!(is_register(offset), "no register is at {offset:#x}");
        // SAFETY: an aligned word, as was just seen, of a mapped window of registers; reading one
        // has no effect on memory.
        unsafe { ptr::read_volatile((self.base + u64::from(offset)) as *const u32) }
    }

    fn write(&mut self, offset: u32, value: u32) {
        assert!(is_register(offset), "no register is at {offset:#x}");
        // SAFETY: as for `read`. What the device writes to memory because of it, it writes to
        // `SHARED`, which is atomics, or to unused pages.
        unsafe { ptr::write_volatile((self.base + u64::from(offset)) as *mut u32, value) }
    }
}

/// The balloon among `count` windows from `base` on, as the command line says them. None if there
/// is none.
pub(crate) fn find_balloon(base: u64, count: u64) -> Option<Window> {
    let mapped = (DEVICE_BYTES - base % DEVICE_BYTES) / WINDOW_BYTES;
    if !base.is_multiple_of(WINDOW_BYTES) || !memory::map_devices(base) {
        return None;
    }
    let windows = (0..count.min(mapped)).map(|n| Window { base: base + n * WINDOW_BYTES });
    // Devices stand one behind the other: the first window without one is the last.
    let mut devices = windows.map_while(|mut window| {
        let known = window.read(register::MAGIC_VALUE) == MAGIC && window.read(register::VERSION) == VERSION;
        known.then_some(window)
    });
    devices.find_map(|mut window| (window.read(register::DEVICE_ID) == DEVICE_ID).then_some(window))
}

#[repr(align(4096))]
struct Shared([AtomicU32; SHARED_WORDS]);

/// Rings and buffers. Mapped to itself as all memory is, so that its address is guest-physical too.
static SHARED: Shared = Shared([const { AtomicU32::new(0) }; SHARED_WORDS]);

/// The memory that the balloon's device shares, and its guest-physical address.
pub(crate) fn shared() -> (&'static [AtomicU32], u64) {
    (&SHARED.0, SHARED.0.as_ptr() as u64)
}
