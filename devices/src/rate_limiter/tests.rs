use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

/// A clock that stands until it is set forward.
#[derive(Clone, Default)]
struct Hand(Arc<AtomicU64>);

impl Hand {
    fn clock(&self) -> Clock {
        let nanos = self.0.clone();
        Arc::new(move || Duration::from_nanos(nanos.load(Ordering::SeqCst)))
    }

    fn forward(&self, by: Duration) {
        self.0.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
    }
}

fn bucket(size: u64, one_time_burst: u64, refill_time: u64) -> Option<Bucket> {
    Some(Bucket { size, one_time_burst, refill_time })
}

fn bytes(size: u64, one_time_burst: u64, refill_time: u64) -> (Limiter, Hand) {
    let hand = Hand::default();
    let limits = Limits { bandwidth: bucket(size, one_time_burst, refill_time), ops: None };
    (Limiter::with_clock(limits, hand.clock()), hand)
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_bucket_is_emptied_and_refills_evenly() {
    let (limiter, hand) = bytes(1000, 0, 100);
    assert_eq!(limiter.take(600), Ok(()));
    assert_eq!(limiter.take(600), Err(20 * MS));
    hand.forward(19 * MS);
    assert_eq!(limiter.take(600), Err(MS));
    hand.forward(MS);
    assert_eq!(limiter.take(600), Ok(()));
    assert_eq!(limiter.take(1), Err(MS / 10));
    // It holds no more than its size.
    hand.forward(10_000 * MS);
    assert_eq!(limiter.take(1000), Ok(()));
    assert_eq!(limiter.take(10), Err(MS));
}

#[test]
fn the_burst_is_spent_first_and_once() {
    let (limiter, hand) = bytes(1000, 500, 100);
    assert_eq!(limiter.take(400), Ok(()));
    assert_eq!(limiter.take(1100), Ok(()), "100 of the burst, 1000 of the bucket");
    assert_eq!(limiter.take(1), Err(MS / 10));
    hand.forward(1000 * MS);
    assert_eq!(limiter.take(1000), Ok(()));
    assert_eq!(limiter.take(1), Err(MS / 10), "there is no second burst");
}

#[test]
fn what_is_larger_than_the_bucket_passes_and_is_paid_for() {
    let (limiter, hand) = bytes(100, 0, 100);
    assert_eq!(limiter.take(300), Ok(()));
    assert_eq!(limiter.take(1), Err(201 * MS));
    assert_eq!(limiter.take(300), Err(200 * MS));
    hand.forward(200 * MS);
    assert_eq!(limiter.take(300), Ok(()));
}

#[test]
fn both_buckets_must_have_enough_or_neither_is_touched() {
    let hand = Hand::default();
    let limits = Limits { bandwidth: bucket(1000, 0, 1000), ops: bucket(2, 0, 100) };
    let limiter = Limiter::with_clock(limits, hand.clock());
    assert_eq!(limiter.take(10), Ok(()));
    assert_eq!(limiter.take(10), Ok(()));
    assert_eq!(limiter.take(10), Err(50 * MS));
    hand.forward(50 * MS);
    assert_eq!(limiter.take(1000), Ok(()), "the refused one has cost nothing");
    assert_eq!(limiter.take(100), Err(100 * MS), "the longer wait counts");
    hand.forward(100 * MS);
    assert_eq!(limiter.take(100), Ok(()));
}

#[test]
fn what_limits_nothing_is_none() {
    for limits in [Limits::default(), Limits { bandwidth: bucket(0, 5, 100), ops: bucket(5, 5, 0) }] {
        assert!(limits.is_none());
        let limiter = Limiter::new(limits);
        assert_eq!((limiter.take(u64::MAX), limiter.save()), (Ok(()), None));
    }
}

#[test]
fn a_patch_changes_what_it_names() {
    let (limiter, _) = bytes(100, 0, 100);
    assert_eq!(limiter.take(100), Ok(()));
    limiter.set(Limits { bandwidth: None, ops: bucket(1, 0, 100) });
    assert!(limiter.take(1).is_err(), "the empty bucket is still there");
    limiter.set(Limits { bandwidth: bucket(0, 0, 0), ops: None });
    assert_eq!(limiter.take(100), Ok(()));
    assert_eq!(limiter.take(100), Err(100 * MS), "operations are limited now");
}

#[test]
fn a_limiter_goes_on_elsewhere_where_it_was() {
    let (limiter, hand) = bytes(1000, 7, 100);
    hand.forward(12_345 * MS);
    assert_eq!(limiter.take(607), Ok(()));
    let state = limiter.save().expect("limits");
    let later = Hand::default();
    let restored = Limiter::with_clock(Limits::default(), later.clock());
    restored.restore(&state);
    assert_eq!(restored.save(), Some(state));
    assert_eq!(restored.take(600), Err(20 * MS));
    later.forward(20 * MS);
    assert_eq!(restored.take(600), Ok(()));
}

proptest! {
    /// Never more than size + burst + what has refilled, and what one operation owes; whatever is
    /// saved meanwhile.
    #[test]
    fn the_rate_is_kept(
        size in 1u64..5000, burst in 0u64..5000, refill in 1u64..2000,
        steps in prop::collection::vec((0u64..3000, 0u64..500), 1..200),
    ) {
        let (limiter, hand) = bytes(size, burst, refill);
        let (mut passed, mut ms) = (0u64, 0u64);
        for (n, forward) in steps {
            if limiter.take(n).is_ok() {
                passed += n;
                let allowed = size + burst + ms * size / refill + 1 + 3000;
                prop_assert!(passed <= allowed, "{passed} of {allowed}");
            }
            let state = limiter.save().expect("limits");
            limiter.restore(&state);
            ms += forward;
            hand.forward(MS * forward as u32);
        }
    }

    /// What waits as long as it was told passes then.
    #[test]
    fn waiting_helps(size in 1u64..5000, refill in 1u64..2000, takes in prop::collection::vec(0u64..9000, 1..50)) {
        let (limiter, hand) = bytes(size, 0, refill);
        for n in takes {
            if let Err(wait) = limiter.take(n) {
                hand.forward(wait);
                prop_assert_eq!(limiter.take(n), Ok(()));
            }
        }
    }

    /// A state may come from anywhere.
    #[test]
    fn any_state_is_taken(a in any::<(u64, u64, u64, i64)>(), bytes in any::<u64>()) {
        let (size, refill_time_ms, burst, since_empty_ns) = a;
        let state = BucketState { size, refill_time_ms, burst, since_empty_ns };
        let limiter = Limiter::default();
        limiter.restore(&LimiterState { bandwidth: Some(state), ops: Some(state) });
        let _ = (limiter.take(bytes), limiter.take(1), limiter.save());
    }
}
