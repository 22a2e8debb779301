//! What can go wrong with a store.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// Why a store did not do what it was asked for. What was there before is there still.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The kernel refused.
    #[error("cannot {what} {path}", path = path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The directory is not this user's alone.
    #[error("the store {path} is not safe: {why}; expected a directory of this user with mode 0700", path = path.display())]
    Untrusted {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file is not what it should be.
    #[error("{path} cannot be used: {why}", path = path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: Flaw,
    },
    /// Another process has the store.
    #[error(
        "the store {path} is in use by another process for more than {} s: try again when that is done",
        limit.as_secs(), path = path.display()
    )]
    Busy {
        /// Which.
        path: PathBuf,
        /// How long this one has waited.
        limit: Duration,
    },
    /// It cannot be called so.
    #[error(
        "{0:?} is no name of a checkpoint: expected 1 to 80 letters, digits, `-`, `_` or `.`, not beginning with `.`"
    )]
    Name(String),
    /// The name is taken.
    #[error("there is a checkpoint called {0:?}: give this one another name, or remove that one first")]
    Taken(String),
    /// No such checkpoint.
    #[error("there is no checkpoint {name:?} in {path}; there is: {known}", path = path.display())]
    Missing {
        /// Which was meant.
        name: String,
        /// Where.
        path: PathBuf,
        /// Which there are.
        known: String,
    },
    /// More than a store holds.
    #[error("{what}: {found} are more than the {most} that are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many there may be.
        most: u64,
    },
    /// It was interrupted.
    #[error("interrupted")]
    Interrupted,
}

/// What is wrong with a file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Flaw {
    /// Something else altogether.
    #[error("it does not begin as {0} does")]
    Magic(&'static str),
    /// Written by another build.
    #[error("it is of format {found}, and this build of samepage reads {known}")]
    Format {
        /// What it says.
        found: u32,
        /// What is known.
        known: u32,
    },
    /// Too long, or too short.
    #[error("it has {bytes} bytes: expected {least} to {most}")]
    Length {
        /// How many.
        bytes: u64,
        /// At least.
        least: u64,
        /// At most.
        most: u64,
    },
    /// Not what was written, or written by another store.
    #[error("the digest of {0} does not fit: it was damaged, or is of another store")]
    Digest(&'static str),
    /// A number that cannot be.
    #[error("{what} is {found}: expected at most {most}")]
    Range {
        /// Which.
        what: &'static str,
        /// What it is.
        found: u64,
        /// What it may be.
        most: u64,
    },
    /// Parts that do not fit together.
    #[error("{0}")]
    Inconsistent(&'static str),
    /// It cannot be decoded.
    #[error("{0} cannot be decoded")]
    Decode(&'static str),
    /// It refers to what is not there.
    #[error("it has pages in pack {pack:016x}, {why}")]
    Pack {
        /// Which.
        pack: u64,
        /// What is wrong with that.
        why: String,
    },
}
