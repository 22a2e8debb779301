//! The list of experiments, and the results of one, as tables.

use std::collections::BTreeSet;

use super::super::table::table;
use lab::experiment::plan::{Kind, Plan};
use lab::experiment::run::Outcome;
use lab::experiment::summary::PointSummary;
use lab::spread::Spread;
use lab::stress::scenario::Scenario;
use memory::PAGE_BYTES;

/// Columns of the list: sentences in it are broken.
const COLUMNS: u16 = 100;

/// The list of experiments.
pub(super) fn list(plans: &[Plan], scenarios: &[Scenario]) -> String {
    let mut table = table(&["experiment", "shows", "points", "repetitions"], 2);
    for plan in plans {
        table.add_row([
            plan.name.clone(),
            plan.about.clone(),
            plan.points().len().to_string(),
            plan.repeat.to_string(),
        ]);
    }
    for scenario in scenarios {
        let about = format!("{}; a scenario of `samepage stress`", scenario.about);
        table.add_row([scenario.name.clone(), about, "-".into(), "1".into()]);
    }
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    table.set_width(COLUMNS);
    format!(
        "{table}\n`samepage experiment run NAME` runs one. Each point is one combination of an experiment's dimensions. A scenario has a verdict instead."
    )
}

/// The table's columns for each kind, in order; all other figures are in JSON, CSV and the page.
pub(super) fn columns(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::IdenticalVms => &[
            "shared_pages",
            "frames_pages",
            "freed_pages",
            "ideal_pages",
            "zero_only_pages",
            "freed_self_pages",
            "freed_cross_pages",
            "metadata_pages",
            "merge_seconds",
            "merge_cpu_seconds",
        ],
        Kind::Ideal => &[
            "achieved_percent",
            "freed_zero_pages",
            "freed_self_pages",
            "freed_cross_pages",
            "to_50_percent_seconds",
            "to_95_percent_seconds",
            "churn_half_life_seconds",
            "churn_achieved_percent",
        ],
        Kind::SideChannel => &[
            "same_domain_common_p50_ns",
            "same_domain_unique_p50_ns",
            "same_domain_slower_percent",
            "other_domain_common_p50_ns",
            "other_domain_unique_p50_ns",
            "other_domain_slower_percent",
        ],
        Kind::PageCache => &[
            "to_50_percent_seconds",
            "to_90_percent_seconds",
            "peak_shared_pages",
            "peak_percent",
            "after_evict_shared_pages",
            "first_read_seconds",
            "second_read_seconds",
            "merge_cpu_seconds",
        ],
        Kind::ScannerPareto => &[
            "freed_pages",
            "achieved_percent",
            "merge_cpu_seconds",
            "merge_cpu_seconds_per_freed_gib",
            "write_p50_ns",
            "write_p99_ns",
            "write_p999_ns",
            "write_max_ns",
        ],
        Kind::InflateDeflate => &[
            "untouched_reclaim_gib_per_second",
            "touched_reclaim_gib_per_second",
            "touched_return_gib_per_second",
            "touched_return_install_gib_per_second",
            "touched_reclaim_vmm_seconds_per_gib",
        ],
        Kind::CloneFanout => &[
            "pause_seconds",
            "ready_seconds",
            "vm_cpu_seconds_per_clone",
            "own_at_0_s_pages",
            "own_at_1_s_pages",
            "own_at_10_s_pages",
            "own_at_60_s_pages",
            "first_write_p50_ns",
            "first_write_p99_ns",
        ],
        Kind::Shootdown => &[
            "discard_at_once_remote_tlb_flush_requests_per_page",
            "discard_one_by_one_remote_tlb_flush_requests_per_page",
            "merge_remote_tlb_flush_requests_per_page",
            "break_remote_tlb_flush_requests_per_page",
            "quiet_late_per_million_reads",
            "merge_late_per_million_reads",
            "quiet_write_p99_ns",
            "merge_write_p99_ns",
        ],
        Kind::HugePages => &[
            "unmerged_reach_pages",
            "unmerged_ticks",
            "unmerged_packed_ticks",
            "merged_ticks",
            "beside_merged_ticks",
            "freed_pages",
            "huge_before_pages",
            "huge_after_pages",
        ],
        Kind::Mixed => &[
            "present_pages",
            "ideal_pages",
            "freed_pages",
            "sharing_percent",
            "sharing_compression_percent",
            "sharing_patches_compression_percent",
        ],
        Kind::Thrashing => &[
            "knee_overcommit_percent",
            "at_100_writes_per_second",
            "at_200_writes_per_second",
            "at_300_writes_per_second",
            "at_600_writes_per_second",
            "at_300_paged_out_per_second",
        ],
    }
}

