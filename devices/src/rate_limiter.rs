//! Rate limits as token buckets, with the semantics of Firecracker's rate limiters: one bucket for
//! bytes, one for operations. A bucket of `size` tokens refills evenly in `refill_time`;
//! `one_time_burst` more tokens are spent first, and never refilled.
//!
//! An operation that needs more than the bucket can hold is let through when nothing is owed, and
//! owes the rest: later ones wait until that is paid.
//!
//! Time comes from a [`Clock`], so that tests need not sleep.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize};

/// One bucket. As Firecracker has it, one of no size, or that refills in no time, limits nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// The most tokens that it holds: bytes, or operations.
    pub size: u64,
    /// Tokens that are spent first, and once.
    #[serde(default, deserialize_with = "or_default")]
    pub one_time_burst: u64,
    /// In how many milliseconds an empty one is full.
    pub refill_time: u64,
}

/// What may pass; None has no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<Bucket>,
    /// Operations: frames, or requests.
    #[serde(default)]
    pub ops: Option<Bucket>,
}

/// A key may be null, too.
fn or_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Bucket {
    fn is_limit(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }

    /// Nanoseconds in which `tokens` are refilled; up to 2^63 - 1, some 290 years.
    fn refill_ns(&self, tokens: u64) -> i64 {
        let ns = u128::from(tokens) * u128::from(self.refill_time);
        ns.saturating_mul(1_000_000).div_ceil(self.size.max(1).into()).try_into().unwrap_or(i64::MAX)
    }
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        let is_open = |bucket: &Option<Bucket>| bucket.is_none_or(|bucket| !bucket.is_limit());
        is_open(&self.bandwidth) && is_open(&self.ops)
    }
}

impl Limits {
    /// With the buckets of `patch` in the place of its own; one that limits nothing removes it.
    pub fn apply(&mut self, patch: Self) {
        let bucket =
            |bucket: Option<Bucket>, other: Option<Bucket>| other.or(bucket).filter(Bucket::is_limit);
        *self = Self { bandwidth: bucket(self.bandwidth, patch.bandwidth), ops: bucket(self.ops, patch.ops) };
    }
}

/// The time that has passed since any fixed instant.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// A bucket as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Filled {
    bucket: Bucket,
    burst: u64,
    /// When it was, or will be, empty, in nanoseconds of the clock: a token more is in it for each
    /// `refill_time / size` since.
    empty_at: i64,
}

impl Filled {
    /// Full.
    fn new(bucket: Bucket, now: i64) -> Option<Self> {
        let empty_at = now.saturating_sub(bucket.refill_ns(bucket.size));
        bucket.is_limit().then_some(Self { bucket, burst: bucket.one_time_burst, empty_at })
    }

    /// When it is empty again if `tokens` are taken now, and what is left of its burst.
    fn without(&self, tokens: u64, now: i64) -> (i64, u64) {
        let of_burst = tokens.min(self.burst);
        let full_at = now.saturating_sub(self.bucket.refill_ns(self.bucket.size));
        let empty_at = self.empty_at.max(full_at).saturating_add(self.bucket.refill_ns(tokens - of_burst));
        (empty_at, self.burst - of_burst)
    }

    /// How long `tokens` have to wait.
    fn wait(&self, tokens: u64, now: i64) -> i64 {
        let needed = tokens.saturating_sub(self.burst);
        match needed {
            0 => 0,
            // More than it can ever hold: nothing may be owed, that is all.
            _ if needed > self.bucket.size => self.empty_at.saturating_sub(now).max(0),
            _ => self.without(tokens, now).0.saturating_sub(now).max(0),
        }
    }

    fn take(&mut self, tokens: u64, now: i64) {
        (self.empty_at, self.burst) = self.without(tokens, now);
    }

    fn save(&self, now: i64) -> BucketState {
        let Self { bucket, burst, empty_at } = *self;
        let since_empty_ns = now.saturating_sub(empty_at);
        BucketState { size: bucket.size, refill_time_ms: bucket.refill_time, burst, since_empty_ns }
    }

