//! What was seen of a fleet over time.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::host::governor::Management;
use crate::overcommit::pressure::Pressure;
use crate::overcommit::view::GuestState;

/// Samples of one run; a longer run keeps every second one.
const MAX_SAMPLES: usize = 20_000;

/// Declares a sample once: as a structure, and as a line of CSV.
macro_rules! sample {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// A fleet at one moment. Pages are of 4096 bytes.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        pub struct Sample { $($(#[$doc])* pub $name: $type,)* }

        const COLUMNS: &[&str] = &[$(stringify!($name)),*];

        impl Sample {
            fn csv(&self, line: &mut String) {
                $(let _ = write!(line, "{},", self.$name);)*
                line.pop();
                line.push('\n');
            }
        }
    };
}

sample! {
    /// Since the beginning.
    seconds: f64,
    /// The phase, by number.
    phase: usize,
    /// How short of memory it is: 0 high, 1 soft, 2 hard, 3 low.
    pressure: u8,
    /// What may be used.
    capacity_pages: u64,
    /// What is in use.
    used_pages: u64,
    /// What may still be taken.
    free_pages: u64,
    /// What all guests were promised.
    promised_pages: u64,
    /// Pages on frames.
    resident_pages: u64,
    /// What sharing saves.
    saved_pages: u64,
    /// What is in balloons.
    ballooned_pages: u64,
    /// What is on swap.
    swapped_pages: u64,
    /// What is owed.
    debt_pages: u64,
    /// What could pay.
    cover_pages: u64,
    /// Percent of the last ten seconds in which somebody waited for memory.
    psi_some_percent: f64,
    /// In which everybody did.
    psi_full_percent: f64,
    /// Guests that run.
    running: usize,
    /// Guests that are throttled.
    throttled: usize,
    /// Guests that are suspended.
    suspended: usize,
}

impl Sample {
    /// Out of what the governor has.
    pub fn of(management: &Management, seconds: f64, phase: usize) -> Self {
        let host = management.host.clone().unwrap_or_default();
        let ledger = management.ledger.clone().unwrap_or_default();
        let in_state = |state| management.guests.iter().filter(|guest| guest.state == state).count();
        let sum = |of: fn(&crate::overcommit::view::GuestView) -> u64| management.guests.iter().map(of).sum();
        let psi = host.psi.unwrap_or_default();
        Self {
            seconds,
            phase,
            pressure: Pressure::ALL.iter().position(|p| *p == management.pressure).unwrap_or(0) as u8,
            capacity_pages: host.capacity_pages,
            used_pages: host.used_pages,
            free_pages: host.free_pages,
            promised_pages: ledger.promised,
            resident_pages: sum(|guest| guest.resident_pages),
            saved_pages: ledger.saved,
            ballooned_pages: sum(|guest| guest.ballooned_pages()),
            swapped_pages: ledger.classes.swapped,
            debt_pages: ledger.debt.total(),
            cover_pages: ledger.cover.total(),
            psi_some_percent: psi.some_avg10_percent,
            psi_full_percent: psi.full_avg10_percent,
            running: in_state(GuestState::Running),
            throttled: management.guests.iter().filter(|g| g.throttle_pages_per_second.is_some()).count(),
            suspended: in_state(GuestState::Suspended),
        }
    }
}

/// All samples, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Series {
    /// The samples.
    pub samples: Vec<Sample>,
}

impl Series {
    /// One more.
    pub fn add(&mut self, sample: Sample) {
        if self.samples.len() >= MAX_SAMPLES {
            let mut odd = false;
            self.samples.retain(|_| {
                odd = !odd;
                odd
            });
        }
        self.samples.push(sample);
    }

    /// As comma-separated values, the first line of which names the columns.
    pub fn csv(&self) -> String {
        let mut text = COLUMNS.join(",");
        text.push('\n');
        self.samples.iter().for_each(|sample| sample.csv(&mut text));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_every_column_and_a_long_run_is_thinned() {
        let mut series = Series::default();
        for n in 0..MAX_SAMPLES + 1 {
            series.add(Sample { seconds: n as f64, ..Sample::default() });
        }
        assert_eq!(series.samples.len(), MAX_SAMPLES / 2 + 1);
        let seconds: Vec<f64> = series.samples.iter().map(|s| s.seconds).collect();
        assert_eq!((seconds[1], seconds.last()), (2.0, Some(&(MAX_SAMPLES as f64))));
        let csv = series.csv();
        assert!(csv.lines().all(|line| line.split(',').count() == COLUMNS.len()));
    }
}
