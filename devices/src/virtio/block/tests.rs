use std::fs::File;
use std::io::{Read, Seek, Write};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::reclaim::Gpa;
use crate::virtio::testing::*;
use crate::virtio::worker::MAX_IN_FLIGHT_BYTES;

const OK: u32 = VIRTIO_BLK_S_OK;
const IOERR: u32 = VIRTIO_BLK_S_IOERR;
const SECTORS: u64 = 64;
/// Where requests have their parts.
const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x800;

/// Remembers the ranges of transfers.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Range<u64>>>>);

impl InFlight for Recorder {
    fn during(&self, range: Range<Gpa>, transfer: &mut dyn FnMut()) {
        self.0.lock().unwrap().push(range.start.0..range.end.0);
        transfer();
    }
}

/// The initial contents of a disk of `sectors` sectors.
fn content(sectors: u64) -> Vec<u8> {
    (0..sectors * SECTOR_BYTES).map(|at| (at / SECTOR_BYTES + at % 251) as u8).collect()
}

struct Bench {
    driver: Driver,
    ring: Ring,
    file: File,
    recorded: Recorder,
    errors: Arc<Errors>,
    handle: Handle,
    requests: u16,
}

impl Bench {
    fn new(read_only: bool) -> Self {
        Self::with_features(read_only, u64::MAX)
    }

    /// With those of the offered features that are in `mask`.
    fn with_features(read_only: bool, mask: u64) -> Self {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content(SECTORS)).unwrap();
        let medium = Medium::File(file.try_clone().unwrap());
        let recorded = Recorder::default();
        Self::over(disk(medium, SECTORS, read_only), file, mask, recorded.clone(), Box::new(recorded))
    }

    fn over(disk: Disk, file: File, mask: u64, recorded: Recorder, in_flight: Box<dyn InFlight>) -> Self {
        let (block, handle) = Block::new(disk, in_flight, || {}).unwrap();
        let errors = block.errors.clone();
        let features = (block.features() & mask) | crate::virtio::TRANSPORT_FEATURES;
        let mut driver = Driver::new(block);
        driver.negotiate(features);
        let ring = driver.add_queue(0, 128);
        driver.add_status(DRIVER_OK);
        Self { driver, ring, file, recorded, errors, handle, requests: 0 }
    }

    /// Has the device do what there is to do until `requests` are complete.
    fn finish(&mut self, requests: u16) {
        finish(&mut self.driver, &self.ring, requests);
    }

    /// Sends a chain of these descriptors; returns what the used ring says was written, None if the
    /// chain was not completed.
    fn send(&mut self, parts: &[(u64, u32, u16)]) -> Option<u32> {
        for (n, (address, len, flags)) in parts.iter().enumerate() {
            let next = if n + 1 < parts.len() { NEXT } else { 0 };
            self.ring.descriptor(n as u16, (*address, *len, flags | next, n as u16 + 1));
        }
        self.ring.set_used_event(self.requests);
        self.ring.offer(0);
        self.driver.kick(0);
        self.requests += 1;
        self.finish(self.requests);
        (self.ring.used_idx() == self.requests).then(|| self.ring.used(self.requests - 1).1)
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.driver.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.driver.memory.write_obj(0xee_u8, GuestAddress(STATUS)).unwrap();
    }

    /// A request as Linux makes it, with one data buffer at [`DATA`]. Returns its status and the
    /// length in the used ring.
    fn request(&mut self, kind: u32, sector: u64, bytes: u32) -> (u32, u32) {
        self.header(kind, sector);
        let writes = if kind == VIRTIO_BLK_T_OUT { 0 } else { WRITE };
        let used = match bytes {
            0 => self.send(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]),
            _ => self.send(&[(HEADER, 16, 0), (DATA, bytes, writes), (STATUS, 1, WRITE)]),
        };
        (self.status(), used.unwrap())
    }

    fn status(&self) -> u32 {
        self.driver.bytes(STATUS, 1)[0].into()
    }

    /// Malformed, refused, unknown, failed.
    fn errors(&self) -> [u64; 4] {
        self.errors.counts()
    }

    fn on_disk(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        self.file.rewind().unwrap();
        self.file.read_to_end(&mut all).unwrap();
        all
    }
}

fn disk(medium: Medium, sectors: u64, read_only: bool) -> Disk {
    Disk { medium, sectors, read_only, id: *b"a disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0" }
}

