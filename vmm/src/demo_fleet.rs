//! The fleet of a demo: brought up, shown, and gone again.

use std::fmt::Display;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::progress::{Bars, interrupt_flag};
use fleet::HostError;
use fleet::runtime::FleetDir;
use fleet::spec::{AdmissionName, EngineName, FillSpec, FleetSpec, GuestSpec, Overcommit};
use fleet::watch::Watch;
use machine::VmConfig;
use memory::userfault;
use merge::ksm;
use merge::slab::engine::Tuning;
use os::print::outln;

/// The documented mix, in percent of the pages each guest fills.
const MIX: FillSpec = FillSpec { zero: 10, common: 40, duplicate: 10, unique: 40, pages: None };

/// What a demo shows, as text and as JSON.
pub(super) trait Shown: Display + Serialize {
    /// Pages that do not hold what was written to them: with one the demo has failed.
    fn mismatched_pages(&self) -> u64;
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
