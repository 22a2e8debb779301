//! Commands to a guest's balloon driver, and its replies.

use core::fmt;

use super::fields::{Fields, bad, split};
use super::{ParseError, Word};

/// A balloon command: `balloon ACTION [key=value]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balloon {
    /// Report the driver's state.
    Report,
    /// Read the free pages that the host should have emptied, and count those that are not all
    /// zeros.
    Check,
    /// Misbehave: write to pages that are in the balloon.
    Touch { pages: u64 },
    /// Take everything back and release the device.
    Off,
    /// Drive the device again.
    On,
    /// Misbehave: send a request that no driver should.
    Hostile(Hostile),
}

/// A request that no driver should send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hostile {
    /// Inflates by page frame numbers that are not RAM.
    Outside,
    /// Inflates by one page, 256 times.
    Repeated,
    /// Inflates by a buffer that ends within a page frame number.
    Length,
    /// Inflates by a buffer that the device may only write.
    Direction,
    /// Inflates by a chain of descriptors without an end.
    Loop,
    /// Sends statistics with unknown and repeated tags and impossible values, cut within one.
    Statistics,
    /// Reports free pages that are not RAM.
    Reporting,
    /// Hints free pages that are not RAM, without beginning a run.
    Hinting,
}

impl Hostile {
    pub const ALL: [Hostile; 8] = [
        Self::Outside,
        Self::Repeated,
        Self::Length,
        Self::Direction,
        Self::Loop,
        Self::Statistics,
        Self::Reporting,
        Self::Hinting,
    ];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outside => "outside",
            Self::Repeated => "repeated",
            Self::Length => "length",
            Self::Direction => "direction",
            Self::Loop => "loop",
            Self::Statistics => "statistics",
            Self::Reporting => "reporting",
            Self::Hinting => "hinting",
        }
    }

    fn parse(text: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let expected = "outside, repeated, length, direction, loop, statistics, reporting or hinting";
            bad("kind", text, expected)
        })
    }
}

impl Balloon {
    /// The word after `balloon`.
    const fn action(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Check => "check",
            Self::Touch { .. } => "touch",
            Self::Off => "off",
            Self::On => "on",
            Self::Hostile(_) => "hostile",
        }
    }

    /// Parses the words after `balloon`.
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let expected = "report, check, touch, off, on or hostile";
        let (word, rest) = match split(rest) {
            Err(ParseError::Empty) => return Err(ParseError::UnknownWord { found: Word::new(), expected }),
            other => other?,
        };
        let bare = |action| Fields::parse(rest, [], "no key").map(|_| action);
        match word {
            "report" => bare(Self::Report),
            "check" => bare(Self::Check),
            "touch" => Ok(Self::Touch { pages: Fields::parse(rest, ["pages"], "pages")?.number(0)? }),
            "off" => bare(Self::Off),
            "on" => bare(Self::On),
            "hostile" => {
                let fields = Fields::parse(rest, ["kind"], "kind")?;
                Ok(Self::Hostile(Hostile::parse(fields.text(0)?.1)?))
            }
            _ => Err(ParseError::UnknownWord { found: Word::of(word), expected }),
        }
    }
}

impl fmt::Display for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.action())?;
        match self {
            Self::Touch { pages } => write!(f, " pages={pages}"),
            Self::Hostile(kind) => write!(f, " kind={}", kind.name()),
            Self::Report | Self::Check | Self::Off | Self::On => Ok(()),
        }
    }
}

/// Whether the driver drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drive {
    /// The device is reset and not driven.
    Off,
    On,
    /// The balloon is being emptied before the device is released.
    Leaving,
    /// The device asked for a reset, would not start, or does not do what it must. `off`, then
    /// `on`, may help.
    Broken,
}

impl Drive {
    const ALL: [Drive; 4] = [Self::Off, Self::On, Self::Leaving, Self::Broken];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Leaving => "leaving",
            Self::Broken => "broken",
        }
    }
}

/// The state of free page hinting, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hinting {
    /// None asked for, or stopped.
    #[default]
    Idle,
    /// Free pages are being hinted.
    Running,
    /// All are hinted. They stay so until the host is done, or a fill needs them.
    Finished,
}

impl Hinting {
    const ALL: [Hinting; 3] = [Self::Idle, Self::Running, Self::Finished];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Running => "running",
            Self::Finished => "finished",
        }
    }
}

/// The state of a balloon driver. All sizes are in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonReport {
    pub drive: Drive,
    /// The features negotiated; 0 when off.
    pub features: u64,
    /// The size that the host wants.
    pub target: u64,
    /// The size that the guest has told the host.
    pub actual: u64,
    /// Pages in the balloon, or on their way into it or out of it.
    pub given: u64,
    /// Pages that hold nothing and are not in the balloon.
    pub free: u64,
    /// Pages reported as free since the guest started.
    pub reported: u64,
    /// Pages hinted as free in the latest run, 0 once they are the guest's again.
    pub hinted: u64,
    pub hinting: Hinting,
    /// The command ID that the host last set; 0 stop, 1 done, others a run's.
    pub hint_cmd: u32,
    /// How often statistics were sent since the guest started.
    pub statistics: u64,
}

