//! `samepage demo`: a fleet of built-in guests, filled, merged, measured, verified.

use crate::choice;
use std::fmt::Display;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::demo_clones;
use super::progress::{Bars, interrupt_flag};
use fleet::HostError;
use fleet::fleet::Fleet;
use fleet::guest::Lifetime;
use fleet::runtime::FleetDir;
use fleet::spec::{AdmissionName, EngineName, FillSpec, FleetSpec, GuestSpec, Overcommit};
use fleet::status::Verified;
use fleet::watch::Watch;
use machine::{VmConfig, probe};
use measure::report::{Outcome, Report};
use memory::userfault;
use merge::ksm;
use merge::slab::engine::Tuning;
use os::print::outln;
use serde::Serialize;

/// The documented mix, in percent of the pages each guest fills.
pub(super) const MIX: FillSpec = FillSpec { zero: 10, common: 40, duplicate: 10, unique: 40, pages: None };
/// How long merging may take.
const MERGE_LIMIT: Duration = Duration::from_secs(300);

/// Launch a fleet of built-in guests, merge what they share, and print what that saved
#[derive(clap::Args)]
#[command(
    after_help = "Each guest fills its memory with 10 % zero pages, 40 % pages that all guests have in common, 10 % pages
that it has four times itself, and 40 % unique pages. Potential sharing is found by hashing and comparing
every page, actual sharing from the frames that the kernel has mapped. At the end the guests and the
host verify every page. The exit status is 1 if a page is wrong.

Examples:
  samepage demo
  samepage demo --guests 8 --memory 256M
  samepage demo --clones 100                     one guest, captured, and a hundred that go on from there
  samepage demo --engine off --json              the same guests, nothing merged: the baseline"
)]
pub(super) struct Args {
    /// Number of guests
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    guests: u16,
    /// One guest, and so many clones of it, instead
    #[arg(long, value_name = "N", conflicts_with = "guests", value_parser = clap::value_parser!(u16).range(1..=1000))]
    clones: Option<u16>,
    /// Memory of each guest with its unit: 16M to 1T
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = super::memory)]
    memory: u64,
    /// What merges [default: slab where this user may use it, else ksm, else off]
    #[arg(long, value_parser = choice::engine())]
    engine: Option<EngineName>,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let Some(clones) = args.clones {
        return demo_clones::run(clones.into(), args.memory, args.engine, args.json);
    }
    let names = (0..args.guests).map(|n| format!("guest-{n}"));
    carry_out(names, args.memory, args.engine, args.json, measure)
}

/// What a demo shows, as text and as JSON.
pub(super) trait Shown: Display + Serialize {
    /// Pages that do not hold what was written to them: with one the demo has failed.
    fn mismatched_pages(&self) -> u64;
}

impl Shown for Report {
    fn mismatched_pages(&self) -> u64 {
        self.mismatched_pages
    }
}

/// Runs a demo with a fleet of these guests. Nothing of it is left, whatever comes of it.
pub(super) fn carry_out<R: Shown>(
    names: impl IntoIterator<Item = String>,
    memory_bytes: u64,
    engine: Option<EngineName>,
    json: bool,
    show: impl FnOnce(FleetSpec, &FleetDir, &Watch, Vec<String>) -> Result<R, HostError>,
) -> anyhow::Result<ExitCode> {
    let mut notes = Vec::new();
    let engine = engine.unwrap_or_else(|| usable(&mut notes));
    let guests = names.into_iter().map(|name| {
        let vm = VmConfig { memory_bytes, ..VmConfig::default() };
        GuestSpec { fill: Some(MIX), ..GuestSpec::new(name, "demo".into(), vm) }
    });
    let spec = FleetSpec {
        name: format!("demo-{}", std::process::id()),
        engine,
        merge: Tuning::default(),
        overcommit: Overcommit { admission: AdmissionName::Off, ..Overcommit::default() },
        metrics: None,
        open: None,
        pool: 0,
        guests: guests.collect(),
    };
    let interrupted = interrupt_flag()?;
    let bars = Bars::new(spec.guests.len());
    let watch = bars.watch(interrupted);
    let dir = FleetDir::of(&spec.name);
    let result = show(spec, &dir, &watch, notes);
    bars.finish();
    dir.remove();
    let report = result.context("the demo did not finish; everything it started is stopped")?;
    match json {
        true => outln!("{}", serde_json::to_string(&report)?)?,
        false => outln!("{report}")?,
    }
    let wrong = report.mismatched_pages();
    ensure!(wrong == 0, "{wrong} pages do not hold what was written to them");
    Ok(ExitCode::SUCCESS)
}

/// The best engine that this user may use on this host.
fn usable(notes: &mut Vec<String>) -> EngineName {
    let Err(error) = userfault::can_freeze() else { return EngineName::Slab };
    let (engine, what) = match ksm::available().usable() {
        true => (EngineName::Ksm, "KSM merged instead of Samepage's own engine"),
        false => (EngineName::Off, "nothing was merged"),
    };
    notes.push(format!("userfaultfd is unavailable ({error}), so {what}: see `samepage doctor`"));
    engine
}

fn measure(
    spec: FleetSpec,
    dir: &FleetDir,
    watch: &Watch,
    mut notes: Vec<String>,
) -> Result<Report, HostError> {
    let engine = spec.engine;
    let mut fleet = Fleet::up(spec, None, dir, Lifetime::WithUs, watch)?;
    let result = (|| {
        let content = fleet.content(watch)?;
        fleet.start_merging()?;
        // The first copy of each content is on a shared frame too: more pages merge than are saved.
        let goal = content.ideal_saved_pages;
        let merged = fleet.settle(goal, MERGE_LIMIT, watch)?;
        let frames = fleet.paused(Fleet::frames)?;
        notes.extend(fleet.stalled());
        fleet.stop_merging();
        notes.extend(fleet.notes());
        let Verified { verified_pages, mismatched_pages, .. } = fleet.verify(watch)?;
        let outcome = Outcome {
            backend: probe::backend_name().into(),
            engine: engine.name().into(),
            merge_seconds: merged.seconds,
            merge_cpu_seconds: merged.progress.cpu_seconds,
            verified_pages,
            mismatched_pages,
            notes,
        };
        Ok(Report::new(outcome, &frames, &content))
    })();
    fleet.stop();
    result
}