/// A disk that takes its time: a transfer begins when the test says so.
struct Slow(Receiver<()>, Sender<()>);

impl InFlight for Slow {
    fn during(&self, _: Range<Gpa>, transfer: &mut dyn FnMut()) {
        let _ = self.1.send(());
        let _ = self.0.recv_timeout(LIMIT);
        transfer();
    }
}

/// With the way to let a transfer go on, and the one that tells of its beginning.
fn slow() -> (Bench, Sender<()>, Receiver<()>) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content(SECTORS)).unwrap();
    let medium = Medium::File(file.try_clone().unwrap());
    let ((go, wait), (began, begun)) = (channel(), channel());
    let slow = Box::new(Slow(wait, began));
    let bench = Bench::over(disk(medium, SECTORS, false), file, u64::MAX, Recorder::default(), slow);
    (bench, go, begun)
}

#[test]
fn what_the_driver_is_told() {
    let mut bench = Bench::new(false);
    assert_eq!(bench.driver.read(reg::VIRTIO_MMIO_DEVICE_ID), 2);
    let config = |bench: &mut Bench, at: u32| bench.driver.read(reg::VIRTIO_MMIO_CONFIG + at);
    assert_eq!([config(&mut bench, 0), config(&mut bench, 4)], [SECTORS as u32, 0]);
    assert_eq!([config(&mut bench, 8), config(&mut bench, 12)], [SIZE_MAX, SEG_MAX]);
    assert_eq!([config(&mut bench, 20), config(&mut bench, 24), config(&mut bench, 60)], [512, 0, 0]);
    assert_eq!([36, 40, 44, 48, 52].map(|at| config(&mut bench, at)), [1 << 21, 16, 8, 1 << 17, 1]);
    let offered = |bench: &mut Bench| bench.driver.transport.device_mut().features();
    assert_eq!(offered(&mut bench), 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14);
    assert_eq!(offered(&mut Bench::new(true)), 1 << 1 | 1 << 2 | 1 << 6 | 1 << 5);
}

#[test]
fn what_is_on_the_disk_is_read_and_what_is_read_is_said() {
    let mut bench = Bench::new(true);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 3, 1024), (OK, 1025));
    assert_eq!(bench.driver.bytes(DATA, 1025), [&content(SECTORS)[3 * 512..5 * 512], &[0]].concat());
    assert_eq!(bench.recorded.0.lock().unwrap().as_slice(), std::slice::from_ref(&(DATA..DATA + 1024)));
    assert_eq!(bench.driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_VRING));
    // The last sector, and none at all behind it.
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, SECTORS - 1, 512), (OK, 513));
    assert_eq!(bench.driver.bytes(DATA, 512), content(SECTORS)[(SECTORS as usize - 1) * 512..]);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, SECTORS, 0), (OK, 1));
}

#[test]
fn a_request_may_be_scattered_at_any_byte() {
    let mut bench = Bench::new(true);
    bench.header(VIRTIO_BLK_T_IN, 1);
    // The status shares the last buffer with data, and lies above the hole in RAM.
    let parts = [
        (HEADER, 5, 0),
        (HEADER + 5, 0, 0),
        (HEADER + 5, 11, 0),
        (DATA, 7, WRITE),
        (HIGH_RAM_START, 1024 - 7 + 1, WRITE),
    ];
    assert_eq!(bench.send(&parts), Some(1025));
    let read = [bench.driver.bytes(DATA, 7), bench.driver.bytes(HIGH_RAM_START, 1017)].concat();
    assert_eq!(read, content(SECTORS)[512..512 + 1024]);
    assert_eq!(bench.driver.bytes(HIGH_RAM_START + 1017, 2), [0, 0]);
}

#[test]
fn the_pages_read_into_are_marked_as_written() {
    let mut bench = Bench::new(true);
    let marked = |bench: &Bench| {
        let mut pages = Vec::new();
        for region in bench.driver.memory.iter() {
            let words = (**region).bitmap().get_and_reset();
            pages.extend((0..words.len() * 64).filter(|page| words[page / 64] >> (page % 64) & 1 != 0));
        }
        pages
    };
    marked(&bench);
    bench.header(VIRTIO_BLK_T_IN, 0);
    marked(&bench);
    bench.send(&[(HEADER, 16, 0), (DATA + 0x800, 0x2000, WRITE), (STATUS, 1, WRITE)]);
    let seen = marked(&bench);
    for page in [DATA, DATA + 0x1000, DATA + 0x2000, STATUS] {
        assert!(seen.contains(&(page as usize / 4096)), "{page:#x} of {seen:?}");
    }
    assert!(!seen.contains(&((DATA + 0x3000) as usize / 4096)));
}

