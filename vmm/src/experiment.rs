//! `samepage experiment`: the field's standard experiments, repeatable.

mod csv;
mod figures;
mod report;
mod table;

use crate::choice;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::output_file::{can_be_written, write};
use super::progress::{draw_target, interrupt_flag};
use super::stress;
use fleet::watch::Watch;
use lab::contender::Contender;
use lab::environment::Environment;
use lab::experiment::journal::{Found, Journal};
use lab::experiment::plan::{MAX_REPEAT, Plan};
use lab::experiment::run::Outcome;
use lab::experiment::{ExperimentError, catalogue};
use lab::stress::scenario::Scenario;
use os::print::{errln, outln};

/// Refresh interval of the bar.
const TICK: Duration = Duration::from_millis(200);

/// Run the field's standard experiments on fleets of their own, repeatably, with a report
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage experiment list
  samepage experiment run identical-vms --html identical-vms.html
  samepage experiment run identical-vms --guests 2,4 --engine slab --repeat 1
  samepage experiment run ideal --results ideal.jsonl        once more with the same file: it goes on where it was
  samepage experiment run fidelity --kernel vmlinux --initrd initrd.cpio --json
  samepage experiment run my-plan.toml --csv figures.csv
  samepage experiment report ideal.jsonl --html all.html     all results side by side
  samepage experiment run ksm-52 --html ksm-52.html          a scenario of `samepage stress`

resources/docs/reference/experiments.md describes each experiment, the figures, and the keys of a plan.")]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List the experiments
    List {
        /// Print one JSON array of plans
        #[arg(long)]
        json: bool,
    },
    Run(Box<RunArgs>),
    Report(report::Args),
}

/// Run an experiment: every combination of its dimensions, several times, each with a fleet of its
/// own
#[derive(clap::Args)]
#[command(
    after_help = "Results are medians over the repetitions, with minimum and maximum; the machine, its kernel and how that is set are part of
them. Control-C ends the trial that runs, takes its guests down, puts the host's settings back, and prints what is finished; the exit
status is 1 then, and 1 if a page does not hold what was written to it."
)]
struct RunArgs {
    /// Its name, or a TOML file
    #[arg(value_name = "NAME|FILE")]
    name: String,
    /// Measure each combination N times, overriding the plan
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_REPEAT)))]
    repeat: Option<u32>,
    /// Seed of the pages' contents, overriding the plan
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Numbers of guests, overriding the plan
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    guests: Vec<u32>,
    /// Engines to compare, overriding the plan
    #[arg(long, value_name = "ENGINE,...", value_delimiter = ',', value_parser = choice::contender())]
    engine: Vec<Contender>,
    /// Memory of each guest with its unit, overriding the plan
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// A Linux kernel for the guests, with an initrd that has the agent: see `samepage image`. With
    /// KASLR, the vmlinuz beside a vmlinux is used
    #[arg(long, value_name = "FILE", requires = "initrd")]
    kernel: Option<PathBuf>,
    /// Its initrd
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Append every finished trial to this file, a line each, and skip those already in it
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
    /// Write a self-contained HTML report
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write every number to a CSV file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.action {
        Action::List { json } => list(json),
        Action::Run(args) => experiment(&args),
        Action::Report(args) => report::run(&args),
    }
}

