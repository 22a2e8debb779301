//! Figures of several repetitions: their median, and how far they spread.

use std::collections::BTreeMap;

use serde::Serialize;

use super::trial::{Point, Trial};
use crate::spread::Spread;

/// All repetitions of one point.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PointSummary {
    #[serde(flatten)]
    pub point: Point,
    /// How many repetitions are finished.
    pub repetitions: usize,
    pub figures: BTreeMap<String, Spread>,
}

impl PointSummary {
    /// The median of a figure, if there is one.
    pub fn median(&self, name: &str) -> Option<f64> {
        self.figures.get(name).map(|spread| spread.median)
    }
}

/// A summary of each point of which there is a trial, in the order of `points`.
pub fn summarize(points: &[Point], trials: &[Trial]) -> Vec<PointSummary> {
    let one = |point: &Point| {
        let of: Vec<&Trial> = trials.iter().filter(|trial| trial.point == *point).collect();
        let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (name, value) in of.iter().flat_map(|trial| &trial.measured.figures) {
            values.entry(name).or_default().push(*value);
        }
        let spread = |(name, values): (&str, Vec<f64>)| Some((name.to_owned(), Spread::of(&values)?));
        (!of.is_empty()).then(|| PointSummary {
            point: point.clone(),
            repetitions: of.len(),
            figures: values.into_iter().filter_map(spread).collect(),
        })
    };
    points.iter().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::super::trial::Measured;
    use super::*;
    use crate::contender::Contender;

    #[test]
    fn points_are_summed_up_by_themselves() {
        let point = |guests| Point { variant: String::new(), engine: Contender::Slab, guests };
        let trial = |guests, repetition, saved| {
            let mut measured = Measured::default();
            measured.put("saved_pages", saved);
            Trial { repetition, point: point(guests), measured, seconds: 1.0 }
        };
        let trials = [trial(1, 1, 5.0), trial(2, 1, 10.0), trial(1, 2, 7.0)];
        let summary = summarize(&[point(1), point(2), point(3)], &trials);
        let seen: Vec<_> =
            summary.iter().map(|s| (s.point.guests, s.repetitions, s.median("saved_pages"))).collect();
        assert_eq!(seen, [(1, 2, Some(6.0)), (2, 1, Some(10.0))]);
    }
}