#[test]
fn what_is_written_is_on_the_disk_and_nothing_else_is_changed() {
    let mut bench = Bench::new(false);
    let new: Vec<u8> = (0..1024).map(|at| (at * 7 % 253) as u8).collect();
    bench.driver.memory.write_slice(&new, GuestAddress(DATA)).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 5, 1024), (OK, 1));
    let mut expected = content(SECTORS);
    expected[5 * 512..7 * 512].copy_from_slice(&new);
    assert!(bench.on_disk() == expected);
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0), (OK, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 5, 1024), (OK, 1025));
    assert_eq!(bench.driver.bytes(DATA, 1024), new);
    assert_eq!(bench.errors(), [0; 4]);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut bench = Bench::new(true);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, 512), (IOERR, 1));
    assert!(bench.on_disk() == content(SECTORS));
    // Nothing is there to be flushed.
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0), (OK, 1));
    assert_eq!(bench.errors(), [0, 1, 0, 0]);
}

#[test]
fn the_name_is_told() {
    let mut bench = Bench::new(true);
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, 20), (OK, 21));
    assert_eq!(&bench.driver.bytes(DATA, 21), b"a disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, 19), (IOERR, 0));
}

#[test]
fn what_the_disk_does_not_have_is_refused() {
    let mut bench = Bench::new(false);
    let top = u64::MAX / 512;
    let refused = [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS + 1, 0),
        (u64::MAX, 512),
        (u64::MAX - 1, 1024),
        (top, 1024),
        (top + 1, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 513),
    ];
    for (sector, bytes) in refused {
        for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            let status = bench.request(kind, sector, bytes).0;
            assert_eq!(status, IOERR, "{kind} of {bytes} bytes at sector {sector}");
        }
    }
    assert!(bench.on_disk() == content(SECTORS));
    assert_eq!(bench.errors(), [0, 2 * refused.len() as u64, 0, 0]);
}

/// 64 KiB of RAM can be named many times.
#[test]
fn a_request_larger_than_any_driver_was_told_is_refused() {
    let mut bench = Bench::new(false);
    let medium = Medium::File(bench.file.try_clone().unwrap());
    let (huge, _) = Block::new(disk(medium, 1 << 20, false), Box::new(Recorder::default()), || {}).unwrap();
    bench.errors = huge.errors.clone();
    bench.driver = Driver::new(huge);
    bench.ring = bench.driver.start(128, true);
    bench.header(VIRTIO_BLK_T_IN, 0);
    let buffer = (DATA, SIZE_MAX, WRITE);
    let mut parts = vec![(HEADER, 16, 0)];
    parts.extend([buffer; SEG_MAX as usize]);
    parts.extend([(DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!((bench.send(&parts), bench.status()), (Some(0), IOERR));
    assert_eq!(bench.errors(), [0, 1, 0, 0]);
}

#[test]
fn what_is_no_request_is_completed() {
    let mut bench = Bench::new(false);
    for kind in [2, 3, 5, 12, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(bench.request(kind, 0, 512), (VIRTIO_BLK_S_UNSUPP, 0), "{kind:#x}");
    }
    // A header that is cut short; nothing to write a status to; nothing at all.
    bench.header(VIRTIO_BLK_T_IN, 0);
    assert_eq!((bench.send(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]), bench.status()), (Some(1), IOERR));
    assert_eq!(bench.send(&[(STATUS, 1, WRITE)]), Some(1));
    assert_eq!(bench.send(&[(HEADER, 16, 0)]), Some(0));
    assert_eq!(bench.send(&[(HEADER, 0, 0)]), Some(0));
    assert_eq!(bench.errors(), [4, 0, 7, 0]);
    // Outside RAM, which the ring loop refuses.
    assert_eq!(bench.send(&[(HEADER, 16, 0), (LOW_RAM - 1, 2, WRITE)]), Some(0));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512), (OK, 513), "it goes on");
}

#[test]
fn a_file_that_was_cut_short_is_an_error_and_no_zeros() {
    let mut bench = Bench::new(true);
    bench.file.set_len(700).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 1, 512), (IOERR, 188));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, 512), (IOERR, 0));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512), (OK, 513));
    assert_eq!(bench.errors(), [0, 0, 0, 2]);
}

