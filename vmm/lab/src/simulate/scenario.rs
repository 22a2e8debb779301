//! Scenario files: hosts, guests, what they do in which phase.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::scenario_error::{ScenarioError, known, no_name_twice, range};
use overcommit::knobs::Knobs;

/// The most guests of one simulation.
const MAX_GUESTS: u64 = 1_000_000;
const MAX_HOSTS: u64 = 100_000;
/// The most steps of all phases together.
const MAX_STEPS: f64 = 10_000_000.0;
/// The most memory of one host or guest: 16 TiB.
const MAX_MIB: u64 = 16 << 20;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the keys of a scenario")]
pub struct Scenario {
    /// Its name, for reports.
    pub name: String,
    /// The seed of its random numbers.
    #[serde(default = "one")]
    pub seed: u64,
    /// How many hosts, all alike; each has all guests.
    #[serde(default = "one")]
    pub hosts: u64,
    /// The length of a step.
    #[serde(default = "one_second")]
    pub step_seconds: f64,
    /// What a host is.
    pub host: HostSpec,
    /// The policy's knobs that are not at their defaults.
    #[serde(default)]
    knobs: toml::Table,
    /// Loads of guests, by name.
    #[serde(rename = "load")]
    pub loads: BTreeMap<String, Load>,
    #[serde(default, rename = "guest")]
    pub guests: Vec<GuestSpec>,
    #[serde(default, rename = "phase")]
    pub phases: Vec<Phase>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [host]")]
pub struct HostSpec {
    /// Memory that guests and their overhead may take.
    pub capacity_mib: u64,
    #[serde(default)]
    pub swap_mib: u64,
    /// Overhead of each guest.
    #[serde(default = "overhead")]
    pub overhead_mib_per_guest: u64,
    /// How fast pages are merged at normal priority; four times as fast at urgent priority; 0 is
    /// not at all.
    #[serde(default)]
    pub merge_mib_per_second: u64,
    /// The time to read a page from swap, which a guest waits.
    #[serde(default = "page_in")]
    pub page_in_microseconds: f64,
    /// The most that is read from swap, for all guests together.
    #[serde(default = "swap_speed")]
    pub page_in_mib_per_second: u64,
    /// How fast a balloon moves.
    #[serde(default = "balloon_speed")]
    pub balloon_mib_per_second: u64,
    /// Whether the kernel reports stalls.
    #[serde(default = "yes")]
    pub psi: bool,
}

/// A guest's use of its memory. Percentages are of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "keys of a load")]
pub struct Load {
    pub active_percent: f64,
    /// How fast it touches memory for the first time.
    #[serde(default = "touch")]
    pub touch_mib_per_second: f64,
    /// The time to come from what it used before to this.
    #[serde(default)]
    pub ramp_seconds: f64,
    /// How much what it uses changes each second, at most.
    #[serde(default)]
    pub walk_percent: f64,
    /// The length of a turn of work and rest, each guest with an offset of its own; 0 is no rest.
    #[serde(default)]
    pub period_seconds: f64,
    /// The part of the turn in which it works, in percent.
    #[serde(default = "half")]
    pub duty_percent: f64,
    /// What it uses while it rests.
    #[serde(default)]
    pub rest_percent: f64,
}

/// The behaviour of a guest's balloon driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// It follows its target.
    #[default]
    Follows,
    /// The same, 64 times as slowly.
    Slow,
    None,
    /// It never moves.
    Refuses,
    /// It follows, and reports that all its memory is in use and none to spare.
    Lies,
}

/// One kind of guest.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [[guest]]")]
pub struct GuestSpec {
    pub name: String,
    /// How many on each host.
    #[serde(default = "one")]
    pub count: u64,
    /// Memory promised to each.
    pub memory_mib: u64,
    #[serde(default = "shares")]
    pub shares: u32,
    /// The least it is left.
    #[serde(default)]
    pub min_mib: u64,
    /// The most it is left; what it is promised unless set.
    pub max_mib: Option<u64>,
    /// Higher suffers later.
    #[serde(default)]
    pub priority: u32,
    #[serde(default)]
    pub balloon: Driver,
    /// The part of the memory it has touched that others have too.
    #[serde(default)]
    pub share_percent: f64,
    /// Its first load.
    pub load: String,
    /// When the first one starts.
    #[serde(default)]
    pub arrives_seconds: f64,
    /// The interval to each next one.
    #[serde(default)]
    pub every_seconds: f64,
    /// How long it stays; to the end unless set.
    pub stays_seconds: Option<f64>,
}

/// A time in which conditions differ from before.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [[phase]]")]
pub struct Phase {
    /// Its name, for reports.
    pub name: String,
    pub seconds: f64,
    /// New loads of kinds of guests, by name; the others go on.
    #[serde(default)]
    pub loads: BTreeMap<String, String>,
    /// New behaviour of their balloon drivers.
    #[serde(default)]
    pub balloons: BTreeMap<String, Driver>,
    /// Knobs that change from now on.
    #[serde(default)]
    knobs: toml::Table,
    /// The part of the shared pages that guests write to each second of this phase, which breaks
    /// the sharing.
    #[serde(default)]
    pub breaks_percent_per_second: f64,
    /// Capacity that other programs take in this phase.
    #[serde(default)]
    pub elsewhere_mib: u64,
    /// How far the clock jumps when it begins.
    #[serde(default)]
    pub clock_jump_seconds: f64,
    /// The policy's knobs in this phase: all of those above, put together by [`Scenario::parse`].
    #[serde(skip)]
    pub policy: Knobs,
}

