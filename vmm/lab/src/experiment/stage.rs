//! The fleet of a trial: started, filled, measured, checked, and ended.

use std::thread;
use std::time::{Duration, Instant};

use guest::protocol::{Command, Done, Fill, Latency, Mix, Reply, Target};

use super::ExperimentError;
use super::kernel;
use super::plan::Plan;
use super::trial::{Measured, Point};
use fleet::HostError;
use fleet::fleet::Fleet;
use fleet::guest::Lifetime;
use fleet::runtime::FleetDir;
use fleet::spec::{AdmissionName, EngineName, FleetSpec, GuestSpec, Overcommit};
use fleet::watch::Watch;
use machine::{LINUX_CMDLINE, VmConfig, cmdline};
use measure::Space;
use measure::frames::{self, Frames};
use merge::slab::engine::Tuning;
use merge::{Progress, Settling};

/// How often an interrupt is checked for while nothing happens.
const POLL: Duration = Duration::from_millis(20);
/// Seeds of neighbours are this far apart, so that the guests of one repetition share no seed with
/// another's.
const SEED_STRIDE: u64 = 1 << 20;

/// A point of a plan that is about to be run.
pub(super) struct Stage<'a> {
    pub(super) plan: &'a Plan,
    pub(super) point: &'a Point,
    /// Counted from 1.
    pub(super) repetition: u32,
    pub(super) watch: &'a Watch,
}

impl Stage<'_> {
    /// Starts a fleet with a guest for each of `domains`, filled, lets `work` measure it, and has
    /// every page checked.
    pub(super) fn play(
        &self,
        domains: &[&str],
        work: impl FnOnce(&mut Fleet, &mut Measured) -> Result<(), ExperimentError>,
    ) -> Result<Measured, ExperimentError> {
        self.play_in(self.spec(domains)?, work)
    }

    /// As [`Self::play`], with guests that are not all as in the plan.
    pub(super) fn play_in(
        &self,
        spec: FleetSpec,
        work: impl FnOnce(&mut Fleet, &mut Measured) -> Result<(), ExperimentError>,
    ) -> Result<Measured, ExperimentError> {
        let dir = FleetDir::of(&spec.name);
        let mut measured = Measured::default();
        let result = (|| {
            let engine = self.point.engine.engine(&dir)?;
            let mut fleet = Fleet::ready(spec, Some(engine), &dir, Lifetime::WithUs, self.watch)?;
            let result = self.fill(&mut fleet).and_then(|()| work(&mut fleet, &mut measured));
            let result = result.and_then(|()| {
                measured.notes.extend(fleet.notes());
                fleet.stop_merging();
                self.verify(&mut fleet)
            });
            fleet.stop();
            result
        })();
        dir.remove();
        result.map(|()| measured)
    }

    /// How many vCPUs run, besides the one that a guest does its work with.
    pub(super) fn running(&self) -> u8 {
        self.plan.variant_of(self.point).running.unwrap_or(1)
    }

    /// The fleet of [`Self::play`].
    pub(super) fn spec(&self, domains: &[&str]) -> Result<FleetSpec, ExperimentError> {
        let (guest, variant) = (&self.plan.guest, self.plan.variant_of(self.point));
        let kernel = kernel::of(self.plan, &variant).map_err(ExperimentError::NothingToRun)?;
        let memory_bytes = self.plan.memory_bytes()?;
        let cmdline = match variant.cmdline {
            Some(more) => Some(cmdline::append(guest.cmdline.as_deref().unwrap_or(LINUX_CMDLINE), &more)),
            None => guest.cmdline.clone(),
        };
        let vm = VmConfig {
            memory_bytes,
            cpus: guest.cpus,
            kernel: kernel.path,
            unpack: kernel.unpack,
            initrd: guest.initrd.clone(),
            cmdline,
            huge_pages: variant.huge_pages,
            ..VmConfig::default()
        };
        // They are filled from our seeds, below.
        let guests = domains.iter().enumerate().map(|(n, domain)| GuestSpec {
            ready_seconds: guest.ready_seconds,
            ..GuestSpec::new(format!("guest-{n}"), (*domain).to_owned(), vm.clone())
        });
        Ok(FleetSpec {
            name: format!("experiment-{}", std::process::id()),
            engine: self.point.engine.kind(),
            merge: Tuning::default(),
            overcommit: Overcommit { admission: AdmissionName::Off, ..Overcommit::default() },
            metrics: None,
            open: None,
            pool: 0,
            guests: guests.collect(),
        })
    }

    /// Makes all guests fill their memory as the plan says.
    pub(super) fn fill(&self, fleet: &mut Fleet) -> Result<(), ExperimentError> {
        self.fill_pages(fleet, self.plan.guest.fill.pages)
    }

    /// As [`Self::fill`], with `pages` pages; without a number all that a guest can spare.
    pub(super) fn fill_pages(&self, fleet: &mut Fleet, pages: Option<u64>) -> Result<(), ExperimentError> {
        let fill = self.plan.guest.fill;
        let mix = Mix::new(fill.zero, fill.common, fill.duplicate, fill.unique);
        let mix = mix.map_err(|_| ExperimentError::Mix(fill.sum()))?;
        let common = self.plan.seed.wrapping_add(self.repetition.into()).wrapping_mul(SEED_STRIDE);
        fleet.each(|guest| {
            let seed = common.wrapping_add(1 + guest.number as u64);
            guest.fill_by(Fill { seed, common, mix, pages }, self.watch)
        })?;
        Ok(())
    }

    /// Has every page checked, by its guest and by the host.
    pub(super) fn verify(&self, fleet: &mut Fleet) -> Result<(), ExperimentError> {
        let verified = fleet.verify(self.watch)?;
        match verified.mismatched_pages {
            0 => Ok(()),
            wrong => Err(ExperimentError::WrongPages {
                wrong,
                checked: verified.verified_pages,
                point: self.point.to_string(),
            }),
        }
    }

    /// Waits until merging has settled or its time is over; calls `look` each
    /// [`Plan::look_seconds`] with the time since `began`.
    pub(super) fn settle(
        &self,
        fleet: &mut Fleet,
        began: Instant,
        mut look: impl FnMut(&mut Fleet, f64) -> Result<(), ExperimentError>,
    ) -> Result<Progress, ExperimentError> {
        let (mut settling, mut next) = (Settling::default(), 0.0);
        loop {
            let seconds = began.elapsed().as_secs_f64();
            if seconds >= next {
                look(fleet, seconds)?;
                next = seconds + self.plan.look_seconds;
            }
            let progress = fleet.progress().unwrap_or_default();
            settling.saw(&progress);
            let settled = settling.is_over(&progress);
            // Where nothing merges there is nothing to wait for.
            if settled || self.point.engine.kind() == EngineName::Off || seconds >= self.plan.merge_seconds {
                look(fleet, began.elapsed().as_secs_f64())?;
                return Ok(progress);
            }
            self.rest(POLL)?;
        }
    }

    /// Sleeps for `length`, unless the user interrupts it.
    pub(super) fn rest(&self, length: Duration) -> Result<(), HostError> {
        let until = Instant::now() + length;
        loop {
            self.watch.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(POLL));
        }
    }

    /// Makes guest `number` time its writes to `target` from now on; returns the times until now.
    pub(super) fn time_writes(
        &self,
        fleet: &mut Fleet,
        number: usize,
        target: Target,
        rate: u64,
    ) -> Result<Latency, ExperimentError> {
        let command = Command::Latency { target, rate, seconds: None };
        let results = fleet.each(|guest| match guest.number == number {
            true => guest.obey(&command, self.watch).map(Some),
            false => Ok(None),
        })?;
        Ok(results
            .into_iter()
            .flatten()
            .find_map(|reply| match reply {
                Reply::Ok(Done::Latency(latency)) => Some(latency),
                _ => None,
            })
            .unwrap_or_default())
    }
}

