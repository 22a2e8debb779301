//! The torture of merging by slabs: guests that fill, rewrite, check, free and balloon their memory
//! while its pages are merged, written to, dropped and merged again, and while the engine and
//! guests are killed. With clones, guests are captured in the middle of that, too, and others go on from
//! there.
//!
//! What is done follows from a seed; when it meets what else happens does not. Writers of every
//! step of a merge are there: vCPUs (churn and fill), the VMM's own threads (the balloon's rings
//! and both serial ports), and the balloon's discards. What a page must hold is known to the guest
//! alone, which checks all of them again and again.

mod choices;
mod engine;
mod guest;

pub use engine::{ROLE as ENGINE, serve};

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
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

use crate::keeper::{Image, Listener};

/// Actions of a guest in a round, before it checks all of its pages.
const TURNS: u64 = 8;
/// The longest wait in a round before a guest is captured.
const CAPTURE_MILLIS: u64 = 1500;
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
    /// Whether guests are captured while they work, and clones take the places of guests that are killed.
    pub clones: bool,
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
    /// How often a guest was captured while it worked.
    pub captures: u64,
    /// How often the keeper of what was captured went away in the middle of that.
    pub given_up: u64,
    /// How many of the guests that took others' places were clones.
    pub clones: u64,
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
            "captures": self.captures, "given_up": self.given_up, "clones": self.clones,
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
        let (mut for_engine, mut for_capture) = (self.choices.fork(), self.choices.fork());
        let which = for_capture.below(self.guests.len() as u64) as usize;
        let captured = self.options.clones.then(|| self.guests[which].control().to_owned());
        let dir = self.dir.path();
        let (engine, over) = (&mut self.engine, &AtomicBool::new(false));
        let mut image = None;
        let done: Result<Vec<Tally>> = thread::scope(|scope| {
            let guests = self.guests.iter_mut().zip(forks);
            let turns: Vec<_> = guests
                .map(|(guest, mut choices)| scope.spawn(move || turns(guest, &mut choices, checked)))
                .collect();
            let engine = scope.spawn(move || engine.disturb(&mut for_engine, over));
            let capture =
                captured.map(|control| scope.spawn(move || capture(&control, dir, &mut for_capture)));
            let done: Vec<_> = turns.into_iter().map(|turns| turns.join()).collect();
            image = match capture.map(|capture| capture.join()) {
                None => None,
                Some(Ok(captured)) => {
                    let captured = captured.context("a capture")?;
                    tally.captures += 1;
                    tally.given_up += u64::from(captured.is_none());
                    captured
                }
                Some(Err(_)) => bail!("the thread of a capture panicked"),
            };
            over.store(true, Ordering::Relaxed);
            match engine.join() {
                Ok(disturbed) => disturbed.context("the engine")?,
                Err(_) => bail!("the thread of the engine panicked"),
            }
            done.into_iter().map(|done| done.unwrap_or_else(|_| bail!("a guest's thread panicked"))).collect()
        });
        done?.iter().for_each(|one| tally.add(one));
        tally.rounds += 1;
        if let Some(image) = image {
            self.replace_by_clone(&image, tally, checked)?;
        }
        if self.choices.below(ROUNDS_PER_KILL) == 0 {
            let which = self.choices.below(self.guests.len() as u64) as usize;
            self.guests_killed += 1;
            self.guests[which] = self.guest(&format!("vm-{which}-{}", self.guests_killed))?;
        }
        Ok(())
    }

    /// Kills a guest, and has a clone in its place, which may be one of that guest.
    fn replace_by_clone(
        &mut self,
        image: &Image,
        tally: &mut Tally,
        checked: &(impl Fn(u64) + Sync),
    ) -> Result<()> {
        let which = self.choices.below(self.guests.len() as u64) as usize;
        tally.clones += 1;
        self.guests_killed += 1;
        let name = format!("clone-{which}-{}", self.guests_killed);
        let clone = Guest::cloned(self.dir.path(), &name, self.options, self.engine.socket(), image);
        let mut clone = clone.with_context(|| format!("guest {name} did not go on"))?;
        checked(clone.verify(tally)?);
        self.guests[which] = clone;
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

/// Captures the guest at `control`, whatever it does just now. None if the keeper went away meanwhile, which costs the guest nothing.
fn capture(control: &Path, dir: &Path, choices: &mut Choices) -> Result<Option<Image>> {
    thread::sleep(Duration::from_millis(choices.below(CAPTURE_MILLIS)));
    let listener = Listener::bind(dir.join("keeper.sock"))?;
    let mut daemon = guest::connect(control)?;
    let request = json!({"op": "capture", "socket": listener.path()});
    daemon.get_mut().write_all(format!("{request}\n").as_bytes())?;
    let mut keeper = listener.accept()?;
    std::fs::remove_file(listener.path())?;
    let steps = if choices.below(4) == 0 { choices.below(12) } else { u64::MAX };
    let (mut taken, mut is_whole) = (0, false);
    while !is_whole && taken < steps {
        is_whole = keeper.step()?;
        taken += 1;
    }
    let image = is_whole.then(|| keeper.image()).transpose()?;
    let mut answer = String::new();
    daemon.read_line(&mut answer)?;
    ensure!(!is_whole || answer.contains("\"captured\""), "it was kept, and answered {answer:?}");
    Ok(image)
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
