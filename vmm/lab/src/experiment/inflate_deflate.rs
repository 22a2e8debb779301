//! How fast a guest's memory is reclaimed by its balloon, and how fast the guest has it again: the
//! columns of HyperAlloc.
//!
//! Each guest keeps the pages it was filled with; everything else that it can spare goes into the
//! balloon and comes out of it again, first never touched, then touched. After every way out a
//! guest with a driver of ours reads all that came back, which must be zeros; of others the host's
//! page table says that no frame was left. What was kept is checked while the rest is away.

use std::thread;
use std::time::{Duration, Instant};

use guest::protocol::{Balloon, BalloonDone, Command, Done, Reply};

use super::ExperimentError;
use super::stage::Stage;
use super::threads::vmm_seconds;
use super::trial::Measured;
use fleet::HostError;
use fleet::balloon::{Judge, Stop, why};
use fleet::fleet::Fleet;
use fleet::guest::Guest;
use fleet::target::Target;
use memory::PAGE_BYTES;

/// How often a balloon that moves is looked at. A look costs the VMM some 50 us, which count as its
/// processor time.
const POLL: Duration = Duration::from_millis(2);
/// Longest that one move may take.
const LIMIT: Duration = Duration::from_secs(600);

/// The cost of one step, for all guests together.
#[derive(Clone, Copy)]
struct Moved {
    seconds: f64,
    /// Processor time of the VMMs' threads that run no guest code.
    vmm_seconds: f64,
}

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let domains = vec!["experiment"; stage.point.guests as usize];
    stage.play(&domains, |fleet, measured| {
        let spare = fleet.each(|guest| Ok(spare_pages(stage, guest)))?;
        measured.put("moved_pages", spare.iter().copied().map(f64::from).sum());
        measured.put("kept_pages", (stage.plan.guest.fill.pages.unwrap_or(0) * spare.len() as u64) as f64);
        cycle(stage, fleet, "untouched", measured)?;
        // The last step wrote everything; now it is forgotten, but for what is kept.
        fleet.each(|guest| guest.obey(&Command::Free { percent: 100 }, stage.watch))?;
        stage.fill(fleet)?;
        cycle(stage, fleet, "touched", measured)
    })
}

/// Pages that a guest can do without: what it offers for a workload, less what it keeps.
fn spare_pages(stage: &Stage<'_>, guest: &Guest) -> u32 {
    let offered = guest.ready().map_or(0, |ready| ready.pages);
    let spare = offered.saturating_sub(stage.plan.guest.fill.pages.unwrap_or(0));
    u32::try_from(spare).unwrap_or(u32::MAX)
}

/// Inflates and deflates, twice; the second time the guest uses at once what it has got back.
fn cycle(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    memory: &str,
    measured: &mut Measured,
) -> Result<(), ExperimentError> {
    let pages: u64 = fleet.each(|guest| Ok(u64::from(spare_pages(stage, guest))))?.iter().sum();
    let gib = (pages * PAGE_BYTES) as f64 / f64::from(1 << 30);
    let put = |measured: &mut Measured, step: &str, moved: Moved| {
        measured.put(&format!("{memory}_{step}_gib_per_second"), gib / moved.seconds.max(f64::EPSILON));
        measured.put(&format!("{memory}_{step}_vmm_seconds_per_gib"), moved.vmm_seconds / gib);
    };
    put(measured, "reclaim", inflate(stage, fleet)?);
    let absent: u64 = fleet.each(|guest| Ok(target(guest)?.status()?.host.absent_pages))?.iter().sum();
    measured.put(&format!("{memory}_reclaimed_percent"), 100.0 * absent as f64 / pages as f64);
    put(measured, "return", deflate(stage, fleet)?);
    let zeros = came_back_empty(stage, fleet)?;
    measured.count([(&*format!("{memory}_read_as_zeros_pages"), zeros)]);
    inflate(stage, fleet)?;
    stage.verify(fleet)?;
    let began = Instant::now();
    let out = deflate(stage, fleet)?;
    let vmm = fleet.each(|guest| Ok(vmm_seconds(guest)))?.iter().sum::<f64>();
    // Everything: what came back, and what was kept once more.
    stage.fill_pages(fleet, None)?;
    let seconds = began.elapsed().as_secs_f64();
    let filled = fleet.each(|guest| Ok(vmm_seconds(guest)))?.iter().sum::<f64>();
    put(measured, "return_install", Moved { seconds, vmm_seconds: out.vmm_seconds + filled - vmm });
    stage.verify(fleet)
}

fn inflate(stage: &Stage<'_>, fleet: &mut Fleet) -> Result<Moved, ExperimentError> {
    balloons(stage, fleet, |guest| spare_pages(stage, guest))
}

fn deflate(stage: &Stage<'_>, fleet: &mut Fleet) -> Result<Moved, ExperimentError> {
    balloons(stage, fleet, |_| 0)
}

/// Sets all balloons at once and waits until every driver says that it is there.
fn balloons(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    pages: impl Fn(&Guest) -> u32 + Sync,
) -> Result<Moved, ExperimentError> {
    let began = Instant::now();
    let results = fleet.each(|guest| {
        let (target, before) = (target(guest)?, vmm_seconds(guest));
        let asked_pages = pages(guest);
        target.set(asked_pages)?;
        let mut judge = Judge::new(asked_pages, LIMIT);
        let stop = loop {
            stage.watch.check()?;
            if let Some(stop) = judge.look(began.elapsed(), target.size()?, false) {
                break stop;
            }
            thread::sleep(POLL);
        };
        let spent = vmm_seconds(guest) - before;
        match stop {
            Stop::Reached => Ok((spent, None)),
            stop => {
                let status = target.status()?;
                Ok((spent, Some((target.guest, status.size, why(stop, &status)))))
            }
        }
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let mut vmm_seconds = 0.0;
    for (spent, stuck) in results {
        vmm_seconds += spent;
        if let Some((guest, size, stop)) = stuck {
            let (target_pages, actual_pages) = (size.target_pages, size.actual_pages);
            return Err(ExperimentError::Balloon {
                guest,
                target_pages,
                actual_pages,
                reason: stop.reason(),
            });
        }
    }
    Ok(Moved { seconds, vmm_seconds })
}

fn target(guest: &Guest) -> Result<Target, HostError> {
    guest.handle()?.map(|handle| Target::of(&handle)).ok_or_else(|| HostError::Ended {
        guest: guest.spec.name.clone(),
        how: "its process is gone".into(),
        log: String::new(),
    })
}

/// Makes the guests whose driver is ours read every page that came back. Returns their number; all
/// must be zeros.
fn came_back_empty(stage: &Stage<'_>, fleet: &mut Fleet) -> Result<u64, ExperimentError> {
    let read = fleet.each(|guest| {
        if !guest.is_built_in() {
            return Ok((0, 0));
        }
        match guest.obey(&Command::Balloon(Balloon::Check), stage.watch)? {
            Reply::Ok(Done::Balloon(BalloonDone::Check { checked, nonzero })) => Ok((checked, nonzero)),
            _ => Ok((0, 0)),
        }
    })?;
    let (checked, wrong) = read.iter().fold((0, 0), |(a, b), (checked, wrong)| (a + checked, b + wrong));
    match wrong {
        0 => Ok(checked),
        wrong => Err(ExperimentError::WrongPages { wrong, checked, point: stage.point.to_string() }),
    }
}
