//! Two Linux guests read the same file, one after the other, while merging goes on: how soon the
//! second copy in memory is merged.
//!
//! The file is a drive of both. Each reads it once through its own page cache, the second some
//! seconds after the first; then both drop it from their page cache, and the next round has other
//! contents, so that leftovers of the last one do not count. Pages are found in the guests' memory
//! by their contents, and followed by their frames.

use std::io;
use std::time::{Duration, Instant};

use guest::protocol::{Command, Disk, DiskDone, Done, MAX_DISK_PAGES, Reply};
use tempfile::NamedTempFile;

use super::ExperimentError;
use super::file_pages::{self, Located};
use super::stage::Stage;
use super::trial::Measured;
use crate::spread::median;
use fleet::HostError;
use fleet::fleet::Fleet;
use fleet::guest::Guest;
use fleet::watch::Watch;
use machine::Drive;
use measure::Space;
use memory::PAGE_BYTES;

/// Fractions of the file whose time is recorded.
const PARTS: [(f64, &str); 2] = [(0.5, "to_50_percent_seconds"), (0.9, "to_90_percent_seconds")];
/// A round is over when this fraction of the file is shared: a page or two may be on their way out
/// of a page cache.
const ALL_BUT_A_FEW: f64 = 0.999;
/// Pages of one command to a guest: it answers only when it is done.
const COMMAND_PAGES: u64 = 4096;
const _: () = assert!(COMMAND_PAGES <= MAX_DISK_PAGES);
/// Seeds of neighbouring repetitions are this far apart, and of a file's rounds one.
const SEED_STRIDE: u64 = 1 << 16;
/// A seed with this bit never fills a guest.
const FILE_SEED: u64 = 1 << 63;

/// A file of the experiment's own, gone with it.
struct Image {
    file: NamedTempFile,
    pages: u64,
    seed: u64,
}

impl Image {
    fn new(stage: &Stage<'_>) -> Result<Self, ExperimentError> {
        let pages = stage.plan.file_bytes()? / PAGE_BYTES;
        let file = tempfile::Builder::new().prefix("samepage-page-cache-").tempfile();
        let file = file.map_err(failed("make a file in the temporary directory"))?;
        let seed = stage.plan.seed.wrapping_add(stage.repetition.into()).wrapping_mul(SEED_STRIDE);
        let mut image = Self { file, pages, seed: seed | FILE_SEED };
        image.write()?;
        Ok(image)
    }

    fn write(&mut self) -> Result<(), ExperimentError> {
        let file = self.file.as_file_mut();
        file_pages::write(file, self.seed, self.pages).map_err(failed("write the file that guests read"))
    }

