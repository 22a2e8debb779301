//! Repeatable random numbers.

use splitmix::SplitMix64;

/// A stream of numbers that follows from its seed.
#[derive(Clone, Debug)]
pub struct Dice(SplitMix64);

impl Dice {
    /// The stream number `stream` of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mixed = SplitMix64::new(seed).draw() ^ stream;
        Self(SplitMix64::new(SplitMix64::new(mixed).draw()))
    }

    /// From 0 to below 1.
    pub fn part(&mut self) -> f64 {
        (self.0.draw() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// From -1 to below 1.
    pub fn swing(&mut self) -> f64 {
        2.0 * self.part() - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_repeats_itself_and_streams_differ() {
        let roll = |seed, stream| Dice::new(seed, stream).part();
        assert_eq!(roll(1, 2), roll(1, 2));
        assert!(roll(1, 2) != roll(1, 3) && roll(1, 2) != roll(2, 2));
        let mut dice = Dice::new(7, 0);
        let mean = (0..10_000).map(|_| dice.swing()).sum::<f64>() / 10_000.0;
        assert!(mean.abs() < 0.03, "{mean}");
    }
}
