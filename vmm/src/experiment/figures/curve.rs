//! What the plots of an experiment have in common.

use lab::experiment::run::Outcome;
use lab::experiment::summary::PointSummary;
use lab::experiment::trial::Series;
use memory::PAGE_BYTES;

/// Which variant and engine.
pub(super) fn curve(summary: &PointSummary) -> String {
    let point = &summary.point;
    match point.variant.is_empty() {
        true => point.engine.to_string(),
        false => format!("{}, {}", point.engine, point.variant),
    }
}

pub(super) fn mib(pages: f64) -> f64 {
    pages * PAGE_BYTES as f64 / f64::from(1 << 20)
}

/// The series of the first repetition of each point: a curve is no median.
pub(super) fn first_series(outcome: &Outcome) -> Vec<(&PointSummary, &Series)> {
    let first = |s: &PointSummary| outcome.trials.iter().find(|trial| trial.point == s.point);
    outcome.summary.iter().filter_map(|s| Some((s, &first(s)?.measured.series))).collect()
}
