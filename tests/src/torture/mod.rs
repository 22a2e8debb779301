//! The torture of merging by slabs: guests that fill, rewrite, check, free and balloon their memory
//! while its pages are merged, written to, dropped and merged again, and while the engine and
//! guests are killed.
//!
//! What is done follows from a seed; when it meets what else happens does not. Writers of every
//! step of a merge are there: vCPUs (churn and fill), the VMM's own threads (the balloon's rings
//! and both serial ports), and the balloon's discards. What a page must hold is known to the guest
//! alone, which checks all of them again and again.

mod choices;
mod engine;
mod guest;

pub use engine::{ROLE as ENGINE, serve};

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use merge::slab::engine::Statistics;
use serde_json::{Value, json};
use tempfile::TempDir;

use choices::Choices;
use engine::Engine;
use guest::Guest;

/// Actions of a guest in a round, before it checks all of its pages.
const TURNS: u64 = 8;
/// One round in this number kills a guest.
const ROUNDS_PER_KILL: u64 = 8;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the choices follow from.
    pub seed: u64,
    /// How many guests, at least one.
    pub guests: usize,
    /// RAM of each in MiB.
    pub memory_mib: u64,
    /// How many pages are to be checked, all guests and rounds together.
    pub pages: u64,
    /// The bits of each page's hash that count: with none, all pages collide.
    pub hash_mask: u64,
    /// From one sample of each guest's working set to the next; None: none are taken.
    pub sampling: Option<Duration>,
    /// How long it may take. A round that has begun is brought to its end.
    pub limit: Duration,
    /// The `torture` binary, a process of which is the engine.
    pub program: PathBuf,
}

/// The results.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    /// Pages that guests have checked.
    pub verified: u64,
    /// Pages that held something else than they should.
    pub mismatches: u64,
    /// Pages of slabs that guests had after their check at the end of each round, added up.
    pub merged: u64,
    /// Pages on the kernel's frame of zeros, counted the same way.
    pub zeros: u64,
    /// Pages that guests gave to their balloons, and read as zeros when they had them back.
    pub ballooned: u64,
    /// Samples that were taken of the working sets of the guests that are left at the end.
    pub periods: u64,
    pub rounds: u64,
    /// How often the engine was ended and started again, killed or not.
    pub engine_restarts: u64,
    /// How often a guest was killed and another one started.
    pub guest_restarts: u64,
    /// What the agents of the guests that are left at the end have counted.
    pub agents: Statistics,
    /// From the start of the first guest to the end of the last.
    pub seconds: f64,
}

impl Tally {
    /// As one JSON object, with what was asked for.
    #[must_use]
    pub fn json(&self, options: &Options) -> Value {
        json!({
            "seed": options.seed, "guests": options.guests, "memory_mib": options.memory_mib,
            "sampling_ms": options.sampling.map(|period| period.as_millis() as u64), "periods": self.periods,
            "hash_mask": options.hash_mask, "pages_verified": self.verified, "mismatches": self.mismatches,
            "merged": self.merged, "zeros": self.zeros, "ballooned": self.ballooned, "rounds": self.rounds,
            "engine_restarts": self.engine_restarts, "guest_restarts": self.guest_restarts,
            "seconds": self.seconds, "agents": self.agents.host,
        })
    }

    fn add(&mut self, more: &Self) {
        self.verified += more.verified;
        self.mismatches += more.mismatches;
        self.merged += more.merged;
        self.zeros += more.zeros;
        self.ballooned += more.ballooned;
    }
}

/// Tortures until enough pages are checked. `checked` hears how many each time that a guest has
/// checked some.
///
/// # Errors
/// A guest or the engine has ended by itself or does not answer, time is up, or the processes
/// cannot be started. A page that is wrong is no error: it ends the torture and is in the tally.
pub fn run(options: &Options, checked: &(impl Fn(u64) + Sync)) -> Result<Tally> {
    ensure!(options.guests > 0, "torture needs a guest");
    let began = Instant::now();
    let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
    let mut torture = Torture::start(options, dir)?;
    let mut tally = Tally::default();
    while tally.verified < options.pages && tally.mismatches == 0 {
        ensure!(
            began.elapsed() < options.limit,
            "time is up after {:?}: {} of {} pages are checked, {} rounds",
            options.limit,
            tally.verified,
            options.pages,
            tally.rounds
        );
        torture.round(&mut tally, checked).with_context(|| format!("in round {}", tally.rounds))?;
    }
    tally.guest_restarts = torture.guests_killed;
    tally.engine_restarts = torture.engine.restarts();
    if tally.mismatches == 0 {
        tally.agents = torture.engine.statistics(options.guests).context("the engine")?;
        tally.periods = torture.end()?;
    }
    tally.seconds = began.elapsed().as_secs_f64();
    Ok(tally)
}

