//! Errors in a scenario, and the checks that find them.

use std::collections::BTreeSet;

use thiserror::Error;

use overcommit::knobs::KnobError;

/// Errors in a scenario.
#[derive(Debug, Error)]
pub enum ScenarioError {
    /// It is not TOML, or has a key that no scenario has.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// An empty list that must not be empty.
    #[error("it has no {0}: expected at least one [[{0}]]")]
    Empty(&'static str),
    /// A name is used twice.
    #[error("two {kind}s are called {name:?}: give each a name of its own")]
    SameName { kind: &'static str, name: String },
    /// A number is out of range.
    #[error("{at}: {key} = {value} is not possible: expected {least} to {most}")]
    Range {
        at: String,
        key: &'static str,
        value: f64,
        /// The least it may be.
        least: f64,
        most: f64,
    },
    /// An unknown name.
    #[error("{at}: there is no {kind} {name:?}: expected one of {known}")]
    Unknown { at: String, kind: &'static str, name: String, known: String },
    #[error("{at}: knobs")]
    Knobs {
        at: String,
        #[source]
        source: KnobError,
    },
    /// Knobs that cannot be read.
    #[error("{at}: knobs")]
    KnobsToml {
        at: String,
        #[source]
        source: toml::de::Error,
    },
}

/// Checks that a number is one, and in its range.
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

/// Checks that a name is known.
pub(super) fn known(at: &str, kind: &'static str, name: &str, all: &[&str]) -> Result<(), ScenarioError> {
    match all.contains(&name) {
        true => Ok(()),
        false => {
            Err(ScenarioError::Unknown { at: at.into(), kind, name: name.into(), known: all.join(", ") })
        }
    }
}

/// Checks that no name is used twice.
pub(super) fn no_name_twice(kind: &'static str, names: &[&str]) -> Result<(), ScenarioError> {
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(**name)) {
        Some(name) => Err(ScenarioError::SameName { kind, name: (*name).into() }),
        None => Ok(()),
    }
}
