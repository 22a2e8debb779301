//! The virtio devices of a VM, in the order of their windows, and the host's way to each.

use std::fs::File;
use std::sync::Arc;

use devices::rate_limiter::Limiter;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{self, Balloon};
use devices::virtio::block::{Block, Disk, SECTOR_BYTES};
use devices::virtio::net::{Limiters, Net};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::Vsock;
use memory::ram::Ram;

use super::config::VmConfig;
use super::drive::Attached;
use super::error::VmError;
use super::pmem::Regions;
use super::running::NetHandle;

/// What the devices take of the host, opened.
pub(super) struct Opened {
    /// As in the configuration.
    pub(super) disks: Vec<Disk>,
    pub(super) regions: Arc<Regions>,
    pub(super) interfaces: Vec<(Net, Limiters)>,
    pub(super) vsock: Option<Vsock>,
}

/// The host's way to the devices.
pub(super) struct Handles {
    pub(super) entropy: Limiter,
    pub(super) balloon: Option<balloon::Handle>,
    pub(super) drives: Vec<Attached>,
    pub(super) nets: Vec<NetHandle>,
}

/// Makes the devices of a VM of `config` whose memory is `ram`.
pub(super) fn make(
    config: &VmConfig,
    ram: &Ram,
    opened: Opened,
) -> Result<(Vec<Box<dyn VirtioDevice>>, Handles), VmError> {
    let entropy = Limiter::new(config.entropy);
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::limited(entropy.clone()))];
    let balloon = config.balloon.map(|balloon| {
        let (device, handle) = Balloon::new(balloon, ram.memory(), Box::new(ram.clone()));
        devices.push(Box::new(device));
        handle
    });
    // Behind the others, which so are where they are without drives.
    let mut drives = Vec::new();
    for (disk, drive) in opened.disks.into_iter().zip(&config.drives) {
        let duplicate =
            |file: &File| file.try_clone().map_err(VmError::host("duplicate a drive's descriptor"));
        let (file, bytes) = (duplicate(disk.medium.file())?, disk.sectors * SECTOR_BYTES);
        let (top, start) = disk.medium.top();
        let top = drive.overlay.as_ref().map(|_| duplicate(top)).transpose()?.map(|top| (top, start));
        let (device, handle) = Block::new(disk, Box::new(ram.clone()), || jail::enter(jail::Thread::Disk))
            .map_err(VmError::host("start a drive's thread"))?;
        devices.push(Box::new(device));
        let (id, read_only) = (drive.id.clone(), drive.read_only);
        drives.push(Attached { id, file, read_only, top, bytes, handle });
    }
    let mut nets = Vec::new();
    for (interface, limiters) in opened.interfaces {
        nets.push(NetHandle { device: devices.len(), limiters });
        devices.push(Box::new(interface));
    }
    if let Some(vsock) = opened.vsock {
        devices.push(Box::new(vsock));
    }
    for device in opened.regions.devices().map_err(VmError::host("start a thread for persistent memory"))? {
        devices.push(Box::new(device));
    }
    Ok((devices, Handles { entropy, balloon, drives, nets }))
}
