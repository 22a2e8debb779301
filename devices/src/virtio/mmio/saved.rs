//! A transport and its device as data, and the way back.

use std::sync::Arc;

use virtio_queue::QueueT;

use super::*;
use crate::state::{QueueState as SavedQueue, RestoreError, TransportState};

impl MmioTransport {
    /// Its state. The device must not be in use meanwhile.
    pub fn save(&self) -> TransportState {
        let queue = |(index, queue): (usize, &QueueState)| {
            let setup = &queue.setup;
            let built = queue.built.as_ref().map(|built| (built.next_avail(), built.next_used()));
            let place = built.or_else(|| self.device.queue_place(index)).unwrap_or_default();
            SavedQueue {
                size: setup.size,
                desc_table: setup.desc_table,
                avail_ring: setup.avail_ring,
                used_ring: setup.used_ring,
                ready: setup.ready,
                next_avail: place.0,
                next_used: place.1,
            }
        };
        TransportState {
            device_id: self.device.device_id(),
            status: self.status,
            needs_reset: self.interrupt.needs_reset(),
            interrupt_status: self.interrupt.status(),
            generation: self.interrupt.generation(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            queues: self.queues.iter().enumerate().map(queue).collect(),
            device: self.device.save(),
        }
    }

    /// Restores what was saved; no driver has seen the device yet. Raises no interrupt: see
    /// [`MmioTransport::wake`].
    ///
    /// # Errors
    /// The state is of another device, one that no driver reaches, or has a ring outside RAM. The
    /// device is reset then.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let device = self.device.device_id();
        if state.device_id != device {
            return Err(RestoreError::Device { found: state.device_id, expected: device });
        }
        if state.queues.len() != self.queues.len() {
            let (found, expected) = (state.queues.len(), self.queues.len());
            return Err(RestoreError::Queues { device, found, expected });
        }
        self.check_status(state)?;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        let event_idx = state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (index, (queue, saved)) in self.queues.iter_mut().zip(&state.queues).enumerate() {
            queue.setup = QueueSetup {
                size: saved.size,
                desc_table: saved.desc_table,
                avail_ring: saved.avail_ring,
                used_ring: saved.used_ring,
                ready: saved.ready,
            };
            queue.built = None;
            if saved.ready {
                let built = queue.setup.build(queue.max, event_idx, &self.memory);
                let wrong = |error: &dyn std::error::Error| RestoreError::Queue {
                    device,
                    queue: index,
                    why: error.to_string(),
                };
                let mut built = built.map_err(|error| wrong(&error))?;
                built.set_next_avail(saved.next_avail);
                built.set_next_used(saved.next_used);
                queue.built = Some(built);
            }
        }
        self.interrupt.restore(state.interrupt_status, state.generation, state.needs_reset);
        self.status = state.status;
        if state.status & DRIVER_OK != 0 {
            self.device.activate(Activation {
                memory: Arc::clone(&self.memory),
                queues: self.queues.iter_mut().map(|queue| queue.built.take()).collect(),
                features: self.driver_features,
                interrupt: self.interrupt.clone(),
            });
        }
        self.device.restore(&state.device)
    }

    /// After [`MmioTransport::restore`], when interrupts arrive: has each queue looked at once, and
    /// each interrupt that waits to be acknowledged arrive once more. Neither does harm if it had
    /// happened before.
    pub fn wake(&self) {
        if self.running() {
            for queue in self.queues.iter().filter(|queue| queue.setup.ready) {
                if let Some(kick) = &queue.kick {
                    let _ = kick.write(1);
                }
            }
        }
        self.interrupt.raise_again();
    }

    /// Whether a driver gets there: by the steps of [`MmioTransport::write_status`], with features
    /// that are offered.
    fn check_status(&self, state: &TransportState) -> Result<(), RestoreError> {
        let TransportState { status, driver_features: features, .. } = *state;
        let steps = [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK];
        let running = steps[3] | DRIVER_OK;
        let is_step = steps.contains(&(status & !FAILED)) || status & !FAILED == running;
        let negotiated = status & FEATURES_OK == 0
            || features & !self.offered_features() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0;
        let ready_early = status & FEATURES_OK == 0 && state.queues.iter().any(|queue| queue.ready);
        match is_step && negotiated && !ready_early {
            true => Ok(()),
            false => Err(RestoreError::Status { device: state.device_id, status, features }),
        }
    }
}

#[cfg(test)]
#[path = "saved_tests.rs"]
mod tests;
