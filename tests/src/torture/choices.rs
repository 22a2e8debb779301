//! Choices that follow from a seed.

use splitmix::SplitMix64;

/// A sequence of choices.
#[derive(Clone, Debug)]
pub(super) struct Choices(SplitMix64);

impl Choices {
    pub(super) fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    /// Another sequence, for another thread.
    pub(super) fn fork(&mut self) -> Self {
        Self::new(self.next())
    }

    /// A number from 0 to `end - 1`; 0 if that is nothing.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn next(&mut self) -> u64 {
        self.0.draw()
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
