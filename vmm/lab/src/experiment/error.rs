//! Errors of experiments.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::stress::scenario::ScenarioError;
use fleet::HostError;
use memory::size::SizeError;

/// Why an experiment could not be run to its end.
#[derive(Debug, Error)]
pub enum ExperimentError {
    /// No experiment has this name.
    #[error("no experiment is called {name:?}{meant}: expected one of {known}, or a TOML file")]
    Unknown {
        name: String,
        /// The most similar name, as a clause.
        meant: String,
        known: String,
    },
    /// The plan's file cannot be read.
    #[error("the experiment {path} cannot be read", path = path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The plan's file is wrong.
    #[error("the experiment {path} is wrong", path = path.display())]
    File {
        path: PathBuf,
        #[source]
        source: Box<ExperimentError>,
    },
    /// It is not TOML, or has a key that no plan has.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// A scenario of the catalogue is wrong.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// A dimension has no value.
    #[error("{0} is empty: expected at least one value")]
    Empty(&'static str),
    /// A number is out of range.
    #[error("{key} = {value} is not possible: expected {least} to {most}")]
    Range {
        key: &'static str,
        value: f64,
        /// The least there may be.
        least: f64,
        most: f64,
    },
    #[error("guest: memory")]
    Memory(#[source] SizeError),
    #[error("guest: the percentages of its fill make {0}: expected 100")]
    Mix(u32),
    /// An initrd without a kernel.
    #[error("an initrd needs a kernel: the built-in guest has no use for one")]
    InitrdWithoutKernel,
    /// The experiment has its guests by construction.
    #[error(
        "{0} is always run with three guests, two of one trust domain and one of another: leave the number of guests out"
    )]
    ThreeGuests(String),
    /// The experiment has its guests by construction.
    #[error(
        "{0} is always run with two guests, one that reads after the other: leave the number of guests out"
    )]
    TwoGuests(String),
    #[error("file: size (at most half of the guests' memory)")]
    FileSize(#[source] SizeError),
    /// The file that guests are to read.
    #[error("cannot {what}")]
    Image {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// A set of pages that the guest does not hold.
    #[error(
        "the guests hold fewer than {least} pages of class {class}: give them more memory with --memory, or another fill"
    )]
    FewPages {
        class: &'static str,
        /// The smallest set, in pages.
        least: u64,
    },
    /// A guest has ended during the experiment.
    #[error("a guest ended in the middle of the experiment: this is a fault in Samepage, please report it")]
    GuestGone,
    /// A balloon experiment whose guests keep all their pages.
    #[error(
        "{0} takes from its guests what they do not keep: its fill must say how many pages they keep, as in fill = {{ unique = 100, pages = 4096 }}"
    )]
    Kept(String),
    /// A balloon did not get to its size.
    #[error("the balloon of {guest} stands at {actual_pages} of {target_pages} pages: {reason}")]
    Balloon {
        guest: String,
        /// Where it should be.
        target_pages: u32,
        actual_pages: u32,
        reason: &'static str,
    },
    /// This machine or this user can run no part of it.
    #[error("nothing of this experiment can be run here: {0}")]
    NothingToRun(String),
    /// The file of results cannot be used.
    #[error("cannot {what} the results {path}", path = path.display())]
    Journal {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A line of it is not a result.
    #[error("line {line} of {path} is no result of an experiment: give --results a file of its own", path = path.display())]
    JournalLine {
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        #[source]
        source: serde_json::Error,
    },
    /// A guest has lost written data.
    #[error(
        "{wrong} of {checked} pages do not hold what was written to them, with {point}: this is a fault in Samepage, please report it"
    )]
    WrongPages { wrong: u64, checked: u64, point: String },
    #[error(transparent)]
    Host(#[from] HostError),
}

impl ExperimentError {
    /// Whether the user interrupted it.
    pub fn is_interrupt(&self) -> bool {
        matches!(self, Self::Host(HostError::Interrupted))
    }
}
