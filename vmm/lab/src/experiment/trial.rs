//! One run of one point, and its results.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::contender::Contender;

/// One combination of a plan's dimensions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Point {
    /// The variant's name; empty where a plan has none.
    pub variant: String,
    pub engine: Contender,
    pub guests: u32,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.guests == 1 { "" } else { "s" };
        write!(f, "{}, {} guest{s}", self.engine, self.guests)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, ", {}", self.variant) }
    }
}

/// Figures by their names, which end with what they are in: `_pages` of 4096 bytes, `_seconds`,
/// `_ns`, `_percent`.
pub type Figures = BTreeMap<String, f64>;

/// Pairs, such as of a time and a value, by the name of the value.
pub type Series = BTreeMap<String, Vec<(f64, f64)>>;

/// The results of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Single numbers.
    pub figures: Figures,
    /// Those that belong together.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub series: Series,
    /// Notes for readers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Measured {
    pub(super) fn put(&mut self, name: &str, value: f64) {
        self.figures.insert(name.into(), value);
    }

    /// Adds figures that are counts.
    pub(super) fn count<const N: usize>(&mut self, counts: [(&str, u64); N]) {
        self.figures.extend(counts.map(|(name, count)| (name.to_owned(), count as f64)));
    }
}

/// One run of one point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Counted from 1.
    pub repetition: u32,
    pub point: Point,
    #[serde(flatten)]
    pub measured: Measured,
    /// How long it took, with starting and ending the guests.
    pub seconds: f64,
}