/// A driver can name the same buffers any number of times.
#[test]
fn what_is_in_flight_is_bounded_and_the_rest_comes_later() {
    let (mut bench, go, begun) = slow();
    let each = SECTORS as u32 * 512;
    bench.header(VIRTIO_BLK_T_IN, 0);
    bench.ring.descriptor(0, (HEADER, 16, NEXT, 1));
    bench.ring.descriptor(1, (DATA, each, WRITE | NEXT, 2));
    bench.ring.descriptor(2, (STATUS, 1, WRITE, 0));
    let taken = (MAX_IN_FLIGHT_BYTES as u32).div_ceil(each + 17) as u16;
    let mut offered = 0;
    while offered < 2 * taken {
        for _ in 0..64 {
            bench.ring.offer(0);
        }
        offered += 64;
        bench.driver.kick(0);
    }
    assert_eq!(begun.recv_timeout(LIMIT), Ok(()));
    assert_eq!(bench.driver.transport.device_mut().queue_place(0), Some((taken, 0)));
    drop((go, begun));
    bench.finish(offered);
    assert_eq!(bench.status(), OK);
}

#[test]
fn a_slow_disk_holds_up_no_other_access() {
    let (mut bench, go, begun) = slow();
    bench.header(VIRTIO_BLK_T_IN, 3);
    for (n, part) in [(HEADER, 16, NEXT), (DATA, 512, WRITE | NEXT), (STATUS, 1, WRITE)].iter().enumerate() {
        bench.ring.descriptor(n as u16, (part.0, part.1, part.2, n as u16 + 1));
    }
    bench.ring.offer(0);
    // It returns though the disk does nothing until told.
    bench.driver.kick(0);
    assert_eq!(begun.recv_timeout(LIMIT), Ok(()));
    assert_eq!(bench.driver.read(reg::VIRTIO_MMIO_CONFIG), SECTORS as u32);
    assert!(!bench.driver.transport.quiesce(Instant::now()), "it is in flight");
    assert_eq!((bench.ring.used_idx(), bench.status()), (0, 0xee));
    go.send(()).unwrap();
    assert!(bench.driver.transport.quiesce(Instant::now() + LIMIT));
    assert_eq!((bench.ring.used_idx(), bench.status()), (1, OK));
    assert_eq!(bench.driver.bytes(DATA, 512), content(SECTORS)[3 * 512..4 * 512]);
}

#[test]
fn a_reset_waits_for_what_has_begun_and_forgets_the_rest() {
    let (mut bench, go, begun) = slow();
    bench.header(VIRTIO_BLK_T_IN, 3);
    for n in 0..2 {
        bench.ring.descriptor(3 * n, (HEADER, 16, NEXT, 3 * n + 1));
        let at = DATA + 0x1000 * u64::from(n);
        bench.ring.descriptor(3 * n + 1, (at, 512, WRITE | NEXT, 3 * n + 2));
        bench.ring.descriptor(3 * n + 2, (STATUS, 1, WRITE, 0));
        bench.ring.offer(3 * n);
    }
    bench.driver.kick(0);
    assert_eq!(begun.recv_timeout(LIMIT), Ok(()));
    let driver = &mut bench.driver;
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| driver.write(reg::VIRTIO_MMIO_STATUS, 0));
        // Let go before it waits, it does not wait: that is allowed, and rare.
        std::thread::sleep(Duration::from_millis(20));
        assert!(!reset.is_finished(), "something was in flight");
        go.send(()).unwrap();
    });
    assert_eq!(bench.driver.bytes(DATA, 512), content(SECTORS)[3 * 512..4 * 512]);
    assert_eq!(bench.ring.used_idx(), 0);
    // It can be used again, and nothing of before comes.
    bench.ring = bench.driver.start(128, true);
    bench.requests = 0;
    drop((go, begun));
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut bench = Bench::new(false);
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let send = |bench: &mut Bench, kind, ranges: &[Vec<u8>]| {
        let bytes = ranges.concat();
        bench.header(kind, 0);
        bench.driver.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        bench.send(&[(HEADER, 16, 0), (DATA, bytes.len() as u32, 0), (STATUS, 1, WRITE)]);
        bench.status()
    };
    let mut expected = content(SECTORS);
    for flags in [0, 1] {
        let at = 8 + 16 * u64::from(flags);
        assert_eq!(send(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, &[range(at, 9, flags)]), OK);
        expected[at as usize * 512..(at as usize + 9) * 512].fill(0);
    }
    assert!(bench.on_disk() == expected);
    // What is discarded reads as it did or as zeros.
    assert_eq!(send(&mut bench, VIRTIO_BLK_T_DISCARD, &[range(0, 3, 0), range(SECTORS - 8, 8, 0)]), OK);
    let now = bench.on_disk();
    assert_eq!(now.len(), expected.len());
    for (sector, (now, before)) in now.chunks(512).zip(expected.chunks(512)).enumerate() {
        let was_discarded = sector < 3 || sector >= SECTORS as usize - 8;
        assert!(now == before || was_discarded && now.iter().all(|byte| *byte == 0), "{sector}");
    }
    assert_eq!(bench.errors(), [0; 4]);
    for (kind, ranges, status) in [
        (VIRTIO_BLK_T_DISCARD, vec![], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, 1, 0); 17], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, 0, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, u32::MAX, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(SECTORS, 1, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(u64::MAX, 1, 0)], IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![range(0, 1, 1)], VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_DISCARD, vec![vec![0; 15]], IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![range(0, 1, 0); 2], IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![range(0, 1, 2)], VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![range(SECTORS - 1, 2, 0)], IOERR),
    ] {
        assert_eq!(send(&mut bench, kind, &ranges), status, "{kind} {ranges:?}");
    }
    let mut bench = Bench::new(true);
    assert_eq!(send(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, &[range(0, 1, 0)]), IOERR);
    assert!(bench.on_disk() == content(SECTORS));
}

