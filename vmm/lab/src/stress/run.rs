//! Runs a scenario: phase after phase, while the governor works and a sampler records.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use guest::protocol::{Balloon, Command, Done, Latency, Reply};

use super::scenario::{Churn, GuestPattern, Phase, Restart, Scenario, Storm, SwapState};
use super::series::{Sample, Series};
use super::verdict::{Fate, GuestVerdict, PhaseVerdict, Stormed, Timed, Verdict};
use fleet::HostError;
use fleet::actuator::govern;
use fleet::fleet::Fleet;
use fleet::governor::Governor;
use fleet::guest::{Guest, Lifetime};
use fleet::management::Management;
use fleet::runtime::FleetDir;
use fleet::status::Verified;
use fleet::watch::Watch;
use machine::probe;
use memory::PAGE_BYTES;
use memory::page_out::has_swap;
use memory::swap_filler::SwapFiller;
use os::lock;
use overcommit::view::GuestState;

/// How often a guest in a storm is asked for its progress.
const STORM_POLL: Duration = Duration::from_millis(20);
/// The longest time for a guest's storm.
const STORM_LIMIT: Duration = Duration::from_secs(600);
/// How often an interrupt is checked for while nothing happens.
const POLL: Duration = Duration::from_millis(50);

/// Runs `scenario`; all that it starts has ended when it returns. `begin` is called with the number
/// of each phase as it begins.
pub fn run(scenario: &Scenario, watch: &Watch, begin: &dyn Fn(usize)) -> Result<Verdict, HostError> {
    if scenario.phases.iter().any(|phase| phase.swap == Some(SwapState::Full)) {
        // Checked before guests are started for it.
        has_swap().map_err(HostError::FillSwap)?;
    }
    let mut spec = scenario.fleet.clone();
    spec.name = format!("stress-{}", std::process::id());
    // They arrive in phases.
    spec.guests.clear();
    let dir = FleetDir::of(&spec.name);
    let result = Fleet::ready(spec, None, &dir, Lifetime::WithUs, watch).and_then(|mut fleet| {
        fleet.start_merging().inspect_err(|_| fleet.stop())?;
        let stress = Stress::new(scenario, &dir, fleet, watch)?;
        stress.run(begin)
    });
    dir.remove();
    result
}

struct Stress<'a> {
    scenario: &'a Scenario,
    dir: &'a FleetDir,
    watch: &'a Watch,
    fleet: Arc<Mutex<Fleet>>,
    governor: Mutex<Option<Governor>>,
    began: Instant,
    phase: AtomicUsize,
    swap: Mutex<SwapFiller>,
    seen: Mutex<Seen>,
}

/// The sampler's state.
#[derive(Default)]
struct Seen {
    series: Series,
    verdict: Verdict,
    sampled_seconds: f64,
    used_peak_pages: u64,
    /// Of governors that have ended.
    before: Vec<Management>,
}

impl Seen {
    fn guest(&mut self, name: &str) -> Option<&mut GuestVerdict> {
        self.verdict.guests.iter_mut().find(|guest| guest.name == name)
    }
}

