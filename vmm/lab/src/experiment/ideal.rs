//! How much of the ideal is reached, over time; then how long sharing lasts while pages change.

use std::time::{Duration, Instant};

use guest::protocol::{Command, Done, Reply, Target};

use super::ExperimentError;
use super::stage::{Present, Saved, Stage};
use super::trial::Measured;
use fleet::HostError;
use fleet::fleet::Fleet;
use measure::content::{self, Content};
use measure::watch::Watcher;

/// Fractions of the final result whose time is recorded.
const PARTS: [(f64, &str); 3] =
    [(0.5, "to_50_percent_seconds"), (0.9, "to_90_percent_seconds"), (0.95, "to_95_percent_seconds")];

/// A kind of saving, and its pages.
type Part = (&'static str, fn(&Saved) -> u64);

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let domains = vec!["experiment"; stage.point.guests as usize];
    stage.play(&domains, |fleet, measured| {
        let content = fleet.content(stage.watch)?;
        let present = Present::now(fleet)?;
        measured.count([
            ("ideal_pages", content.ideal_saved_pages),
            ("ideal_zero_pages", content.zero),
            ("ideal_self_pages", content.self_duplicates),
            ("ideal_cross_pages", content.cross_duplicates),
        ]);
        converge(stage, fleet, &present, &content, measured)?;
        churn(stage, fleet, &present, measured)
    })
}

fn converge(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    present: &Present,
    content: &Content,
    measured: &mut Measured,
) -> Result<(), ExperimentError> {
    let mut seen: Vec<(f64, Saved)> = Vec::new();
    let began = Instant::now();
    fleet.start_merging()?;
    let progress = stage.settle(fleet, began, |_, seconds| {
        seen.push((seconds, present.saved()?.0));
        Ok(())
    })?;
    let Some((_, last)) = seen.last().copied() else { return Ok(()) };
    let ideal = content.ideal_saved_pages.max(1) as f64;
    measured.count([
        ("freed_pages", last.total()),
        ("saved_pages", last.by_sharing()),
        ("frames_pages", present.total().saturating_sub(last.total())),
        ("freed_zero_pages", last.zero),
        ("freed_self_pages", last.own),
        ("freed_cross_pages", last.cross),
    ]);
    measured.put("achieved_percent", 100.0 * last.total() as f64 / ideal);
    for (part, name) in PARTS {
        let reached = |(_, saved): &&(f64, Saved)| saved.total() as f64 >= part * last.total() as f64;
        if let Some((seconds, _)) = seen.iter().find(reached).filter(|_| last.total() > 0) {
            measured.put(name, *seconds);
        }
    }
    if let Some(seconds) = progress.cpu_seconds {
        measured.put("merge_cpu_seconds", seconds);
    }
    let kinds: [Part; 4] =
        [("achieved", Saved::total), ("zero", |s| s.zero), ("self", |s| s.own), ("cross", |s| s.cross)];
    for (name, of) in kinds {
        let points = seen.iter().map(|(seconds, saved)| (*seconds, 100.0 * of(saved) as f64 / ideal));
        measured.series.insert(format!("{name}_percent_of_ideal"), points.collect());
    }
    Ok(())
}

/// Guests write pages of every kind, and the engine merges them again; pages are followed one by
/// one.
fn churn(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    present: &Present,
    measured: &mut Measured,
) -> Result<(), ExperimentError> {
    let churn = stage.plan.churn;
    // Pages by chance, which timed writes are; churn would go through them in order, zeros first.
    let write = |fleet: &mut Fleet, rate| {
        let command = Command::Latency { target: Target::All, rate, seconds: None };
        fleet.each(|guest| guest.obey(&command, stage.watch))
    };
    let mut watcher = Watcher::new(present.spaces());
    let look = |watcher: &mut Watcher| -> Result<(), ExperimentError> {
        let saved = present.saved()?.0.total();
        // The ideal of pages that change while they are read would be of no single moment.
        Ok(watcher.look(present.spaces(), saved, 0).map_err(HostError::from)?)
    };
    look(&mut watcher)?;
    write(fleet, churn.pages_per_second)?;
    while watcher.seconds() < churn.seconds {
        stage.rest(Duration::from_secs_f64(stage.plan.look_seconds))?;
        look(&mut watcher)?;
    }
    // What could be shared at its end, and what is, at the same moment.
    let (content, frames) = fleet.paused(|fleet| {
        let content = content::measure(present.spaces(), &mut |_, _| {})?;
        let frames = fleet.frames()?;
        Ok((content, frames))
    })?;
    let timed = write(fleet, 0)?;
    let writes = timed.iter().map(|reply| match reply {
        Reply::Ok(Done::Latency(latency)) => latency.writes,
        _ => 0,
    });
    let written = writes.sum();
    measured.notes.extend(frames.notes.iter().cloned());
    let watched = watcher.finish();
    let began: u64 = watched.looks.iter().map(|look| look.began_pages).sum();
    let ended: u64 = watched.looks.iter().map(|look| look.ended_pages).sum();
    measured.count([
        // Some are written more than once, and some were not shared.
        ("churn_written_pages", written),
        ("churn_began_pages", began),
        ("churn_ended_pages", ended),
        ("churn_still_shared_pages", watched.still_shared_pages),
    ]);
    if content.ideal_saved_pages > 0 {
        let achieved = 100.0 * frames.freed_pages() as f64 / content.ideal_saved_pages as f64;
        measured.put("churn_achieved_percent", achieved);
    }
    if let Some(seconds) = watched.half_life_seconds {
        measured.put("churn_half_life_seconds", seconds);
    }
    let looks = watched.looks.iter().map(|look| (look.seconds, look.freed_pages as f64));
    measured.series.insert("churn_freed_pages".into(), looks.collect());
    Ok(())
}
