//! A scenario file: a fleet, and what is done to it, phase by phase.

use std::path::{Path, PathBuf};

use guest::protocol::{Class, Target};
use serde::Deserialize;
use thiserror::Error;

use fleet::spec::{FleetFile, FleetSpec, SpecError};
use os::named_file;
use overcommit::knobs::{KnobError, Knobs};

/// Limits on what a scenario may ask for.
const MAX_PHASES: usize = 256;
const MAX_SECONDS: f64 = 24.0 * 3600.0;
/// The default interval between samples, in seconds.
const SAMPLE_SECONDS: f64 = 0.5;

/// A scenario file is not one.
#[derive(Debug, Error)]
#[error("the scenario {path} is wrong", path = path.display())]
pub struct ScenarioFileError {
    path: PathBuf,
    source: ScenarioError,
}

/// Errors in a scenario file.
#[derive(Debug, Error)]
pub enum ScenarioError {
    /// It cannot be read.
    #[error("the scenario {path} cannot be read", path = path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or has a key that no scenario has.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    #[error("[fleet]")]
    Fleet(#[source] SpecError),
    /// It has no phases, or too many.
    #[error("it has {0} phases: expected 1 to {MAX_PHASES}")]
    Phases(usize),
    #[error("{phase}: {key} = {value} is not possible: expected 0 to {MAX_SECONDS}")]
    Seconds { phase: String, key: &'static str, value: f64 },
    /// No guest has this name.
    #[error("{phase}: no guest is called {name:?}; the fleet has {known}")]
    NoGuest { phase: String, name: String, known: String },
    /// A class of pages.
    #[error("{phase}: {class:?} is no class of pages: expected zero, common, dup, unique or all")]
    Class { phase: String, class: String },
    #[error("{phase}: {percent} % is not possible: expected 0 to 100")]
    Percent { phase: String, percent: u8 },
    #[error("{phase}: knobs")]
    Knobs {
        phase: String,
        #[source]
        source: KnobError,
    },
    /// A phase that does nothing.
    #[error(
        "{0}: it does nothing: expected one of arrive, fill, churn, free, storm, latency, settle_seconds, hold_seconds, kill, refuse, restart, swap, knobs, leave, verify"
    )]
    Nothing(String),
}

#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: String,
    pub about: String,
    /// The guests that may arrive, and what they may use together.
    pub fleet: FleetSpec,
    /// From one sample to the next.
    pub sample_seconds: f64,
    pub phases: Vec<Phase>,
    pub expect: Expect,
}

/// What must be true in the end, besides that no page is lost and no guest dies that was not
/// killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table [expect]")]
pub struct Expect {
    /// Guests that the policy stopped, at most.
    pub stopped: Option<u64>,
    /// Guests that were ever suspended, at most.
    pub suspended: Option<u64>,
    /// Guests that were refused admission, exactly.
    pub refused: Option<u64>,
    /// The most that was ever in use, in percent of capacity.
    pub used_percent: Option<f64>,
    /// The most that was promised, as a multiple of capacity: at least this.
    pub promised_times: Option<f64>,
    /// The most that balloons held, in MiB: at least this.
    pub ballooned_mib: Option<u64>,
}

/// Some guests: `"all"`, a name, a prefix with `*`, or several of those.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum GuestPattern {
    One(String),
    Many(Vec<String>),
}

impl GuestPattern {
    fn patterns(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    /// Whether `guest` is among them.
    pub fn has(&self, guest: &str) -> bool {
        self.patterns().iter().any(|pattern| matches(pattern, guest))
    }
}

fn matches(pattern: &str, guest: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => guest.starts_with(prefix),
        None => pattern == "all" || pattern == guest,
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "keys such as { guests = \"all\" }")]
pub struct Churn {
    pub guests: GuestPattern,
    #[serde(default = "all_pages")]
    pub pages: String,
    /// How many a second; 0 stops.
    pub pages_per_second: u64,
    /// How long; until stopped if not set.
    pub seconds: Option<u64>,
}

fn all_pages() -> String {
    "all".into()
}

impl Churn {
    pub fn target(&self) -> Target {
        self.pages.parse().unwrap_or(Target::All)
    }
}

/// Every guest writes this part of its pages of one class, as fast as it can.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "keys such as { guests = \"all\" }")]
pub struct Storm {
    pub guests: GuestPattern,
    /// Which pages: those that all have in common unless set.
    #[serde(default = "common_pages")]
    pub pages: String,
    /// The part of them that is written, in percent.
    pub percent: u8,
}

