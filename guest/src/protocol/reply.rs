//! Lines from a guest.

use core::fmt;

use super::fields::{Fields, bad, split};
use super::{BalloonDone, Chased, DiskDone, Frames, ParseError, Text, Touched, VERSION, Word};

/// Which guest speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The built-in kernel: its pages are contiguous in guest-physical space but for the hole below
    /// 4 GiB.
    Builtin,
    /// The agent in a Linux guest: its pages lie wherever that kernel put them.
    Linux,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Builtin => "builtin",
            Self::Linux => "linux",
        })
    }
}

/// A guest's description of itself when it has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    pub kind: Kind,
    /// How many pages a workload may have.
    pub pages: u64,
    /// Guest-physical address of the first of them, in bytes. Only for [`Kind::Builtin`]; otherwise
    /// 0.
    pub base: u64,
    /// How many pages of memory the guest found.
    pub mem_pages: u64,
}

/// The counts of a guest's workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Pages held, of all classes.
    pub filled: u64,
    /// Pages held by class, in the order of [`super::Class::ALL`].
    pub classes: [u64; 4],
    /// The sum over the pages held of their generations.
    pub generations: u64,
    /// Pages that churn rewrote since the start of the guest.
    pub churned: u64,
    /// How often all pages were verified since the start of the guest.
    pub verified: u64,
    /// Pages found wrong since the start of the guest, by `verify` or by churn before it rewrote
    /// them.
    pub mismatched: u64,
}

/// How long writes took, the page faults among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// How many were timed.
    pub writes: u64,
    /// Half of them took no longer, in nanoseconds.
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub p999_ns: u64,
    pub max_ns: u64,
    /// Writes come in batches: 99 of 100 began within this many microseconds of their time. The
    /// delay is that of waking up and of other users of the processor.
    pub late_p99_us: u64,
    pub late_max_us: u64,
}

/// How time goes on in a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// How long the sleep took by the monotonic clock, in microseconds.
    pub slept_us: u64,
    /// Processors.
    pub cpus: u64,
    /// How often a clock was read, on one processor after the other.
    pub readings: u64,
    /// Readings that were earlier than the one before, by the monotonic clock or by the time stamp counter.
    pub backward: u64,
}

/// The content of an `ok` line, by the command it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// All pages are written.
    Fill {
        pages: u64,
    },
    /// Churn has begun, or stopped.
    Churn {
        /// Pages a second.
        rate: u64,
    },
    /// The writes that were timed.
    Latency(Latency),
    /// All pages are checked.
    Verify {
        checked: u64,
        /// How many of them were wrong.
        mismatched: u64,
        /// The first wrong one.
        first: Option<u64>,
    },
    /// Pages are given back.
    Free {
        freed: u64,
        /// How many are left.
        filled: u64,
    },
    /// Nothing runs any more.
    Idle,
    /// The counts.
    Report(Report),
    /// A balloon command is done.
    Balloon(BalloonDone),
    /// The use of frames.
    Frames(Frames),
    /// A disk command is done.
    Disk(DiskDone),
    /// The reads that were timed.
    Chase(Chased),
    /// What the other processors saw.
    Touch(Touched),
    /// A random number.
    Random {
        number: u64,
    },
    /// The sleep is over, and the clocks are read.
    Clock(Clock),
    /// Interfaces that had the address have the other one.
    Mac {
        interfaces: u64,
    },
    /// The guest powers off.
    Poweroff,
    Reboot,
}

/// Why a command failed, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The line was not understood.
    Parse,
    /// Another command is still running.
    Busy,
    /// `idle` came before the command was done.
    Cancelled,
    /// The guest does not have that many pages.
    Memory,
    /// The command needs pages, and none are filled.
    Empty,
    /// The guest could not do it.
    Failed,
    /// The guest does not support it.
    Unsupported,
}

impl ErrorCode {
    const ALL: [ErrorCode; 7] = [
        Self::Parse,
        Self::Busy,
        Self::Cancelled,
        Self::Memory,
        Self::Empty,
        Self::Failed,
        Self::Unsupported,
    ];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Busy => "busy",
            Self::Cancelled => "cancelled",
            Self::Memory => "memory",
            Self::Empty => "empty",
            Self::Failed => "failed",
            Self::Unsupported => "unsupported",
        }
    }
}

/// A line from a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The guest has started.
    Ready(Ready),
    /// A long command goes on.
    Progress { done: u64, total: u64 },
    /// The command is done.
    Ok(Done),
    /// The command is not done.
    Err {
        /// Why, for programs.
        code: ErrorCode,
        /// Why, for people. Printable ASCII.
        message: Text,
    },
    /// This guest is a copy that goes on: sent once, unasked, before it takes a command.
    Generation {
        /// Differs in each copy.
        number: u64,
    },
    Panic {
        /// Where and why.
        message: Text,
    },
}

