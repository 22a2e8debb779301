//! Counts of times by their size, in constant memory: quantiles without keeping a single value.
//!
//! Values below 16 have a bucket each. Above, each power of two is divided into 16 buckets, so that
//! a quantile is at most a sixteenth too high, and never too low.

/// Buckets to a power of two.
const PARTS: u64 = 16;
/// Bits that tell them apart.
const PART_BITS: u32 = PARTS.trailing_zeros();
/// Those of the small values, and of every power of two from there to the last.
const BUCKETS: usize = (PARTS as usize) * (64 - PART_BITS as usize + 1);

/// How often values of each size were seen.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: [u32; BUCKETS],
    total: u64,
    max: u64,
}

impl Histogram {
    pub const fn new() -> Self {
        Self { counts: [0; BUCKETS], total: 0, max: 0 }
    }

    /// Counts `value`. A bucket that is full stays so.
    pub fn record(&mut self, value: u64) {
        let count = &mut self.counts[bucket(value)];
        *count = count.saturating_add(1);
        self.total = self.total.saturating_add(1);
        self.max = self.max.max(value);
    }

    /// How many values were seen.
    pub const fn total(&self) -> u64 {
        self.total
    }

    pub const fn max(&self) -> u64 {
        self.max
    }

    /// A value that `per_mille` thousandths of all do not exceed, rounded up to the end of its
    /// bucket; 0 of none.
    pub fn quantile(&self, per_mille: u16) -> u64 {
        let wanted = (u128::from(self.total) * u128::from(per_mille.min(1000))).div_ceil(1000).max(1);
        let mut seen = 0u128;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= wanted {
                return last(bucket).min(self.max);
            }
        }
        self.max
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

/// The bucket of a value.
const fn bucket(value: u64) -> usize {
    if value < PARTS {
        return value as usize;
    }
    // Its highest bit says which power of two, the next ones which part of it.
    let shift = value.ilog2() - PART_BITS;
    (shift as usize + 1) * PARTS as usize + (value >> shift & (PARTS - 1)) as usize
}

/// The largest value of a bucket.
const fn last(bucket: usize) -> u64 {
    let (power, part) = (bucket as u64 / PARTS, bucket as u64 % PARTS);
    if power == 0 {
        return part;
    }
    let shift = power - 1;
    ((PARTS + part) << shift) + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for bucket_number in 1..BUCKETS {
            let first = last(bucket_number - 1) + 1;
            assert_eq!((bucket(first), bucket(first - 1)), (bucket_number, bucket_number - 1));
        }
        assert_eq!((bucket(u64::MAX), last(BUCKETS - 1)), (BUCKETS - 1, u64::MAX));
    }

    #[test]
    fn of_nothing_everything_is_nothing() {
        let none = Histogram::new();
        assert_eq!((none.total(), none.max(), none.quantile(500)), (0, 0, 0));
    }

    proptest! {
        #[test]
        fn quantiles_are_at_most_a_sixteenth_too_high(
            mut values in proptest::collection::vec(0_u32..64, 1..300)
                .prop_flat_map(|shifts| (Just(shifts), any::<u64>()))
                .prop_map(|(shifts, seed)| shifts.iter().map(|shift| seed.rotate_left(*shift) >> shift).collect::<std::vec::Vec<u64>>()),
            per_mille in 1_u16..=1000,
        ) {
            let mut histogram = Histogram::new();
            values.iter().for_each(|value| histogram.record(*value));
            values.sort_unstable();
            let exact = values[(values.len() * usize::from(per_mille)).div_ceil(1000) - 1];
            let found = histogram.quantile(per_mille);
            prop_assert!(found >= exact && found - exact <= exact / 16, "{} for {}", found, exact);
            prop_assert_eq!((histogram.total(), histogram.max()), (values.len() as u64, values[values.len() - 1]));
        }
    }
}
