//! `samepage simulate`: the overcommit policy against a model of many hosts and guests.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::progress::{draw_target, interrupt_flag, is_set};
use super::simulate_table::tables;
use lab::simulate::scenario::Scenario;
use lab::simulate::{Report, Sample, run as simulate};
use os::named_file;
use os::print::outln;

/// A simulation that takes longer than this shows a bar.
const SHOWN_AFTER: Duration = Duration::from_secs(1);
/// Steps of hosts between two looks at the clock.
const LOOK_EVERY: u64 = 1024;

/// Try the overcommit policy on a model of hosts and guests, in seconds instead of days
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage simulate resources/scenarios/sim-idle-tax.toml
  samepage simulate resources/scenarios/sim-fleet.toml --hosts 500 --json
  samepage simulate resources/scenarios/sim-cow-storm.toml --csv storm.csv
  samepage simulate resources/scenarios/sim-fleet.toml --seed 7

The policy is the one that the daemon runs; hosts and guests are a model, so that slowdowns are estimates. The same scenario
and seed give the same result on every machine. resources/docs/reference/scenarios.md says what a scenario
may contain.

The exit status is 1 if the policy would have left a guest less than its minimum.")]
pub(super) struct Args {
    /// The scenario: a TOML file
    #[arg(value_name = "SCENARIO")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write a CSV file with a line for each host and step
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Number of hosts, overriding the scenario
    #[arg(long, value_name = "N")]
    hosts: Option<u64>,
    /// Seed, overriding the scenario
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let scenario = read(&args).with_context(|| format!("cannot use the scenario {}", args.file.display()))?;
    let begun = Instant::now();
    let report = play(&scenario, args.csv.as_deref())?;
    let took = begun.elapsed();
    match args.json {
        true => outln!("{}", serde_json::to_string(&report)?)?,
        false => outln!("{}\n{}", tables(&report), headline(&report, took))?,
    }
    let violations: u64 = report.phases.iter().map(|p| p.minimum_violations).sum();
    if violations > 0 {
        bail!("guests were left less than their minimum {violations} times: this is a defect of the policy");
    }
    Ok(ExitCode::SUCCESS)
}

fn read(args: &Args) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::parse(&named_file::read_text(&args.file)?)?;
    if let Some(hosts) = args.hosts {
        scenario = scenario.with_hosts(hosts)?;
    }
    scenario.seed = args.seed.unwrap_or(scenario.seed);
    Ok(scenario)
}

fn headline(report: &Report, took: Duration) -> String {
    format!(
        "scenario {}: {} hosts, {} guests on each, seed {}; {} guest-steps of {} s in {:.2} s, {:.1} million a second",
        report.scenario,
        report.hosts,
        report.guests_per_host,
        report.seed,
        report.guest_steps,
        report.step_seconds,
        took.as_secs_f64(),
        report.guest_steps as f64 / took.as_secs_f64().max(1e-9) / 1e6,
    )
}

/// Runs the simulation, with a bar if it takes long, and the time series if asked for.
fn play(scenario: &Scenario, csv: Option<&Path>) -> anyhow::Result<Report> {
    let interrupted = interrupt_flag()?;
    let mut series = csv.map(Series::create).transpose()?;
    let begun = Instant::now();
    let total = scenario.steps() * scenario.hosts;
    let mut bar: Option<ProgressBar> = None;
    let mut done = 0_u64;
    let report = simulate(scenario, |sample| {
        if let Some(series) = &mut series {
            series.write(sample)?;
        }
        done += 1;
        if done.is_multiple_of(LOOK_EVERY) {
            if is_set(&interrupted) {
                bail!("interrupted after {done} of {total} steps of hosts");
            }
            if bar.is_none() && begun.elapsed() > SHOWN_AFTER {
                bar = Some(new_bar(total));
            }
            if let Some(bar) = &bar {
                bar.set_position(done);
            }
        }
        Ok(())
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if let Some(series) = series {
        series.close()?;
    }
    report
}

fn new_bar(total: u64) -> ProgressBar {
    let template = "{prefix:>20} [{bar:32}] {human_pos:>9} / {human_len} steps of hosts";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(total), draw_target())
        .with_style(style.progress_chars("=> "))
        .with_prefix("simulate")
}

/// The time series as a CSV file.
struct Series {
    path: PathBuf,
    out: BufWriter<File>,
}

impl Series {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let file = named_file::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut series = Self { path: path.into(), out: BufWriter::new(file) };
        let columns = "seconds,host,state,free_pages,ballooned_pages,swapped_pages,saved_pages,running,suspended,throttled,actions";
        writeln!(series.out, "{columns}").with_context(|| format!("cannot write {}", path.display()))?;
        Ok(series)
    }

    fn write(&mut self, s: &Sample) -> anyhow::Result<()> {
        writeln!(
            self.out,
            "{},{},{},{:.0},{:.0},{:.0},{:.0},{},{},{},{}",
            s.seconds,
            s.host,
            s.memory_state.name(),
            s.free_pages,
            s.ballooned_pages,
            s.swapped_pages,
            s.saved_pages,
            s.running,
            s.suspended,
            s.throttled,
            s.actions
        )
        .with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn close(mut self) -> anyhow::Result<()> {
        self.out.flush().with_context(|| format!("cannot write {}", self.path.display()))
    }
}
