//! How much of its memory a guest uses: estimated from a random sample of pages, as Waldspurger's
//! "Memory Resource Management in VMware ESX Server" (OSDI 2002) has it. In each period some pages
//! are parked ([`memory::parker`]), and those that are touched counted.
//!
//! Every touch counts: a vCPU's, a device's, and also the merging agent's when it hashes a page
//! that was written.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use memory::parker::{Parker, Population};
use memory::parking::Parked;
use memory::ram::Ram;
use splitmix::SplitMix64;

/// The most pages of a sample: each costs up to three mappings while it is parked, of which the
/// rest of the process leaves 8192.
pub const MAX_SAMPLES: u64 = 2000;
/// Quantile of the normal distribution for 95 %.
const Z: f64 = 1.959_964;
/// How soon it is tried again to bring back a page that could not be.
const RETRY: Duration = Duration::from_millis(10);

/// How a VM's working set is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// From one sample to the next.
    pub period: Duration,
    /// Pages in each, at most [`MAX_SAMPLES`].
    pub samples: u64,
}

/// Pages in each sample by default.
pub const SAMPLES: u64 = 100;

impl Sampling {
    /// Of as many pages as usual.
    pub fn every_seconds(seconds: f64) -> Self {
        Self { period: Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX), samples: SAMPLES }
    }
}

/// Why there is no estimate.
#[derive(Clone, Debug, Error)]
pub enum WorkingSetError {
    /// The VM was started without.
    #[error("the working set of this VM is not sampled: start it with --sample-working-set SECONDS")]
    Off,
    /// Too early, or the VM was paused in every period so far.
    #[error("no period of sampling is over yet: ask again after {0:?}")]
    NotYet(Duration),
    /// It was asked for and is not possible.
    #[error("the working set of this VM cannot be sampled")]
    Failed(#[source] Arc<io::Error>),
}

/// What the last whole period has shown. Pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Periods that were sampled so far.
    pub periods: u64,
    /// From one sample to the next.
    pub period_seconds: f64,
    /// Pages that were watched through the last period, or until they were touched.
    pub samples: u64,
    /// Those that were touched.
    pub touched: u64,
    /// Pages that the sample was taken of: present, small, and this guest's alone.
    pub sampled_pages: u64,
    /// Pages in huge pages, of which no sample is taken, nor is anything said of them.
    pub huge_pages: u64,
    /// Pages touched within a period, of `sampled_pages`.
    pub estimated_pages: u64,
    /// Half the width of the 95 % confidence interval.
    pub error_pages: u64,
    /// Pages that may have been written since the log of writes was last cleared, if that is on: it
    /// is for an engine that merges.
    pub written_pages: Option<u64>,
}

impl WorkingSet {
    /// What a sample says: `touched` of `samples` pages, which were drawn from `population` ones.
    fn estimate(samples: u64, touched: u64, population: u64) -> (u64, u64) {
        if samples == 0 {
            return (0, population);
        }
        let (n, all) = (samples as f64, population as f64);
        let part = touched.min(samples) as f64 / n;
        // Wilson's interval, which says something also where none or all are touched.
        let centre = (part + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (part * (1.0 - part) / n + Z * Z / (4.0 * n * n)).sqrt();
        let off = (part - (centre - half)).max(centre + half - part);
        ((part * all).round() as u64, (off * all).ceil() as u64)
    }

    fn of(periods: u64, sampling: Sampling, population: Population, chosen: u64, parked: Parked) -> Self {
        let samples = parked.touched + parked.idle;
        // Those that could not be parked, being shared by the kernel's merging or gone, are no part
        // of what is spoken of.
        let watched = samples + parked.withdrawn;
        let sampled_pages = (population.pages as f64 * watched as f64 / chosen.max(1) as f64).round() as u64;
        let sampled_pages = sampled_pages.min(population.pages);
        let (estimated_pages, error_pages) = Self::estimate(samples, parked.touched, sampled_pages);
        Self {
            periods,
            period_seconds: sampling.period.as_secs_f64(),
            samples,
            touched: parked.touched,
            sampled_pages,
            huge_pages: population.huge_pages,
            estimated_pages,
            error_pages,
            written_pages: None,
        }
    }
}

/// What is known of one VM's working set. Clones are the same.
#[derive(Clone)]
pub(super) struct Sampler(Arc<Mutex<Result<WorkingSet, WorkingSetError>>>);

impl Sampler {
    /// Samples `ram` from now on, on a thread of its own, for as long as this process lives; or,
    /// without `sampling`, not.
    pub(super) fn start(ram: &Ram, sampling: Option<Sampling>) -> Self {
        let known = |known| Self(Arc::new(Mutex::new(Err(known))));
        let Some(sampling) = sampling else { return known(WorkingSetError::Off) };
        let sampler = known(WorkingSetError::NotYet(sampling.period));
        let failed = |error: io::Error| {
            tracing::warn!("the working set is not sampled: {error}");
            WorkingSetError::Failed(Arc::new(error))
        };
        let started = Parker::new(ram).and_then(|mut parker| {
            let sampler = sampler.clone();
            let work = move || {
                jail::enter(jail::Thread::Sample);
                if let Err(error) = sampler.work(&mut parker, sampling) {
                    sampler.say(Err(failed(error)));
                }
            };
            thread::Builder::new().name("sample".into()).spawn(work)
        });
        if let Err(error) = started {
            sampler.say(Err(failed(error)));
        }
        sampler
    }

