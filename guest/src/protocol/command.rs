//! Commands from the host to a guest.

use core::fmt;
use core::str::FromStr;

use super::fields::{Fields, bad, split};
use super::{Balloon, Chase, Disk, Mac, ParseError, Touch, Word};

/// The class of a page. The order is the order of the segments in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// All zeros until written again.
    Zero,
    /// Equal in all guests that share the common seed.
    Common,
    /// Several equal copies within the guest.
    Dup,
    /// Equal to no other page anywhere.
    Unique,
}

impl Class {
    /// Every class, in the order of the segments in memory.
    pub const ALL: [Class; 4] = [Class::Zero, Class::Common, Class::Dup, Class::Unique];

    /// Its number in a page's header and in tables by class: 0 to 3.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The class of a number from a page's header.
    pub fn from_code(code: u8) -> Option<Class> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Common => "common",
            Self::Dup => "dup",
            Self::Unique => "unique",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What churn rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// The pages of every class.
    All,
    /// The pages of one class.
    Only(Class),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Only(class) => class.fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text == "all" {
            return Ok(Self::All);
        }
        Class::ALL
            .into_iter()
            .find(|class| class.name() == text)
            .map(Self::Only)
            .ok_or_else(|| bad("class", text, "zero, common, dup, unique or all"))
    }
}

/// How the pages of a guest are divided among the classes, in percent. The parts sum to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mix {
    parts: [u8; 4],
}

impl Mix {
    /// A mix of these percentages.
    ///
    /// # Errors
    /// [`ParseError::NotAHundred`] if they do not sum to 100.
    pub const fn new(zero: u8, common: u8, dup: u8, unique: u8) -> Result<Self, ParseError> {
        let sum = zero as u64 + common as u64 + dup as u64 + unique as u64;
        if sum != 100 {
            return Err(ParseError::NotAHundred { sum });
        }
        Ok(Self { parts: [zero, common, dup, unique] })
    }

    /// The percentage of `class`.
    pub const fn percent(self, class: Class) -> u8 {
        self.parts[class.code() as usize]
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [zero, common, dup, unique] = self.parts;
        write!(f, "zero={zero} common_pct={common} dup={dup} unique={unique}")
    }
}

impl FromStr for Mix {
    type Err = ParseError;

    /// Reads what it displays as: `zero=P common_pct=P dup=P unique=P` in any order.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let keys = ["zero", "common_pct", "dup", "unique"];
        let fields = Fields::parse(text, keys, "zero, common_pct, dup, unique")?;
        Self::from_fields(&fields, 0)
    }
}

impl Mix {
    fn from_fields<const N: usize>(fields: &Fields<'_, N>, first: usize) -> Result<Self, ParseError> {
        let mut parts = [0; 4];
        for (slot, part) in parts.iter_mut().enumerate() {
            *part = fields.percent(first + slot)?;
        }
        let [zero, common, dup, unique] = parts;
        Self::new(zero, common, dup, unique)
    }
}

/// What to fill memory with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The guest's own seed.
    pub seed: u64,
    /// The seed that all guests share.
    pub common: u64,
    /// The division into classes.
    pub mix: Mix,
    /// How many pages; all there are if not said.
    pub pages: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Fill(Fill),
    /// Rewrite pages in the background, each with its next generation.
    Churn {
        target: Target,
        /// Pages a second; 0 stops.
        rate: u64,
        /// For how long; until stopped if not said.
        seconds: Option<u64>,
    },
    /// Report the write times since the last such command, and rewrite random pages in the
    /// background from now on.
    Latency {
        target: Target,
        /// Pages a second; 0 stops.
        rate: u64,
        /// For how long; until stopped if not said.
        seconds: Option<u64>,
    },
    Verify,
    /// Forget part of the pages and give them back.
    Free {
        /// Of the pages held, 0 to 100.
        percent: u8,
    },
    /// Stop whatever is running.
    Idle,
    /// Report the counts.
    Report,
    /// A balloon command.
    Balloon(Balloon),
    /// Report the use of frames by the guest's kernel.
    Frames {
        /// The first guest frame number of interest.
        from: u64,
    },
    /// A disk command.
    Disk(Disk),
    /// Read pages, each read after the one before, and time that.
    Chase(Chase),
    /// Have other processors read pages, and report how long that took them.
    Touch(Touch),
    /// Draw a random number.
    Random,
    /// Sleep, and compare the clocks of all processors.
    Clock {
        /// For how long to sleep, 0 to [`MAX_SLEEP_MILLIS`].
        millis: u32,
    },
    /// Give interfaces that have one Ethernet address another.
    Mac {
        was: Mac,
        is: Mac,
    },
    /// Power off.
    Poweroff,
    Reboot,
}

/// Longest sleep of a `clock`.
pub const MAX_SLEEP_MILLIS: u32 = 60_000;

