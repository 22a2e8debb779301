//! A device that records what the transport does to it.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use crate::virtio::drain::{Completion, drain};
use crate::virtio::{Activation, Interrupt, Progress, RingError, VirtioDevice};
use crate::warn::Limited;

/// Two queues, one of which may be left out, one feature bit and eight bytes of configuration.
#[derive(Default)]
pub(crate) struct Probe {
    pub(crate) config: [u8; 8],
    pub(crate) active: Option<Activation>,
    pub(crate) seen: Arc<Mutex<Seen>>,
    pub(crate) broken: Option<Limited>,
    /// After each chain, make this head of queue 0 available again: a driver that never stops.
    pub(crate) refill: bool,
}

#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) features: u64,
    pub(crate) queues: Vec<bool>,
    pub(crate) resets: usize,
    pub(crate) chains: usize,
    pub(crate) interrupt: Option<Interrupt>,
}

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        0x2a
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 4]
    }

    fn features(&self) -> u64 {
        1 << 3
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = self.config.get(at).copied().unwrap_or(*byte);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, &byte) in (offset as usize..).zip(data) {
            if let Some(place) = self.config.get_mut(at) {
                *place = byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) {
        let mut seen = self.seen.lock().unwrap();
        seen.features = activation.features;
        seen.queues = activation.queues.iter().map(Option::is_some).collect();
        seen.interrupt = Some(activation.interrupt.clone());
        self.active = Some(activation);
        self.broken = Some(Limited::new("probe"));
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        let Activation { memory, queues, interrupt, .. } = self.active.as_mut().unwrap();
        let queue = queues[index].as_mut().unwrap();
        let avail_idx = GuestAddress(virtio_queue::QueueT::avail_ring(queue) + 2);
        drain(queue, memory, interrupt, self.broken.as_ref().unwrap(), |_| {
            self.seen.lock().unwrap().chains += 1;
            if self.refill {
                let idx: u16 = memory.read_obj(avail_idx).unwrap();
                memory.write_obj(idx.wrapping_add(1), avail_idx).unwrap();
            }
            Completion::Written(0)
        })
    }

    fn reset(&mut self) {
        self.active = None;
        self.seen.lock().unwrap().resets += 1;
    }

    fn queue_place(&self, index: usize) -> Option<(u16, u16)> {
        crate::virtio::place(self.active.as_ref()?.queues.get(index)?.as_ref())
    }
}
