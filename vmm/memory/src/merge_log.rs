//! The last pages of a VM that were replaced by others: what is shown when its guest ends
//! unexpectedly.
//!
//! A wrong merge shows only when the guest trips over it, so a report of a crash has what was done
//! to its memory just before. Written after a step, never within one: the guest may be asleep
//! there.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Gpa, PAGE_BYTES, SlabPage};

/// Replacements that are remembered. Older ones are forgotten.
pub const REMEMBERED: usize = 32;

/// What is in the place of pages now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum With {
    /// Pages of a slab that hold the same, from this one of it on.
    Slab {
        /// Counted from the slab's beginning.
        first: SlabPage,
    },
    /// Nothing: they were all zeros, and read so.
    Zeros,
    /// Fresh memory: the guest gave them back.
    Fresh,
}

/// Adjacent pages that were replaced together.
#[derive(Clone, Copy, Debug)]
pub struct Replaced {
    /// Guest-physical address of the first one.
    pub gpa: Gpa,
    /// How many.
    pub pages: u64,
    /// By what.
    pub with: With,
    /// When it was done.
    pub at: Instant,
}

/// The last replacements in one VM's memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MergeLog(Arc<Mutex<VecDeque<Replaced>>>);

impl MergeLog {
    /// Remembers that `pages` pages from `gpa` on have been replaced now.
    pub(super) fn add(&self, gpa: Gpa, pages: u64, with: With) {
        let mut last = os::lock(&self.0);
        if last.len() == REMEMBERED {
            last.pop_front();
        }
        last.push_back(Replaced { gpa, pages, with, at: Instant::now() });
    }

    /// At most [`REMEMBERED`] replacements, the oldest first.
    pub fn last(&self) -> Vec<Replaced> {
        os::lock(&self.0).iter().copied().collect()
    }
}

/// Replacements as a table, with how long before `now` each was done.
pub struct Before<'a>(
    /// What to show.
    pub &'a [Replaced],
    /// Which moment they are counted back from.
    pub Instant,
);

impl fmt::Display for Before<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for replaced in self.0 {
            let before: Duration = self.1.saturating_duration_since(replaced.at);
            let end = replaced.gpa.0 + replaced.pages * PAGE_BYTES;
            let millis = before.as_secs_f64() * 1e3;
            write!(f, "\n    {millis:>10.3} ms before: {:#011x}-{end:#011x} by ", replaced.gpa.0)?;
            match replaced.with {
                With::Slab { first } => write!(f, "pages of a slab, its page {} first", first.0)?,
                With::Zeros => write!(f, "nothing, for they were zeros")?,
                With::Fresh => write!(f, "fresh memory, for the guest gave them back")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_remembered_and_no_more() {
        let log = MergeLog::default();
        assert!(log.last().is_empty());
        for n in 0..REMEMBERED as u32 + 3 {
            log.clone().add(Gpa(u64::from(n) * PAGE_BYTES), n.into(), With::Slab { first: SlabPage(n) });
        }
        let last = log.last();
        assert_eq!((last.len(), last[0].gpa, last[0].pages), (REMEMBERED, Gpa(3 * PAGE_BYTES), 3));
        assert_eq!(last[REMEMBERED - 1].with, With::Slab { first: SlabPage(REMEMBERED as u32 + 2) });
        assert!(last.windows(2).all(|two| two[0].at <= two[1].at));
    }

    #[test]
    fn they_are_shown_by_address_and_age() {
        let at = Instant::now();
        let replaced = [
            Replaced { gpa: Gpa(0x10_0000), pages: 2, with: With::Slab { first: SlabPage(7) }, at },
            Replaced { gpa: Gpa(0x20_0000), pages: 1, with: With::Zeros, at },
            Replaced { gpa: Gpa(0x30_0000), pages: 1, with: With::Fresh, at },
        ];
        let shown = Before(&replaced, at + Duration::from_micros(1500)).to_string();
        let lines: Vec<_> = shown.lines().skip(1).map(str::trim).collect();
        assert_eq!(lines[0], "1.500 ms before: 0x000100000-0x000102000 by pages of a slab, its page 7 first");
        assert!(lines[1].contains("0x000200000-0x000201000 by nothing") && lines[2].contains("fresh memory"));
    }
}