fn common_pages() -> String {
    Class::Common.name().into()
}

impl Storm {
    pub fn target(&self) -> Target {
        self.pages.parse().unwrap_or(Target::All)
    }
}

/// More or fewer filled pages.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "keys such as { guests = \"all\" }")]
pub struct FillPhase {
    pub guests: GuestPattern,
    /// How many MiB; as in the fleet file, unless set.
    pub mib: Option<u64>,
}

/// Pages that are given up.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "keys such as { guests = \"all\" }")]
pub struct FreePhase {
    pub guests: GuestPattern,
    /// The part of its pages, in percent.
    pub percent: u8,
}

/// Components that can be restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Restart {
    /// The governor, from the state that it saved.
    Governor,
    /// The merge engine; guests keep what they share.
    Engine,
    /// Both, as when the daemon dies.
    Daemon,
}

/// States of the host's swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SwapState {
    /// No free space is left.
    Full,
    /// As it was before.
    Free,
}

/// One phase. Its keys are carried out in this order, whether memory is short or not.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table [[phase]]")]
pub struct Phase {
    pub name: String,
    /// The policy's knobs from now on.
    pub knobs: Option<Knobs>,
    /// These guests are started.
    pub arrive: Option<GuestPattern>,
    /// ... one after the other, at this interval; all at once if not set.
    pub stagger_seconds: f64,
    /// These VM processes are killed.
    pub kill: Option<GuestPattern>,
    /// These guests' balloon drivers stop.
    pub refuse: Option<GuestPattern>,
    /// This is restarted.
    pub restart: Option<Restart>,
    /// The state of the host's swap from now on.
    pub swap: Option<SwapState>,
    /// These guests write pages.
    pub fill: Option<FillPhase>,
    /// These guests free some.
    pub free: Option<FreePhase>,
    /// These write in the background.
    pub churn: Option<Churn>,
    /// These write in the background, and the time of each write is reported when the phase ends.
    pub latency: Option<Churn>,
    /// These write at once what they share.
    pub storm: Option<Storm>,
    /// Until merging brings nothing new, at most for this time.
    pub settle_seconds: Option<f64>,
    /// Wait for this time.
    pub hold_seconds: f64,
    /// All guests check all their pages, and the host checks them, too.
    pub verify: bool,
    pub leave: Option<GuestPattern>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "the keys of a scenario")]
struct File {
    name: String,
    #[serde(default)]
    about: String,
    fleet: FleetFile,
    sample_seconds: Option<f64>,
    #[serde(default)]
    phase: Vec<Phase>,
    #[serde(default)]
    expect: Expect,
}

impl Scenario {
    /// Reads and checks a scenario file.
    pub fn read(path: &Path) -> Result<Self, ScenarioFileError> {
        let wrong = |source| ScenarioFileError { path: path.into(), source };
        let text = named_file::read_text(path)
            .map_err(|source| wrong(ScenarioError::Read { path: path.into(), source }))?;
        Self::parse(&text, path.parent().unwrap_or(Path::new("."))).map_err(wrong)
    }

    /// As [`Self::read`], for text whose relative paths begin at `dir`.
    pub fn parse(text: &str, dir: &Path) -> Result<Self, ScenarioError> {
        let file: File = toml::from_str(text)?;
        let fleet = FleetSpec::of(file.fleet, dir).map_err(ScenarioError::Fleet)?;
        if !(1..=MAX_PHASES).contains(&file.phase.len()) {
            return Err(ScenarioError::Phases(file.phase.len()));
        }
        let sample_seconds = file.sample_seconds.unwrap_or(SAMPLE_SECONDS).max(0.05);
        check_seconds("the scenario", "sample_seconds", sample_seconds)?;
        let mut phases = file.phase;
        for (n, phase) in phases.iter_mut().enumerate() {
            if phase.name.is_empty() {
                phase.name = format!("phase {}", n + 1);
            }
            phase.check(&fleet)?;
        }
        Ok(Self { name: file.name, about: file.about, fleet, sample_seconds, phases, expect: file.expect })
    }
}

fn check_seconds(phase: &str, key: &'static str, value: f64) -> Result<(), ScenarioError> {
    match (0.0..=MAX_SECONDS).contains(&value) {
        true => Ok(()),
        false => Err(ScenarioError::Seconds { phase: phase.into(), key, value }),
    }
}

