//! Rate limits, by a clock that stands until a test sets it forward.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;
use crate::rate_limiter::{Bucket, Limits};

const MS: Duration = Duration::from_millis(1);

struct Limited {
    guest: Guest,
    ms: Arc<AtomicU64>,
    limiters: Limiters,
}

/// So many bytes or frames in a hundred milliseconds, each way.
fn limited(bandwidth: u64, ops: u64) -> Limited {
    let ms = Arc::new(AtomicU64::new(0));
    let bucket = |size| Some(Bucket { size, one_time_burst: 0, refill_time: 100 });
    let limits = Limits { bandwidth: bucket(bandwidth), ops: bucket(ops) };
    let limiter = || {
        let ms = ms.clone();
        Limiter::with_clock(limits, Arc::new(move || Duration::from_millis(ms.load(Ordering::SeqCst))))
    };
    let limiters = Limiters { receive: limiter(), transmit: limiter() };
    let mut guest = Guest::limited(None, limiters.clone());
    guest.start(ALL);
    Limited { guest, ms, limiters }
}

impl Limited {
    fn forward(&self, ms: u64) {
        self.ms.fetch_add(ms, Ordering::SeqCst);
    }

    /// Offers a frame to send.
    fn offer(&mut self, slot: u16, bytes: usize) {
        let sent = frame(bytes, slot as u8);
        self.guest.driver.memory.write_slice(&sent, GuestAddress(buffer(slot))).unwrap();
        self.guest.rings[TRANSMIT].descriptor(slot, (buffer(slot), bytes as u32, 0, 0));
        self.guest.rings[TRANSMIT].offer(slot);
    }

    fn process(&mut self, queue: usize) -> Progress {
        self.guest.driver.transport.notify(queue)
    }

    fn sent(&self) -> usize {
        std::iter::from_fn(|| self.guest.sent()).count()
    }
}

#[test]
fn frames_that_are_too_many_stay_in_the_ring_until_the_bucket_refills() {
    let mut limited = limited(1_000_000, 2);
    (0..4).for_each(|slot| limited.offer(slot, 60));
    assert_eq!(limited.process(TRANSMIT), Progress::Later(50 * MS));
    assert_eq!((limited.sent(), limited.guest.rings[TRANSMIT].used_idx()), (2, 2));
    // Asked too early, it waits for what is left.
    limited.forward(20);
    assert_eq!(limited.process(TRANSMIT), Progress::Later(30 * MS));
    limited.forward(30);
    assert_eq!(limited.process(TRANSMIT), Progress::Later(50 * MS));
    limited.forward(100);
    assert_eq!(limited.process(TRANSMIT), Progress::Idle);
    assert_eq!((limited.sent(), limited.guest.rings[TRANSMIT].used_idx()), (2, 4));
}

#[test]
fn a_frame_for_the_guest_waits_and_is_not_lost() {
    let mut limited = limited(1000, 1000);
    (0..8).for_each(|slot| limited.guest.offer(slot, 2000));
    for seed in 0..2 {
        limited.guest.host.send(&frame(HEADER_BYTES + 600, seed)).unwrap();
    }
    assert_eq!(limited.process(RECEIVE), Progress::Later(20 * MS));
    assert_eq!(limited.guest.rings[RECEIVE].used_idx(), 1);
    limited.forward(20);
    assert_eq!(limited.process(RECEIVE), Progress::Idle);
    assert_eq!(limited.guest.rings[RECEIVE].used_idx(), 2);
    let got = limited.guest.driver.bytes(buffer(1), HEADER_BYTES + 600);
    assert!(got[HEADER_BYTES..] == frame(HEADER_BYTES + 600, 1)[HEADER_BYTES..]);
}

/// One that the driver has no buffer for pays once, however often it is looked at.
#[test]
fn a_frame_pays_once() {
    let mut limited = limited(1000, 1000);
    limited.guest.host.send(&frame(HEADER_BYTES + 600, 0)).unwrap();
    for _ in 0..3 {
        assert_eq!(limited.process(RECEIVE), Progress::Idle);
    }
    limited.guest.offer(0, 2000);
    assert_eq!(limited.process(RECEIVE), Progress::Idle);
    assert_eq!(limited.guest.rings[RECEIVE].used_idx(), 1);
}

#[test]
fn other_limits_and_a_reset_take_effect_at_once() {
    let mut limited = limited(1_000_000, 1);
    (0..3).for_each(|slot| limited.offer(slot, 60));
    assert_eq!(limited.process(TRANSMIT), Progress::Later(100 * MS));
    limited.limiters.transmit.set(Limits { ops: Some(Bucket::default()), bandwidth: None });
    assert_eq!(limited.process(TRANSMIT), Progress::Idle);
    assert_eq!(limited.sent(), 3);
    limited.guest.driver.write(reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(limited.process(TRANSMIT), Progress::Idle);
}

#[test]
fn limits_and_their_buckets_are_saved_and_restored() {
    let mut limited = limited(1_000_000, 2);
    (0..3).for_each(|slot| limited.offer(slot, 60));
    assert_eq!(limited.process(TRANSMIT), Progress::Later(50 * MS));
    let state = limited.guest.driver.transport.save();
    let limiters = Limiters::default();
    let other = Guest::limited(None, limiters.clone());
    let mut driver = Driver::over(
        limited.guest.driver.memory.clone(),
        Net::limited(
            Config { mac: MAC, mtu: None },
            Box::new(Segment { socket: other.host.try_clone().unwrap(), offload: Arc::default() }),
            limiters.clone(),
        ),
    );
    driver.transport.restore(&state).unwrap();
    let limits = |limiter: &Limiter| limiter.save().map(|state| state.limits());
    assert_eq!(limits(&limiters.receive), limits(&limited.limiters.receive));
    assert!(limits(&limiters.transmit).is_some());
    assert!(matches!(driver.transport.notify(TRANSMIT), Progress::Later(wait) if wait <= 50 * MS));
    // Of a device with another number of them it is refused.
    let mut wrong = state.clone();
    wrong.device = crate::state::DeviceState::Limiters(vec![None]);
    assert!(driver.transport.restore(&wrong).is_err());
}