fn one() -> u64 {
    1
}
fn one_second() -> f64 {
    1.0
}
fn overhead() -> u64 {
    4
}
fn page_in() -> f64 {
    100.0
}
fn swap_speed() -> u64 {
    400
}
fn balloon_speed() -> u64 {
    256
}
fn yes() -> bool {
    true
}
fn touch() -> f64 {
    64.0
}
fn half() -> f64 {
    50.0
}
fn shares() -> u32 {
    1000
}

impl Scenario {
    /// Reads a scenario, and checks that it is possible.
    ///
    /// # Errors
    ///
    /// What is wrong, where, and what was expected.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        let mut scenario: Self = toml::from_str(text)?;
        scenario.check()?;
        let mut table = scenario.knobs.clone();
        knobs(&table, "scenario")?;
        for phase in &mut scenario.phases {
            table.extend(phase.knobs.clone());
            phase.policy = knobs(&table, &format!("phase {}", phase.name))?;
        }
        Ok(scenario)
    }

    /// The same with another number of hosts.
    ///
    /// # Errors
    /// Too many, or none.
    pub fn with_hosts(mut self, hosts: u64) -> Result<Self, ScenarioError> {
        self.hosts = hosts;
        self.check()?;
        Ok(self)
    }

    /// Steps of one host.
    pub fn steps(&self) -> u64 {
        self.phases.iter().map(|p| self.phase_steps(p)).sum()
    }

    /// Steps of one phase; at least 1.
    pub fn phase_steps(&self, phase: &Phase) -> u64 {
        ((phase.seconds / self.step_seconds).round() as u64).max(1)
    }

    /// Guests of one host.
    pub fn guests_per_host(&self) -> u64 {
        self.guests.iter().map(|g| g.count).fold(0, u64::saturating_add)
    }

    fn check(&self) -> Result<(), ScenarioError> {
        for (kind, is_empty) in [("guest", self.guests.is_empty()), ("phase", self.phases.is_empty())] {
            if is_empty {
                return Err(ScenarioError::Empty(kind));
            }
        }
        let at = |key, value, least, most| range("scenario", key, value, least, most);
        at("hosts", self.hosts as f64, 1.0, MAX_HOSTS as f64)?;
        at("step_seconds", self.step_seconds, 0.01, 60.0)?;
        let guests = self.hosts.saturating_mul(self.guests_per_host());
        at("guests of all hosts", guests as f64, 1.0, MAX_GUESTS as f64)?;
        self.host.check()?;
        for (name, load) in &self.loads {
            load.check(&format!("load {name}"))?;
        }
        let kinds: Vec<&str> = self.guests.iter().map(|g| g.name.as_str()).collect();
        no_name_twice("guest", &kinds)?;
        for guest in &self.guests {
            guest.check()?;
            self.known_load(&format!("guest {}", guest.name), &guest.load)?;
        }
        no_name_twice("phase", &self.phases.iter().map(|p| p.name.as_str()).collect::<Vec<_>>())?;
        for phase in &self.phases {
            let at = format!("phase {}", phase.name);
            phase.check(&at, &kinds)?;
            for load in phase.loads.values() {
                self.known_load(&at, load)?;
            }
        }
        let steps = self.phases.iter().map(|p| p.seconds).sum::<f64>() / self.step_seconds;
        at("steps of all phases", steps, 1.0, MAX_STEPS)
    }

    fn known_load(&self, at: &str, name: &str) -> Result<(), ScenarioError> {
        known(at, "load", name, &self.loads.keys().map(String::as_str).collect::<Vec<_>>())
    }
}

impl HostSpec {
    fn check(&self) -> Result<(), ScenarioError> {
        let at = |key, value, least, most| range("host", key, value, least, most);
        at("capacity_mib", self.capacity_mib as f64, 1.0, MAX_MIB as f64)?;
        at("swap_mib", self.swap_mib as f64, 0.0, MAX_MIB as f64)?;
        at("overhead_mib_per_guest", self.overhead_mib_per_guest as f64, 0.0, MAX_MIB as f64)?;
        at("merge_mib_per_second", self.merge_mib_per_second as f64, 0.0, MAX_MIB as f64)?;
        at("page_in_microseconds", self.page_in_microseconds, 0.0, 1e6)?;
        at("page_in_mib_per_second", self.page_in_mib_per_second as f64, 1.0, MAX_MIB as f64)?;
        at("balloon_mib_per_second", self.balloon_mib_per_second as f64, 1.0, MAX_MIB as f64)
    }
}