impl Phase {
    fn check(&self, fleet: &FleetSpec) -> Result<(), ScenarioError> {
        let phase = || self.name.clone();
        for (key, value) in [
            ("stagger_seconds", self.stagger_seconds),
            ("hold_seconds", self.hold_seconds),
            ("settle_seconds", self.settle_seconds.unwrap_or(0.0)),
        ] {
            check_seconds(&self.name, key, value)?;
        }
        let churns = [&self.churn, &self.latency];
        let named = [&self.arrive, &self.kill, &self.refuse, &self.leave]
            .into_iter()
            .flatten()
            .chain(self.fill.iter().map(|f| &f.guests))
            .chain(self.free.iter().map(|f| &f.guests))
            .chain(churns.into_iter().flatten().map(|c| &c.guests))
            .chain(self.storm.iter().map(|s| &s.guests));
        for pattern in named.clone().flat_map(GuestPattern::patterns) {
            if !fleet.guests.iter().any(|guest| matches(pattern, &guest.name)) {
                let known = fleet.guests.iter().map(|g| g.name.as_str()).collect::<Vec<_>>().join(", ");
                return Err(ScenarioError::NoGuest { phase: phase(), name: pattern.clone(), known });
            }
        }
        let classes =
            churns.into_iter().flatten().map(|c| &c.pages).chain(self.storm.iter().map(|s| &s.pages));
        for class in classes {
            if class.parse::<Target>().is_err() {
                return Err(ScenarioError::Class { phase: phase(), class: class.clone() });
            }
        }
        let percents = self.free.iter().map(|f| f.percent).chain(self.storm.iter().map(|s| s.percent));
        if let Some(percent) = percents.into_iter().find(|p| *p > 100) {
            return Err(ScenarioError::Percent { phase: phase(), percent });
        }
        if let Some(knobs) = &self.knobs {
            knobs.check().map_err(|source| ScenarioError::Knobs { phase: phase(), source })?;
        }
        let does = named.count() > 0
            || self.knobs.is_some()
            || self.restart.is_some()
            || self.swap.is_some()
            || self.verify
            || self.settle_seconds.is_some()
            || self.hold_seconds > 0.0;
        if does { Ok(()) } else { Err(ScenarioError::Nothing(phase())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLEET: &str = "name = 's'\n[fleet]\nname = 'f'\n[[fleet.guest]]\nname = 'g'\ncount = 3\n";

    fn parse(phases: &str) -> Result<Scenario, String> {
        Scenario::parse(&format!("{FLEET}{phases}"), Path::new("/")).map_err(|e| os::one_line(&e))
    }

    #[test]
    fn phases_are_read() {
        let scenario = parse(
            "[[phase]]\narrive = 'all'\nfill = { guests = 'g-*', mib = 10 }\n[[phase]]\nname = 'x'\n\
             churn = { guests = ['g-0', 'g-1'], pages = 'common', pages_per_second = 5 }\nhold_seconds = 1\n[expect]\nstopped = 0",
        )
        .unwrap();
        let [first, second] = &scenario.phases[..] else { panic!("{scenario:?}") };
        assert_eq!(first.name, "phase 1");
        let churn = second.churn.as_ref().unwrap();
        assert!(churn.guests.has("g-1") && !churn.guests.has("g-2"));
        assert_eq!((churn.target(), scenario.expect.stopped), (Target::Only(Class::Common), Some(0)));
    }

    #[test]
    fn every_mistake_is_named() {
        for (phases, expected) in [
            ("", "0 phases"),
            ("[[phase]]\nname = 'p'", "p: it does nothing"),
            ("[[phase]]\narrive = 'h'", "no guest is called \"h\"; the fleet has g-0, g-1, g-2"),
            ("[[phase]]\nhold_seconds = -1", "hold_seconds = -1"),
            ("[[phase]]\nhold_seconds = nan", "hold_seconds = NaN"),
            ("[[phase]]\nstorm = { guests = 'all', percent = 101 }", "101 %"),
            ("[[phase]]\nstorm = { guests = 'all', percent = 1, pages = 'odd' }", "no class of pages"),
            ("[[phase]]\nknobs = { idle_tax = 7 }", "knobs: idle_tax = 7"),
            ("[[phase]]\nrestart = 'host'", "unknown variant `host`"),
            ("[[phase]]\nswap = 'half'", "unknown variant `half`"),
            ("[[phase]]\nbreak = 1", "unknown field `break`"),
            ("[expect]\nlost = 1", "unknown field `lost`"),
        ] {
            let error = parse(phases).unwrap_err();
            assert!(error.contains(expected), "{phases:?} gave {error:?}, expected {expected:?}");
        }
    }
}
