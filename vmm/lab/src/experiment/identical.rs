//! Identical guests: what is shared and what that saves, once merging has settled.

use std::time::Instant;

use super::ExperimentError;
use super::stage::{Present, Stage};
use super::trial::Measured;

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let domains = vec!["experiment"; stage.point.guests as usize];
    stage.play(&domains, |fleet, measured| {
        let content = fleet.content(stage.watch)?;
        let present = Present::now(fleet)?;
        let before = fleet.ledger(false)?.ledger.overhead.total();
        let began = Instant::now();
        fleet.start_merging()?;
        let mut last = (0, 0.0);
        let progress = stage.settle(fleet, began, |fleet, seconds| {
            let merged = fleet.progress().unwrap_or_default().merged_pages;
            if merged > last.0 {
                last = (merged, seconds);
            }
            Ok(())
        })?;
        let ledger = fleet.ledger(false)?.ledger;
        let (saved, frames) = fleet.paused(|_| present.saved())?;
        measured.count([
            ("promised_pages", frames.pages.total),
            ("present_pages", present.total()),
            ("shared_pages", frames.pages.shared),
            ("freed_pages", saved.total()),
            ("saved_pages", saved.by_sharing()),
            ("frames_pages", frames.frames),
            ("freed_zero_pages", saved.zero),
            ("freed_self_pages", saved.own),
            ("freed_cross_pages", saved.cross),
            ("ideal_pages", content.ideal_saved_pages),
            ("zero_only_pages", content.zero),
            ("ideal_self_pages", content.self_duplicates),
            ("ideal_cross_pages", content.cross_duplicates),
            ("overhead_pages", ledger.overhead.total()),
        ]);
        // The difference of two readings, so it is negative if other memory was given back
        // meanwhile.
        measured.put("metadata_pages", ledger.overhead.total() as f64 - before as f64);
        measured.put("merge_seconds", last.1);
        if let Some(seconds) = progress.cpu_seconds {
            measured.put("merge_cpu_seconds", seconds);
        }
        measured.notes.extend(frames.notes);
        Ok(())
    })
}
