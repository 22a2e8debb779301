//! Samples of a fleet over time.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use fleet::management::Management;
use overcommit::memory_state::{Because, MemoryState};
use overcommit::view::{GuestState, GuestView};

/// Samples of one run; a longer run keeps every second one.
const MAX_SAMPLES: usize = 20_000;
/// Guests in all samples together; a run that has more of them keeps every second sample.
const MAX_GUEST_SAMPLES: usize = 200_000;

/// One guest at one moment. Pages are of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSample {
    /// Pages in its balloon.
    pub ballooned_pages: u64,
    /// Its pages on frames.
    pub resident_pages: u64,
}

impl GuestSample {
    fn of(guest: &GuestView) -> Self {
        Self { ballooned_pages: guest.ballooned_pages(), resident_pages: guest.resident_pages }
    }
}

/// Declares a sample once: as a structure, and as a line of CSV. Guests are not in the CSV, whose
/// columns are the same for all fleets.
macro_rules! sample {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// A fleet at one moment. Pages are of 4096 bytes.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        pub struct Sample {
            $($(#[$doc])* pub $name: $type,)*
            /// Each guest, by its name.
            #[serde(default)]
            pub guests: BTreeMap<String, GuestSample>,
        }

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
    memory_state: u8,
    /// Why: 0 by what is free, 1 because that falls, 2 because of stalls, 3 because of the state
    /// before.
    because: u8,
    /// The fleet's capacity.
    capacity_pages: u64,
    /// Pages in use.
    used_pages: u64,
    /// Pages that may still be taken.
    free_pages: u64,
    /// The age of the ledger's numbers, by the oldest walk that counters have changed since:
    /// promised, saved, swapped, debt and cover. The others are of the last look.
    ledger_age_seconds: f64,
    promised_pages: u64,
    /// Pages on frames.
    resident_pages: u64,
    saved_pages: u64,
    /// Pages in balloons.
    ballooned_pages: u64,
    /// Pages on swap.
    swapped_pages: u64,
    debt_pages: u64,
    cover_pages: u64,
    /// Percent of the last ten seconds in which at least one task waited for memory.
    psi_some_percent: f64,
    /// In which all tasks that had work did.
    psi_full_percent: f64,
    running: usize,
    /// Guests that were held back by their limit lately. Most limits are never reached.
    throttled: usize,
    /// Guests that are suspended.
    suspended: usize,
}

impl Sample {
    /// From the state of the governor.
    pub fn of(management: &Management, seconds: f64, phase: usize) -> Self {
        let host = management.host.clone().unwrap_or_default();
        let ledger = management.ledger.clone().unwrap_or_default();
        let in_state = |state| management.guests.iter().filter(|guest| guest.state == state).count();
        let sum = |of: fn(&GuestView) -> u64| management.guests.iter().map(of).sum();
        let psi = host.psi.unwrap_or_default();
        let memory_state =
            MemoryState::ALL.iter().position(|p| *p == management.memory_state).unwrap_or(0) as u8;
        Self {
            seconds,
            phase,
            memory_state,
            because: Because::ALL.iter().position(|b| *b == management.because).unwrap_or(0) as u8,
            capacity_pages: host.capacity_pages,
            used_pages: host.used_pages,
            free_pages: host.free_pages,
            ledger_age_seconds: management.ledger_age_seconds().unwrap_or(0.0)
                + ledger.oldest_split_seconds().unwrap_or(0.0),
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
            throttled: management.guests.iter().filter(|g| g.held).count(),
            suspended: in_state(GuestState::Suspended),
            guests: management.guests.iter().map(|g| (g.name.clone(), GuestSample::of(g))).collect(),
        }
    }
}

/// All samples, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Series {
    pub samples: Vec<Sample>,
}

impl Series {
    pub fn add(&mut self, sample: Sample) {
        let guests = self.samples.len().saturating_mul(sample.guests.len());
        if self.samples.len() >= MAX_SAMPLES || guests >= MAX_GUEST_SAMPLES {
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
    use overcommit::view::BalloonView;

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

    #[test]
    fn many_guests_thin_a_run_sooner() {
        let guests: BTreeMap<_, _> = (0..1000).map(|n| (n.to_string(), GuestSample::default())).collect();
        let mut series = Series::default();
        let most = MAX_GUEST_SAMPLES / guests.len();
        for _ in 0..=most {
            series.add(Sample { guests: guests.clone(), ..Sample::default() });
        }
        assert_eq!(series.samples.len(), most / 2 + 1);
    }

    #[test]
    fn each_guest_is_in_a_sample() {
        let guest = |name: &str, actual_pages| GuestView {
            name: name.into(),
            promised_pages: 1000,
            balloon: Some(BalloonView { target_pages: 900, actual_pages }),
            resident_pages: 500,
            ..GuestView::default()
        };
        let guests = vec![guest("a", 300), guest("b", 2000)];
        let sample = Sample::of(&Management { guests, ..Management::default() }, 0.0, 0);
        let json = serde_json::to_value(&sample).unwrap();
        assert_eq!(json["guests"]["a"], serde_json::json!({"ballooned_pages": 300, "resident_pages": 500}));
        assert_eq!(sample.guests["b"].ballooned_pages, 1000, "never more than it was promised");
        assert_eq!(sample.ballooned_pages, 1300);
    }
}