impl Command {
    /// The first word of the line.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fill(_) => "fill",
            Self::Churn { .. } => "churn",
            Self::Latency { .. } => "latency",
            Self::Verify => "verify",
            Self::Free { .. } => "free",
            Self::Idle => "idle",
            Self::Report => "report",
            Self::Balloon(_) => "balloon",
            Self::Frames { .. } => "frames",
            Self::Disk(_) => "disk",
            Self::Chase(_) => "chase",
            Self::Touch(_) => "touch",
            Self::Random => "random",
            Self::Clock { .. } => "clock",
            Self::Mac { .. } => "mac",
            Self::Poweroff => "poweroff",
            Self::Reboot => "reboot",
        }
    }

    /// Reads a line, with or without its `\n`.
    ///
    /// # Errors
    /// [`ParseError`], with what was found and what was expected.
    pub fn parse(line: &str) -> Result<Self, ParseError> {
        let (word, rest) = split(line)?;
        let bare = |command| Fields::parse(rest, [], "no key").map(|_| command);
        match word {
            "fill" => {
                let keys = ["seed", "common", "zero", "common_pct", "dup", "unique", "pages"];
                let names = "seed, common, zero, common_pct, dup, unique, pages";
                let fields = Fields::parse(rest, keys, names)?;
                Ok(Self::Fill(Fill {
                    seed: fields.number(0)?,
                    common: fields.number(1)?,
                    mix: Mix::from_fields(&fields, 2)?,
                    pages: fields.optional(6)?,
                }))
            }
            "churn" | "latency" => {
                let fields = Fields::parse(rest, ["class", "rate", "seconds"], "class, rate, seconds")?;
                let target = fields.text(0)?.1.parse()?;
                let (rate, seconds) = (fields.number(1)?, fields.optional(2)?);
                Ok(match word {
                    "churn" => Self::Churn { target, rate, seconds },
                    _ => Self::Latency { target, rate, seconds },
                })
            }
            "verify" => bare(Self::Verify),
            "free" => {
                let fields = Fields::parse(rest, ["percent"], "percent")?;
                Ok(Self::Free { percent: fields.percent(0)? })
            }
            "idle" => bare(Self::Idle),
            "report" => bare(Self::Report),
            "balloon" => Balloon::parse(rest).map(Self::Balloon),
            "frames" => Ok(Self::Frames { from: Fields::parse(rest, ["from"], "from")?.number(0)? }),
            "disk" => Disk::parse(rest).map(Self::Disk),
            "chase" => Chase::parse(rest).map(Self::Chase),
            "touch" => Touch::parse(rest).map(Self::Touch),
            "random" => bare(Self::Random),
            "clock" => {
                let fields = Fields::parse(rest, ["millis"], "millis")?;
                match u32::try_from(fields.number(0)?) {
                    Ok(millis @ 0..=MAX_SLEEP_MILLIS) => Ok(Self::Clock { millis }),
                    _ => Err(bad("millis", fields.text(0)?.1, "a number from 0 to 60000")),
                }
            }
            "mac" => {
                let fields = Fields::parse(rest, ["was", "is"], "was, is")?;
                let address = |slot| fields.text(slot).and_then(|(key, text)| Mac::parse(key, text));
                Ok(Self::Mac { was: address(0)?, is: address(1)? })
            }
            "poweroff" => bare(Self::Poweroff),
            "reboot" => bare(Self::Reboot),
            _ => Err(ParseError::UnknownWord {
                found: Word::of(word),
                expected: "fill, churn, latency, verify, free, idle, report, balloon, frames, disk, chase, touch, random, clock, mac, poweroff or reboot",
            }),
        }
    }
}

impl fmt::Display for Command {
    /// Writes the line, without `\n`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Fill(Fill { seed, common, mix, pages }) => {
                write!(f, " seed={seed} common={common} {mix}")?;
                pages.map_or(Ok(()), |pages| write!(f, " pages={pages}"))
            }
            Self::Churn { target, rate, seconds } | Self::Latency { target, rate, seconds } => {
                write!(f, " class={target} rate={rate}")?;
                seconds.map_or(Ok(()), |seconds| write!(f, " seconds={seconds}"))
            }
            Self::Free { percent } => write!(f, " percent={percent}"),
            Self::Balloon(action) => write!(f, " {action}"),
            Self::Frames { from } => write!(f, " from={from}"),
            Self::Disk(action) => write!(f, " {action}"),
            Self::Chase(chase) => write!(f, " {chase}"),
            Self::Touch(touch) => write!(f, " {touch}"),
            Self::Clock { millis } => write!(f, " millis={millis}"),
            Self::Mac { was, is } => write!(f, " was={was} is={is}"),
            Self::Verify | Self::Idle | Self::Report | Self::Random | Self::Poweroff | Self::Reboot => Ok(()),
        }
    }
}