/// The content of an `ok command=balloon` line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonDone {
    Report(BalloonReport),
    /// The free pages are read.
    Check {
        checked: u64,
        /// How many of them were not all zeros.
        nonzero: u64,
    },
    /// Pages in the balloon are written.
    Touch {
        /// How many; fewer than asked for if the balloon is smaller.
        touched: u64,
    },
    /// The device is released.
    Off,
    /// The device is driven.
    On {
        features: u64,
    },
    /// The request was sent.
    Hostile {
        kind: Hostile,
        /// Whether the device completed it within a second.
        completed: bool,
        /// The device's status register afterwards.
        status: u32,
    },
}

const REPORT_KEYS: [&str; 11] = [
    "state",
    "features",
    "target",
    "actual",
    "given",
    "free",
    "reported",
    "hinted",
    "hinting",
    "hint_cmd",
    "statistics",
];

impl BalloonDone {
    /// Parses the words after `command=balloon`.
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let rest = rest.strip_prefix("action=").ok_or(ParseError::MissingKey { key: "action" })?;
        let (action, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        match action {
            "report" => BalloonReport::parse(rest).map(Self::Report),
            "check" => {
                let fields = Fields::parse(rest, ["checked", "nonzero"], "checked, nonzero")?;
                Ok(Self::Check { checked: fields.number(0)?, nonzero: fields.number(1)? })
            }
            "touch" => Ok(Self::Touch { touched: Fields::parse(rest, ["touched"], "touched")?.number(0)? }),
            "off" => Fields::parse(rest, [], "no key").map(|_| Self::Off),
            "on" => Ok(Self::On { features: Fields::parse(rest, ["features"], "features")?.number(0)? }),
            "hostile" => {
                let fields = Fields::parse(rest, ["kind", "completed", "status"], "kind, completed, status")?;
                let completed = match fields.text(1)? {
                    (_, "yes") => true,
                    (_, "no") => false,
                    (key, value) => return Err(bad(key, value, "yes or no")),
                };
                let kind = Hostile::parse(fields.text(0)?.1)?;
                Ok(Self::Hostile { kind, completed, status: word(&fields, 2)? })
            }
            _ => Err(bad("action", action, "report, check, touch, off, on or hostile")),
        }
    }
}

/// A number of 32 bits.
fn word<const N: usize>(fields: &Fields<'_, N>, slot: usize) -> Result<u32, ParseError> {
    let (key, value) = fields.text(slot)?;
    u32::try_from(fields.number(slot)?).map_err(|_| bad(key, value, "a number below 2^32"))
}

impl BalloonReport {
    fn parse(rest: &str) -> Result<Self, ParseError> {
        let fields = Fields::parse(rest, REPORT_KEYS, "the state of a balloon")?;
        let drive = Drive::ALL.into_iter().find(|drive| Ok(drive.name()) == fields.text(0).map(|t| t.1));
        let hinting = Hinting::ALL.into_iter().find(|at| Ok(at.name()) == fields.text(8).map(|t| t.1));
        Ok(Self {
            drive: match drive {
                Some(drive) => drive,
                None => return Err(bad("state", fields.text(0)?.1, "off, on, leaving or broken")),
            },
            features: fields.number(1)?,
            target: fields.number(2)?,
            actual: fields.number(3)?,
            given: fields.number(4)?,
            free: fields.number(5)?,
            reported: fields.number(6)?,
            hinted: fields.number(7)?,
            hinting: match hinting {
                Some(hinting) => hinting,
                None => return Err(bad("hinting", fields.text(8)?.1, "idle, running or finished")),
            },
            hint_cmd: word(&fields, 9)?,
            statistics: fields.number(10)?,
        })
    }
}

impl fmt::Display for BalloonDone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Report(report) => write!(f, "action=report {report}"),
            Self::Check { checked, nonzero } => write!(f, "action=check checked={checked} nonzero={nonzero}"),
            Self::Touch { touched } => write!(f, "action=touch touched={touched}"),
            Self::Off => f.write_str("action=off"),
            Self::On { features } => write!(f, "action=on features={features:#x}"),
            Self::Hostile { kind, completed, status } => {
                let completed = if *completed { "yes" } else { "no" };
                write!(f, "action=hostile kind={} completed={completed} status={status:#x}", kind.name())
            }
        }
    }
}

impl fmt::Display for BalloonReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { drive, features, target, actual, given, free, .. } = self;
        let Self { reported, hinted, hinting, hint_cmd, statistics, .. } = self;
        write!(f, "state={} features={features:#x} target={target} actual={actual} ", drive.name())?;
        write!(f, "given={given} free={free} reported={reported} hinted={hinted} ")?;
        write!(f, "hinting={} hint_cmd={hint_cmd} statistics={statistics}", hinting.name())
    }
}
