//! Numbers that look random and follow from a seed (Steele and others' SplitMix64).

/// A sequence of choices.
#[derive(Clone, Debug)]
pub(super) struct Choices(u64);

impl Choices {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Another sequence, for another thread.
    pub(super) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    /// A number from 0 to `end - 1`; 0 if that is nothing.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_follow_from_the_seed() {
        let some = |seed| (0..100).map(|_| 0).scan(Choices::new(seed), |c, _: u64| Some(c.below(10)));
        assert!(some(1).eq(some(1)) && !some(1).eq(some(2)));
        assert!((0..10).all(|n| some(1).any(|choice| choice == n)));
        let mut choices = Choices::new(0);
        // The first number of this generator for seed 0.
        assert_eq!(choices.next(), 0xe220_a839_7b1d_cdaf);
        assert!(choices.fork().next() != choices.fork().next() && choices.below(0) == 0);
    }
}
