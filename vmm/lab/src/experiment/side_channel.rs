//! Whether a guest can tell by its own write times which of its pages are merged.
//!
//! Three guests: two in one trust domain, the third in another, all with the same common pages, so
//! that every guest has pages that another one has too, and pages of its own. The first and the
//! third time their writes to both kinds, in windows that take turns, so that other load on the
//! machine disturbs both alike. Where windows of common pages are slower than windows of others in
//! half of all pairs, an observer cannot do better than guess; at 100 % one window of each
//! distinguishes them.

use std::time::{Duration, Instant};

use guest::protocol::{Class, Target};

use super::ExperimentError;
use super::stage::{Present, Stage};
use super::trial::Measured;
use crate::spread::median;
use fleet::fleet::Fleet;
use fleet::spec::EngineName;

/// The observers: the guest's number, and the prefix of its figures.
const OBSERVERS: [(usize, &str); 2] = [(0, "same_domain"), (2, "other_domain")];

/// Times of the windows of one kind of page.
#[derive(Default)]
struct Windows {
    p50_ns: Vec<f64>,
    p99_ns: Vec<f64>,
}

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    // KSM knows no domains: its guests are all in one, and the third stands for another owner's.
    let domains = match stage.point.engine.kind() {
        EngineName::Ksm => ["one", "one", "one"],
        EngineName::Slab | EngineName::Off => ["one", "one", "other"],
    };
    stage.play(&domains, |fleet, measured| {
        let present = Present::now(fleet)?;
        fleet.start_merging()?;
        stage.settle(fleet, Instant::now(), |_, _| Ok(()))?;
        let (saved, frames) = fleet.paused(|_| present.saved())?;
        measured.put("freed_pages", saved.total() as f64);
        measured.put("saved_pages", saved.by_sharing() as f64);
        for (number, name) in OBSERVERS {
            let shared = frames.guests.get(number).map_or(0, |guest| guest.pages.shared);
            measured.put(&format!("{name}_shared_pages"), shared as f64);
        }
        for (number, name) in OBSERVERS {
            observe(stage, fleet, number, name, measured)?;
        }
        if stage.point.engine.kind() == EngineName::Ksm {
            measured
                .notes
                .push("KSM knows no trust domains: the guest of the other domain is merged too".into());
        }
        Ok(())
    })
}

fn observe(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    number: usize,
    name: &str,
    measured: &mut Measured,
) -> Result<(), ExperimentError> {
    let timing = stage.plan.timing;
    let rate = timing.pages_per_second;
    let length = Duration::from_secs_f64(f64::from(timing.writes) / rate as f64);
    let (mut common, mut unique) = (Windows::default(), Windows::default());
    for _ in 0..timing.windows {
        for (class, windows) in [(Class::Common, &mut common), (Class::Unique, &mut unique)] {
            stage.time_writes(fleet, number, Target::Only(class), rate)?;
            stage.rest(length)?;
            let timed = stage.time_writes(fleet, number, Target::Only(class), 0)?;
            if timed.writes > 0 {
                windows.p50_ns.push(timed.p50_ns as f64);
                windows.p99_ns.push(timed.p99_ns as f64);
            }
        }
    }
    for (kind, windows) in [("common", &common), ("unique", &unique)] {
        measured.put(&format!("{name}_{kind}_p50_ns"), median(windows.p50_ns.iter().copied()));
        measured.put(&format!("{name}_{kind}_p99_ns"), median(windows.p99_ns.iter().copied()));
        measured.series.insert(format!("{name}_{kind}_windows"), distribution(&windows.p50_ns));
    }
    measured.put(&format!("{name}_slower_percent"), slower_percent(&common.p50_ns, &unique.p50_ns));
    Ok(())
}

/// Each value with the percentage of values that are not above it.
fn distribution(values: &[f64]) -> Vec<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let part = |n: usize| 100.0 * (n + 1) as f64 / sorted.len() as f64;
    sorted.iter().enumerate().map(|(n, value)| (*value, part(n))).collect()
}

/// The percentage of all pairs of one value of each in which the first is larger; a tie counts half
/// (Mann and Whitney's U).
fn slower_percent(these: &[f64], those: &[f64]) -> f64 {
    let pairs = these.len() * those.len();
    if pairs == 0 {
        return 50.0;
    }
    let won = these.iter().flat_map(|this| those.iter().map(move |that| (this, that)));
    let won: f64 = won
        .map(|(this, that)| match this.total_cmp(that) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        })
        .sum();
    100.0 * won / pairs as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted() {
        assert_eq!(slower_percent(&[2.0, 3.0], &[1.0, 1.5]), 100.0);
        assert_eq!(slower_percent(&[1.0, 2.0], &[1.0, 2.0]), 50.0);
        assert_eq!(slower_percent(&[1.0], &[2.0, 0.5, 1.0, 3.0]), 37.5);
        assert_eq!(slower_percent(&[], &[1.0]), 50.0);
    }

    #[test]
    fn a_distribution_ends_at_all_of_it() {
        assert_eq!(distribution(&[3.0, 1.0]), [(1.0, 50.0), (3.0, 100.0)]);
    }
}
