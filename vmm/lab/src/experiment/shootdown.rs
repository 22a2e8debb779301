//! What a page costs in TLB flushes and interrupts when the host takes it, merges it, or breaks its
//! sharing, while vCPUs run that have it in their TLBs.
//!
//! The first guest has one vCPU that times its writes, and others that read the pages which are
//! merged, without end. Steps follow one another: nothing, for comparison; a balloon that takes
//! many pages at once, and one that takes them one by one; merging, which an engine does in runs or
//! page by page; writes to what was merged. KVM counts the flushes of this VM; interrupts are the
//! whole host's, less what came in the same time without work.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use guest::protocol::{Class, Command, Done, Latency, Reply, Target, Touch, Touched};

use super::ExperimentError;
use super::stage::Stage;
use super::trial::Measured;
use fleet::HostError;
use fleet::fleet::Fleet;
use fleet::guest::Guest;
use machine::control;

/// The guest whose vCPUs run.
const OBSERVED: usize = 0;
/// How long nothing is done, for comparison.
const QUIET: Duration = Duration::from_secs(1);
/// Pages that the balloon takes at once, and those that it takes one by one.
const AT_ONCE: u32 = 2048;
const ONE_BY_ONE: u32 = 64;
/// Longest that a balloon may take for one request.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(1);

/// Lines of /proc/interrupts, and their names in figures. The first is the kernel's own count of
/// shootdowns, the second of functions called on other processors (KVM's requests among them), the
/// third of processors that were woken or kicked.
const INTERRUPTS: [(&str, &str); 3] =
    [("TLB", "tlb_interrupts"), ("CAL", "call_interrupts"), ("RES", "reschedule_interrupts")];
/// Values of KVM's statistics. Not every KVM has each.
const FLUSHES: [&str; 3] = ["remote_tlb_flush", "remote_tlb_flush_requests", "tlb_flush"];

/// Counts so far.
struct Counts {
    at: Instant,
    events: BTreeMap<&'static str, f64>,
}

/// What happened during a step.
struct Step {
    seconds: f64,
    events: BTreeMap<&'static str, f64>,
    writes: Latency,
    reads: Touched,
}

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let running = stage.running();
    let mut spec = stage.spec(&vec!["experiment"; stage.point.guests as usize])?;
    for guest in &mut spec.guests {
        guest.vm.cpus = running + 1;
    }
    stage.play_in(spec, |fleet, measured| {
        measured.count([("running_vcpus", running.into())]);
        // Pages that were written and are free again are what the balloon takes.
        stage.fill_pages(fleet, None)?;
        stage.fill(fleet)?;
        let quiet = step(stage, fleet, running, |_| stage.rest(QUIET).map(|()| 1.0).map_err(Into::into))?;
        put(measured, "quiet", &quiet, 1.0, None);
        let mut steps =
            |fleet: &mut Fleet, name: &str, work: &dyn Fn(&mut Fleet) -> Result<f64, ExperimentError>| {
                let mut pages = 0.0;
                let done = step(stage, fleet, running, |fleet| {
                    pages = work(fleet)?;
                    Ok(pages)
                })?;
                // The guest counts what it rewrote: those it timed meanwhile are pages of its own.
                pages -= if name == "break" { done.writes.writes as f64 } else { 0.0 };
                put(measured, name, &done, pages, Some(&quiet));
                Ok::<_, ExperimentError>(())
            };
        steps(fleet, "discard_at_once", &|fleet| inflate(stage, fleet, 0, AT_ONCE, AT_ONCE))?;
        steps(fleet, "discard_one_by_one", &|fleet| inflate(stage, fleet, AT_ONCE, ONE_BY_ONE, 1))?;
        steps(fleet, "merge", &|fleet| {
            fleet.start_merging()?;
            let progress = stage.settle(fleet, Instant::now(), |_, _| Ok(()))?;
            Ok(progress.merged_pages as f64 / f64::from(stage.point.guests))
        })?;
        fleet.stop_merging();
        steps(fleet, "break", &|fleet| break_shares(stage, fleet))?;
        observed(fleet, |guest| {
            obey(stage, guest, &Command::Touch(Touch { class: Class::Common, cpus: 0 }))
        })?;
        Ok(())
    })
}

