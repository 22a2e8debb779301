//! SplitMix64: numbers that look random and follow from a seed, the same on every machine and in
//! every version.
//!
//! For samples, models and tests. Some of the numbers determine the others: where that matters, ask
//! the kernel for random bytes.
//!
//! Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
#![forbid(unsafe_code)]

#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, or 0 if `end` is 0; as evenly distributed as the numbers are.
    pub fn below(&mut self, end: u64) -> u64 {
        let product = u128::from(self.draw()) * u128::from(end);
        // The high half; it is below `end`.
        (product >> 64) as u64
    }
}

/// The generator's finalizer: one to one, so different numbers stay different.
pub fn mix(number: u64) -> u64 {
    let mixed = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_numbers_are_the_paper_s() {
        let mut numbers = SplitMix64::new(0);
        assert_eq!([numbers.draw(), numbers.draw()], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    #[test]
    fn all_numbers_below_an_end_are_drawn() {
        let mut numbers = SplitMix64::new(1);
        let mut seen = [0u32; 10];
        (0..10_000).for_each(|_| seen[numbers.below(10) as usize] += 1);
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
        assert_eq!(numbers.below(0), 0);
    }
}
