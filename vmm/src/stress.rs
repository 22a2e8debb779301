//! `samepage stress`: overcommit a fleet on purpose, and check every page.

mod fate;
mod figures;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use self::fate::{fate, reasons};
use super::output_file::{can_be_written, write};
use super::progress::{draw_target, interrupt_flag};
use super::table::{counted, mib, table};
use fleet::watch::{Stage, Watch};
use lab::stress::run;
use lab::stress::scenario::Scenario;
use lab::stress::verdict::{Fate, Verdict};
use memory::PAGE_BYTES;
use os::print::{errln, outln};
use overcommit::memory_state::{Because, MemoryState};

/// Refresh interval of the bar.
const TICK: Duration = Duration::from_millis(200);
/// Rows of the table over time.
const ROWS: usize = 24;

/// Overcommit a fleet on purpose: guests arrive, fill, churn, break what they share, die; every
/// page is checked
#[derive(clap::Args)]
#[command(
    after_help = "The scenario describes the fleet, its capacity, the load phase by phase, and what must be true in
the end. The exit status is 1 if a page was lost, a guest died by itself, or an expectation was not met.
Everything that it starts has ended when it returns.

Examples:
  samepage stress resources/scenarios/ksm-52.toml
  samepage stress resources/scenarios/cow-storm.toml --csv storm.csv --html storm.html
  samepage stress resources/scenarios/hostile-guests.toml --json > verdict.json"
)]
pub(super) struct Args {
    /// The scenario file
    #[arg(value_name = "SCENARIO")]
    file: PathBuf,
    #[command(flatten)]
    output: Output,
}

// The outputs of a verdict. No doc comment: clap would show it as that of the command.
#[derive(clap::Args)]
pub(super) struct Output {
    /// Print the verdict and the time series as one JSON object
    #[arg(long)]
    pub(super) json: bool,
    /// Write the time series to this CSV file, a line a sample
    #[arg(long, value_name = "FILE")]
    pub(super) csv: Option<PathBuf>,
    /// Write a self-contained HTML report
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    play(&Scenario::read(&args.file)?, &args.output)
}

