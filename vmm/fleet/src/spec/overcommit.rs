//! What a fleet may use, which guests are admitted, and how its memory is managed: `[overcommit]`
//! of a fleet file.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use memory::size::{SizeError, parse_size};
use overcommit::knobs::{KnobError, Knobs};

/// The least that a fleet may be given, and the most that can be written.
const MIN_CAPACITY_BYTES: u64 = 1 << 20;
const MAX_CAPACITY_BYTES: u64 = 1 << 50;
/// Cover for each frame of debt, where the fleet file says nothing: half of what is owed could be
/// paid.
const USUAL_FLOOR: f64 = 0.5;
/// Percent of capacity that may be promised, where the fleet file says nothing.
const USUAL_RATIO_PERCENT: f64 = 100.0;

/// How long pages are watched, where the fleet file says nothing.
const USUAL_WORKING_SET_SECONDS: f64 = 10.0;

/// The rule of admission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdmissionName {
    /// No more is promised than there is.
    Strict,
    /// No more than a percentage of what there is, and swap: Linux's own formula.
    Ratio,
    /// While cover is at least `floor` times debt.
    #[default]
    Covered,
    /// All guests are admitted.
    Off,
}

/// How much a fleet may promise, and what is done when that is too much.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overcommit {
    /// What the fleet may use, in bytes. None: what the host has, or its control group.
    pub capacity_bytes: Option<u64>,
    /// Which guests are admitted.
    pub admission: AdmissionName,
    /// For `ratio`.
    pub ratio_percent: f64,
    /// For `covered`.
    pub floor: f64,
    /// Whether balloons are set, guests held back and suspended; else the fleet is only watched.
    pub policy: bool,
    /// How.
    pub knobs: Knobs,
    /// How long some pages of each guest are watched to see how many it uses, while there is a
    /// policy; 0: none are.
    pub working_set_seconds: f64,
}

impl Overcommit {
    /// How long pages are watched, if they are.
    pub fn sampling_seconds(&self) -> Option<f64> {
        (self.policy && self.working_set_seconds > 0.0).then_some(self.working_set_seconds)
    }
}

impl Default for Overcommit {
    fn default() -> Self {
        Self {
            capacity_bytes: None,
            admission: AdmissionName::default(),
            ratio_percent: USUAL_RATIO_PERCENT,
            floor: USUAL_FLOOR,
            // Balloons that were set by hand are left alone, unless the fleet file asks for a
            // policy.
            policy: false,
            knobs: Knobs::default(),
            working_set_seconds: USUAL_WORKING_SET_SECONDS,
        }
    }
}

/// What is wrong with `[overcommit]`.
#[derive(Debug, Error)]
pub enum OvercommitError {
    /// Its capacity.
    #[error("capacity")]
    Capacity(#[source] SizeError),
    /// Its ratio.
    #[error("ratio_percent = {0} is not possible: expected more than 0, at most 10000")]
    Ratio(f64),
    /// Its floor.
    #[error("floor = {0} is not possible: expected 0 to 1000 frames of cover for each frame of debt")]
    Floor(f64),
    /// How long pages are watched.
    #[error("working_set_seconds = {0} is not possible: expected 0.1 to 3600, or 0 for not at all")]
    WorkingSet(f64),
    /// A knob.
    #[error("knobs")]
    Knobs(#[source] KnobError),
}

/// The keys of a fleet file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table [overcommit]")]
pub(super) struct OvercommitKeys {
    capacity: Option<String>,
    admission: AdmissionName,
    ratio_percent: Option<f64>,
    floor: Option<f64>,
    policy: Option<bool>,
    knobs: Knobs,
    working_set_seconds: Option<f64>,
}

impl OvercommitKeys {
    /// Checks them.
    pub(super) fn check(&self) -> Result<Overcommit, OvercommitError> {
        let usual = Overcommit::default();
        let capacity = |text: &String| parse_size(text, MIN_CAPACITY_BYTES, MAX_CAPACITY_BYTES);
        let overcommit = Overcommit {
            capacity_bytes: self
                .capacity
                .as_ref()
                .map(capacity)
                .transpose()
                .map_err(OvercommitError::Capacity)?,
            admission: self.admission,
            ratio_percent: self.ratio_percent.unwrap_or(usual.ratio_percent),
            floor: self.floor.unwrap_or(usual.floor),
            policy: self.policy.unwrap_or(true),
            knobs: self.knobs,
            working_set_seconds: self.working_set_seconds.unwrap_or(usual.working_set_seconds),
        };
        if !(overcommit.ratio_percent > 0.0 && overcommit.ratio_percent <= 10_000.0) {
            return Err(OvercommitError::Ratio(overcommit.ratio_percent));
        }
        if !(0.0..=1000.0).contains(&overcommit.floor) {
            return Err(OvercommitError::Floor(overcommit.floor));
        }
        let watched = overcommit.working_set_seconds;
        if watched != 0.0 && !(0.1..=3600.0).contains(&watched) {
            return Err(OvercommitError::WorkingSet(watched));
        }
        overcommit.knobs.check().map_err(OvercommitError::Knobs)?;
        Ok(overcommit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &str) -> Result<Overcommit, String> {
        let keys: OvercommitKeys = toml::from_str(keys).map_err(|e| e.to_string())?;
        keys.check().map_err(|e| os::one_line(&e))
    }

    #[test]
    fn a_fleet_that_says_so_is_managed() {
        let all =
            check("capacity = '1G'\nadmission = 'ratio'\nratio_percent = 325\nknobs = { idle_tax = 0.5 }")
                .unwrap();
        assert_eq!(
            (all.capacity_bytes, all.admission, all.policy),
            (Some(1 << 30), AdmissionName::Ratio, true)
        );
        assert_eq!(all.knobs, Knobs { idle_tax: 0.5, ..Knobs::default() });
        assert!(!check("policy = false").unwrap().policy && !Overcommit::default().policy);
    }

    #[test]
    fn every_mistake_is_named() {
        for (keys, expected) in [
            ("capacity = '0M'", "capacity: it cannot be 0M"),
            ("capacity = '4'", "no unit"),
            ("admission = 'lax'", "unknown variant `lax`"),
            ("ratio_percent = 0", "ratio_percent = 0"),
            ("ratio_percent = nan", "ratio_percent = NaN"),
            ("floor = -1.0", "floor = -1"),
            ("working_set_seconds = 0.01", "working_set_seconds = 0.01"),
            ("policy = 'balloon'", "invalid type"),
            ("knobs = { idle_tax = 2 }", "idle_tax = 2 is not possible"),
            ("knobs = { idle = 2 }", "unknown field `idle`"),
        ] {
            let error = check(keys).unwrap_err();
            assert!(error.contains(expected), "{keys} gave {error}");
        }
    }
}