/// A figure's displayed name and the factor of its values: pages are shown in MiB, nanoseconds in
/// microseconds.
pub(super) fn readable(name: &str) -> (String, f64) {
    let (name, unit, factor) = if let Some(name) = name.strip_suffix("_pages") {
        (name, " MiB", PAGE_BYTES as f64 / f64::from(1 << 20))
    } else if let Some(name) = name.strip_suffix("_ns") {
        (name, " us", 1e-3)
    } else if let Some(name) = name.strip_suffix("_percent") {
        (name, " %", 1.0)
    } else if let Some(name) = name.strip_suffix("_gib_per_second") {
        (name, " GiB/s", 1.0)
    } else if let Some(name) = name.strip_suffix("_seconds_per_gib") {
        (name, " s/GiB", 1.0)
    } else if let Some(name) = name.strip_suffix("_seconds") {
        (name, " s", 1.0)
    } else {
        (name, "", 1.0)
    };
    (format!("{}{unit}", name.replace('_', " ")), factor)
}

/// The median, with minimum and maximum where repetitions differ.
pub(super) fn spread(spread: &Spread, factor: f64) -> String {
    let [median, least, most] =
        [spread.median, spread.least, spread.most].map(|value| digits(value * factor));
    if least == most { median } else { format!("{median} ({least}-{most})") }
}

fn digits(value: f64) -> String {
    match value.abs() {
        small if small < 10.0 => format!("{value:.2}"),
        _ => format!("{value:.1}"),
    }
}

/// A dimension's name, and its value at a point.
type Dimension = (&'static str, fn(&PointSummary) -> String);

/// The dimensions with more than one value, by name.
pub(super) fn dimensions(summary: &[PointSummary]) -> Vec<Dimension> {
    let all: [Dimension; 3] = [
        ("variant", |s| s.point.variant.clone()),
        ("engine", |s| s.point.engine.to_string()),
        ("guests", |s| s.point.guests.to_string()),
    ];
    let differ = |of: &fn(&PointSummary) -> String| summary.iter().map(of).collect::<BTreeSet<_>>().len() > 1;
    all.into_iter().filter(|(name, of)| *name == "engine" || differ(of)).collect()
}

/// The table of an outcome, the trials skipped, and the machine measured on.
pub(super) fn outcome(outcome: &Outcome) -> String {
    let dimensions = dimensions(&outcome.summary);
    let columns = columns(outcome.plan.kind);
    let (names, factors): (Vec<_>, Vec<_>) = columns.iter().map(|name| readable(name)).unzip();
    let header: Vec<&str> =
        dimensions.iter().map(|(name, _)| *name).chain(names.iter().map(String::as_str)).collect();
    let mut table = table(&header, dimensions.len());
    for summary in &outcome.summary {
        let mut row: Vec<String> = dimensions.iter().map(|(_, of)| of(summary)).collect();
        row.extend(columns.iter().zip(&factors).map(|(name, factor)| {
            summary.figures.get(*name).map_or("-".into(), |figure| spread(figure, *factor))
        }));
        table.add_row(row);
    }
    let plan = &outcome.plan;
    let mut text = format!(
        "{table}\nexperiment {}, seed {}: {} of {} trials; repetitions: {}, shown are medians (min-max); guests of {}, {}\n{}",
        plan.name,
        plan.seed,
        outcome.trials.len(),
        outcome.planned_trials,
        plan.repeat,
        plan.guest.memory,
        if plan.guest.kernel.is_some() { "Linux" } else { "built-in" },
        outcome.environment.line(),
    );
    for note in &outcome.notes {
        text.push_str(&format!("\nnote: {note}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_in_units_that_people_read() {
        assert_eq!(readable("saved_pages"), ("saved MiB".into(), 1.0 / 256.0));
        assert_eq!(readable("write_p99_ns"), ("write p99 us".into(), 1e-3));
        assert_eq!(readable("to_50_percent_seconds"), ("to 50 percent s".into(), 1.0));
        assert_eq!(readable("a_vmm_seconds_per_gib"), ("a vmm s/GiB".into(), 1.0));
        assert_eq!(readable("full_passes").0, "full passes");
    }

    #[test]
    fn a_spread_is_shown_where_there_is_one() {
        let one = |median, least, most| spread(&Spread { median, least, most }, 1.0);
        assert_eq!(one(1.0, 1.0, 1.001), "1.00");
        assert_eq!(one(20.0, 10.0, 30.0), "20.0 (10.0-30.0)");
    }
}