/// Plays a scenario and prints its verdict.
pub(super) fn play(scenario: &Scenario, output: &Output) -> anyhow::Result<ExitCode> {
    for path in [&output.html, &output.csv].into_iter().flatten() {
        can_be_written(path)?;
    }
    let names: Vec<String> = scenario.fleet.guests.iter().map(|guest| guest.name.clone()).collect();
    let tell = move |stage, guest: usize, done, total| {
        if let (Stage::Wait, true, Some(name)) = (stage, done < total, names.get(guest)) {
            errln!("waiting for guest {name}, which is suspended or paused; Control-C stops");
        }
    };
    let watch = Watch::new(tell, interrupt_flag()?);
    let bar = ProgressBar::with_draw_target(Some(scenario.phases.len() as u64), draw_target());
    let style = ProgressStyle::with_template("{prefix} [{bar:24}] {pos}/{len} {msg} ({elapsed})")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(scenario.name.clone());
    bar.enable_steady_tick(TICK);
    let result = run::run(scenario, &watch, &|n| {
        bar.set_position(n as u64);
        bar.set_message(scenario.phases[n].name.clone());
    });
    bar.finish_and_clear();
    let verdict = result.context("the scenario did not finish; everything it started is stopped")?;
    if let Some(path) = &output.csv {
        write(path, &verdict.series.csv())?;
    }
    if let Some(path) = &output.html {
        write(path, &figures::page(&verdict).to_string())?;
    }
    match output.json {
        true => outln!("{}", serde_json::to_string(&verdict)?)?,
        false => outln!("{}", text(&verdict))?,
    }
    Ok(if verdict.held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Numbers of the ledger that are older than this are not shown beside newer ones.
const FRESH_SECONDS: f64 = 1.0;

fn pages(pages: u64) -> String {
    mib(pages * PAGE_BYTES)
}

fn text(verdict: &Verdict) -> String {
    let mut all = vec![over_time(verdict), guests(verdict)];
    all.extend(reasons(verdict));
    if !verdict.actions.is_empty() {
        let counts = verdict.actions.iter().map(|(kind, count)| format!("{kind} {count}"));
        all.push(format!(
            "the policy did: {}; {} of these failed",
            counts.collect::<Vec<_>>().join(", "),
            verdict.failed_actions
        ));
    }
    if verdict.swap_taken_pages > 0 {
        all.push(format!("the scenario withheld {} MiB of the host's swap", pages(verdict.swap_taken_pages)));
    }
    all.push(format!(
        "{}, engine {}, {}: MiB: {} promised = {:.2} times the capacity of {}, at most {} in use ({:.0} %)",
        verdict.backend,
        verdict.engine,
        verdict.kernel,
        pages(verdict.promised_peak_pages),
        verdict.promised_times(),
        pages(verdict.capacity_pages),
        pages(verdict.used_peak_pages),
        verdict.used_peak_percent(),
    ));
    all.push(format!(
        "{}: {} of {} pages wrong; {} stopped, {} suspended at some time, {} not admitted; {:.1} s",
        if verdict.held { "held" } else { "NOT HELD" },
        verdict.mismatched_pages,
        verdict.verified_pages,
        counted(verdict.count(Fate::Stopped), "guest"),
        verdict.ever_suspended(),
        verdict.count(Fate::Refused),
        verdict.seconds,
    ));
    if !verdict.unchecked.is_empty() {
        let names: Vec<_> = verdict.unchecked.iter().map(String::as_str).collect();
        all.push(format!("left out of a check because they were suspended: {}", names.join(", ")));
    }
    all.extend(verdict.failures.iter().map(|failure| format!("  {failure}")));
    all.join("\n")
}

/// A row for each of some samples, evenly over the run.
fn over_time(verdict: &Verdict) -> String {
    let mut table = table(
        &[
            "phase",
            "memory state",
            "s",
            "used",
            "free",
            "promised",
            "saved",
            "balloon",
            "swap",
            "debt",
            "cover",
            "read s ago",
            "throttled",
            "suspended",
        ],
        2,
    );
    let samples = &verdict.series.samples;
    let every = samples.len().div_ceil(ROWS).max(1);
    let last = samples.len().saturating_sub(1);
    let mut before = None;
    for (n, sample) in samples.iter().enumerate() {
        if n % every != 0 && n != last && before == Some(sample.phase) {
            continue;
        }
        before = Some(sample.phase);
        let phase = verdict.phases.get(sample.phase).map_or("", |phase| &phase.name);
        let state = MemoryState::ALL.get(usize::from(sample.memory_state)).map_or("", |p| p.name());
        let because = match Because::ALL.get(usize::from(sample.because)) {
            None | Some(Because::Free) => String::new(),
            Some(because) => format!(": {}", because.name()),
        };
        let mut row = vec![phase.to_owned(), format!("{state}{because}"), format!("{:.1}", sample.seconds)];
        // The ledger is read at intervals: numbers of different times must not be compared.
        let ledger = |number: u64| {
            if sample.ledger_age_seconds <= FRESH_SECONDS { pages(number) } else { String::new() }
        };
        row.extend([sample.used_pages, sample.free_pages].map(pages));
        row.extend([sample.promised_pages, sample.saved_pages].map(ledger));
        row.push(pages(sample.ballooned_pages));
        row.extend([sample.swapped_pages, sample.debt_pages, sample.cover_pages].map(ledger));
        row.push(format!("{:.1}", sample.ledger_age_seconds));
        row.extend([sample.throttled, sample.suspended].map(|n| n.to_string()));
        table.add_row(row);
    }
    format!(
        "{table}\npromised, saved, swap, debt and cover are from the ledger and left out where it is older than {FRESH_SECONDS} s; \
         throttled: guests that reached their limit lately; memory state: by free memory, or: falling, if it soon will be so \
         little; stalls, for tasks wait for memory; before, for more must be free, or for longer, until it is left"
    )
}

fn guests(verdict: &Verdict) -> String {
    let mut table = table(
        &[
            "guest",
            "in the end",
            "fill s",
            "throttled s",
            "suspended s",
            "storm MiB/s",
            "write p50 us",
            "p99",
            "p99.9",
            "max",
        ],
        2,
    );
    for guest in &verdict.guests {
        let storm = guest.storms.iter().fold((0, 0.0), |(p, s), storm| (p + storm.pages, s + storm.seconds));
        let storm = match storm {
            (0, _) => "-".into(),
            (pages, seconds) => {
                format!("{:.0}", pages as f64 * PAGE_BYTES as f64 / seconds / f64::from(1 << 20))
            }
        };
        let mut row = vec![guest.name.clone(), fate(guest).to_owned()];
        row.extend(
            [guest.fill_seconds, guest.held_seconds, guest.suspended_seconds].map(|s| format!("{s:.1}")),
        );
        row.push(storm);
        // The last phase in which writes were timed.
        row.extend(match guest.latencies.last() {
            Some(l) => {
                [l.p50_ns, l.p99_ns, l.p999_ns, l.max_ns].map(|ns| format!("{:.1}", ns as f64 / 1000.0))
            }
            None => ["-"; 4].map(String::from),
        });
        table.add_row(row);
    }
    std::iter::once(table.to_string()).chain(reasons(verdict)).collect::<Vec<_>>().join("\n")
}
