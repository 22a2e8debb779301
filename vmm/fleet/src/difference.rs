//! In what the guests of a fleet that run differ from its file.

use std::fmt;

/// In what a guest that runs differs from the fleet file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// It has another value of a key.
    Key {
        /// Whose.
        guest: String,
        /// Which.
        key: String,
        /// It runs with this.
        runs_with: String,
        /// The file says this.
        file: String,
    },
    /// The file has no such guest.
    NotInFile {
        /// Which.
        guest: String,
        /// Its process.
        pid: u32,
    },
    /// What it was started with is not known.
    Unknown {
        /// Which.
        guest: String,
        /// Its process.
        pid: u32,
    },
    /// Its VM does not answer.
    Silent {
        /// Which.
        guest: String,
        /// Its process.
        pid: u32,
        /// What came instead of an answer.
        why: String,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key { guest, key, runs_with, file } => {
                write!(f, "guest {guest}: {key}: it runs with {runs_with}, the file says {file}")
            }
            Self::NotInFile { guest, pid } => {
                write!(f, "guest {guest}: it runs (process {pid}) and is not in the file")
            }
            Self::Unknown { guest, pid } => write!(
                f,
                "guest {guest}: it runs (process {pid}), and what it was started with is not known: its directory was removed, or \
                 another version of samepage started it"
            ),
            Self::Silent { guest, pid, why } => {
                write!(f, "guest {guest}: its VM (process {pid}) does not answer: {why}")
            }
        }
    }
}

/// Everything in which what runs differs from the fleet file, a line each.
#[derive(Debug)]
pub struct Differences(pub Vec<Difference>);

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|difference| write!(f, "\n    {difference}"))
    }
}
