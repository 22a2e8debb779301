//! How much work a guest gets done the less memory it has left, and where the knee is.
//!
//! A guest writes one part of its memory all the time, its working set, and leaves the rest alone.
//! The host pushes pages out to its swap until no more than a share of them have frames, and goes
//! on pushing what comes back. As long as cold pages can go, the guest hardly notices; once the
//! working set does not fit, each write waits for a page that was pushed out a moment ago. The
//! share is given as overcommit: at 200 % half of the memory is left.

use std::thread;
use std::time::{Duration, Instant};

use guest::protocol::{Class, Command, Target};

use super::ExperimentError;
use super::shootdown::{obey, observed};
use super::stage::Stage;
use super::trial::Measured;
use fleet::HostError;
use fleet::fleet::Fleet;
use kernel_view::smaps::ProcessPages;
use machine::control;

/// Overcommit in percent: memory that was filled, of what is left.
const RATIOS: [u64; 8] = [100, 125, 150, 200, 250, 300, 400, 600];
/// How often pages that have come back are pushed out again.
const LOOK: Duration = Duration::from_millis(20);
/// Faster than any guest writes.
const AS_FAST_AS_IT_CAN: u64 = 1_000_000;
/// Thrashing begins where less than so much of the work without pressure is done, in percent.
const KNEE_PERCENT: f64 = 50.0;
/// Looks until memory is down to its share before work is counted: pages that were written lately
/// are passed over once.
const MOST_LOOKS: u32 = 50;

/// What was done under one pressure.
struct Done {
    writes_per_second: f64,
    paged_out_per_second: f64,
    resident_pages: u64,
    swapped_pages: u64,
}

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let throttle = stage.plan.variant_of(stage.point).throttle;
    stage.play(&vec!["experiment"; stage.point.guests as usize], |fleet, measured| {
        let filled = observed(fleet, |guest| Ok(guest.pages_of(Target::All)))?.unwrap_or(0);
        let working_set = observed(fleet, |guest| Ok(guest.pages_of(Target::Only(Class::Common))))?.unwrap_or(0);
        measured.count([("filled_pages", filled), ("working_set_pages", working_set)]);
        set_throttle(fleet, throttle)?;
        churn(stage, fleet, AS_FAST_AS_IT_CAN)?;
        let (mut series, mut most, mut knee) = ([const { Vec::new() }; 3], 0.0, None);
        for ratio in RATIOS {
            let done = under_pressure(stage, fleet, filled * 100 / ratio, ratio > 100)?;
            let at = ratio as f64;
            for (line, value) in
                series.iter_mut().zip([done.writes_per_second, done.paged_out_per_second, done.swapped_pages as f64])
            {
                line.push((at, value));
            }
            measured.put(&format!("at_{ratio}_writes_per_second"), done.writes_per_second);
            measured.put(&format!("at_{ratio}_paged_out_per_second"), done.paged_out_per_second);
            measured.count([(&*format!("at_{ratio}_resident_pages"), done.resident_pages)]);
            most = f64::max(most, done.writes_per_second);
            if knee.is_none() && done.writes_per_second < most * KNEE_PERCENT / 100.0 {
                knee = Some(at);
            }
        }
        churn(stage, fleet, 0)?;
        set_throttle(fleet, None)?;
        match knee {
            Some(at) => measured.put("knee_overcommit_percent", at),
            None => measured.notes.push(format!(
                "no knee up to {} % of overcommit: the working set fits into what is left, or the host's swap is as fast as the guest",
                RATIOS[RATIOS.len() - 1]
            )),
        }
        for (name, line) in ["writes_per_second", "paged_out_per_second", "swapped_pages"].into_iter().zip(series) {
            measured.series.insert(name.into(), line);
        }
        Ok(())
    })
}

fn churn(stage: &Stage<'_>, fleet: &mut Fleet, rate: u64) -> Result<(), ExperimentError> {
    let churn = Command::Churn { target: Target::Only(Class::Common), rate, seconds: None };
    fleet.each(|guest| obey(stage, guest, &churn))?;
    Ok(())
}

fn set_throttle(fleet: &mut Fleet, pages_per_second: Option<u64>) -> Result<(), ExperimentError> {
    fleet.each(|guest| guest.control(&control::Request::Throttle { pages_per_second }))?;
    Ok(())
}

/// Counts what all guests write within the plan's time while each has at most `left` pages with
/// frames.
fn under_pressure(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    left: u64,
    pressed: bool,
) -> Result<Done, ExperimentError> {
    let length = Duration::from_secs_f64(stage.plan.merge_seconds);
    if pressed {
        for _ in 0..MOST_LOOKS {
            if push_out(fleet, left)? == 0 {
                break;
            }
            thread::sleep(LOOK);
        }
    }
    let churned = |fleet: &mut Fleet| -> Result<u64, ExperimentError> {
        let reports = fleet.each(|guest| guest.report(stage.watch))?;
        Ok(reports.into_iter().flatten().map(|report| report.churned).sum())
    };
    let (before, began, mut paged_out) = (churned(fleet)?, Instant::now(), 0);
    while began.elapsed() < length {
        stage.watch.check()?;
        if pressed {
            paged_out += push_out(fleet, left)?;
        }
        thread::sleep(LOOK);
    }
    let seconds = began.elapsed().as_secs_f64();
    let written = churned(fleet)?.saturating_sub(before);
    let memory =
        fleet.each(|guest| Ok(guest.pid().and_then(|pid| ProcessPages::of(pid).ok()).unwrap_or_default()))?;
    Ok(Done {
        writes_per_second: written as f64 / seconds,
        paged_out_per_second: paged_out as f64 / seconds,
        resident_pages: memory.iter().map(|pages| pages.anonymous).sum(),
        swapped_pages: memory.iter().map(|pages| pages.swapped).sum(),
    })
}

/// Pages out what each guest has beyond `left` pages. Returns how many pages went.
fn push_out(fleet: &mut Fleet, left: u64) -> Result<u64, ExperimentError> {
    let went = fleet.each(|guest| {
        let now = guest.pid().and_then(|pid| ProcessPages::of(pid).ok()).map_or(0, |pages| pages.anonymous);
        let pages = now.saturating_sub(left);
        if pages == 0 {
            return Ok(0);
        }
        match guest.control(&control::Request::PageOut { pages })? {
            control::Reply::PagedOut(out) => Ok(out.swapped_pages),
            other => Err(HostError::unexpected_of_vm(&guest.spec.name, &other)),
        }
    })?;
    Ok(went.iter().sum())
}
