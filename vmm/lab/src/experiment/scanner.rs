//! What an engine saves in a fixed time, the processor time it takes for that, and how long a
//! guest's writes take meanwhile.

use std::time::{Duration, Instant};

use guest::protocol::{Class, Target};

use super::ExperimentError;
use super::stage::{Present, Stage};
use super::trial::Measured;
use memory::PAGE_BYTES;

/// The guest that times its writes, to pages that no other guest has: so it waits for the engine
/// and not for a broken share.
const OBSERVER: usize = 0;

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let domains = vec!["experiment"; stage.point.guests as usize];
    stage.play(&domains, |fleet, measured| {
        let ideal = fleet.content(stage.watch)?.ideal_saved_pages;
        let present = Present::now(fleet)?;
        let target = Target::Only(Class::Unique);
        stage.time_writes(fleet, OBSERVER, target, stage.plan.timing.pages_per_second)?;
        let began = Instant::now();
        fleet.start_merging()?;
        let length = Duration::from_secs_f64(stage.plan.merge_seconds);
        stage.rest(length.saturating_sub(began.elapsed()))?;
        let progress = fleet.progress().unwrap_or_default();
        let timed = stage.time_writes(fleet, OBSERVER, target, 0)?;
        let (saved, frames) = fleet.paused(|_| present.saved())?;
        let freed = saved.total();
        measured.count([
            ("ideal_pages", ideal),
            ("freed_pages", freed),
            ("saved_pages", saved.by_sharing()),
            ("timed_writes", timed.writes),
            ("write_p50_ns", timed.p50_ns),
            ("write_p99_ns", timed.p99_ns),
            ("write_p999_ns", timed.p999_ns),
            ("write_max_ns", timed.max_ns),
            ("full_passes", progress.full_passes),
        ]);
        measured.put("achieved_percent", 100.0 * freed as f64 / ideal.max(1) as f64);
        if let Some(seconds) = progress.cpu_seconds {
            measured.put("merge_cpu_seconds", seconds);
            let gib = (freed * PAGE_BYTES) as f64 / f64::from(1 << 30);
            if gib > 0.0 {
                measured.put("merge_cpu_seconds_per_freed_gib", seconds / gib);
            }
        }
        measured.notes.extend(frames.notes);
        Ok(())
    })
}
