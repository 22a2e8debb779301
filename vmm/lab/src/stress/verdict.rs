//! The result of a stress run: what was lost, how long guests waited, what it took.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::scenario::Expect;
use super::series::Series;
use memory::PAGE_BYTES;

/// How long writes took in one phase, as the guest timed them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    pub phase: String,
    pub writes: u64,
    /// Half of them took no longer, in nanoseconds.
    pub p50_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// 999 of 1000.
    pub p999_ns: u64,
    pub max_ns: u64,
}

/// A storm of writes of one guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stormed {
    pub phase: String,
    /// Pages written.
    pub pages: u64,
    /// How long that took.
    pub seconds: f64,
}

/// The fate of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    #[default]
    Absent,
    /// It was refused admission.
    Refused,
    Running,
    Suspended,
    /// The scenario ended it.
    Left,
    /// The scenario killed it.
    Killed,
    /// The policy stopped it.
    Stopped,
    /// It died, which was not intended.
    Died,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestVerdict {
    pub name: String,
    pub fate: Fate,
    /// Why, where there is something to say.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub why: Option<String>,
    /// How long filling its memory took in all.
    pub fill_seconds: f64,
    /// How long its vCPUs were held back.
    pub held_seconds: f64,
    /// How long it was suspended.
    pub suspended_seconds: f64,
    /// Its storms of writes.
    pub storms: Vec<Stormed>,
    /// How long its writes took.
    pub latencies: Vec<Timed>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseVerdict {
    pub name: String,
    pub begin_seconds: f64,
    /// How long it took.
    pub seconds: f64,
    /// How long merging took to settle, where that was waited for; None: it did not in time.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub settled_seconds: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub scenario: String,
    pub about: String,
    /// Nothing was lost, and everything is as expected.
    pub held: bool,
    /// Losses, and results that are not as expected.
    pub failures: Vec<String>,
    /// How long it took.
    pub seconds: f64,
    /// The KVM the guests ran on.
    pub backend: String,
    pub engine: String,
    pub kernel: String,
    /// The fleet's capacity, in pages.
    pub capacity_pages: u64,
    /// The most that was promised.
    pub promised_peak_pages: u64,
    /// The most that was in use.
    pub used_peak_pages: u64,
    /// Pages checked by their guests.
    pub verified_pages: u64,
    pub mismatched_pages: u64,
    /// Guests that were left out of a check because they were suspended.
    pub unchecked: BTreeSet<String>,
    /// The policy's actions, by kind.
    pub actions: BTreeMap<String, u64>,
    /// Actions that failed.
    pub failed_actions: u64,
    /// Pages of swap that the scenario took away.
    pub swap_taken_pages: u64,
    pub guests: Vec<GuestVerdict>,
    pub phases: Vec<PhaseVerdict>,
    /// Samples over time.
    pub series: Series,
}

impl Verdict {
    /// Guests of this fate.
    pub fn count(&self, fate: Fate) -> u64 {
        self.guests.iter().filter(|guest| guest.fate == fate).count() as u64
    }

    /// Guests that were ever suspended.
    pub fn ever_suspended(&self) -> u64 {
        self.guests.iter().filter(|guest| guest.suspended_seconds > 0.0).count() as u64
    }

    /// The most in use, in percent of capacity.
    pub fn used_peak_percent(&self) -> f64 {
        self.used_peak_pages as f64 * 100.0 / self.capacity_pages.max(1) as f64
    }

    /// The most promised, as a multiple of capacity.
    pub fn promised_times(&self) -> f64 {
        self.promised_peak_pages as f64 / self.capacity_pages.max(1) as f64
    }

    /// Compares the results with what was expected.
    pub fn judge(&mut self, expect: &Expect) {
        let mut failures = Vec::new();
        if self.mismatched_pages > 0 {
            failures.push(format!("{} pages do not hold what was written to them", self.mismatched_pages));
        }
        for guest in self.guests.iter().filter(|guest| guest.fate == Fate::Died) {
            failures.push(format!(
                "guest {} died: {}",
                guest.name,
                guest.why.as_deref().unwrap_or("for an unknown reason")
            ));
        }
        let mut at_most = |what: &str, is: f64, limit: Option<f64>| {
            if let Some(limit) = limit.filter(|limit| is > *limit) {
                failures.push(format!("{what}: {is:.1}, expected at most {limit}"));
            }
        };
        at_most("guests stopped", self.count(Fate::Stopped) as f64, expect.stopped.map(|n| n as f64));
        at_most("guests suspended", self.ever_suspended() as f64, expect.suspended.map(|n| n as f64));
        at_most("percent of capacity in use", self.used_peak_percent(), expect.used_percent);
        let balloons = self.series.samples.iter().map(|s| s.ballooned_pages).max().unwrap_or(0);
        let balloons = (balloons * PAGE_BYTES) >> 20;
        let mut at_least = |what: &str, is: f64, limit: Option<f64>| {
            if let Some(limit) = limit.filter(|limit| is < *limit) {
                failures.push(format!("{what}: {is:.2}, expected at least {limit}"));
            }
        };
        at_least("promised, in times of capacity", self.promised_times(), expect.promised_times);
        at_least("MiB in balloons", balloons as f64, expect.ballooned_mib.map(|n| n as f64));
        if let Some(refused) = expect.refused.filter(|refused| *refused != self.count(Fate::Refused)) {
            failures.push(format!("guests refused: {}, expected {refused}", self.count(Fate::Refused)));
        }
        self.held = failures.is_empty();
        self.failures = failures;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_and_what_is_not_expected_is_said() {
        let guest = |fate| GuestVerdict { name: "a".into(), fate, ..GuestVerdict::default() };
        let verdict = |fate, mismatched_pages| Verdict {
            capacity_pages: 100,
            used_peak_pages: 90,
            promised_peak_pages: 300,
            mismatched_pages,
            guests: vec![guest(fate)],
            ..Verdict::default()
        };
        let judged = |mut verdict: Verdict, expect: Expect| {
            verdict.judge(&expect);
            assert_eq!(verdict.held, verdict.failures.is_empty());
            verdict.failures.join("; ")
        };
        let all = Expect {
            stopped: Some(0),
            used_percent: Some(90.0),
            promised_times: Some(3.0),
            refused: Some(0),
            ..Expect::default()
        };
        assert_eq!(judged(verdict(Fate::Running, 0), all), "");
        assert_eq!(judged(verdict(Fate::Killed, 0), all), "");
        assert!(judged(verdict(Fate::Running, 1), all).contains("1 pages do not hold"));
        assert!(judged(verdict(Fate::Died, 0), all).contains("guest a died"));
        assert!(judged(verdict(Fate::Stopped, 0), all).contains("guests stopped: 1.0, expected at most 0"));
        assert!(judged(verdict(Fate::Refused, 0), all).contains("guests refused: 1, expected 0"));
        let more =
            Expect { used_percent: Some(80.0), promised_times: Some(4.0), ballooned_mib: Some(1), ..all };
        let failures = judged(verdict(Fate::Running, 0), more);
        assert_eq!(failures.split("; ").count(), 3, "{failures}");
    }
}
