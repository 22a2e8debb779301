use virtio_bindings::bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::virtio::testing::*;

/// Chance makes 64 random bytes all zero once in 2^512 runs.
fn is_random(bytes: &[u8]) -> bool {
    bytes.iter().any(|&byte| byte != 0)
}

#[test]
fn a_whole_life() {
    let mut driver = Driver::new(Rng::new());
    assert_eq!(driver.read(reg::VIRTIO_MMIO_MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read(reg::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 16);

    for life in 0..3 {
        let mut ring = driver.start(8, life % 2 == 0);
        // More requests than the ring has entries, so that the indices wrap.
        for request in 0..20u16 {
            let at = BUFFERS + 0x1000 * u64::from(request);
            ring.descriptor(request % 8, (at, 64, WRITE, 0));
            ring.set_used_event(request);
            ring.offer(request % 8);
            driver.kick(0);
            assert_eq!(driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_VRING));
            assert_eq!(ring.used_idx(), request + 1);
            assert_eq!(ring.used(request), (u32::from(request % 8), 64));
            assert!(is_random(&driver.bytes(at, 64)));
            assert!(!is_random(&driver.bytes(at + 64, 64)), "nothing past the buffer");
        }
        driver.write(reg::VIRTIO_MMIO_STATUS, 0);
        ring.offer(0);
        driver.kick(0);
        assert_eq!(driver.interrupted(), None, "no life after a reset");
        assert_eq!(ring.used_idx(), 20);
        let zeros = vec![0; 0x2_0000];
        driver.memory.write_slice(&zeros, GuestAddress(BUFFERS)).unwrap();
    }
}

/// KVM's log does not have what a device writes to the guest.
#[test]
fn what_the_device_writes_is_marked_and_nothing_else() {
    let mut driver = Driver::new(Rng::new());
    let mut ring = driver.start(16, true);
    // From one page into the next.
    ring.descriptor(0, (BUFFERS + 0x2000 - 10, 64, WRITE, 0));
    ring.offer(0);
    let marked = |driver: &Driver| {
        let mut pages = Vec::new();
        for region in driver.memory.iter() {
            let words = (**region).bitmap().get_and_reset();
            pages.extend((0..words.len() * 64).filter(|page| words[page / 64] >> (page % 64) & 1 != 0));
        }
        pages
    };
    marked(&driver);
    driver.kick(0);
    assert_eq!(ring.used(0), (0, 64));
    let pages = [ring.used, BUFFERS + 0x1000, BUFFERS + 0x2000].map(|gpa| gpa as usize / 4096);
    assert_eq!(marked(&driver), pages);
}

#[test]
fn a_request_is_capped_and_may_be_scattered() {
    let mut driver = Driver::new(Rng::new());
    let mut ring = driver.start(16, false);
    ring.descriptor(0, (BUFFERS, 100, WRITE | NEXT, 1));
    ring.descriptor(1, (BUFFERS + 0x1000, 0, WRITE | NEXT, 2));
    ring.descriptor(2, (BUFFERS + 0x2000, 0x2_0000, WRITE, 0));
    ring.offer(0);
    driver.kick(0);
    assert_eq!(ring.used(0), (0, MAX_REQUEST_BYTES as u32));
    assert!(is_random(&driver.bytes(BUFFERS, 100)));
    assert!(!is_random(&driver.bytes(BUFFERS + 100, 100)));
    assert!(is_random(&driver.bytes(BUFFERS + 0x2000, MAX_REQUEST_BYTES - 100)));
    assert!(!is_random(&driver.bytes(BUFFERS + 0x2000 + 4096 - 100, 4096)));
}

#[test]
fn a_readable_buffer_is_not_written() {
    let mut driver = Driver::new(Rng::new());
    let mut ring = driver.start(16, false);
    ring.descriptor(0, (BUFFERS, 64, 0, 0));
    ring.descriptor(1, (BUFFERS, 64, NEXT, 2));
    ring.descriptor(2, (BUFFERS + 0x1000, 64, WRITE, 0));
    ring.offer(0);
    ring.offer(1);
    driver.kick(0);
    assert_eq!((ring.used(0), ring.used(1)), ((0, 0), (1, 64)));
    assert!(!is_random(&driver.bytes(BUFFERS, 64)));
    assert!(is_random(&driver.bytes(BUFFERS + 0x1000, 64)));
}

#[test]
fn requests_beyond_the_limit_wait() {
    use crate::rate_limiter::{Bucket, Limiter, Limits};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;
    let ms = Arc::new(AtomicU64::new(0));
    let hand = ms.clone();
    let limits =
        Limits { bandwidth: Some(Bucket { size: 100, one_time_burst: 0, refill_time: 100 }), ops: None };
    let clock = Arc::new(move || Duration::from_millis(hand.load(Ordering::SeqCst)));
    let mut driver = Driver::new(Rng::limited(Limiter::with_clock(limits, clock)));
    let mut ring = driver.start(8, false);
    for slot in 0..2 {
        ring.descriptor(slot, (BUFFERS + 0x1000 * u64::from(slot), 64, WRITE, 0));
        ring.offer(slot);
    }
    assert_eq!(driver.transport.notify(0), Progress::Later(Duration::from_millis(28)));
    assert_eq!(ring.used_idx(), 1);
    assert!(!is_random(&driver.bytes(BUFFERS + 0x1000, 64)));
    ms.store(28, Ordering::SeqCst);
    assert_eq!(driver.transport.notify(0), Progress::Idle);
    assert_eq!(ring.used_idx(), 2);
    assert!(is_random(&driver.bytes(BUFFERS + 0x1000, 64)));
}