impl Reply {
    /// The reply to a line that was not understood.
    pub fn not_understood(error: ParseError) -> Self {
        Self::Err { code: ErrorCode::Parse, message: Text::of(error) }
    }

    /// Whether no more lines answer this command.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Ok(_) | Self::Err { .. } | Self::Panic { .. })
    }

    /// Reads a line, with or without its `\n`.
    ///
    /// # Errors
    /// [`ParseError`], with what was found and what was expected.
    pub fn parse(line: &str) -> Result<Self, ParseError> {
        let (word, rest) = split(line)?;
        match word {
            "ready" => Ready::parse_fields(rest).map(Self::Ready),
            "progress" => {
                let fields = Fields::parse(rest, ["done", "total"], "done, total")?;
                Ok(Self::Progress { done: fields.number(0)?, total: fields.number(1)? })
            }
            "ok" => Done::parse(rest).map(Self::Ok),
            "err" => parse_err(rest),
            "generation" => {
                let fields = Fields::parse(rest, ["number"], "number")?;
                Ok(Self::Generation { number: fields.number(0)? })
            }
            "panic" => Ok(Self::Panic { message: Text::of(rest) }),
            _ => Err(ParseError::UnknownWord {
                found: Word::of(word),
                expected: "ready, progress, ok, err, generation or panic",
            }),
        }
    }
}

impl Ready {
    fn parse_fields(rest: &str) -> Result<Self, ParseError> {
        let keys = ["version", "kind", "pages", "base", "mem_pages"];
        let fields = Fields::parse(rest, keys, "version, kind, pages, base, mem_pages")?;
        if fields.number(0)? != VERSION {
            return Err(bad("version", fields.text(0)?.1, "1"));
        }
        let kind = match fields.text(1)? {
            (_, "builtin") => Kind::Builtin,
            (_, "linux") => Kind::Linux,
            (key, value) => return Err(bad(key, value, "builtin or linux")),
        };
        Ok(Self { kind, pages: fields.number(2)?, base: fields.number(3)?, mem_pages: fields.number(4)? })
    }
}

