//! The course that every contender runs, alone, with fresh guests: merge, settle, rest, change, be
//! written to.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fleet::HostError;
use fleet::fleet::Fleet;
use fleet::guest::Lifetime;
use fleet::runtime::FleetDir;
use fleet::watch::Watch;
use guest::protocol::{Class, Command, Done, Latency, Reply, Target};
use lab::contender::Contender;
use lab::environment::{KsmKnobs, ksm_knobs};
use measure::Space;
use measure::content::Content;
use memory::PAGE_BYTES;
use merge::{EngineError, Progress, Settling};

use super::accounting::{Memory, ThreadSeconds, mapping_bytes, memory_files};
use super::figures::{Round, SECONDS};
use super::ksm_tables::sweep_ksm;
use super::setting::Setting;

/// The part of the ideal that counts as merged.
const GOAL_PERCENT: u64 = 95;
/// How often progress is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// After merging has settled, slabs still give memory back: wait until none has for this long.
const QUIET: Duration = Duration::from_secs(6);
/// And that is waited for no longer than this.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// Writes a second that the first guest times.
const TIMED_RATE: u64 = 2000;
/// How long writes are timed once merging has settled, to unique pages and to common ones.
const SETTLED_WRITES: Duration = Duration::from_secs(5);
/// One page in this number changes each second.
const CHURN_PART: u64 = 100;

/// What one contender did.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub figures: Round,
    /// What a reader of them should know.
    pub notes: Vec<String>,
    /// KSM's knobs while it ran.
    pub knobs: KsmKnobs,
}

/// Runs the course. Everything that it starts has ended when it returns.
///
/// # Errors
/// A guest or the engine fails, a page is wrong in the end, or the user wants an end.
pub fn run(setting: &Setting, contender: Contender, watch: &Watch) -> Result<Outcome> {
    let mut notes = Vec::new();
    for attempt in 1.. {
        if contender.is_ksm() {
            notes.extend(sweep_ksm(watch)?);
        }
        let spec = setting.fleet(contender);
        let dir = FleetDir::of(&spec.name);
        let course = || -> Result<Outcome> {
            let mut fleet =
                Fleet::up(spec.clone(), Some(contender.engine(&dir)?), &dir, Lifetime::WithUs, watch)?;
            let outcome = Course { setting, contender, watch, fleet: &mut fleet }.run();
            fleet.stop();
            outcome
        };
        let outcome = course();
        dir.remove();
        match outcome {
            // Another fleet took KSM while ours came up, or another program set it.
            Err(error) if attempt < 3 && is_disturbed(&error) => {
                notes.push(format!("measured again: {error}"));
            }
            Err(error) => return Err(error),
            Ok(mut outcome) => {
                outcome.notes.extend(notes);
                return Ok(outcome);
            }
        }
    }
    bail!("KSM is always taken by another fleet or program")
}

fn is_disturbed(error: &anyhow::Error) -> bool {
    let is_busy = matches!(error.downcast_ref(), Some(HostError::Engine(EngineError::Busy { .. })));
    is_busy || error.is::<KnobsChanged>()
}

/// A program that ignores the lock has set KSM meanwhile: the measurement is void.
#[derive(Debug, thiserror::Error)]
#[error("another program set KSM while it was measured: it was {was:?} and is {is:?}")]
struct KnobsChanged {
    was: KsmKnobs,
    is: KsmKnobs,
}

struct Course<'a> {
    setting: &'a Setting,
    contender: Contender,
    watch: &'a Watch,
    fleet: &'a mut Fleet,
}

/// Processor time of a window, in percent of one processor.
struct Load {
    engine: f64,
    vms: f64,
}

