//! `samepage demo --clones N`: one guest, filled and captured, and many that go on from there.

use std::fmt;
use std::process::ExitCode;

use serde::Serialize;

use super::demo_fleet::{self, Shown};
use super::table::mib;
use fleet::HostError;
use fleet::fleet::Fleet;
use fleet::guest::Lifetime;
use fleet::runtime::FleetDir;
use fleet::spec::{EngineName, FleetSpec};
use fleet::status::Verified;
use fleet::status::Wanted;
use fleet::watch::Watch;
use machine::capture::Captured;
use machine::probe;
use memory::PAGE_BYTES;
use overcommit::ledger::Ledger;

/// The guest that is cloned.
const ORIGIN: &str = "origin";

/// What came of it.
#[derive(Serialize)]
struct Report {
    backend: String,
    engine: &'static str,
    clones: usize,
    memory_bytes: u64,
    /// What was captured, and for how long the origin stood still.
    captured: Captured,
    /// Until all clones had answered.
    seconds: f64,
    verified_pages: u64,
    mismatched_pages: u64,
    /// Once all had answered.
    ledger: Ledger,
    notes: Vec<String>,
}

pub(super) fn run(
    clones: usize,
    memory_bytes: u64,
    engine: Option<EngineName>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    demo_fleet::carry_out([ORIGIN.into()], memory_bytes, engine, json, |spec, dir, watch, notes| {
        show(spec, dir, clones, watch, notes)
    })
}

impl Shown for Report {
    fn mismatched_pages(&self) -> u64 {
        self.mismatched_pages
    }
}

fn show(
    spec: FleetSpec,
    dir: &FleetDir,
    clones: usize,
    watch: &Watch,
    notes: Vec<String>,
) -> Result<Report, HostError> {
    let (engine, memory_bytes) = (spec.engine.name(), spec.guests[0].vm.memory_bytes);
    let mut fleet = Fleet::up(spec, None, dir, Lifetime::WithUs, watch)?;
    let result = (|| {
        fleet.start_merging()?;
        let wanted =
            Wanted { of: ORIGIN.into(), count: clones, prefix: Some("clone".into()), ..Wanted::default() };
        let cloned = fleet.start_clones(&wanted, watch)?;
        let ledger = fleet.ledger(false)?.ledger;
        let Verified { verified_pages, mismatched_pages, .. } = fleet.verify(watch)?;
        Ok(Report {
            backend: probe::backend_name().into(),
            engine,
            clones: cloned.guests.len(),
            memory_bytes,
            captured: cloned.image.map(|image| image.captured).unwrap_or_default(),
            seconds: cloned.seconds,
            verified_pages,
            mismatched_pages,
            ledger,
            notes,
        })
    })();
    fleet.stop_merging();
    fleet.stop();
    result
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self;
        let Report { clones, captured, ledger, .. } = report;
        let pages = |pages: u64| mib(pages * PAGE_BYTES);
        let of_clones = |number: fn(&overcommit::ledger::Account) -> u64| -> f64 {
            let accounts = ledger.guests.iter().filter(|guest| guest.name != ORIGIN);
            accounts.map(number).sum::<u64>() as f64 * PAGE_BYTES as f64
                / (1 << 20) as f64
                / (*clones).max(1) as f64
        };
        write!(
            f,
            "{clones} clones of a guest of {} MiB on {}, engine {}\n\
         captured: {} MiB copied into slabs; the guest stood still for {:.1} ms\n\
         all clones answered after {:.2} s, {:.1} ms each\n\
         promised {} MiB, {} MiB of frames; {} MiB in slabs, not touched\n\
         each clone: {:.2} MiB of its own, {:.2} MiB of its VMM, {:.2} MiB of page tables; {:.1} MiB shared or not touched\n\
         {} pages verified, by the guests and by the host: {} wrong",
            mib(report.memory_bytes),
            report.backend,
            report.engine,
            pages(captured.copied_pages),
            captured.pause_us as f64 / 1000.0,
            report.seconds,
            report.seconds * 1000.0 / (*clones).max(1) as f64,
            pages(ledger.promised),
            pages(ledger.frames),
            pages(ledger.overhead.held_by_images),
            of_clones(|guest| guest.classes.private),
            of_clones(|guest| guest.overhead.vmm),
            of_clones(|guest| guest.overhead.page_tables),
            of_clones(|guest| guest.classes.shared + guest.classes.image),
            report.verified_pages,
            report.mismatched_pages,
        )?;
        report.notes.iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}