fn list(json: bool) -> anyhow::Result<ExitCode> {
    let (plans, scenarios) = (catalogue::all()?, catalogue::scenarios()?);
    if json {
        let mut all = plans.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
        all.extend(scenarios.iter().map(|s| {
            json!({"name": s.name, "about": s.about, "kind": "stress", "guests": s.fleet.guests.len(),
                   "engine": s.fleet.engine.name(), "phases": s.phases.iter().map(|p| &p.name).collect::<Vec<_>>()})
        }));
        outln!("{}", serde_json::to_string(&all)?)?;
    } else {
        outln!("{}", table::list(&plans, &scenarios))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// An experiment that is a scenario: it has a verdict instead of points, and nothing to vary.
fn scenario(scenario: &Scenario, args: &RunArgs) -> anyhow::Result<ExitCode> {
    let given = [
        ("--repeat", args.repeat.is_some()),
        ("--seed", args.seed.is_some()),
        ("--guests", !args.guests.is_empty()),
        ("--engine", !args.engine.is_empty()),
        ("--memory", args.memory.is_some()),
        ("--kernel", args.kernel.is_some()),
        ("--results", args.results.is_some()),
    ];
    if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
        bail!(
            "{option} does not apply to {name}, which is a scenario and fixes all of that: change a copy of resources/scenarios/{name}.toml \
             and run it with `samepage stress`",
            name = scenario.name
        );
    }
    let output = stress::Output { json: args.json, csv: args.csv.clone(), html: args.html.clone() };
    stress::play(scenario, &output)
}

fn experiment(args: &RunArgs) -> anyhow::Result<ExitCode> {
    if let Some(found) = catalogue::scenario(&args.name)? {
        return scenario(&found, args);
    }
    let plan = plan(args)?;
    for path in [&args.html, &args.csv].into_iter().flatten() {
        can_be_written(path)?;
    }
    let environment = Environment::now();
    let (mut journal, found) = match &args.results {
        None => (None, Found::default()),
        Some(path) => {
            let (journal, found) = Journal::open(path, &plan, &environment)?;
            (Some(journal), found)
        }
    };
    let (others, other_builds) = (found.others, found.note());
    let mut outcome = Outcome::new(plan, environment, found.trials)?;
    if let Some(note) = other_builds {
        errln!("note: {note}");
        outcome.notes.push(note);
    }
    let kept = outcome.trials.len();
    if let (Some(path), true) = (&args.results, kept + others > 0) {
        let path = path.display();
        errln!(
            "{path}: {kept} of {} trials are finished; {others} of other dimensions or another machine",
            outcome.planned_trials
        );
    }
    let result = go_on(&mut outcome, journal.as_mut());
    if outcome.trials.is_empty() {
        result.context("no trial finished; everything that was started is stopped")?;
        bail!("no trial finished");
    }
    if let Some(path) = &args.csv {
        write(path, &csv::text(&outcome))?;
    }
    if let Some(path) = &args.html {
        write(path, &figures::page(&outcome).to_string())?;
    }
    match args.json {
        true => outln!("{}", serde_json::to_string(&outcome)?)?,
        false => outln!("{}", table::outcome(&outcome))?,
    }
    let (done, planned) = (outcome.trials.len(), outcome.planned_trials);
    let go_on = match &args.results {
        Some(path) => format!("; the same command resumes from {}", path.display()),
        None => String::new(),
    };
    result.with_context(|| {
        format!(
            "{done} of {planned} trials finished and shown; everything that was started is stopped{go_on}"
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn plan(args: &RunArgs) -> Result<Plan, ExperimentError> {
    let mut plan = catalogue::find(&args.name)?;
    plan.repeat = args.repeat.unwrap_or(plan.repeat);
    plan.seed = args.seed.unwrap_or(plan.seed);
    if !args.guests.is_empty() {
        plan.guests.clone_from(&args.guests);
    }
    if !args.engine.is_empty() {
        plan.engines.clone_from(&args.engine);
    }
    if let Some(kernel) = &args.kernel {
        plan.set_linux(kernel, args.initrd.as_deref());
    }
    if let Some(memory) = &args.memory {
        plan.guest.memory.clone_from(memory);
    }
    plan.check()?;
    Ok(plan)
}

fn go_on(outcome: &mut Outcome, journal: Option<&mut Journal>) -> anyhow::Result<()> {
    let planned = outcome.planned_trials;
    let bar = ProgressBar::with_draw_target(Some(planned as u64), draw_target());
    let style = ProgressStyle::with_template("{prefix} [{bar:24}] {pos}/{len} {msg} ({elapsed})")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(outcome.plan.name.clone());
    bar.enable_steady_tick(TICK);
    let watch = Watch::new(|_, _, _, _| {}, interrupt_flag()?);
    let result = outcome.go_on(journal, &watch, &|repetition, point, done| {
        bar.set_position(done as u64);
        bar.set_message(format!("repetition {repetition}, {point}"));
        if bar.is_hidden() {
            // In a log, which has no bars, hours should not pass in silence.
            errln!("{}: {} of {planned}: repetition {repetition}, {point}", bar.prefix(), done + 1);
        }
    });
    bar.finish_and_clear();
    Ok(result?)
}