impl Course<'_> {
    fn run(&mut self) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let figures = &mut outcome.figures;
        let content = self.fleet.content(self.watch)?;
        ensure!(content.ideal_saved_pages > 0, "these guests have nothing in common");
        figures.insert("ideal_pages", content.ideal_saved_pages as f64);
        let spaces = self.fleet.spaces()?;
        let memory = Memory::now(&spaces)?;

        self.merge(&content, &spaces, &mut outcome.knobs, figures)?;
        put_latency(figures, self.time_writes(Class::Unique, 0)?);
        if !self.setting.merging_only {
            self.after_merging(content, &spaces, memory, figures)?;
        }
        if self.contender.is_ksm() {
            let (was, is) = (settings(&outcome.knobs), settings(&ksm_knobs()));
            ensure!(was == is, KnobsChanged { was, is });
        }
        outcome.notes.extend(self.fleet.notes());
        self.fleet.stop_merging();
        let wrong = self.fleet.verify(self.watch)?.mismatched_pages;
        ensure!(
            wrong == 0,
            "{wrong} pages do not hold what was written to them, by {}",
            self.contender.name()
        );
        Ok(outcome)
    }

    /// All that comes once merging has got there.
    fn after_merging(
        &mut self,
        content: Content,
        spaces: &[Space],
        memory: Memory,
        figures: &mut Round,
    ) -> Result<()> {
        if self.contender != Contender::Off {
            self.settle()?;
            let unmapped = self.share(content, spaces, "share_percent", figures)?;
            self.memory(memory, spaces, unmapped, figures)?;
        }
        self.windows(spaces, figures)?;
        // Unique ones first: the others break what is shared.
        for (class, p50, p99, max) in [
            (Class::Unique, "settled_write_p50_ns", "settled_write_p99_ns", "settled_write_max_ns"),
            (Class::Common, "shared_write_p50_ns", "shared_write_p99_ns", "shared_write_max_ns"),
        ] {
            self.time_writes(class, TIMED_RATE)?;
            self.rest(SETTLED_WRITES)?;
            let latency = self.time_writes(class, 0)?;
            figures.insert(p50, latency.p50_ns as f64);
            figures.insert(p99, latency.p99_ns as f64);
            figures.insert(max, latency.max_ns as f64);
        }
        Ok(())
    }

    /// Lets the engine begin and waits for the goal.
    fn merge(
        &mut self,
        content: &Content,
        spaces: &[Space],
        knobs: &mut KsmKnobs,
        figures: &mut Round,
    ) -> Result<()> {
        // Pages that were only ever read are on the zero page from the start, and need no merging.
        let zeros = self.fleet.paused(Fleet::frames)?.pages.zero;
        let goal = goal(content, self.setting.guests).saturating_sub(zeros);
        // Not before: the pause would be in the times.
        self.time_writes(Class::Unique, TIMED_RATE)?;
        let before = ThreadSeconds::now(spaces)?;
        let began = Instant::now();
        self.fleet.start_merging()?;
        if self.contender.is_ksm() {
            *knobs = ksm_knobs();
        }
        let (merged, seconds) = loop {
            self.watch.check()?;
            let (progress, seconds) = (self.progress()?, began.elapsed());
            if progress.merged_pages >= goal {
                break (Some(progress), seconds);
            }
            let is_over = match self.contender {
                Contender::Off => seconds >= self.setting.window,
                _ => seconds >= self.setting.limit,
            };
            if is_over {
                break (None, seconds);
            }
            thread::sleep(LOOK);
        };
        let Some(progress) = merged else { return Ok(()) };
        let used = ThreadSeconds::now(spaces)?.since(before);
        figures.insert(SECONDS, seconds.as_secs_f64());
        let Some(cpu_seconds) = self.engine_seconds(progress, used.engine) else { return Ok(()) };
        figures.insert("cpu_seconds", cpu_seconds);
        let merged_gib = (progress.merged_pages * PAGE_BYTES) as f64 / GIB;
        figures.insert("cpu_seconds_per_merged_gib", cpu_seconds / merged_gib);
        if let (Contender::Slab, Some(said)) = (self.contender, progress.cpu_seconds) {
            figures.insert("progress_cpu_share", said / used.engine);
        }
        Ok(())
    }

    /// Processor time of the engine: the kernel's word where the engine is threads of ours,
    /// `ksmd`'s where it is KSM.
    fn engine_seconds(&self, progress: Progress, threads: f64) -> Option<f64> {
        if self.contender.is_ksm() { progress.cpu_seconds } else { Some(threads) }
    }

    fn progress(&mut self) -> Result<Progress> {
        self.fleet.progress().context("the engine does not say how far it is: a guest may have ended")
    }

    /// Waits until merging has settled, and gives nothing back.
    fn settle(&mut self) -> Result<()> {
        let began = Instant::now();
        let (mut settling, mut is_settled) = (Settling::default(), false);
        let (mut least, mut since) = (memory_files(), Instant::now());
        while !(is_settled && since.elapsed() >= QUIET) && began.elapsed() < SETTLE_LIMIT {
            self.rest(LOOK)?;
            let progress = self.progress()?;
            settling.saw(&progress);
            is_settled = settling.is_over(&progress);
            let slabs = memory_files();
            if slabs < least {
                (least, since) = (slabs, Instant::now());
            }
        }
        Ok(())
    }

    /// How much of the ideal is shared, by the kernel's own tables. Returns the bytes of slabs that
    /// no guest maps.
    fn share(
        &mut self,
        content: Content,
        spaces: &[Space],
        key: &'static str,
        figures: &mut Round,
    ) -> Result<u64> {
        let frames = self.fleet.paused(Fleet::frames)?;
        // Not the pages that are present now: zeros may have been given back, which saves them too.
        let saved = content.present().saturating_sub(frames.frames);
        figures.insert(key, 100.0 * saved as f64 / content.ideal_saved_pages as f64);
        let mapped = frames.frames.saturating_sub(frames.pages.private) * PAGE_BYTES;
        Ok(Memory::now(spaces)?.slab_bytes.saturating_sub(mapped))
    }

    /// What the engine needs beside guest RAM, grown since `before`.
    fn memory(&mut self, before: Memory, spaces: &[Space], unmapped: u64, figures: &mut Round) -> Result<()> {
        let now = Memory::now(spaces)?;
        let grown = |of: fn(&Memory) -> u64| of(&now) as f64 - of(&before) as f64;
        let mappings = grown(|memory| memory.mappings);
        let parts = [
            ("memory_private_bytes", grown(|memory| memory.private_bytes)),
            ("memory_page_table_bytes", grown(|memory| memory.page_table_bytes)),
            ("memory_mapping_bytes", mappings * mapping_bytes() as f64),
            ("memory_ksm_bytes", if self.contender.is_ksm() { now.ksm_bytes as f64 } else { 0.0 }),
            ("memory_unmapped_slab_bytes", if self.contender.is_ksm() { 0.0 } else { unmapped as f64 }),
        ];
        let guest_gib = (self.setting.memory_bytes * u64::from(self.setting.guests)) as f64 / GIB;
        let all: f64 = parts.iter().map(|(_, bytes)| bytes).sum();
        figures.extend(parts);
        figures.insert("mappings", mappings);
        figures.insert("memory_bytes_per_gib", all / guest_gib);
        Ok(())
    }

    /// The windows in which nothing changes, unique pages do, and common ones do.
    fn windows(&mut self, spaces: &[Space], figures: &mut Round) -> Result<()> {
        let load = self.load(spaces)?;
        figures.insert("idle_cpu_percent", load.engine);
        figures.insert("idle_vm_cpu_percent", load.vms);
        for (class, engine, vms) in [
            (Class::Unique, "churn_unique_cpu_percent", "churn_unique_vm_cpu_percent"),
            (Class::Common, "churn_common_cpu_percent", "churn_common_vm_cpu_percent"),
        ] {
            self.churn(class, CHURN_PART)?;
            let load = self.load(spaces)?;
            figures.insert(engine, load.engine);
            figures.insert(vms, load.vms);
        }
        if self.contender != Contender::Off {
            // While they still change: an engine that only catches up at rest does not keep up.
            let content = self.fleet.content(self.watch)?;
            self.share(content, spaces, "share_after_churn_percent", figures)?;
        }
        self.churn(Class::Common, 0)
    }

    fn load(&mut self, spaces: &[Space]) -> Result<Load> {
        let (before, progress, began) = (ThreadSeconds::now(spaces)?, self.progress()?, Instant::now());
        self.rest(self.setting.window)?;
        let used = ThreadSeconds::now(spaces)?.since(before);
        let (now, seconds) = (self.progress()?, began.elapsed().as_secs_f64());
        let engine = match (self.contender.is_ksm(), now.cpu_seconds, progress.cpu_seconds) {
            (true, Some(now), Some(before)) => now - before,
            (true, ..) => bail!("ksmd cannot be seen, so its processor time cannot be had"),
            _ => used.engine,
        };
        Ok(Load { engine: 100.0 * engine / seconds, vms: 100.0 * used.vms / seconds })
    }

    /// Has every guest change one page in `part` each second, all of this class; 0 ends it.
    fn churn(&mut self, class: Class, part: u64) -> Result<()> {
        for guest in &mut self.fleet.guests {
            let pages = guest.filled().and_then(|fill| fill.pages).unwrap_or(0);
            let rate = pages.checked_div(part).unwrap_or(0);
            let command = Command::Churn { target: Target::Only(class), rate, seconds: None };
            guest.obey(&command, self.watch)?;
        }
        Ok(())
    }

    /// What the first guest has timed by now; it goes on at `rate`, 0 ends it.
    fn time_writes(&mut self, class: Class, rate: u64) -> Result<Latency> {
        let guest = self.fleet.guests.first_mut().context("a fleet without guests")?;
        let command = Command::Latency { target: Target::Only(class), rate, seconds: None };
        match guest.obey(&command, self.watch)? {
            Reply::Ok(Done::Latency(latency)) => Ok(latency),
            other => bail!("{command} was answered {other}"),
        }
    }

    fn rest(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        loop {
            self.watch.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(100)));
        }
    }
}