impl Load {
    fn check(&self, place: &str) -> Result<(), ScenarioError> {
        let at = |key, value, least, most| range(place, key, value, least, most);
        at("active_percent", self.active_percent, 0.0, 100.0)?;
        at("touch_mib_per_second", self.touch_mib_per_second, 0.0, MAX_MIB as f64)?;
        at("ramp_seconds", self.ramp_seconds, 0.0, 1e9)?;
        at("walk_percent", self.walk_percent, 0.0, 100.0)?;
        at("period_seconds", self.period_seconds, 0.0, 1e9)?;
        at("duty_percent", self.duty_percent, 0.0, 100.0)?;
        at("rest_percent", self.rest_percent, 0.0, 100.0)
    }
}

impl GuestSpec {
    fn check(&self) -> Result<(), ScenarioError> {
        let place = format!("guest {}", self.name);
        let at = |key, value, least, most| range(&place, key, value, least, most);
        let memory = self.memory_mib as f64;
        at("count", self.count as f64, 1.0, MAX_GUESTS as f64)?;
        at("memory_mib", memory, 1.0, MAX_MIB as f64)?;
        at("min_mib", self.min_mib as f64, 0.0, memory)?;
        at("max_mib", self.max_mib.unwrap_or(self.memory_mib) as f64, self.min_mib as f64, memory)?;
        at("shares", f64::from(self.shares), 1.0, 1e9)?;
        at("share_percent", self.share_percent, 0.0, 100.0)?;
        at("arrives_seconds", self.arrives_seconds, 0.0, 1e9)?;
        at("every_seconds", self.every_seconds, 0.0, 1e9)?;
        at("stays_seconds", self.stays_seconds.unwrap_or(1.0), 0.0, 1e9)
    }
}

impl Phase {
    fn check(&self, place: &str, kinds: &[&str]) -> Result<(), ScenarioError> {
        let at = |key, value, least, most| range(place, key, value, least, most);
        at("seconds", self.seconds, 0.01, 1e9)?;
        at("breaks_percent_per_second", self.breaks_percent_per_second, 0.0, 100.0)?;
        at("elsewhere_mib", self.elsewhere_mib as f64, 0.0, MAX_MIB as f64)?;
        at("clock_jump_seconds", self.clock_jump_seconds, -1e9, 1e9)?;
        self.loads.keys().chain(self.balloons.keys()).try_for_each(|name| known(place, "guest", name, kinds))
    }
}

fn knobs(table: &toml::Table, at: &str) -> Result<Knobs, ScenarioError> {
    let knobs: Knobs =
        table.clone().try_into().map_err(|source| ScenarioError::KnobsToml { at: at.into(), source })?;
    knobs.check().map_err(|source| ScenarioError::Knobs { at: at.into(), source })?;
    Ok(knobs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name = 'x'\nhost = { capacity_mib = 64 }\nload = { busy = { active_percent = 50 } }\n\
        guest = [{ name = 'a', memory_mib = 32, load = 'busy' }]\n";

    fn error(text: &str) -> String {
        let error = Scenario::parse(text).expect_err("an error");
        let source = std::error::Error::source(&error).map(|s| format!(": {s}")).unwrap_or_default();
        format!("{error}{source}")
    }

    #[test]
    fn knobs_add_up_from_phase_to_phase() {
        let text = format!(
            "{GOOD}knobs = {{ idle_tax = 0.1 }}\n[[phase]]\nname = 'p'\nseconds = 1\nknobs = {{ hold_seconds = 7 }}\n\
             [[phase]]\nname = 'q'\nseconds = 1\nknobs = {{ idle_tax = 0.2 }}"
        );
        let scenario = Scenario::parse(&text).expect("a scenario");
        let found: Vec<_> =
            scenario.phases.iter().map(|p| (p.policy.idle_tax, p.policy.hold_seconds)).collect();
        assert_eq!(found, [(0.1, 7.0), (0.2, 7.0)]);
        assert!(scenario.with_hosts(0).is_err());
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let phase = |rest: &str| error(&format!("{GOOD}[[phase]]\nname = 'p'\nseconds = 9\n{rest}"));
        assert!(error(GOOD).contains("at least one [[phase]]"));
        assert_eq!(phase("seconds = 1").lines().next(), Some("TOML parse error at line 8, column 1"));
        assert!(phase("loads = { b = 'busy' }").contains("there is no guest \"b\": expected one of a"));
        assert!(phase("loads = { a = 'lazy' }").contains("there is no load \"lazy\": expected one of busy"));
        assert!(phase("elsewhere_mib = 99999999999").contains("phase p: elsewhere_mib = 99999999999"));
        assert!(phase("knobs = { idle_tax = 2.0 }").contains("phase p: knobs: idle_tax = 2 is not possible"));
        assert!(phase("knobs = { idle_taxes = 2.0 }").contains("unknown field"));
        assert!(phase("[[phase]]\nname = 'p'\nseconds = 1").contains("two phases are called \"p\""));
        let changed = |from: &str, to: &str| {
            error(&format!("{}[[phase]]\nname = 'p'\nseconds = 1", GOOD.replace(from, to)))
        };
        assert!(changed("= 32,", "= 0,").contains("guest a: memory_mib = 0 is not possible"));
        assert!(changed("= 50", "= nan").contains("active_percent = NaN"));
    }
}