struct Torture<'a> {
    options: &'a Options,
    dir: TempDir,
    choices: Choices,
    guests: Vec<Guest>,
    engine: Engine,
    guests_killed: u64,
}

impl<'a> Torture<'a> {
    fn start(options: &'a Options, dir: TempDir) -> Result<Self> {
        let socket = dir.path().join("merge.sock");
        let engine = Engine::start(&options.program, &socket, options.hash_mask)?;
        let choices = Choices::new(options.seed);
        let mut torture = Self { options, dir, choices, guests: Vec::new(), engine, guests_killed: 0 };
        for n in 0..options.guests {
            let guest = torture.guest(&format!("vm-{n}"))?;
            torture.guests.push(guest);
        }
        Ok(torture)
    }

    fn guest(&self, name: &str) -> Result<Guest> {
        Guest::start(self.dir.path(), name, self.options, self.engine.socket())
            .with_context(|| format!("guest {name} did not start"))
    }

    /// All guests carry out their commands, each on a thread of ours, while the engine is ended and
    /// started.
    fn round(&mut self, tally: &mut Tally, checked: &(impl Fn(u64) + Sync)) -> Result<()> {
        let forks: Vec<_> = self.guests.iter().map(|_| self.choices.fork()).collect();
        let mut for_engine = self.choices.fork();
        let (engine, over) = (&mut self.engine, &AtomicBool::new(false));
        let done: Result<Vec<Tally>> = thread::scope(|scope| {
            let guests = self.guests.iter_mut().zip(forks);
            let turns: Vec<_> = guests
                .map(|(guest, mut choices)| scope.spawn(move || turns(guest, &mut choices, checked)))
                .collect();
            let engine = scope.spawn(move || engine.disturb(&mut for_engine, over));
            let done: Vec<_> = turns.into_iter().map(|turns| turns.join()).collect();
            over.store(true, Ordering::Relaxed);
            match engine.join() {
                Ok(disturbed) => disturbed.context("the engine")?,
                Err(_) => bail!("the thread of the engine panicked"),
            }
            done.into_iter().map(|done| done.unwrap_or_else(|_| bail!("a guest's thread panicked"))).collect()
        });
        done?.iter().for_each(|one| tally.add(one));
        tally.rounds += 1;
        if self.choices.below(ROUNDS_PER_KILL) == 0 {
            let which = self.choices.below(self.guests.len() as u64) as usize;
            self.guests_killed += 1;
            self.guests[which] = self.guest(&format!("vm-{which}-{}", self.guests_killed))?;
        }
        Ok(())
    }

    /// Ends all guests. Returns how many samples of working sets they have seen.
    fn end(self) -> Result<u64> {
        let mut periods = 0;
        for mut guest in self.guests {
            if self.options.sampling.is_some() {
                periods += guest.periods()?;
            }
            guest.end()?;
        }
        Ok(periods)
    }
}

/// A guest's part of a round.
fn turns(guest: &mut Guest, choices: &mut Choices, checked: &(impl Fn(u64) + Sync)) -> Result<Tally> {
    let mut tally = Tally::default();
    let name = guest.name().to_owned();
    let mut all = || {
        guest.mind(choices)?;
        for turn in 0..TURNS {
            // Every round begins with something to merge.
            let what = if turn == 0 { 0 } else { choices.below(100) };
            let verified = guest.turn(what, choices, &mut tally)?;
            checked(verified);
            thread::sleep(Duration::from_millis(choices.below(200)));
        }
        guest.command("idle")?;
        let verified = guest.verify(&mut tally)?;
        checked(verified);
        guest.count(&mut tally)
    };
    all().with_context(|| format!("guest {name}"))?;
    Ok(tally)
}