/// The knobs that only their owner changes: the advisor sets one by itself.
fn settings(knobs: &KsmKnobs) -> KsmKnobs {
    let is_advised =
        knobs.iter().any(|(name, value)| *name == "advisor_mode" && value.contains("[scan-time]"));
    knobs.iter().filter(|(name, _)| !(is_advised && *name == "pages_to_scan")).cloned().collect()
}

const GIB: f64 = (1u64 << 30) as f64;

/// Pages merged, as the engine counts them, when the wanted part of the ideal is saved.
fn goal(content: &Content, guests: u16) -> u64 {
    // It counts the pages on shared frames, the first of each frame too. What these guests have in
    // common is in all of them, so there are as many first ones as there are duplicates in each of
    // the other guests. Zeros have no first.
    let first = content.cross_duplicates.div_ceil(u64::from(guests).saturating_sub(1).max(1));
    content.ideal_saved_pages * GOAL_PERCENT / 100 + first
}

fn put_latency(figures: &mut Round, latency: Latency) {
    figures.insert("writes", latency.writes as f64);
    figures.insert("write_p50_ns", latency.p50_ns as f64);
    figures.insert("write_p99_ns", latency.p99_ns as f64);
    figures.insert("write_p999_ns", latency.p999_ns as f64);
    figures.insert("write_max_ns", latency.max_ns as f64);
    figures.insert("write_late_p99_us", latency.late_p99_us as f64);
    figures.insert("write_late_max_us", latency.late_max_us as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_goal_counts_the_first_of_each_but_of_zeros() {
        // Four guests: 1000 contents in all of them, 500 zeros, 100 copies within a guest.
        let content = Content {
            zero: 500,
            self_duplicates: 100,
            cross_duplicates: 3000,
            ideal_saved_pages: 3600,
            ..Content::default()
        };
        assert_eq!(goal(&content, 4), 3420 + 1000);
        // With everything merged that many are counted and more.
        assert!(goal(&content, 4) <= 500 + 100 + 4 * 1000);
    }

    #[test]
    fn the_advisor_may_change_what_is_its_own() {
        let knobs = |mode: &str, pages: &str| -> KsmKnobs {
            vec![("advisor_mode", mode.into()), ("pages_to_scan", pages.into())]
        };
        let advised = "none [scan-time]";
        assert_eq!(settings(&knobs(advised, "500")), settings(&knobs(advised, "12500")));
        assert_ne!(
            settings(&knobs("[none] scan-time", "100")),
            settings(&knobs("[none] scan-time", "20000"))
        );
    }
}
