//! What clones of one guest cost: until all of them answer, and in frames of their own as they grow older.
//!
//! One guest is filled and captured; as many clones as the point has guests go on from there, all at once. They do nothing of
//! themselves, so what they have of their own is what a guest and its VMM touch by being there. Then one clone writes what it shares, so that each write is the first
//! one: what a copy costs it. Every page of every clone is checked in the end.

use std::time::{Duration, Instant};

use guest::protocol::{Class, Target};

use super::ExperimentError;
use super::stage::Stage;
use super::threads::all_seconds;
use super::trial::Measured;
use fleet::fleet::Fleet;
use fleet::status::Wanted;

/// Ages at which clones are looked at, in seconds; those beyond the plan's `merge_seconds` are left out.
const AGES: [u32; 4] = [0, 1, 10, 60];
/// The guest that is cloned, as [`Stage::spec`] calls it.
const ORIGIN: &str = "guest-0";

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    stage.play(&["experiment"], |fleet, measured| {
        fleet.start_merging()?;
        let wanted = Wanted {
            of: ORIGIN.into(),
            count: stage.point.guests as usize,
            prefix: Some("clone".into()),
            ..Wanted::default()
        };
        let cloned = fleet.start_clones(&wanted, stage.watch)?;
        let born = Instant::now();
        let clones = f64::from(stage.point.guests);
        if let Some(captured) = cloned.image.map(|image| image.captured) {
            measured.put("pause_seconds", Duration::from_micros(captured.pause_us).as_secs_f64());
            measured.count([("copied_pages", captured.copied_pages)]);
        }
        measured.put("ready_seconds", cloned.seconds);
        measured.put("ready_seconds_per_clone", cloned.seconds / clones);
        let spent = fleet.each(|guest| Ok(guest.image().map(|_| all_seconds(guest))))?;
        measured.put("vm_cpu_seconds_per_clone", spent.into_iter().flatten().sum::<f64>() / clones);
        for age in AGES.into_iter().filter(|age| f64::from(*age) <= stage.plan.merge_seconds) {
            stage.rest(Duration::from_secs(age.into()).saturating_sub(born.elapsed()))?;
            own(fleet, age, measured)?;
        }
        first_writes(stage, fleet, measured)?;
        if let Some(audit) = fleet.ledger(true)?.audit {
            measured.count([("residue_pages", audit.residue_pages)]);
        }
        Ok(())
    })
}

/// What each clone has of its own at this age: pages, its VMM, page tables.
fn own(fleet: &mut Fleet, age: u32, measured: &mut Measured) -> Result<(), ExperimentError> {
    let ledger = fleet.ledger(false)?.ledger;
    let clones = || ledger.guests.iter().filter(|guest| guest.name != ORIGIN);
    let each = |pages: u64| pages as f64 / clones().count().max(1) as f64;
    let sum = |of: fn(&overcommit::ledger::Account) -> u64| each(clones().map(of).sum());
    let (private, vmm) = (sum(|guest| guest.classes.private), sum(|guest| guest.overhead.vmm));
    let tables = sum(|guest| guest.overhead.page_tables);
    measured.put(&format!("own_at_{age}_s_pages"), private + vmm + tables);
    if age == 0 {
        measured.put("vmm_pages", vmm);
        measured.put("page_tables_pages", tables);
        measured.put("untouched_pages", sum(|guest| guest.classes.image));
        measured.count([("used_pages", ledger.used)]);
    }
    Ok(())
}

/// The first clone writes pages that it shares, for the first time.
fn first_writes(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    measured: &mut Measured,
) -> Result<(), ExperimentError> {
    let timing = stage.plan.timing;
    let length = Duration::from_secs_f64(f64::from(timing.writes) / timing.pages_per_second as f64);
    let target = Target::Only(Class::Unique);
    stage.time_writes(fleet, 1, target, timing.pages_per_second)?;
    stage.rest(length)?;
    let timed = stage.time_writes(fleet, 1, target, 0)?;
    if timed.writes > 0 {
        measured.count([("first_write_p50_ns", timed.p50_ns), ("first_write_p99_ns", timed.p99_ns)]);
    }
    Ok(())
}
