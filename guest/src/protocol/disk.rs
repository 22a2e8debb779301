//! Commands to a guest that has a disk, and its replies.

use core::fmt;

use super::fields::{Fields, bad, split};
use super::{ParseError, Word};

/// Most pages of one `disk read`: 256 MiB.
pub const MAX_DISK_PAGES: u64 = 1 << 16;

/// A command for the guest's first disk: `disk ACTION [key=value]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Read pages of it through the page cache, where they stay.
    Read {
        /// The first, counted from the start of the disk.
        first: u64,
        /// How many, 1 to [`MAX_DISK_PAGES`].
        pages: u64,
        /// Check that page n of the disk holds the unique page n of this seed.
        seed: Option<u64>,
    },
    /// Drop the disk from the page cache.
    Drop,
}

impl Disk {
    /// Parses the words after `disk`.
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let expected = "read or drop";
        let (word, rest) = match split(rest) {
            Err(ParseError::Empty) => return Err(ParseError::UnknownWord { found: Word::new(), expected }),
            other => other?,
        };
        match word {
            "read" => {
                let fields = Fields::parse(rest, ["first", "pages", "seed"], "first, pages, seed")?;
                match fields.number(1)? {
                    pages @ 1..=MAX_DISK_PAGES => {
                        Ok(Self::Read { first: fields.number(0)?, pages, seed: fields.optional(2)? })
                    }
                    _ => Err(bad("pages", fields.text(1)?.1, "a number from 1 to 65536")),
                }
            }
            "drop" => Fields::parse(rest, [], "no key").map(|_| Self::Drop),
            _ => Err(ParseError::UnknownWord { found: Word::of(word), expected }),
        }
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { first, pages, seed } => {
                write!(f, "read first={first} pages={pages}")?;
                seed.map_or(Ok(()), |seed| write!(f, " seed={seed}"))
            }
            Self::Drop => f.write_str("drop"),
        }
    }
}

/// What was done with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskDone {
    /// All pages were read.
    Read {
        pages: u64,
        /// Pages that do not match the seed; 0 without one.
        wrong: u64,
        /// How long reading took, in nanoseconds, without checking.
        ns: u64,
    },
    /// The page cache holds nothing of it.
    Drop,
}

impl DiskDone {
    /// Parses the words after `ok command=disk`.
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let rest = rest.strip_prefix("action=").ok_or(ParseError::MissingKey { key: "action" })?;
        let (action, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        match action {
            "read" => {
                let fields = Fields::parse(rest, ["pages", "wrong", "ns"], "pages, wrong, ns")?;
                Ok(Self::Read { pages: fields.number(0)?, wrong: fields.number(1)?, ns: fields.number(2)? })
            }
            "drop" => Fields::parse(rest, [], "no key").map(|_| Self::Drop),
            _ => Err(bad("action", action, "read or drop")),
        }
    }
}

impl fmt::Display for DiskDone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { pages, wrong, ns } => write!(f, "action=read pages={pages} wrong={wrong} ns={ns}"),
            Self::Drop => f.write_str("action=drop"),
        }
    }
}
