//! The other side, for tests: a driver that talks to the transport's registers and lays out rings
//! in RAM.

pub(crate) mod probe;

use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::bindings::virtio_config as status;
use virtio_bindings::bindings::virtio_mmio as reg;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::MmioTransport;
use super::{TRANSPORT_FEATURES, VirtioDevice};
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

pub(crate) const ACKNOWLEDGE: u32 = status::VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(crate) const DRIVER: u32 = status::VIRTIO_CONFIG_S_DRIVER;
pub(crate) const FEATURES_OK: u32 = status::VIRTIO_CONFIG_S_FEATURES_OK;
pub(crate) const DRIVER_OK: u32 = status::VIRTIO_CONFIG_S_DRIVER_OK;
pub(crate) const NEEDS_RESET: u32 = status::VIRTIO_CONFIG_S_NEEDS_RESET;
pub(crate) const FAILED: u32 = status::VIRTIO_CONFIG_S_FAILED;

pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// RAM is two regions with a hole between them.
pub(crate) const LOW_RAM: u64 = 0x10_0000;
pub(crate) const HIGH_RAM_START: u64 = 0x20_0000;
pub(crate) const HIGH_RAM_END: u64 = 0x21_0000;

/// Where buffers may be put; rings are below.
pub(crate) const BUFFERS: u64 = 0x4_0000;

pub(crate) fn ram() -> Arc<GuestMemory> {
    let ranges = [
        (GuestAddress(0), LOW_RAM as usize),
        (GuestAddress(HIGH_RAM_START), (HIGH_RAM_END - HIGH_RAM_START) as usize),
    ];
    Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
}

/// One split virtqueue, as a driver sees it. Each has a 64 KiB area: descriptors, available, used.
pub(crate) struct Ring {
    memory: Arc<GuestMemory>,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) size: u16,
    next_avail: u16,
}

impl Ring {
    pub(crate) fn new(memory: &Arc<GuestMemory>, index: usize, size: u16) -> Self {
        let base = 0x1_0000 * (1 + index as u64);
        Self {
            memory: memory.clone(),
            desc: base,
            avail: base + 0x4000,
            used: base + 0x8000,
            size,
            next_avail: 0,
        }
    }

    pub(crate) fn descriptor_at(
        &self,
        table: u64,
        index: u16,
        (addr, len, flags, next): (u64, u32, u16, u16),
    ) {
        let descriptor = Descriptor::new(addr, len, flags, next);
        self.memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    pub(crate) fn descriptor(&self, index: u16, descriptor: (u64, u32, u16, u16)) {
        self.descriptor_at(self.desc, index, descriptor);
    }

    /// Makes the chain at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail_idx(self.next_avail.wrapping_add(1));
    }

    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.next_avail = index;
        self.memory.write_obj(index, GuestAddress(self.avail + 2)).unwrap();
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.avail)).unwrap();
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.avail + 4 + 2 * u64::from(self.size))).unwrap();
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used + 2)).unwrap()
    }

    /// Head and length of used element `index`.
    pub(crate) fn used(&self, index: u16) -> (u32, u32) {
        let at = self.used + 4 + 8 * u64::from(index % self.size);
        let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }
}

/// A driver and everything around it.
pub(crate) struct Driver {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) transport: MmioTransport,
    pub(crate) irq: EventFd,
}

impl Driver {
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::over(ram(), device)
    }

    /// With other RAM, which must reach up to [`LOW_RAM`] at least.
    pub(crate) fn over(memory: Arc<GuestMemory>, device: impl VirtioDevice + 'static) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let line = IrqLine::new(irq.try_clone().unwrap());
        let transport = MmioTransport::new(memory.clone(), Box::new(device), line);
        Self { memory, transport, irq }
    }

    pub(crate) fn read(&mut self, register: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, register: u32, value: u32) {
        self.transport.write(u64::from(register), &value.to_le_bytes());
    }

    pub(crate) fn status(&mut self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    /// Sets further status bits, as drivers do.
    pub(crate) fn add_status(&mut self, bits: u32) {
        let status = self.status();
        self.write(reg::VIRTIO_MMIO_STATUS, status | bits);
    }

    pub(crate) fn write_features(&mut self, features: u64) {
        for word in 0..2 {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * word)) as u32);
        }
    }

    /// Everything up to FEATURES_OK.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.write(reg::VIRTIO_MMIO_STATUS, 0);
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.write_features(features);
        self.add_status(FEATURES_OK);
    }

    /// Describes a queue without calling it ready.
    pub(crate) fn describe_queue(&mut self, index: usize, size: u32, desc: u64, avail: u64, used: u64) {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, index as u32);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        for (low, high, address) in [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, desc),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH, avail),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, reg::VIRTIO_MMIO_QUEUE_USED_HIGH, used),
        ] {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
    }

    pub(crate) fn add_queue(&mut self, index: usize, size: u16) -> Ring {
        let ring = Ring::new(&self.memory, index, size);
        // A ring from before a reset must not be seen again.
        self.memory.write_slice(&[0; 0x1_0000], GuestAddress(ring.desc)).unwrap();
        self.describe_queue(index, u32::from(size), ring.desc, ring.avail, ring.used);
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        ring
    }

    /// The whole initialisation with every transport feature but EVENT_IDX if `event_idx` is false,
    /// and queue 0.
    pub(crate) fn start(&mut self, size: u16, event_idx: bool) -> Ring {
        let without = if event_idx { 0 } else { 1 << 29 };
        self.negotiate(TRANSPORT_FEATURES & !without);
        let ring = self.add_queue(0, size);
        self.add_status(DRIVER_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        ring
    }

    pub(crate) fn kick(&mut self, queue: u32) {
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }

    /// Takes the pending interrupt: its status bits, acknowledged, or None if the line was quiet.
    pub(crate) fn interrupted(&mut self) -> Option<u32> {
        self.irq.read().ok()?;
        let bits = self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, bits);
        assert_eq!(self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        Some(bits)
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// How long a request may take before a test gives up.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Has a device that a thread serves do what there is to do until `requests` are complete, as the event loop does.
pub(crate) fn finish(driver: &mut Driver, ring: &Ring, requests: u16) {
    let event = driver.transport.device_mut().source().unwrap().0.try_clone_to_owned().unwrap();
    while ring.used_idx() != requests {
        let mut fds = [PollFd::new(&event, PollFlags::IN)];
        let timeout = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "{} of {requests}", ring.used_idx());
        driver.transport.arrived(0);
    }
}