impl<'a> Stress<'a> {
    fn new(
        scenario: &'a Scenario,
        dir: &'a FleetDir,
        fleet: Fleet,
        watch: &'a Watch,
    ) -> Result<Self, HostError> {
        let guests = scenario.fleet.guests.iter();
        let verdict = Verdict {
            scenario: scenario.name.clone(),
            about: scenario.about.clone(),
            backend: probe::backend_name().into(),
            engine: scenario.fleet.engine.name().into(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into(),
            capacity_pages: fleet.budget().capacity,
            guests: guests
                .map(|g| GuestVerdict { name: g.name.clone(), ..GuestVerdict::default() })
                .collect(),
            ..Verdict::default()
        };
        let stress = Self {
            scenario,
            dir,
            watch,
            fleet: Arc::new(Mutex::new(fleet)),
            governor: Mutex::default(),
            began: Instant::now(),
            phase: AtomicUsize::new(0),
            swap: Mutex::default(),
            seen: Mutex::new(Seen { verdict, ..Seen::default() }),
        };
        if let Err(error) = stress.govern() {
            stress.fleet().stop();
            return Err(error);
        }
        Ok(stress)
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        lock(&self.fleet)
    }

    /// Starts a governor; it continues from the state that an earlier one has left.
    fn govern(&self) -> Result<(), HostError> {
        let governor = govern(&self.fleet, self.dir)?;
        *lock(&self.governor) = Some(governor);
        Ok(())
    }

    fn end_governor(&self) {
        let ended = lock(&self.governor).take();
        if let Some(governor) = ended {
            let management = governor.management();
            lock(&self.seen).before.push(management);
        }
    }

    fn management(&self) -> Option<Management> {
        lock(&self.governor).as_ref().map(Governor::management)
    }

    fn run(self, begin: &dyn Fn(usize)) -> Result<Verdict, HostError> {
        let ending = AtomicBool::new(false);
        let done = thread::scope(|scope| {
            let sampler = scope.spawn(|| {
                while !ending.load(Ordering::Relaxed) {
                    self.sample();
                    thread::park_timeout(Duration::from_secs_f64(self.scenario.sample_seconds));
                }
            });
            let done = self.phases(begin);
            ending.store(true, Ordering::Relaxed);
            sampler.thread().unpark();
            done
        });
        self.sample();
        let fates = self.fates();
        self.end_governor();
        self.fleet().stop();
        done?;
        Ok(self.verdict(fates))
    }

    fn phases(&self, begin: &dyn Fn(usize)) -> Result<(), HostError> {
        for (n, phase) in self.scenario.phases.iter().enumerate() {
            begin(n);
            self.phase.store(n, Ordering::Relaxed);
            let begin_seconds = self.began.elapsed().as_secs_f64();
            let settled_seconds = self.carry_out(phase)?;
            let seconds = self.began.elapsed().as_secs_f64() - begin_seconds;
            let verdict = PhaseVerdict { name: phase.name.clone(), begin_seconds, seconds, settled_seconds };
            lock(&self.seen).verdict.phases.push(verdict);
        }
        Ok(())
    }

    /// Carries out a phase, in the order of the keys of [`Phase`]. Returns how long merging took to
    /// settle.
    fn carry_out(&self, phase: &Phase) -> Result<Option<f64>, HostError> {
        if let (Some(knobs), Some(governor)) = (phase.knobs, lock(&self.governor).as_ref()) {
            governor.set_knobs(knobs);
        }
        if let Some(pattern) = &phase.arrive {
            self.arrive(pattern, phase.stagger_seconds)?;
        }
        if let Some(pattern) = &phase.kill {
            self.kill(pattern);
        }
        if let Some(pattern) = &phase.refuse {
            self.each(pattern, |guest| guest.obey(&Command::Balloon(Balloon::Off), self.watch).map(drop))?;
        }
        if let Some(what) = phase.restart {
            self.restart(what)?;
        }
        match phase.swap {
            Some(SwapState::Full) => self.fill_swap()?,
            Some(SwapState::Free) => *lock(&self.swap) = SwapFiller::default(),
            None => {}
        }
        if let Some(fill) = &phase.fill {
            self.fill(&fill.guests, fill.mib)?;
        }
        if let Some(free) = &phase.free {
            let command = Command::Free { percent: free.percent };
            self.each(&free.guests, |guest| guest.obey(&command, self.watch).map(drop))?;
        }
        if let Some(churn) = &phase.churn {
            let Churn { pages_per_second: rate, seconds, .. } = *churn;
            let command = Command::Churn { target: churn.target(), rate, seconds };
            self.each(&churn.guests, |guest| guest.obey(&command, self.watch).map(drop))?;
        }
        if let Some(timed) = &phase.latency {
            self.latency(timed, timed.pages_per_second)?;
        }
        if let Some(storm) = &phase.storm {
            self.storm(storm, &phase.name)?;
        }
        let settled = match phase.settle_seconds {
            Some(seconds) => {
                Some(self.fleet().settle(0, Duration::from_secs_f64(seconds), self.watch)?.seconds)
            }
            None => None,
        };
        self.hold(phase.hold_seconds)?;
        if let Some(timed) = &phase.latency {
            for (name, latency) in self.latency(timed, 0)? {
                let Latency { writes, p50_ns, p99_ns, p999_ns, max_ns, .. } = latency;
                let timed = Timed { phase: phase.name.clone(), writes, p50_ns, p99_ns, p999_ns, max_ns };
                if let Some(guest) = lock(&self.seen).guest(&name) {
                    guest.latencies.push(timed);
                }
            }
        }
        if phase.verify {
            let Verified { verified_pages, mismatched_pages, skipped } = self.fleet().verify(self.watch)?;
            let mut seen = lock(&self.seen);
            seen.verdict.unchecked.extend(skipped);
            seen.verdict.verified_pages += verified_pages;
            seen.verdict.mismatched_pages += mismatched_pages;
        }
        if let Some(pattern) = &phase.leave {
            self.leave(pattern)?;
        }
        Ok(settled)
    }

    fn hold(&self, seconds: f64) -> Result<(), HostError> {
        let begin = Instant::now();
        while begin.elapsed().as_secs_f64() < seconds {
            self.watch.check()?;
            thread::sleep(POLL.min(Duration::from_secs_f64(seconds)));
        }
        self.watch.check()
    }

    fn arrive(&self, pattern: &GuestPattern, stagger_seconds: f64) -> Result<(), HostError> {
        let here: Vec<String> = self.fleet().guests.iter().map(|guest| guest.spec.name.clone()).collect();
        let specs = self.scenario.fleet.guests.iter().cloned().enumerate();
        let coming: Vec<_> = specs.filter(|(_, g)| pattern.has(&g.name) && !here.contains(&g.name)).collect();
        let at_a_time = if stagger_seconds > 0.0 { 1 } else { coming.len().max(1) };
        for guests in coming.chunks(at_a_time) {
            let refused = self.fleet().admit(guests, self.watch)?;
            {
                let mut seen = lock(&self.seen);
                for (_, spec) in guests {
                    if let Some(guest) = seen.guest(&spec.name) {
                        guest.fate = Fate::Running;
                    }
                }
                for (name, refusal) in refused {
                    if let Some(guest) = seen.guest(&name) {
                        (guest.fate, guest.why) = (Fate::Refused, Some(refusal.to_string()));
                    }
                }
            }
            self.tell_governor()?;
            self.hold(stagger_seconds)?;
        }
        Ok(())
    }

    fn tell_governor(&self) -> Result<(), HostError> {
        let handles = self.fleet().handles()?;
        if let Some(governor) = lock(&self.governor).as_ref() {
            governor.set_handles(handles);
        }
        Ok(())
    }

    fn kill(&self, pattern: &GuestPattern) {
        for guest in self.fleet().guests.iter().filter(|guest| pattern.has(&guest.spec.name)) {
            guest.kill();
            if let Some(verdict) = lock(&self.seen).guest(&guest.spec.name) {
                verdict.fate = Fate::Killed;
            }
        }
    }

    fn restart(&self, what: Restart) -> Result<(), HostError> {
        if what != Restart::Engine {
            self.end_governor();
        }
        if what != Restart::Governor {
            let mut fleet = self.fleet();
            fleet.stop_merging();
            fleet.start_merging()?;
        }
        if what != Restart::Engine { self.govern() } else { Ok(()) }
    }

    fn fill_swap(&self) -> Result<(), HostError> {
        let filled = lock(&self.swap).fill(|| self.watch.check().is_ok());
        self.watch.check()?;
        lock(&self.seen).verdict.swap_taken_pages = filled.map_err(HostError::FillSwap)?;
        Ok(())
    }

    fn leave(&self, pattern: &GuestPattern) -> Result<(), HostError> {
        let mut fleet = self.fleet();
        let names = fleet.guests.iter().map(|guest| guest.spec.name.clone());
        for name in names.filter(|name| pattern.has(name)).collect::<Vec<_>>() {
            if let Some(guest) = lock(&self.seen).guest(&name).filter(|guest| guest.fate == Fate::Running) {
                guest.fate = Fate::Left;
            }
            fleet.remove(&name);
        }
        drop(fleet);
        self.tell_governor()
    }

    /// Calls `f` for the running guests that match, all at the same time. One that ends meanwhile
    /// is left out.
    fn each<T: Send>(
        &self,
        pattern: &GuestPattern,
        work: impl Fn(&mut Guest) -> Result<T, HostError> + Sync,
    ) -> Result<Vec<(String, T)>, HostError> {
        let done =
            self.fleet().each(|guest| {
                if !pattern.has(&guest.spec.name) {
                    return Ok(None);
                }
                match work(guest) {
                    Ok(value) => Ok(Some((guest.spec.name.clone(), value))),
                    Err(
                        HostError::Socket { .. } | HostError::Unanswered { .. } | HostError::Ended { .. },
                    ) if guest.is_ending() => Ok(None),
                    Err(error) => Err(error),
                }
            })?;
        Ok(done.into_iter().flatten().collect())
    }

    fn fill(&self, pattern: &GuestPattern, mib: Option<u64>) -> Result<(), HostError> {
        let filled = self.each(pattern, |guest| {
            let begin = Instant::now();
            match mib {
                Some(mib) => guest.fill_pages((mib << 20) / PAGE_BYTES, self.watch)?,
                None => guest.fill(self.watch)?,
            }
            Ok(begin.elapsed().as_secs_f64())
        })?;
        for (name, seconds) in filled {
            if let Some(guest) = lock(&self.seen).guest(&name) {
                guest.fill_seconds += seconds;
            }
        }
        Ok(())
    }

    /// Starts timing writes; returns the times until now.
    fn latency(&self, timed: &Churn, rate: u64) -> Result<Vec<(String, Latency)>, HostError> {
        let command = Command::Latency { target: timed.target(), rate, seconds: timed.seconds };
        let results = self.each(&timed.guests, |guest| guest.obey(&command, self.watch))?;
        let latency = |(name, reply)| match reply {
            Reply::Ok(Done::Latency(latency)) => Some((name, latency)),
            _ => None,
        };
        Ok(results.into_iter().filter_map(latency).collect())
    }

    fn storm(&self, storm: &Storm, phase: &str) -> Result<(), HostError> {
        let stormed = self.each(&storm.guests, |guest| {
            let Some(pages) = guest.pages_of(storm.target()) else { return Ok(None) };
            let wanted = pages * u64::from(storm.percent) / 100;
            let churned = |guest: &mut Guest| -> Result<u64, HostError> {
                Ok(guest.report(self.watch)?.map_or(0, |report| report.churned))
            };
            let before = churned(guest)?;
            let begin = Instant::now();
            // A rate that no guest reaches: it writes as fast as it can, and is stopped in time.
            let rate = wanted.max(1).saturating_mul(1000);
            guest.obey(&Command::Churn { target: storm.target(), rate, seconds: None }, self.watch)?;
            let mut written = 0;
            while written < wanted && begin.elapsed() < STORM_LIMIT {
                thread::sleep(STORM_POLL);
                written = churned(guest)? - before;
            }
            let seconds = begin.elapsed().as_secs_f64();
            guest.obey(&Command::Churn { target: storm.target(), rate: 0, seconds: None }, self.watch)?;
            Ok(Some(Stormed { phase: phase.into(), pages: written, seconds }))
        })?;
        for (name, stormed) in stormed {
            if let (Some(guest), Some(stormed)) = (lock(&self.seen).guest(&name), stormed) {
                guest.storms.push(stormed);
            }
        }
        Ok(())
    }

    fn sample(&self) {
        let Some(management) = self.management() else { return };
        let seconds = self.began.elapsed().as_secs_f64();
        let sample = Sample::of(&management, seconds, self.phase.load(Ordering::Relaxed));
        let mut seen = lock(&self.seen);
        let passed = seconds - std::mem::replace(&mut seen.sampled_seconds, seconds);
        for view in management.guests.iter().filter(|view| view.state == GuestState::Suspended) {
            if let Some(guest) = seen.guest(&view.name) {
                guest.suspended_seconds += passed;
            }
        }
        seen.verdict.promised_peak_pages = seen.verdict.promised_peak_pages.max(sample.promised_pages);
        seen.used_peak_pages = seen.used_peak_pages.max(management.peak_used_pages);
        seen.series.add(sample);
    }

    /// The fate of each guest that has arrived, and how long it was held back.
    fn fates(&self) -> Vec<(String, Fate, Option<String>, f64)> {
        let management = self.management().unwrap_or_default();
        let mut fleet = self.fleet();
        let fate = |guest: &mut Guest| {
            let name = guest.spec.name.clone();
            if let Some(why) = management.stopped.get(&name) {
                return (name, Fate::Stopped, Some(why.clone()), 0.0);
            }
            if let Some(how) = guest.ended() {
                return (name, Fate::Died, Some(how.to_owned()), 0.0);
            }
            let held = guest.vm_status().map_or(0.0, |status| status.throttle.held_ms as f64 / 1000.0);
            match management.suspended.get(&name) {
                Some(why) => (name, Fate::Suspended, Some(why.clone()), held),
                None => (name, Fate::Running, None, held),
            }
        };
        fleet.guests.iter_mut().map(fate).collect()
    }

    fn verdict(self, fates: Vec<(String, Fate, Option<String>, f64)>) -> Verdict {
        let mut seen = lock(&self.seen);
        for (name, fate, why, held_seconds) in fates {
            if let Some(guest) = seen.guest(&name) {
                guest.held_seconds = held_seconds;
                // A guest that was killed is dead because of that.
                if guest.fate == Fate::Running {
                    (guest.fate, guest.why) = (fate, why);
                }
            }
        }
        let Seen { series, mut verdict, used_peak_pages, before, .. } = std::mem::take(&mut *seen);
        verdict.seconds = self.began.elapsed().as_secs_f64();
        verdict.used_peak_pages = used_peak_pages;
        verdict.series = series;
        for management in before {
            verdict.failed_actions += management.action_log.failed;
            for (kind, count) in management.action_log.counts {
                *verdict.actions.entry(kind).or_default() += count;
            }
        }
        verdict.judge(&self.scenario.expect);
        verdict
    }
}
