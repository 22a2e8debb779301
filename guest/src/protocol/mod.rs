//! The control protocol: ASCII lines over the second serial port ([`CONTROL_PORT`]), the same in
//! every guest.
//!
//! A line is at most [`MAX_LINE`] bytes, its `\n` included; a `\r` before it is ignored. Words are
//! separated by spaces, values are `key=value` in any order, numbers are decimal or `0x`
//! hexadecimal.
//!
//! Once started, the guest sends one unsolicited line:
//!
//! ```text
//! ready version=1 kind=builtin|linux pages=N base=GPA_HEX mem_pages=N
//! ```
//!
//! `pages` are those that a workload may have. In the built-in guest page 0 of them is at
//! guest-physical address `base`, the next follow it to the end of the RAM below 4 GiB, and the
//! rest stands from 4 GiB on. In a Linux guest they may be anywhere, and `base` is 0.
//!
//! A guest that goes on as a copy of another one says so once, unasked, before it takes a command:
//!
//! ```text
//! generation number=N
//! ```
//!
//! The guest then answers each command with exactly one final line, `ok command=... key=value ...`
//! or `err code=... message`. Before it, `fill` and `verify` may send `progress done=N total=N` any
//! number of times. Send the next command when the last one is answered; one sent earlier is
//! answered `err code=busy`, but `idle` cancels a running command, and `poweroff` and `reboot` work
//! at any time. A guest that dies sends `panic message`, and its VM ends as failed.
//!
//! | command | does |
//! |---|---|
//! | `fill seed= common= zero= common_pct= dup= unique= [pages=]` | writes every page; percentages sum to 100 |
//! | `churn class=zero\|common\|dup\|unique\|all rate= [seconds=]` | rewrites pages in the background; `rate=0` stops |
//! | `latency class= rate= [seconds=]` | rewrites random pages in the background and times each write; `rate=0` stops |
//! | `verify` | checks every page |
//! | `free percent=` | forgets this part of the pages held, and gives them back |
//! | `idle` | stops everything |
//! | `report` | counts |
//! | `balloon report\|check\|touch\|off\|on\|hostile ...` | controls the balloon, or misuses it: see [`Balloon`] |
//! | `frames from=` | reports the use of frames by the guest's kernel, from this one on: see [`Frames`] |
//! | `disk read\|drop ...` | reads the disk through the page cache, or drops it from there: see [`Disk`] |
//! | `random` | draws a random number |
//! | `chase class= nodes= packed=` | times reads of which each waits for the one before: see [`Chase`] |
//! | `touch class= cpus=` | has the other processors read pages: see [`Touch`] |
//! | `clock millis=` | sleeps, then compares the clocks of all processors |
//! | `mac was= is=` | gives interfaces with one Ethernet address another |
//! | `poweroff`, `reboot` | end the guest |

mod access;
mod balloon;
mod command;
mod disk;
mod fields;
mod frames;
mod line;
mod mac;
mod reply;

#[cfg(test)]
mod tests;

use core::fmt;

pub use access::{Chase, Chased, Touch, Touched};
pub use balloon::{Balloon, BalloonDone, BalloonReport, Drive, Hinting, Hostile};
pub use command::{Class, Command, Fill, MAX_SLEEP_MILLIS, Mix, Target};
pub use disk::{Disk, DiskDone, MAX_DISK_PAGES};
pub use frames::{FrameRuns, Frames, MAX_RUNS, frame_runs};
pub use line::{LineReader, Text, Word};
pub use mac::Mac;
pub use reply::{Clock, Done, ErrorCode, Kind, Latency, Ready, Reply, Report};

/// I/O port of the serial port that carries the protocol (COM2).
pub const CONTROL_PORT: u16 = 0x2f8;

/// I/O port of the console (COM1). The built-in guest takes the same commands there, typed.
pub const CONSOLE_PORT: u16 = 0x3f8;

/// Longest line in bytes, `\n` included.
pub const MAX_LINE: usize = 256;

/// The version in the `ready` line.
pub const VERSION: u64 = 1;

/// Why a line was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// Nothing but spaces.
    Empty,
    /// Longer than [`MAX_LINE`].
    TooLong,
    /// A byte that is neither printable ASCII nor a space.
    NotText { byte: u8 },
    /// The first word is unknown here.
    UnknownWord {
        /// The word found, cut to fit.
        found: Word,
        /// The words expected.
        expected: &'static str,
    },
    /// A word that is not `key=value`.
    NotAField {
        /// The word found, cut to fit.
        found: Word,
    },
    /// A key that this line does not have.
    UnknownKey {
        /// The key, cut to fit.
        key: Word,
        /// The keys there are.
        expected: &'static str,
    },
    /// A key that stands twice.
    RepeatedKey { key: &'static str },
    /// A required key is missing.
    MissingKey { key: &'static str },
    /// A value that its key does not take.
    BadValue {
        key: &'static str,
        /// The value, cut to fit.
        value: Word,
        /// The values taken.
        expected: &'static str,
    },
    /// The percentages of a mix do not sum to 100.
    NotAHundred {
        /// Their sum.
        sum: u64,
    },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("empty line, expected a command"),
            Self::TooLong => write!(f, "line too long, at most {MAX_LINE} bytes"),
            Self::NotText { byte } => write!(f, "byte {byte:#04x} in a line, expected printable ASCII"),
            Self::UnknownWord { found, expected } => write!(f, "{found:?} is unknown, expected {expected}"),
            Self::NotAField { found } => write!(f, "{found:?} is no key=value"),
            Self::UnknownKey { key, expected } => write!(f, "unknown key {key:?}, expected {expected}"),
            Self::RepeatedKey { key } => write!(f, "{key}= stands twice"),
            Self::MissingKey { key } => write!(f, "{key}= is missing"),
            Self::BadValue { key, value, expected } => write!(f, "{key}={value}, expected {expected}"),
            Self::NotAHundred { sum } => {
                write!(f, "zero + common_pct + dup + unique is {sum}, expected 100")
            }
        }
    }
}

impl core::error::Error for ParseError {}
