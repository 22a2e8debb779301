//! The tables of `samepage simulate`.

use comfy_table::Table;

use super::table::table;
use lab::simulate::{PhaseReport, Report};
use memory::PAGE_BYTES;
use overcommit::memory_state::MemoryState;

/// Pages of a MiB.
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;

/// The meaning of the columns.
const LEGEND: &str = "moved: by balloons; out, in: to swap and back; denied: first touches without a frame; throttled: guests at their limit; \
swings: balloons sent back within a minute; quiet: at the end, nothing was done; left: what its balloon leaves a guest";

/// A row for each phase, a row for each kind of guest in each phase, and why guests were suspended
/// or stopped.
pub(super) fn tables(report: &Report) -> String {
    let mut text = format!("{}\n{LEGEND}\n{}", phases(report), kinds(report));
    for phase in &report.phases {
        for reason in &phase.reasons {
            text.push_str(&format!("\n{}: {reason}", phase.name));
        }
        let told = phase.reasons.len() as u64;
        let all = phase.suspends + phase.stops;
        if all > told {
            text.push_str(&format!("\n{}: and {} more", phase.name, all - told));
        }
    }
    text
}

fn phases(report: &Report) -> Table {
    let header = [
        "phase",
        "seconds",
        "high %",
        "soft %",
        "hard %",
        "low %",
        "least free %",
        "moved MiB",
        "out MiB",
        "in MiB",
        "denied MiB",
        "throttled s",
        "suspends",
        "stops",
        "swings",
        "below min",
        "quiet s",
        "slowdown",
    ];
    let mut table = table(&header, 1);
    for phase in &report.phases {
        let mut row = vec![phase.name.clone(), format!("{:.0}", phase.seconds)];
        let percent = |p: &MemoryState| phase.state_percent.get(p.name()).copied().unwrap_or(0.0);
        row.extend(MemoryState::ALL.iter().map(|p| format!("{:.1}", percent(p))));
        row.push(format!("{:.1}", phase.least_free_percent));
        row.extend(pages_of(phase).map(|pages| (pages / PAGES_PER_MIB).to_string()));
        row.push(format!("{:.0}", phase.throttled_seconds));
        let counts = [phase.suspends, phase.stops, phase.swings, phase.minimum_violations];
        row.extend(counts.map(|n| n.to_string()));
        row.push(format!("{:.0}", phase.quiet_seconds));
        row.push(slowdown(phase.slowdown));
        table.add_row(row);
    }
    table
}

fn pages_of(phase: &PhaseReport) -> [u64; 4] {
    let out = phase.swapped_out_pages + phase.kernel_swapped_out_pages;
    [phase.balloon_moved_pages, out, phase.swapped_in_pages, phase.denied_pages]
}

fn kinds(report: &Report) -> Table {
    let header = [
        "phase ends",
        "guests",
        "living",
        "promised MiB",
        "left MiB",
        "resident MiB",
        "swapped MiB",
        "slowdown",
    ];
    let mut table = table(&header, 2);
    for phase in &report.phases {
        for kind in &phase.guests {
            let mut row = vec![phase.name.clone(), kind.name.clone(), kind.living.to_string()];
            let pages = [kind.promised_pages, kind.left_pages, kind.resident_pages, kind.swapped_pages];
            row.extend(pages.map(|p| (p / PAGES_PER_MIB).to_string()));
            row.push(slowdown(kind.slowdown));
            table.add_row(row);
        }
    }
    table
}

fn slowdown(times: Option<f64>) -> String {
    times.map_or("-".into(), |times| format!("{times:.2}"))
}