    fn restore(state: &BucketState, now: i64) -> Option<Self> {
        let bucket =
            Bucket { size: state.size, one_time_burst: state.burst, refill_time: state.refill_time_ms };
        // What is owed is at most what one operation owes.
        let owed = bucket.refill_ns(MAX_OWED_TOKENS.max(bucket.size));
        let empty_at = now.saturating_sub(state.since_empty_ns.max(owed.saturating_neg()));
        bucket.is_limit().then_some(Self { bucket, burst: state.burst, empty_at })
    }
}

/// More than any operation needs.
const MAX_OWED_TOKENS: u64 = 1 << 21;

/// A bucket in a captured state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    pub size: u64,
    pub refill_time_ms: u64,
    /// What is left of its burst.
    pub burst: u64,
    /// For how long it has been filling; less than 0 if something is owed.
    pub since_empty_ns: i64,
}

/// A limiter in a captured state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimiterState {
    pub bandwidth: Option<BucketState>,
    pub ops: Option<BucketState>,
}

impl LimiterState {
    /// What it limits.
    pub fn limits(&self) -> Limits {
        let bucket = |state: BucketState| Bucket {
            size: state.size,
            one_time_burst: state.burst,
            refill_time: state.refill_time_ms,
        };
        Limits { bandwidth: self.bandwidth.map(bucket), ops: self.ops.map(bucket) }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Buckets {
    bandwidth: Option<Filled>,
    ops: Option<Filled>,
}

/// Limits of one direction of a device. Clones share the buckets.
#[derive(Clone)]
pub struct Limiter {
    buckets: Arc<Mutex<Buckets>>,
    clock: Clock,
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Limiter").field(&*self.buckets()).finish()
    }
}

impl Limiter {
    /// With full buckets, by the host's clock.
    pub fn new(limits: Limits) -> Self {
        let start = Instant::now();
        Self::with_clock(limits, Arc::new(move || start.elapsed()))
    }

    /// With full buckets, by another clock.
    pub fn with_clock(limits: Limits, clock: Clock) -> Self {
        let limiter = Self { buckets: Arc::default(), clock };
        limiter.set(limits);
        limiter
    }

    /// Puts full buckets in the place of those that `limits` has, which leaves the others as they
    /// are; one that limits nothing removes it.
    pub fn set(&self, limits: Limits) {
        let now = self.now();
        let mut buckets = self.buckets();
        if let Some(bucket) = limits.bandwidth {
            buckets.bandwidth = Filled::new(bucket, now);
        }
        if let Some(bucket) = limits.ops {
            buckets.ops = Filled::new(bucket, now);
        }
    }

    /// Takes the tokens of one operation of `bytes` bytes.
    ///
    /// # Errors
    /// They are not there: none is taken, and this is how long to wait, at least a microsecond.
    pub fn take(&self, bytes: u64) -> Result<(), Duration> {
        let mut buckets = self.buckets();
        if *buckets == Buckets::default() {
            return Ok(());
        }
        let now = self.now();
        let wait = |bucket: &Option<Filled>, tokens| bucket.map_or(0, |bucket| bucket.wait(tokens, now));
        let wait = wait(&buckets.bandwidth, bytes).max(wait(&buckets.ops, 1));
        if wait > 0 {
            return Err(Duration::from_nanos(wait.unsigned_abs().max(1000)));
        }
        buckets.bandwidth.iter_mut().for_each(|bucket| bucket.take(bytes, now));
        buckets.ops.iter_mut().for_each(|bucket| bucket.take(1, now));
        Ok(())
    }

    /// What it is now; None if it limits nothing.
    pub fn save(&self) -> Option<LimiterState> {
        let (now, buckets) = (self.now(), *self.buckets());
        let save = |bucket: Option<Filled>| bucket.map(|bucket| bucket.save(now));
        (buckets != Buckets::default())
            .then(|| LimiterState { bandwidth: save(buckets.bandwidth), ops: save(buckets.ops) })
    }

    /// Is so from now on.
    pub fn restore(&self, state: &LimiterState) {
        let now = self.now();
        let restore = |state: &Option<BucketState>| state.and_then(|state| Filled::restore(&state, now));
        *self.buckets() = Buckets { bandwidth: restore(&state.bandwidth), ops: restore(&state.ops) };
    }

    fn now(&self) -> i64 {
        (self.clock)().as_nanos().try_into().unwrap_or(i64::MAX)
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        crate::lock::lock(&self.buckets)
    }
}

#[cfg(test)]
mod tests;