/// Has the balloon of the observed guest grow from `from` by `pages`, `each` at a time. Returns how
/// many.
fn inflate(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    from: u32,
    pages: u32,
    each: u32,
) -> Result<f64, ExperimentError> {
    let (mut size, end) = (from, from + pages);
    while size < end {
        size = end.min(size + each);
        let (name, actual) = observed(fleet, |guest| {
            guest.control(&control::Request::BalloonTarget { pages: size })?;
            let until = Instant::now() + LIMIT;
            loop {
                stage.watch.check()?;
                let actual = match guest.control(&control::Request::BalloonSize)? {
                    control::Reply::BalloonSize(size) => size.actual_pages,
                    other => return Err(HostError::unexpected_of_vm(&guest.spec.name, &other)),
                };
                if actual >= size || Instant::now() > until {
                    return Ok((guest.spec.name.clone(), actual));
                }
                thread::sleep(POLL);
            }
        })?;
        if actual < size {
            let reason = "out of time, and still moving";
            return Err(ExperimentError::Balloon {
                guest: name,
                target_pages: size,
                actual_pages: actual,
                reason,
            });
        }
    }
    Ok(pages.into())
}

/// Has the observed guest write what it shares, page after page. Returns how many it wrote.
fn break_shares(stage: &Stage<'_>, fleet: &mut Fleet) -> Result<f64, ExperimentError> {
    let timing = stage.plan.timing;
    let target = Target::Only(Class::Common);
    let churn = |rate| Command::Churn { target, rate, seconds: None };
    let churned = |fleet: &mut Fleet| {
        observed(fleet, |guest| Ok(guest.report(stage.watch)?.map_or(0, |report| report.churned)))
    };
    let before = churned(fleet)?;
    observed(fleet, |guest| obey(stage, guest, &churn(timing.pages_per_second)))?;
    stage.rest(Duration::from_secs_f64(f64::from(timing.writes) / timing.pages_per_second as f64))?;
    observed(fleet, |guest| obey(stage, guest, &churn(0)))?;
    Ok(churned(fleet)?.saturating_sub(before) as f64)
}

/// Counts what happens while `work` is done: to the guest that is observed, and on the host.
fn step(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    running: u8,
    work: impl FnOnce(&mut Fleet) -> Result<f64, ExperimentError>,
) -> Result<Step, ExperimentError> {
    let touch = Command::Touch(Touch { class: Class::Common, cpus: running.into() });
    let unique = Target::Only(Class::Unique);
    stage.time_writes(fleet, OBSERVED, unique, stage.plan.timing.pages_per_second)?;
    observed(fleet, |guest| obey(stage, guest, &touch))?;
    let before = counts(fleet)?;
    work(fleet)?;
    let after = counts(fleet)?;
    let reads = match observed(fleet, |guest| obey(stage, guest, &touch))? {
        Done::Touch(reads) => reads,
        _ => Touched::default(),
    };
    let writes = stage.time_writes(fleet, OBSERVED, unique, 0)?;
    let events = after.events.iter().map(|(name, count)| {
        let before = before.events.get(name).copied().unwrap_or_default();
        (*name, count - before)
    });
    let seconds = after.at.duration_since(before.at).as_secs_f64();
    Ok(Step { seconds, events: events.collect(), writes, reads })
}