    /// What the last whole period has shown.
    pub(super) fn last(&self) -> Result<WorkingSet, WorkingSetError> {
        os::lock(&self.0).clone()
    }

    fn say(&self, what: Result<WorkingSet, WorkingSetError>) {
        *os::lock(&self.0) = what;
    }

    fn work(&self, parker: &mut Parker, sampling: Sampling) -> io::Result<()> {
        let mut random = SplitMix64::new(RandomState::new().build_hasher().finish());
        let mut periods = 0;
        loop {
            let began = Instant::now();
            let population = parker.population()?;
            let ranks = ranks(&mut random, sampling.samples.min(MAX_SAMPLES), population.pages);
            let chosen = parker.choose(&ranks)?;
            parker.park(&chosen)?;
            parker.watch(sampling.period.saturating_sub(began.elapsed()))?;
            let parked = loop {
                match parker.end() {
                    Some(parked) => break parked,
                    None => parker.watch(RETRY)?,
                }
            };
            if !parked.interrupted {
                periods += 1;
                let found = WorkingSet::of(periods, sampling, population, chosen.len() as u64, parked);
                self.say(Ok(found));
            }
        }
    }
}

/// `count` different numbers below `end`, ascending; all of them where there are no more.
fn ranks(numbers: &mut SplitMix64, count: u64, end: u64) -> Vec<u64> {
    let mut ranks = std::collections::BTreeSet::new();
    // Floyd's way: each of the last `count` numbers stands for itself where a random one is taken
    // already.
    for last in end.saturating_sub(count)..end {
        let drawn = numbers.below(last + 1);
        if !ranks.insert(drawn) {
            ranks.insert(last);
        }
    }
    ranks.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn samples_are_different_pages_of_the_population(seed: u64, count in 0u64..200, end in 0u64..5000) {
            let ranks = ranks(&mut SplitMix64::new(seed), count, end);
            prop_assert_eq!(ranks.len() as u64, count.min(end));
            prop_assert!(ranks.windows(2).all(|two| two[0] < two[1]));
            prop_assert!(ranks.last().is_none_or(|last| *last < end));
        }

        #[test]
        fn an_estimate_stays_within_the_population(samples in 0u64..2000, touched: u64, all in 0u64..1 << 28) {
            let touched = touched % (samples + 1);
            let (pages, error) = WorkingSet::estimate(samples, touched, all);
            prop_assert!(pages <= all);
            // However many are touched, something is known: less than all, and never nothing at
            // all.
            prop_assert!(error <= all);
            prop_assert!(all < 10_000 || error > 0);
        }

        #[test]
        fn more_samples_know_better(samples in 10u64..500, part in 0u64..=10) {
            let error = |n: u64| WorkingSet::estimate(n * 10, n * part, 1 << 20).1;
            prop_assert!(error(samples * 2) < error(samples));
        }
    }

    /// Draws samples of a population of which a part is used, and counts how often the truth is
    /// within the error.
    fn right_of_100(random: &mut SplitMix64, all: u64, used: u64, samples: u64) -> u64 {
        (0..100)
            .filter(|_| {
                let touched = ranks(random, samples, all).iter().filter(|rank| **rank < used).count() as u64;
                let (pages, error) = WorkingSet::estimate(samples, touched, all);
                pages.abs_diff(used) <= error
            })
            .count() as u64
    }

    #[test]
    fn the_truth_is_within_the_error_as_often_as_is_said() {
        let mut random = SplitMix64::new(7);
        for percent in [0, 1, 5, 10, 50, 90, 99, 100] {
            let right = (0..10).map(|_| right_of_100(&mut random, 100_000, percent * 1000, 100)).sum::<u64>();
            // 950 of 1000 are meant; what chance makes of that is 7 up or down.
            assert!(right >= 920, "{right} of 1000 at {percent} %");
        }
        // It is no error bound that holds for want of being one.
        assert!(WorkingSet::estimate(100, 50, 100_000).1 < 11_000);
    }

    #[test]
    fn pages_that_were_withdrawn_say_nothing() {
        let sampling = Sampling { period: Duration::from_secs(10), samples: 100 };
        let population = Population { pages: 10_000, huge_pages: 512 };
        let parked = Parked { touched: 20, withdrawn: 10, idle: 60, interrupted: false };
        // Ten more of the hundred were chosen and could not be parked: others have them, too.
        let found = WorkingSet::of(3, sampling, population, 100, parked);
        assert_eq!((found.samples, found.touched, found.sampled_pages), (80, 20, 9000));
        assert_eq!((found.estimated_pages, found.huge_pages, found.periods), (2250, 512, 3));
        let none = WorkingSet::of(1, sampling, Population::default(), 0, Parked::default());
        assert_eq!((none.estimated_pages, none.error_pages), (0, 0));
    }
}