impl Done {
    fn parse(rest: &str) -> Result<Self, ParseError> {
        let rest = rest.strip_prefix("command=").ok_or(ParseError::MissingKey { key: "command" })?;
        let (command, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let bare = |done| Fields::parse(rest, [], "no key").map(|_| done);
        match command {
            "fill" => {
                let fields = Fields::parse(rest, ["pages"], "pages")?;
                Ok(Self::Fill { pages: fields.number(0)? })
            }
            "churn" => {
                let fields = Fields::parse(rest, ["rate"], "rate")?;
                Ok(Self::Churn { rate: fields.number(0)? })
            }
            "latency" => {
                let keys = ["writes", "p50_ns", "p99_ns", "p999_ns", "max_ns", "late_p99_us", "late_max_us"];
                let fields = Fields::parse(rest, keys, "the numbers of a latency")?;
                Ok(Self::Latency(Latency {
                    writes: fields.number(0)?,
                    p50_ns: fields.number(1)?,
                    p99_ns: fields.number(2)?,
                    p999_ns: fields.number(3)?,
                    max_ns: fields.number(4)?,
                    late_p99_us: fields.number(5)?,
                    late_max_us: fields.number(6)?,
                }))
            }
            "verify" => {
                let fields =
                    Fields::parse(rest, ["checked", "mismatched", "first"], "checked, mismatched, first")?;
                let first = match fields.text(2)? {
                    (_, "none") => None,
                    _ => Some(fields.number(2)?),
                };
                Ok(Self::Verify { checked: fields.number(0)?, mismatched: fields.number(1)?, first })
            }
            "free" => {
                let fields = Fields::parse(rest, ["freed", "filled"], "freed, filled")?;
                Ok(Self::Free { freed: fields.number(0)?, filled: fields.number(1)? })
            }
            "idle" => bare(Self::Idle),
            "report" => Report::parse(rest).map(Self::Report),
            "balloon" => BalloonDone::parse(rest).map(Self::Balloon),
            "frames" => Frames::parse(rest).map(Self::Frames),
            "disk" => DiskDone::parse(rest).map(Self::Disk),
            "chase" => Chased::parse(rest).map(Self::Chase),
            "touch" => Touched::parse(rest).map(Self::Touch),
            "random" => Ok(Self::Random { number: Fields::parse(rest, ["number"], "number")?.number(0)? }),
            "clock" => {
                let keys = ["slept_us", "cpus", "readings", "backward"];
                let fields = Fields::parse(rest, keys, "slept_us, cpus, readings, backward")?;
                Ok(Self::Clock(Clock {
                    slept_us: fields.number(0)?,
                    cpus: fields.number(1)?,
                    readings: fields.number(2)?,
                    backward: fields.number(3)?,
                }))
            }
            "mac" => {
                Ok(Self::Mac { interfaces: Fields::parse(rest, ["interfaces"], "interfaces")?.number(0)? })
            }
            "poweroff" => bare(Self::Poweroff),
            "reboot" => bare(Self::Reboot),
            _ => Err(bad("command", command, "the name of a command")),
        }
    }
}

impl Report {
    fn parse(rest: &str) -> Result<Self, ParseError> {
        let keys =
            ["filled", "zero", "common", "dup", "unique", "generations", "churned", "verified", "mismatched"];
        let names = "the counts of a report";
        let fields = Fields::parse(rest, keys, names)?;
        Ok(Self {
            filled: fields.number(0)?,
            classes: [fields.number(1)?, fields.number(2)?, fields.number(3)?, fields.number(4)?],
            generations: fields.number(5)?,
            churned: fields.number(6)?,
            verified: fields.number(7)?,
            mismatched: fields.number(8)?,
        })
    }
}

fn parse_err(rest: &str) -> Result<Reply, ParseError> {
    let rest = rest.strip_prefix("code=").ok_or(ParseError::MissingKey { key: "code" })?;
    let (name, message) = rest.split_once(' ').unwrap_or((rest, ""));
    let code = ErrorCode::ALL
        .into_iter()
        .find(|code| code.name() == name)
        .ok_or_else(|| bad("code", name, "parse, busy, cancelled, memory, empty, failed or unsupported"))?;
    Ok(Reply::Err { code, message: Text::of(message.trim_ascii()) })
}

impl fmt::Display for Reply {
    /// Writes the line, without `\n`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(Ready { kind, pages, base, mem_pages }) => write!(
                f,
                "ready version={VERSION} kind={kind} pages={pages} base={base:#x} mem_pages={mem_pages}"
            ),
            Self::Progress { done, total } => write!(f, "progress done={done} total={total}"),
            Self::Ok(done) => write!(f, "ok command={done}"),
            Self::Err { code, message } => write!(f, "err code={} {message}", code.name()),
            Self::Generation { number } => write!(f, "generation number={number}"),
            Self::Panic { message } => write!(f, "panic {message}"),
        }
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fill { pages } => write!(f, "fill pages={pages}"),
            Self::Churn { rate } => write!(f, "churn rate={rate}"),
            Self::Latency(Latency { writes, p50_ns, p99_ns, p999_ns, max_ns, late_p99_us, late_max_us }) => {
                write!(f, "latency writes={writes} p50_ns={p50_ns} p99_ns={p99_ns} p999_ns={p999_ns} ")?;
                write!(f, "max_ns={max_ns} late_p99_us={late_p99_us} late_max_us={late_max_us}")
            }
            Self::Verify { checked, mismatched, first } => {
                write!(f, "verify checked={checked} mismatched={mismatched} first=")?;
                match first {
                    Some(first) => write!(f, "{first}"),
                    None => f.write_str("none"),
                }
            }
            Self::Free { freed, filled } => write!(f, "free freed={freed} filled={filled}"),
            Self::Idle => f.write_str("idle"),
            Self::Report(report) => write!(f, "report {report}"),
            Self::Balloon(done) => write!(f, "balloon {done}"),
            Self::Frames(frames) => write!(f, "frames {frames}"),
            Self::Disk(done) => write!(f, "disk {done}"),
            Self::Chase(chased) => write!(f, "chase {chased}"),
            Self::Touch(touched) => write!(f, "touch {touched}"),
            Self::Random { number } => write!(f, "random number={number}"),
            Self::Clock(Clock { slept_us, cpus, readings, backward }) => {
                write!(f, "clock slept_us={slept_us} cpus={cpus} readings={readings} backward={backward}")
            }
            Self::Mac { interfaces } => write!(f, "mac interfaces={interfaces}"),
            Self::Poweroff => f.write_str("poweroff"),
            Self::Reboot => f.write_str("reboot"),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { filled, classes: [zero, common, dup, unique], generations, churned, verified, mismatched } =
            self;
        write!(f, "filled={filled} zero={zero} common={common} dup={dup} unique={unique} ")?;
        write!(f, "generations={generations} churned={churned} verified={verified} mismatched={mismatched}")
    }
}
