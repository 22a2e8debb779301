//! A figure of several rounds: its median and spread.

use serde::Serialize;

/// A figure over all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median: see [`median`].
    pub median: f64,
    /// The least of them.
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Of `values`; None of none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let least = values.iter().copied().reduce(f64::min)?;
        let most = values.iter().copied().reduce(f64::max)?;
        Some(Self { median: median(values.iter().copied()), least, most })
    }
}

/// The middle value; of an even number of them the mean of the two in the middle. 0 without values.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, half) if n.is_multiple_of(2) => f64::midpoint(sorted[half - 1], sorted[half]),
        (_, half) => sorted[half],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_stands_in_the_middle() {
        assert_eq!([median([]), median([4.0]), median([9.0, 1.0, 2.0])], [0.0, 4.0, 2.0]);
        assert_eq!(median([4.0, 1.0, 2.0, 8.0]), 3.0);
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(&[]), None);
    }
}
