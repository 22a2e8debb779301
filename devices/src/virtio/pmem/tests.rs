use std::os::fd::AsRawFd;

use virtio_bindings::bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::*;

const REQUEST: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 0x100;
const START: u64 = 5 << 30;
const BYTES: u64 = 6 << 20;

struct Bench {
    driver: Driver,
    ring: Ring,
    requests: u16,
}

impl Bench {
    fn new(file: Option<File>) -> Self {
        let mut driver = Driver::new(Pmem::new(START, BYTES, file, || {}).unwrap());
        let ring = driver.start(64, true);
        Self { driver, ring, requests: 0 }
    }

    /// Sends a request of these bytes with so much room for its answer; what the used ring says was written, and the first word there.
    fn send(&mut self, request: &[u8], room: u32) -> (u32, u32) {
        self.driver.memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        self.driver.memory.write_obj(0xeeee_eeee_u32, GuestAddress(ANSWER)).unwrap();
        let next = if room > 0 { NEXT } else { 0 };
        self.ring.descriptor(0, (REQUEST, request.len() as u32, next, 1));
        self.ring.descriptor(1, (ANSWER, room, WRITE, 0));
        self.ring.set_used_event(self.requests);
        self.ring.offer(0);
        self.driver.kick(0);
        self.requests += 1;
        finish(&mut self.driver, &self.ring, self.requests);
        let answer = self.driver.memory.read_obj(GuestAddress(ANSWER)).unwrap();
        (self.ring.used(self.requests - 1).1, answer)
    }

    fn flush(&mut self) -> (u32, u32) {
        self.send(&FLUSH.to_le_bytes(), 4)
    }
}

#[test]
fn the_driver_is_told_where_the_file_is_and_flushes_it() {
    let mut bench = Bench::new(Some(tempfile::tempfile().unwrap()));
    let mut config = |offset: u32| u64::from(bench.driver.read(reg::VIRTIO_MMIO_CONFIG + offset));
    assert_eq!(config(0) | config(4) << 32, START);
    assert_eq!(config(8) | config(12) << 32, BYTES);
    assert_eq!(config(16), 0, "and nothing else");
    for _ in 0..200 {
        assert_eq!(bench.flush(), (4, DONE));
    }
    assert_eq!(bench.driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_VRING));
    // What is only read has nothing to be flushed.
    assert_eq!(Bench::new(None).flush(), (4, DONE));
}

#[test]
fn what_is_no_flush_is_refused() {
    let mut bench = Bench::new(Some(tempfile::tempfile().unwrap()));
    assert_eq!(bench.send(&1_u32.to_le_bytes(), 4), (4, REFUSED));
    assert_eq!(bench.send(&[0; 3], 4), (0, 0xeeee_eeee), "no type");
    assert_eq!(bench.send(&[0; 4], 3), (0, 0xeeee_eeee), "no place for the answer");
    assert_eq!(bench.send(&[0; 4], 0), (0, 0xeeee_eeee));
    assert_eq!(bench.send(&[0; 400], 4), (4, DONE), "what follows the type is not looked at");
    assert_eq!(bench.flush(), (4, DONE), "and it goes on");
}

#[test]
fn a_file_that_cannot_be_flushed_is_an_error_of_the_guests() {
    // A pipe knows no fsync.
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    assert!(reader.as_raw_fd() >= 0);
    let mut bench = Bench::new(Some(File::from(reader)));
    assert_eq!(bench.flush(), (4, REFUSED));
}

#[test]
fn it_goes_on_where_it_was_and_nowhere_else() {
    let device = |start, bytes| Pmem::new(start, bytes, None, || {}).unwrap();
    let saved = device(START, BYTES).save();
    device(START, BYTES).restore(&saved).unwrap();
    for (start, bytes) in [(START, BYTES + ALIGN_BYTES), (START + ALIGN_BYTES, BYTES)] {
        let error = device(start, bytes).restore(&saved).unwrap_err().to_string();
        assert!(error.contains("6291456 bytes at 0x140000000 was saved"), "{error}");
    }
    let other = device(START, BYTES).restore(&DeviceState::Nothing);
    assert!(matches!(other, Err(RestoreError::Kind { device: DEVICE_ID })), "{other:?}");
}