#[test]
fn another_disk_takes_its_place() {
    let mut bench = Bench::new(false);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, SECTORS - 1, 512), (OK, 513));
    bench.driver.interrupted();
    let mut other = tempfile::tempfile().unwrap();
    other.write_all(&[9; 4 * 512]).unwrap();
    bench.handle.replace(disk(Medium::File(other), 4, true));
    assert_eq!(bench.driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_CONFIG));
    assert_eq!(bench.driver.read(reg::VIRTIO_MMIO_CONFIG), 4);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 3, 512), (OK, 513));
    assert_eq!(bench.driver.bytes(DATA, 512), [9; 512]);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 4, 512), (IOERR, 0), "it is smaller");
    assert!(bench.on_disk() == content(SECTORS));
}

#[test]
fn a_disk_that_fails_is_the_guests_error() {
    let mut bench = Bench::new(false);
    // Reading a file that is open for writing only, and writing one that is for reading, fail as a
    // broken disk does.
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    let only_write = File::options().write(true).open(file.path()).unwrap();
    bench.handle.replace(disk(Medium::File(only_write), SECTORS, false));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512), (IOERR, 0));
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, 512), (OK, 1));
    bench.handle.replace(disk(Medium::File(File::open(file.path()).unwrap()), SECTORS, false));
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, 512), (IOERR, 1));
    assert_eq!(bench.errors(), [0, 0, 0, 2]);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512), (OK, 513), "it goes on");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 64 } else { 1024 }))]

    /// Any header, any chain: it is completed, a status is in the last byte the device may write,
    /// and a read-only disk never changes.
    #[test]
    fn rubbish_is_completed(
        requests in prop::collection::vec(
            (
                prop_oneof![Just(0_u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
                prop_oneof![0..SECTORS + 2, any::<u64>()],
                prop::collection::vec((DATA - 0x20..LOW_RAM + 0x10, 0..0x900_u32, any::<bool>()), 0..6),
                prop_oneof![Just(16_u32), 0..20_u32],
            ),
            1..12,
        ),
    ) {
        let mut bench = Bench::new(true);
        for (kind, sector, buffers, header) in requests {
            bench.header(kind, sector);
            let mut parts = vec![(HEADER, header, 0)];
            parts.extend(buffers.iter().map(|(at, len, writes)| (*at, *len, if *writes { WRITE } else { 0 })));
            parts.push((STATUS, 1, WRITE));
            prop_assert!(bench.send(&parts).is_some());
            let status = bench.status();
            // What the ring loop refuses has none.
            prop_assert!(matches!(status, 0..=2 | 0xee), "{}", status);
        }
        prop_assert!(bench.on_disk() == content(SECTORS));
    }
}