    /// Changes its contents.
    fn next(&mut self) -> Result<(), ExperimentError> {
        self.seed = self.seed.wrapping_add(1) | FILE_SEED;
        self.write()
    }
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> ExperimentError {
    move |source| ExperimentError::Image { what, source }
}

/// Figures of all rounds, of which the trial's are the medians.
#[derive(Default)]
struct Rounds(Vec<(&'static str, Vec<f64>)>);

impl Rounds {
    fn put(&mut self, name: &'static str, value: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name, vec![value])),
        }
    }

    /// The number of rounds with such a figure.
    fn count(&self, name: &str) -> usize {
        self.0.iter().find(|(known, _)| *known == name).map_or(0, |(_, values)| values.len())
    }
}

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let mut image = Image::new(stage)?;
    let path = image.file.path().into();
    let drive = Drive { id: Drive::id(0), path, read_only: true, ..Drive::default() };
    let mut spec = stage.spec(&["experiment"; 2])?;
    for guest in &mut spec.guests {
        guest.vm.drives = vec![drive.clone()];
        // Pages that a guest's kernel frees go back to the host if it reports them: else a dropped
        // file would stay shared.
        guest.vm.balloon.iter_mut().for_each(|balloon| balloon.reporting = true);
    }
    stage.play_in(spec, |fleet, measured| {
        fleet.start_merging()?;
        // Pages that guests booted from are merged before anything is measured.
        stage.settle(fleet, Instant::now(), |_, _| Ok(()))?;
        let before = fleet.progress().unwrap_or_default().cpu_seconds;
        let mut rounds = Rounds::default();
        for number in 1..=stage.plan.file.rounds {
            if number > 1 {
                image.next()?;
            }
            round(stage, fleet, &image, number, &mut rounds, measured)?;
        }
        for (name, values) in &rounds.0 {
            measured.put(name, median(values.iter().copied()));
        }
        let all = stage.plan.file.rounds as usize;
        for (part, name) in PARTS.iter().filter(|(_, name)| rounds.count(name) < all) {
            measured.notes.push(format!(
                "{} % of the file were shared within merge_seconds in {} of {all} rounds with {}: {name} is theirs",
                100.0 * part,
                rounds.count(name),
                stage.point,
            ));
        }
        let after = fleet.progress().unwrap_or_default().cpu_seconds;
        if let (Some(before), Some(after)) = (before, after) {
            measured.put("merge_cpu_seconds", after - before);
        }
        measured.count([("file_pages", image.pages)]);
        Ok(())
    })
}

/// Both read, the engine merges, both drop the file.
fn round(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    image: &Image,
    number: u32,
    rounds: &mut Rounds,
    measured: &mut Measured,
) -> Result<(), ExperimentError> {
    let offset = Duration::from_secs_f64(stage.plan.variant_of(stage.point).offset_seconds.unwrap_or(0.0));
    let read = fleet.each(|guest| {
        if guest.number > 0 {
            stage.rest(offset)?;
        }
        let read = read(guest, image, stage.watch)?;
        Ok((read, Instant::now()))
    })?;
    let began = read.iter().map(|(_, ended)| *ended).max().unwrap_or_else(Instant::now);
    if let Some(wrong) = read.iter().map(|(read, _)| read.wrong).find(|wrong| *wrong > 0) {
        let point = stage.point.to_string();
        return Err(ExperimentError::WrongPages { wrong, checked: image.pages, point });
    }
    for ((read, _), name) in read.iter().zip(["first_read_seconds", "second_read_seconds"]) {
        rounds.put(name, read.seconds);
    }
    let Ok(spaces) = <[Space; 2]>::try_from(fleet.spaces()?) else {
        return Err(ExperimentError::GuestGone);
    };
    let located = [Located::of(&spaces[0], image.seed)?, Located::of(&spaces[1], image.seed)?];
    let found = located[0].pages().min(located[1].pages());
    if found < image.pages {
        let missing = image.pages - found;
        measured
            .notes
            .push(format!("{missing} pages of the file were not found in a guest after it had read them"));
    }

    let mut seen: Vec<(f64, u64)> = Vec::new();
    loop {
        let seconds = began.elapsed().as_secs_f64();
        let shared = file_pages::shared(&spaces, &located)?;
        seen.push((seconds, shared));
        if shared as f64 >= ALL_BUT_A_FEW * image.pages as f64 || seconds >= stage.plan.merge_seconds {
            break;
        }
        stage.rest(Duration::from_secs_f64(stage.plan.look_seconds))?;
    }
    for (part, name) in PARTS {
        if let Some((seconds, _)) =
            seen.iter().find(|(_, shared)| *shared as f64 >= part * image.pages as f64)
        {
            rounds.put(name, *seconds);
        }
    }
    let peak = seen.iter().map(|(_, shared)| *shared).max().unwrap_or(0);
    rounds.put("peak_shared_pages", peak as f64);
    rounds.put("peak_percent", 100.0 * peak as f64 / image.pages as f64);

    fleet.each(|guest| tell(guest, Disk::Drop, stage.watch))?;
    let forgot = Instant::now();
    while forgot.elapsed().as_secs_f64() < stage.plan.file.evict_seconds {
        stage.rest(Duration::from_secs_f64(stage.plan.look_seconds))?;
        seen.push((began.elapsed().as_secs_f64(), file_pages::shared(&spaces, &located)?));
    }
    rounds.put("after_evict_shared_pages", seen.last().map_or(0.0, |(_, shared)| *shared as f64));
    let percent = seen.iter().map(|(at, shared)| (*at, 100.0 * *shared as f64 / image.pages as f64));
    measured.series.insert(format!("round_{number}_shared_percent"), percent.collect());
    Ok(())
}

/// A complete read of the file.
struct Read {
    wrong: u64,
    /// In the guest, without the time between commands.
    seconds: f64,
}

fn read(guest: &mut Guest, image: &Image, watch: &Watch) -> Result<Read, HostError> {
    let (mut read, mut first) = (Read { wrong: 0, seconds: 0.0 }, 0);
    while first < image.pages {
        watch.check()?;
        let pages = COMMAND_PAGES.min(image.pages - first);
        let action = Disk::Read { first, pages, seed: Some(image.seed) };
        if let DiskDone::Read { wrong, ns, .. } = tell(guest, action, watch)? {
            read.wrong += wrong;
            read.seconds += ns as f64 / 1e9;
        }
        first += pages;
    }
    Ok(read)
}

fn tell(guest: &mut Guest, action: Disk, watch: &Watch) -> Result<DiskDone, HostError> {
    match guest.obey(&Command::Disk(action), watch)? {
        Reply::Ok(Done::Disk(done)) => Ok(done),
        other => Err(HostError::unexpected(format!("guest {}", guest.spec.name), &other)),
    }
}