/// Pages that are present, and frames under them: of each guest by itself and of all together.
#[derive(Clone, Debug)]
pub(super) struct Present {
    spaces: Vec<Space>,
    /// Present pages of each guest when this was made.
    pages: Vec<u64>,
}

/// Frames that are freed, by what frees them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Saved {
    /// Pages of zeros: on the zero page, or given back.
    pub(super) zero: u64,
    /// Pages on a frame with an earlier page of the same guest.
    pub(super) own: u64,
    /// Pages on a frame with a page of another guest.
    pub(super) cross: u64,
}

impl Saved {
    /// Pages that sharing saves, zeros not counted.
    pub(super) fn by_sharing(&self) -> u64 {
        self.own + self.cross
    }

    /// Pages that need no frame.
    pub(super) fn total(&self) -> u64 {
        self.zero + self.by_sharing()
    }
}

impl Present {
    /// The pages that are present now, before anything is merged.
    pub(super) fn now(fleet: &mut Fleet) -> Result<Self, HostError> {
        let (spaces, frames) = (fleet.spaces()?, fleet.frames()?);
        Ok(Self { spaces, pages: frames.guests.iter().map(|guest| guest.pages.present()).collect() })
    }

    /// Where the guests' memory lies.
    pub(super) fn spaces(&self) -> &[Space] {
        &self.spaces
    }

    pub(super) fn total(&self) -> u64 {
        self.pages.iter().sum()
    }

    /// What is saved now of the pages that were present then. An engine gives back pages of zeros,
    /// which are absent afterwards; so absent pages count as zeros.
    pub(super) fn saved(&self) -> Result<(Saved, Frames), HostError> {
        let all = frames::measure(&self.spaces)?;
        let (mut saved, mut alone) = (Saved::default(), 0);
        for (space, pages) in self.spaces.iter().zip(&self.pages) {
            let one = frames::measure(std::slice::from_ref(space))?;
            saved.zero += one.pages.zero + pages.saturating_sub(one.pages.present());
            saved.own += one.saved_pages;
            alone += one.frames;
        }
        saved.cross = alone.saturating_sub(all.frames);
        Ok((saved, all))
    }
}