/// Writes a step's figures down: events for each of `pages`, less what `quiet` had in the same time
/// where that is the host's.
fn put(measured: &mut Measured, name: &str, step: &Step, pages: f64, quiet: Option<&Step>) {
    measured.put(&format!("{name}_seconds"), step.seconds);
    measured.put(&format!("{name}_touched_pages"), if quiet.is_some() { pages } else { 0.0 });
    for (event, count) in &step.events {
        measured.put(&format!("{name}_{event}"), *count);
        if let Some(quiet) = quiet.filter(|_| pages > 0.0) {
            let usual =
                quiet.events.get(event).copied().unwrap_or_default() / quiet.seconds.max(f64::EPSILON);
            measured.put(&format!("{name}_{event}_per_page"), (count - usual * step.seconds) / pages);
        }
    }
    measured.count([
        (&*format!("{name}_write_p50_ns"), step.writes.p50_ns),
        (&*format!("{name}_write_p99_ns"), step.writes.p99_ns),
        (&*format!("{name}_write_max_ns"), step.writes.max_ns),
        (&*format!("{name}_reads"), step.reads.reads),
        (&*format!("{name}_late_reads"), step.reads.late),
        (&*format!("{name}_away_reads"), step.reads.away),
    ]);
    let reads = step.reads.reads.max(1) as f64;
    measured.put(&format!("{name}_late_per_million_reads"), step.reads.late as f64 * 1e6 / reads);
    if step.reads.late > 0 {
        measured.put(
            &format!("{name}_late_mean_ns"),
            step.reads.late_us as f64 * 1000.0 / step.reads.late as f64,
        );
    }
}

fn counts(fleet: &mut Fleet) -> Result<Counts, ExperimentError> {
    let at = Instant::now();
    let mut events = interrupts(&fs::read_to_string("/proc/interrupts").unwrap_or_default());
    let values = observed(fleet, |guest| match guest.control(&control::Request::KvmStats)? {
        control::Reply::KvmStats(values) => Ok(values),
        other => Err(HostError::unexpected_of_vm(&guest.spec.name, &other)),
    })?;
    events.extend(FLUSHES.iter().filter_map(|name| Some((*name, *values.get(*name)? as f64))));
    Ok(Counts { at, events })
}

/// Interrupts so far of all processors together, of the text of /proc/interrupts.
fn interrupts(text: &str) -> BTreeMap<&'static str, f64> {
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let Some((label, rest)) = line.trim_start().split_once(':') else { continue };
        let Some((_, name)) = INTERRUPTS.iter().find(|(known, _)| *known == label) else { continue };
        let count = rest.split_whitespace().map_while(|word| word.parse::<u64>().ok()).sum::<u64>();
        counts.insert(*name, count as f64);
    }
    counts
}

/// Does something with the first guest, which is observed.
pub(super) fn observed<T: Send>(
    fleet: &mut Fleet,
    work: impl Fn(&mut Guest) -> Result<T, HostError> + Sync,
) -> Result<T, ExperimentError> {
    let done = fleet.each(|guest| match guest.number == OBSERVED {
        true => work(guest).map(Some),
        false => Ok(None),
    })?;
    done.into_iter().flatten().next().ok_or(ExperimentError::GuestGone)
}

pub(super) fn obey(stage: &Stage<'_>, guest: &mut Guest, command: &Command) -> Result<Done, HostError> {
    match guest.obey(command, stage.watch)? {
        Reply::Ok(done) => Ok(done),
        answer => {
            let (guest, command) = (guest.spec.name.clone(), command.name().into());
            Err(HostError::Refused { guest, command, answer: answer.to_string() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_of_all_processors_are_added_up() {
        let text = "           CPU0       CPU1\n  4:          3          0   IO-APIC   4-edge      ttyS0\nRES:        10         20   \
                    Rescheduling interrupts\nCAL:          1          2   Function call interrupts\nTLB:          5          7   TLB shootdowns\n";
        let expected = [("call_interrupts", 3.0), ("reschedule_interrupts", 30.0), ("tlb_interrupts", 12.0)];
        assert_eq!(interrupts(text), expected.into());
        assert!(interrupts("").is_empty());
    }

    #[test]
    fn what_happens_anyway_is_taken_off() {
        let step = |seconds, flushes| Step {
            seconds,
            events: [("tlb_interrupts", flushes)].into(),
            writes: Latency::default(),
            reads: Touched { reads: 1_000_000, late: 3, late_us: 30, ..Touched::default() },
        };
        let mut measured = Measured::default();
        put(&mut measured, "merge", &step(2.0, 300.0), 10.0, Some(&step(1.0, 100.0)));
        assert_eq!(measured.figures["merge_tlb_interrupts_per_page"], 10.0);
        assert_eq!(measured.figures["merge_late_per_million_reads"], 3.0);
        assert_eq!(measured.figures["merge_late_mean_ns"], 10_000.0);
    }
}
