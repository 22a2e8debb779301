//! The register map of virtio-mmio (Virtio 1.2, table 4.1): which offset means what.

use virtio_bindings::bindings::virtio_mmio as reg;

use super::halves::{set_high, set_low};
use super::{MmioTransport, Progress};
use crate::bus::BusDevice;

const CONFIG_OFFSET: u64 = reg::VIRTIO_MMIO_CONFIG as u64;
/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "SMPG", little-endian. Drivers do not look at it.
const VENDOR: u32 = 0x4750_4d53;

impl MmioTransport {
    fn read_register(&mut self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered_features(), self.device_features_sel),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| u32::from(queue.max)),
            reg::VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| u32::from(queue.setup.ready)),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => self.status(),
            // A region of length -1 is one that does not exist (4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            _ => {
                self.ignored.hit(format_args!("read of register {offset:#x}"));
                0
            }
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NUM => self.set_up(offset, |setup| setup.size = value),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.set_up(offset, |setup| set_low(&mut setup.desc_table, value))
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.set_up(offset, |setup| set_high(&mut setup.desc_table, value))
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.set_up(offset, |setup| set_low(&mut setup.avail_ring, value))
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.set_up(offset, |setup| set_high(&mut setup.avail_ring, value))
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.set_up(offset, |setup| set_low(&mut setup.used_ring, value))
            }
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.set_up(offset, |setup| set_high(&mut setup.used_ring, value))
            }
            reg::VIRTIO_MMIO_QUEUE_READY => self.write_ready(value),
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                let queue = value as usize;
                // What a rate limit holds back is for the event loop, which has timers.
                if let Progress::Later(_) = self.notify(queue)
                    && let Some(kick) = self.queues.get(queue).and_then(|queue| queue.kick.as_ref())
                {
                    let _ = kick.write(1);
                }
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            // No region exists, so any selection gives the same answer.
            reg::VIRTIO_MMIO_SHM_SEL => {}
            _ => self.ignored.hit(format_args!("write of {value:#x} to register {offset:#x}")),
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_OFFSET {
            self.device.read_config(offset - CONFIG_OFFSET, data);
        } else if let (Some(register), Ok(data)) = (aligned(offset), <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = self.read_register(register).to_le_bytes();
        } else {
            self.ignored.hit(format_args!("read of {} bytes at {offset:#x}", data.len()));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_OFFSET {
            self.device.write_config(offset - CONFIG_OFFSET, data);
        } else if let (Some(register), Ok(&data)) = (aligned(offset), <&[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(data));
        } else {
            self.ignored.hit(format_args!("write of {} bytes at {offset:#x}", data.len()));
        }
    }
}

/// Registers are accessed as aligned 32-bit words only (4.2.2.2).
fn aligned(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|offset| offset % 4 == 0)
}

/// Word `sel` of a 64-bit feature mask; there are no further ones.
fn half(features: u64, sel: u32) -> u32 {
    match sel {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
