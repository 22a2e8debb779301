use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;

use virtio_bindings::bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::frame::MAX_BYTES;
use super::*;
use crate::bus::BusDevice;
use crate::virtio::TRANSPORT_FEATURES;
use crate::virtio::testing::*;

mod fuzz;
mod limits;
mod receiving;
mod sending;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);
const EVENT_IDX: u64 = 1 << 29;
/// Every feature that a driver can have, without the event index.
const ALL: u64 = TRANSPORT_FEATURES & !EVENT_IDX | OFFERED;
/// CSUM, GUEST_CSUM, MAC, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, HOST_TSO4, HOST_TSO6, HOST_ECN,
/// MRG_RXBUF.
const OFFERED: u64 = 0b1011_1011_1010_0011;

/// A segment with the test at its other end.
struct Segment {
    socket: UnixDatagram,
    offload: Arc<Mutex<Vec<Offload>>>,
}

impl Tap for Segment {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.socket.send(frame).map(drop)
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.socket.recv(frame)
    }

    fn set_offload(&mut self, offload: Offload) -> io::Result<()> {
        self.offload.lock().unwrap().push(offload);
        Ok(())
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

struct Guest {
    driver: Driver,
    host: UnixDatagram,
    offload: Arc<Mutex<Vec<Offload>>>,
    rings: Vec<Ring>,
}

impl Guest {
    fn new(mtu: Option<u16>) -> Self {
        Self::limited(mtu, Limiters::default())
    }

    fn limited(mtu: Option<u16>, limiters: Limiters) -> Self {
        let (ours, host) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        let offload = Arc::default();
        let tap = Segment { socket: ours, offload: Arc::clone(&offload) };
        let driver = Driver::new(Net::limited(Config { mac: MAC, mtu }, Box::new(tap), limiters));
        Self { driver, host, offload, rings: Vec::new() }
    }

    /// With rings of 16 entries.
    fn start(&mut self, features: u64) {
        self.driver.negotiate(features);
        self.rings = (0..2).map(|queue| self.driver.add_queue(queue, 16)).collect();
        self.driver.add_status(DRIVER_OK);
        assert_eq!(self.driver.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
    }

    fn running(features: u64) -> Self {
        let mut guest = Self::new(None);
        guest.start(features);
        guest
    }

    /// Offers the buffer at `slot`, of so many bytes, to receive.
    fn offer(&mut self, slot: u16, bytes: u32) {
        self.rings[RECEIVE].descriptor(slot, (buffer(slot), bytes, WRITE, 0));
        self.rings[RECEIVE].offer(slot);
    }

    /// Has the device look whether the host has sent something.
    fn poll(&mut self) -> Progress {
        self.driver.transport.notify(RECEIVE)
    }

    fn sent(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; MAX_BYTES + 1];
        let bytes = self.host.recv(&mut frame).ok()?;
        frame.truncate(bytes);
        Some(frame)
    }
}

fn buffer(slot: u16) -> u64 {
    BUFFERS + 0x1000 * u64::from(slot)
}

/// A frame of `bytes` bytes, header included, that looks like no other.
fn frame(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|at| if at < HEADER_BYTES { 0 } else { (at as u8).wrapping_mul(7) ^ seed }).collect()
}

#[test]
fn the_driver_is_told_of_its_interface() {
    for mtu in [None, Some(1280)] {
        let mut guest = Guest::new(mtu);
        let mut config = [0xaa; 16];
        guest.driver.transport.read(0x100, &mut config);
        assert_eq!(&config[..6], &MAC.0);
        assert_eq!(config[6..10], [0; 4]);
        assert_eq!(u16::from_le_bytes([config[10], config[11]]), mtu.unwrap_or(0));
        assert_eq!(guest.driver.read(reg::VIRTIO_MMIO_DEVICE_ID), 1);
        let offered = u64::from(guest.driver.read(reg::VIRTIO_MMIO_DEVICE_FEATURES));
        assert_eq!(offered & OFFERED, OFFERED);
        assert_eq!(offered & 1 << 3 != 0, mtu.is_some());
    }
}

#[test]
fn the_tap_leaves_undone_what_the_driver_accepts() {
    let mut guest = Guest::new(None);
    let all = Offload { checksum: true, tso4: true, tso6: true, ecn: true };
    let bit = |bit: u32| 1u64 << bit;
    let (csum, tso4) = (bit(bits::VIRTIO_NET_F_GUEST_CSUM), bit(bits::VIRTIO_NET_F_GUEST_TSO4));
    for (features, expected) in [
        (ALL, all),
        (TRANSPORT_FEATURES, Offload::default()),
        (TRANSPORT_FEATURES | csum, Offload { checksum: true, ..Offload::default() }),
        // Without checksums there is no segmentation.
        (TRANSPORT_FEATURES | tso4, Offload::default()),
    ] {
        guest.start(features);
        assert_eq!(guest.offload.lock().unwrap().last(), Some(&expected));
    }
}

#[test]
fn what_is_an_address() {
    for (text, bytes) in [
        ("02:00:00:00:00:01", [2, 0, 0, 0, 0, 1]),
        ("aA:bb:Cc:dd:EE:ff", [0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]),
    ] {
        let mac: Mac = text.parse().unwrap();
        assert_eq!(mac, Mac(bytes));
        assert_eq!(mac.to_string(), text.to_lowercase());
    }
    for text in [
        "",
        "02",
        "02:00:00:00:00",
        "02:00:00:00:00:00:01",
        "01:00:00:00:00:01",
        "00:00:00:00:00:00",
        "2:0:0:0:0:1",
        "+2:00:00:00:00:01",
        "02-00-00-00-00-01",
    ] {
        let error = text.parse::<Mac>().unwrap_err().to_string();
        assert!(error.contains(&format!("{text:?}")) && error.contains("02:00:00:00:00:01"), "{error}");
    }
    assert_eq!(Mac::local([0xff; 6]), Mac([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]));
}
