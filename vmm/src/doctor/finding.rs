//! What is found of a host, and what of Samepage works there.

use serde::Serialize;

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    /// Fully usable.
    Ok,
    /// Works, with a limit worth knowing.
    Limited,
    /// Absent or unusable.
    Missing,
}

/// One property of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The property.
    pub name: &'static str,
    pub level: Level,
    pub found: String,
    /// The remedy, if there is one.
    pub change: Option<String>,
}

impl Finding {
    pub(super) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), change: None }
    }

    pub(super) fn limited(name: &'static str, found: impl Into<String>, change: impl Into<String>) -> Self {
        Self { name, level: Level::Limited, found: found.into(), change: Some(change.into()) }
    }

    pub(super) fn missing(name: &'static str, found: impl Into<String>, change: impl Into<String>) -> Self {
        Self { name, level: Level::Missing, found: found.into(), change: Some(change.into()) }
    }
}

/// A feature of Samepage, and whether it works on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Feature {
    pub name: &'static str,
    pub works: bool,
    /// The reason why not, or the limit.
    pub why: Option<String>,
}
