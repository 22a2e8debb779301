//! The devices of a VM that hold state of the guest, as far as they are captured and given back.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use devices::legacy::pci::Pci;
use devices::legacy::pm1::Pm1;
use devices::legacy::serial::Serial;
use devices::state::RestoreError;
use devices::virtio::mmio::MmioTransport;

use super::state::saved::DevicesV1;

/// The devices. Clones are the same ones.
#[derive(Clone)]
pub struct Board {
    pub com1: Arc<Mutex<Serial>>,
    pub com2: Arc<Mutex<Serial>>,
    pub pm1: Arc<Mutex<Pm1>>,
    pub pci: Arc<Mutex<Pci>>,
    /// In the order of their windows.
    pub virtio: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Board {
    /// Their state. They must not be in use meanwhile.
    pub fn save(&self) -> DevicesV1 {
        DevicesV1 {
            com1: os::lock(&self.com1).save(),
            com2: os::lock(&self.com2).save(),
            pm1: os::lock(&self.pm1).save(),
            pci: os::lock(&self.pci).save(),
            virtio: self.virtio.iter().map(|device| os::lock(device).save()).collect(),
        }
    }

    /// Makes them what was saved. The interrupt controllers are what they are to be.
    ///
    /// # Errors
    /// There are others, or one cannot be so.
    pub fn restore(&self, state: &DevicesV1) -> Result<(), RestoreError> {
        let (found, expected) = (state.virtio.len(), self.virtio.len());
        if found != expected {
            return Err(RestoreError::Count { found, expected });
        }
        os::lock(&self.com1).restore(&state.com1)?;
        os::lock(&self.com2).restore(&state.com2)?;
        os::lock(&self.pm1).restore(state.pm1);
        os::lock(&self.pci).restore(state.pci);
        for (device, state) in self.virtio.iter().zip(&state.virtio) {
            os::lock(device).restore(state)?;
        }
        Ok(())
    }

    /// Has them finish what is in flight until `limit`; whether they have. The vCPUs stand still.
    pub fn quiesce(&self, limit: Instant) -> bool {
        self.virtio.iter().all(|device| os::lock(device).quiesce(limit))
    }

    /// Has them look at what is waiting, and interrupt for what was not acknowledged.
    pub fn wake(&self) {
        self.virtio.iter().for_each(|device| os::lock(device).wake());
        for port in [&self.com1, &self.com2] {
            os::lock(port).flush_output();
        }
    }
}
