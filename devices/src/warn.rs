//! Counting what guests do wrong, and saying so at a limited rate.
//!
//! A hostile guest can repeat an error a million times a second, so a log line per error would be a
//! denial of service on the host's disk. The limit needs no clock: a line is written when the count
//! reaches a power of two, hence at most 64 lines over the life of a counter, and the first error
//! is always seen.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A named counter that logs the 1st, 2nd, 4th, 8th ... occurrence.
#[derive(Debug)]
pub struct Limited {
    what: &'static str,
    count: AtomicU64,
}

impl Limited {
    /// A counter at zero; `what` names the error and leads each log line.
    pub const fn new(what: &'static str) -> Self {
        Self { what, count: AtomicU64::new(0) }
    }

    /// Counts one occurrence. `detail` is formatted only if this occurrence is logged.
    pub fn hit(&self, detail: fmt::Arguments<'_>) {
        let count = self.count.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count.is_power_of_two() {
            tracing::warn!(count, "{}: {detail}", self.what);
        }
    }

    /// Occurrences so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct Formatted<'a>(&'a Cell<u32>);

    impl fmt::Display for Formatted<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.set(self.0.get() + 1);
            write!(f, "x")
        }
    }

    #[test]
    fn every_occurrence_is_counted() {
        let limited = Limited::new("test");
        let formatted = Cell::new(0);
        for _ in 0..1000 {
            limited.hit(format_args!("{}", Formatted(&formatted)));
        }
        assert_eq!(limited.count(), 1000);
        assert!(formatted.get() <= 10, "1000 occurrences are at most 10 lines, got {}", formatted.get());
    }
}
