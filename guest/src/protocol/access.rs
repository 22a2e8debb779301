//! Reads of memory that are timed: one after the other on the first processor (`chase`), and
//! without end on the others (`touch`).

use core::fmt;

use super::ParseError;
use super::command::{Class, Target};
use super::fields::{Fields, bad};

/// A pointer chase over pages that are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chase {
    pub class: Class,
    /// How many pages, or with `packed` lines: a power of two.
    pub nodes: u64,
    /// One line of each page, or every line of a 64th of the pages: as many lines, and so as much
    /// of the caches, with as good as no misses of the TLB.
    pub packed: bool,
}

/// What a [`Chase`] took, by the time stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chased {
    /// Reads in each batch, each of which waits for the one before.
    pub accesses: u64,
    /// How many batches were timed.
    pub batches: u64,
    /// Ticks of the fastest batch.
    pub best_ticks: u64,
    /// Half of the batches took no longer.
    pub median_ticks: u64,
}

/// Reads on the processors besides the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    pub class: Class,
    /// How many processors read; 0 stops.
    pub cpus: u64,
}

/// What the processors saw since the last [`Touch`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// How many read from now on.
    pub cpus: u64,
    /// Reads of one word each.
    pub reads: u64,
    /// Reads that took 5 us to 1 ms: faults, flushes, interrupts.
    pub late: u64,
    /// What these took together.
    pub late_us: u64,
    /// Reads that took longer: the host ran something else on its processor.
    pub away: u64,
}

/// The class in field `slot`, which cannot be all of them.
fn class<const N: usize>(fields: &Fields<'_, N>, slot: usize) -> Result<Class, ParseError> {
    let (key, text) = fields.text(slot)?;
    match text.parse()? {
        Target::Only(class) => Ok(class),
        Target::All => Err(bad(key, text, "zero, common, dup or unique")),
    }
}

impl Chase {
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let fields = Fields::parse(rest, ["class", "nodes", "packed"], "class, nodes, packed")?;
        let (class, nodes) = (class(&fields, 0)?, fields.number(1)?);
        if !nodes.is_power_of_two() {
            return Err(bad("nodes", fields.text(1)?.1, "a power of two"));
        }
        match fields.number(2)? {
            packed @ 0..=1 => Ok(Self { class, nodes, packed: packed == 1 }),
            _ => Err(bad("packed", fields.text(2)?.1, "0 or 1")),
        }
    }
}

impl fmt::Display for Chase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "class={} nodes={} packed={}", self.class, self.nodes, u8::from(self.packed))
    }
}

impl Chased {
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let keys = ["accesses", "batches", "best_ticks", "median_ticks"];
        let fields = Fields::parse(rest, keys, "accesses, batches, best_ticks, median_ticks")?;
        Ok(Self {
            accesses: fields.number(0)?,
            batches: fields.number(1)?,
            best_ticks: fields.number(2)?,
            median_ticks: fields.number(3)?,
        })
    }
}

impl fmt::Display for Chased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { accesses, batches, best_ticks, median_ticks } = self;
        write!(f, "accesses={accesses} batches={batches} best_ticks={best_ticks} median_ticks={median_ticks}")
    }
}

impl Touch {
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let fields = Fields::parse(rest, ["class", "cpus"], "class, cpus")?;
        Ok(Self { class: class(&fields, 0)?, cpus: fields.number(1)? })
    }
}

impl fmt::Display for Touch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "class={} cpus={}", self.class, self.cpus)
    }
}

impl Touched {
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let keys = ["cpus", "reads", "late", "late_us", "away"];
        let fields = Fields::parse(rest, keys, "cpus, reads, late, late_us, away")?;
        Ok(Self {
            cpus: fields.number(0)?,
            reads: fields.number(1)?,
            late: fields.number(2)?,
            late_us: fields.number(3)?,
            away: fields.number(4)?,
        })
    }
}

impl fmt::Display for Touched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpus, reads, late, late_us, away } = self;
        write!(f, "cpus={cpus} reads={reads} late={late} late_us={late_us} away={away}")
    }
}
