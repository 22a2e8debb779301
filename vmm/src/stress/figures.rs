//! A stress verdict as a page of plots and tables.

use super::fate::{fate, reasons};
use lab::provenance::Provenance;
use lab::stress::series::Sample;
use lab::stress::verdict::{Fate, Verdict};
use measure::html::{Item, Lines, Page, Section, Table};
use measure::report::mib;

/// Points of a line: more cannot be distinguished.
const PLOT_POINTS: usize = 120;

/// A plotted value of each sample: name and number.
type Curve = (&'static str, fn(&Sample) -> f64);

pub(super) fn page(verdict: &Verdict) -> Page {
    let state = if verdict.held { "held" } else { "NOT HELD" };
    Page {
        title: format!("Stress {}", verdict.scenario),
        lead: format!(
            "{state}: {}. KVM {}, engine {}, Linux {}.",
            verdict.about, verdict.backend, verdict.engine, verdict.kernel
        ),
        sections: vec![
            outcome(verdict),
            over_time(verdict),
            phases(verdict),
            guests(verdict),
            Provenance::now([]).section(),
        ],
    }
}

fn outcome(verdict: &Verdict) -> Section {
    let numbers = [
        ("pages checked", verdict.verified_pages.to_string()),
        ("of these wrong", verdict.mismatched_pages.to_string()),
        ("capacity, MiB", format!("{:.0}", mib(verdict.capacity_pages))),
        ("promised, in capacities", format!("{:.2}", verdict.promised_times())),
        ("most in use, % of it", format!("{:.0}", verdict.used_peak_percent())),
        ("guests stopped", verdict.count(Fate::Stopped).to_string()),
        ("suspended at some time", verdict.ever_suspended().to_string()),
        ("not admitted", verdict.count(Fate::Refused).to_string()),
        ("seconds", format!("{:.1}", verdict.seconds)),
    ];
    let mut numbers = numbers.map(|(name, value)| (name.to_owned(), value)).to_vec();
    if verdict.swap_taken_pages > 0 {
        numbers.push(("swap withheld, MiB".into(), format!("{:.0}", mib(verdict.swap_taken_pages))));
    }
    let mut items = vec![Item::KeyValues(numbers)];
    if !verdict.unchecked.is_empty() {
        let rows = verdict.unchecked.iter().map(|name| vec![name.clone()]).collect();
        items.push(Item::Table(Table { header: vec!["not checked: suspended".into()], rows }));
    }
    if !verdict.failures.is_empty() {
        let rows = verdict.failures.iter().map(|failure| vec![failure.clone()]).collect();
        items.push(Item::Table(Table { header: vec!["lost, or not as expected".into()], rows }));
    }
    if !verdict.actions.is_empty() {
        let mut rows: Vec<_> =
            verdict.actions.iter().map(|(kind, count)| vec![kind.clone(), count.to_string()]).collect();
        rows.push(vec!["failed".into(), verdict.failed_actions.to_string()]);
        items.push(Item::Table(Table { header: vec!["the policy did".into(), "times".into()], rows }));
    }
    Section { heading: "Verdict".into(), text: String::new(), items }
}

fn over_time(verdict: &Verdict) -> Section {
    let memory: [Curve; 5] = [
        ("in use", |s| mib(s.used_pages)),
        ("capacity", |s| mib(s.capacity_pages)),
        ("saved", |s| mib(s.saved_pages)),
        ("in balloons", |s| mib(s.ballooned_pages)),
        ("on swap", |s| mib(s.swapped_pages)),
    ];
    let promises: [Curve; 3] = [
        ("promised", |s| mib(s.promised_pages)),
        ("debt", |s| mib(s.debt_pages)),
        ("cover", |s| mib(s.cover_pages)),
    ];
    let guests: [Curve; 3] = [
        ("run", |s| s.running as f64),
        ("throttled", |s| s.throttled as f64),
        ("suspended", |s| s.suspended as f64),
    ];
    let stalls: [Curve; 2] =
        [("some tasks (PSI some)", |s| s.psi_some_percent), ("all tasks (PSI full)", |s| s.psi_full_percent)];
    let samples = &verdict.series.samples;
    let every = samples.len().div_ceil(PLOT_POINTS).max(1);
    let last = samples.len().saturating_sub(1);
    let plot = |title: &str, y: &str, curves: &[Curve]| {
        let line = |(name, of): &Curve| {
            let points = samples.iter().enumerate().filter(|(n, _)| n % every == 0 || *n == last);
            ((*name).to_owned(), points.map(|(_, s)| (s.seconds, of(s))).collect())
        };
        let series = curves.iter().map(line).collect();
        Item::Lines(Lines { title: title.into(), x: "seconds".into(), y: y.into(), series })
    };
    Section {
        heading: "Over time".into(),
        text: "Debt: memory needed at once if all shared pages were written and all absent ones touched; cover: what could pay it."
            .into(),
        items: vec![
            plot("Memory", "MiB", &memory),
            plot("Promises", "MiB", &promises),
            plot("Guests", "guests", &guests),
            plot("Tasks waiting for memory (pressure stall information)", "% of the last 10 s", &stalls),
        ],
    }
}

fn phases(verdict: &Verdict) -> Section {
    let rows = verdict.phases.iter().map(|phase| {
        let settled = phase.settled_seconds.map_or("-".into(), |seconds| format!("{seconds:.1}"));
        vec![
            phase.name.clone(),
            format!("{:.1}", phase.begin_seconds),
            format!("{:.1}", phase.seconds),
            settled,
        ]
    });
    let header = ["phase", "begins, s", "takes, s", "merging settles, s"].map(String::from).to_vec();
    let items = vec![Item::Table(Table { header, rows: rows.collect() })];
    Section { heading: "Phases".into(), text: String::new(), items }
}

fn guests(verdict: &Verdict) -> Section {
    let rows = verdict.guests.iter().map(|guest| {
        // The last phase in which writes were timed.
        let p99 = guest.latencies.last().map_or("-".into(), |l| format!("{:.1}", l.p99_ns as f64 / 1000.0));
        let mut row = vec![guest.name.clone(), fate(guest).to_owned()];
        row.extend(
            [guest.fill_seconds, guest.held_seconds, guest.suspended_seconds].map(|s| format!("{s:.1}")),
        );
        row.push(p99);
        row
    });
    let header = ["guest", "in the end", "fill, s", "throttled, s", "suspended, s", "write p99, us"];
    let mut items =
        vec![Item::Table(Table { header: header.map(String::from).to_vec(), rows: rows.collect() })];
    let reasons = reasons(verdict);
    if !reasons.is_empty() {
        items.push(Item::Notes(reasons));
    }
    Section { heading: "Guests".into(), text: String::new(), items }
}
