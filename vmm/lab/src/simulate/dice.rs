//! Chance that can be repeated: SplitMix64 (Steele, Lea and Flood 2014), the same on every machine and in every version.

/// A stream of numbers that follows from its seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The stream number `stream` of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut dice = Self(seed);
        dice.0 = dice.next() ^ stream;
        dice.0 = dice.next();
        dice
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to below 1.
    pub fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
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
