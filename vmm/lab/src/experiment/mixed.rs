//! What guests that are not alike have in common: by sharing, by patches of similar pages, and by
//! compression.
//!
//! Guests have three workloads in turn, and where there is a Linux kernel every second guest is the
//! built-in one instead: two kernels. Sharing is measured, by merging to the end; what patches and
//! compression would save of the rest is an estimate, from a sample of the contents.

use std::time::Instant;

use guest::protocol::{Fill, Mix};

use super::ExperimentError;
use super::stage::{Present, Stage};
use super::trial::Measured;
use fleet::HostError;
use fleet::fleet::Fleet;
use measure::beyond::Beyond;
use measure::scan::{Options, scan};
use measure::source::Source;
use measure::source::process::ProcessSource;

/// Zero, common, duplicate and unique pages of each workload, in percent: a server that has just
/// started, one in use, a cache.
const WORKLOADS: [[u8; 4]; 3] = [[50, 40, 5, 5], [10, 40, 10, 40], [5, 10, 5, 80]];
/// Contents that are looked at for patches and compression.
const SAMPLE: usize = 2000;

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let mut spec = stage.spec(&vec!["experiment"; stage.point.guests as usize])?;
    for guest in spec.guests.iter_mut().skip(1).step_by(2) {
        (guest.vm.kernel, guest.vm.initrd, guest.vm.cmdline) = (None, None, None);
    }
    stage.play_in(spec, |fleet, measured| {
        fill(stage, fleet)?;
        let content = fleet.content(stage.watch)?;
        let beyond = beyond(stage, fleet)?;
        let present = Present::now(fleet)?;
        fleet.start_merging()?;
        stage.settle(fleet, Instant::now(), |_, _| Ok(()))?;
        let (saved, frames) = fleet.paused(|_| present.saved())?;
        measured.count([
            ("promised_pages", frames.pages.total),
            ("present_pages", present.total()),
            ("ideal_pages", content.ideal_saved_pages),
            ("freed_pages", saved.total()),
            ("freed_zero_pages", saved.zero),
            ("freed_self_pages", saved.own),
            ("freed_cross_pages", saved.cross),
            ("contents_pages", beyond.contents),
            ("sampled_contents", beyond.sampled),
        ]);
        let all = present.total().max(1) as f64;
        let with = |saves: f64| 100.0 * (saved.total() as f64 + beyond.contents as f64 * saves) / all;
        measured.put("sharing_percent", with(0.0));
        measured.put("sharing_patches_percent", with(beyond.patches_save.mean));
        measured.put("sharing_compression_percent", with(beyond.lz4_saves.mean));
        measured.put("sharing_patches_compression_percent", with(beyond.patches_and_lz4_save.mean));
        measured
            .notes
            .push("patches and compression are estimates from a sample: Samepage does neither".into());
        Ok(())
    })
}

/// Has guest n fill its memory by workload n, counted round.
fn fill(stage: &Stage<'_>, fleet: &mut Fleet) -> Result<(), ExperimentError> {
    let mixes = WORKLOADS.map(|[zero, common, dup, unique]| Mix::new(zero, common, dup, unique));
    let common = stage.plan.seed.wrapping_add(stage.repetition.into());
    fleet.each(|guest| {
        let Some(Ok(mix)) = mixes.get(guest.number % mixes.len()).copied() else { return Ok(()) };
        let seed = common.wrapping_mul(1 << 20).wrapping_add(1 + guest.number as u64);
        guest.fill_by(Fill { seed, common, mix, pages: stage.plan.guest.fill.pages }, stage.watch)
    })?;
    Ok(())
}

/// A closer look at a sample of what sharing leaves, while all guests are paused.
fn beyond(stage: &Stage<'_>, fleet: &mut Fleet) -> Result<Beyond, ExperimentError> {
    let beyond = fleet.paused(|fleet| {
        let spaces = fleet.spaces()?;
        let sources: Vec<_> = spaces.into_iter().map(|space| ProcessSource::new(space, true)).collect();
        let sources: Vec<&dyn Source> = sources.iter().map(|source| source as &dyn Source).collect();
        let options = Options { sample_contents: SAMPLE, ..Options::default() };
        let scan = scan(&sources, &options, &mut |_, _| stage.watch.check().is_ok())?;
        Ok::<_, HostError>(scan.look_beyond(&sources, &mut |_, _| stage.watch.check().is_ok())?)
    })?;
    Ok(beyond)
}
