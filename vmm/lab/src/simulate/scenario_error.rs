//! What can be wrong with a scenario, and how that is found.

use std::collections::BTreeSet;

use thiserror::Error;

use overcommit::knobs::KnobError;

/// What is wrong with a scenario.
#[derive(Debug, Error)]
pub enum ScenarioError {
    /// It is not TOML, or has a key that no scenario has.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// A list that must not be empty is.
    #[error("it has no {0}: expected at least one [[{0}]]")]
    Empty(&'static str),
    /// A name is used twice.
    #[error("two {kind}s are called {name:?}: give each a name of its own")]
    SameName {
        /// Of what.
        kind: &'static str,
        /// Which.
        name: String,
    },
    /// A number is out of range.
    #[error("{at}: {key} = {value} is not possible: expected {least} to {most}")]
    Range {
        /// Where.
        at: String,
        /// Which.
        key: &'static str,
        /// What it was set to.
        value: f64,
        /// The least it may be.
        least: f64,
        /// The most.
        most: f64,
    },
    /// A name that stands for nothing.
    #[error("{at}: there is no {kind} {name:?}: expected one of {known}")]
    Unknown {
        /// Where.
        at: String,
        /// Of what.
        kind: &'static str,
        /// Which.
        name: String,
        /// What there is.
        known: String,
    },
    /// A knob.
    #[error("{at}: knobs")]
    Knobs {
        /// Where.
        at: String,
        /// What is wrong.
        #[source]
        source: KnobError,
    },
    /// Knobs that cannot be read.
    #[error("{at}: knobs")]
    KnobsToml {
        /// Where.
        at: String,
        /// What is wrong.
        #[source]
        source: toml::de::Error,
    },
}

/// Sees that a number is one, and in its range.
pub(super) fn range(
    at: &str,
    key: &'static str,
    value: f64,
    least: f64,
    most: f64,
) -> Result<(), ScenarioError> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(ScenarioError::Range { at: at.into(), key, value, least, most }),
    }
}

/// Sees that a name stands for something.
pub(super) fn known(at: &str, kind: &'static str, name: &str, all: &[&str]) -> Result<(), ScenarioError> {
    match all.contains(&name) {
        true => Ok(()),
        false => {
            Err(ScenarioError::Unknown { at: at.into(), kind, name: name.into(), known: all.join(", ") })
        }
    }
}

/// Sees that each has a name of its own.
pub(super) fn no_name_twice(kind: &'static str, names: &[&str]) -> Result<(), ScenarioError> {
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(**name)) {
        Some(name) => Err(ScenarioError::SameName { kind, name: (*name).into() }),
        None => Ok(()),
    }
}
