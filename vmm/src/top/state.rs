//! The state of `samepage top`: the last looks, the order of the guests, keys pressed. Pure: time
//! is passed in as a number.

use std::cmp::Ordering;
use std::collections::VecDeque;

use fleet::management::Management;
use overcommit::ledger::{Account, Classes};
use overcommit::view::{BalloonView, GuestState, GuestView};

/// Looks kept, for the sparkline of free memory.
pub(super) const MAX_SAMPLES: usize = 512;
/// Rates are taken over this time, or over two readings of the ledger if that is longer.
const RATE_SECONDS: f64 = 5.0;
/// Guests that page up and page down move by.
const PAGE: usize = 10;

/// Sort keys of the guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Sort {
    /// Name, from a to z.
    #[default]
    Name,
    /// Host frames, the most first.
    Frames,
    /// What sharing saves, the most first.
    Saved,
    /// The guest's debt, the most first.
    Debt,
    /// The size of the balloon, the largest first.
    Balloon,
    /// First touches a second, the most first.
    Touched,
}

impl Sort {
    /// In the order in which the key `s` steps through them.
    pub(super) const ALL: [Self; 6] =
        [Self::Name, Self::Frames, Self::Saved, Self::Debt, Self::Balloon, Self::Touched];

    /// As on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Frames => "frames",
            Self::Saved => "saved",
            Self::Debt => "debt",
            Self::Balloon => "balloon",
            Self::Touched => "touched",
        }
    }

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).map_or(0, |at| at + 1);
        Self::ALL.get(at).copied().unwrap_or_default()
    }

    fn compare(self, a: &Row, b: &Row) -> Ordering {
        match self {
            Self::Name => a.name.cmp(&b.name),
            Self::Frames => b.frames.total_cmp(&a.frames),
            Self::Saved => b.saved.total_cmp(&a.saved),
            Self::Debt => b.debt_pages.cmp(&a.debt_pages),
            Self::Balloon => b.ballooned().cmp(&a.ballooned()),
            Self::Touched => b.touched_pages_per_second.total_cmp(&a.touched_pages_per_second),
        }
    }
}

/// What was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// Sort by the next key.
    Sort,
    /// Reverse the order.
    Reverse,
    /// Hold the display, or resume it.
    Pause,
    /// Show or hide the help on keys.
    Help,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
}

/// A guest's line. Sizes in pages.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) state: GuestState,
    pub(super) classes: Classes,
    pub(super) promised_pages: u64,
    pub(super) resident_pages: u64,
    pub(super) frames: f64,
    pub(super) saved: f64,
    /// None without a driver.
    pub(super) balloon: Option<BalloonView>,
    /// None if not sampled.
    pub(super) working_set_pages: Option<u64>,
    /// Its error.
    pub(super) working_set_error_pages: Option<u64>,
    pub(super) touched_pages_per_second: f64,
    /// None is no limit.
    pub(super) throttle_pages_per_second: Option<u64>,
    pub(super) debt_pages: u64,
    /// Age of the guest's own statistics.
    pub(super) age_seconds: Option<f64>,
}

impl Row {
    fn of(view: &GuestView, account: Option<&Account>) -> Self {
        let balloon = view.balloon;
        Self {
            name: view.name.clone(),
            state: view.state,
            classes: account.map(|a| a.classes).unwrap_or_default(),
            promised_pages: view.promised_pages,
            resident_pages: view.resident_pages,
            frames: view.frames,
            saved: account.map_or(0.0, |a| a.saved),
            balloon,
            working_set_pages: view.working_set_pages,
            working_set_error_pages: view.working_set_error_pages,
            touched_pages_per_second: view.touched_pages_per_second,
            throttle_pages_per_second: view.throttle_pages_per_second,
            debt_pages: account.map_or(0, |a| a.debt.total()),
            age_seconds: view.age_seconds,
        }
    }

    fn ballooned(&self) -> u64 {
        self.balloon.map_or(0, |balloon| balloon.actual_pages)
    }
}

/// The guests of a look, sorted.
pub(super) fn rows(management: &Management, sort: Sort, reversed: bool) -> Vec<Row> {
    let accounts = management.ledger.as_ref().map_or(&[][..], |ledger| &ledger.guests);
    let account = |view: &GuestView| accounts.iter().find(|account| account.name == view.name);
    let mut rows: Vec<Row> = management.guests.iter().map(|view| Row::of(view, account(view))).collect();
    rows.sort_by(|a, b| {
        let order = sort.compare(a, b);
        let order = if reversed { order.reverse() } else { order };
        order.then_with(|| a.name.cmp(&b.name))
    });
    rows
}

/// What is kept of a look.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    /// The daemon's clock.
    seconds: f64,
    free_pages: u64,
    saved_pages: u64,
    ballooned_pages: u64,
}

/// Where the numbers come from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Source {
    /// No answer yet.
    Waiting,
    Daemon,
    /// No answer since `since_seconds`, by our own clock.
    Gone {
        /// Since when.
        since_seconds: f64,
        /// Why the last request failed.
        why: String,
    },
}

/// Everything to show.
pub(super) struct Top {
    pub(super) fleet: String,
    /// Which fleet answers.
    pub(super) source: Source,
    /// What guests are sorted by.
    pub(super) sort: Sort,
    /// The other way round.
    pub(super) reversed: bool,
    /// Whether the help on keys is shown.
    pub(super) help: bool,
    /// The first guest shown.
    pub(super) first: usize,
    last: Option<Management>,
    /// The look shown while the display is held.
    held: Option<Management>,
    samples: VecDeque<Sample>,
}

impl Top {
    pub(super) fn new(fleet: String, sort: Sort) -> Self {
        Self {
            fleet,
            source: Source::Waiting,
            sort,
            reversed: false,
            help: false,
            first: 0,
            last: None,
            held: None,
            samples: VecDeque::new(),
        }
    }

    /// The look to show; None before the first answer.
    pub(super) fn shown(&self) -> Option<&Management> {
        self.held.as_ref().or(self.last.as_ref())
    }

    /// Whether the display is held.
    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// The daemon has answered.
    pub(super) fn saw(&mut self, management: Management) {
        self.source = Source::Daemon;
        if let Some(sample) = Sample::of(&management) {
            // The clock of a restarted daemon starts again.
            match self.samples.back().map(|last| last.seconds.total_cmp(&sample.seconds)) {
                Some(Ordering::Greater) => self.samples.clear(),
                Some(Ordering::Equal) => _ = self.samples.pop_back(),
                _ => {}
            }
            self.samples.push_back(sample);
            while self.samples.len() > MAX_SAMPLES {
                self.samples.pop_front();
            }
        }
        self.last = Some(management);
    }

    /// The daemon has not answered, at `now_seconds` of our clock.
    pub(super) fn missed(&mut self, why: String, now_seconds: f64) {
        let since_seconds = match self.source {
            Source::Gone { since_seconds, .. } => since_seconds,
            _ => now_seconds,
        };
        self.source = Source::Gone { since_seconds, why };
    }

    /// A key was pressed.
    pub(super) fn press(&mut self, key: Key) {
        let guests = self.shown().map_or(0, |management| management.guests.len());
        match key {
            Key::Sort => (self.sort, self.reversed) = (self.sort.next(), false),
            Key::Reverse => self.reversed = !self.reversed,
            Key::Pause if self.held.take().is_none() => self.held = self.last.clone(),
            Key::Pause => {}
            Key::Help => self.help = !self.help,
            Key::Up => self.first = self.first.saturating_sub(1),
            Key::Down => self.first += 1,
            Key::PageUp => self.first = self.first.saturating_sub(PAGE),
            Key::PageDown => self.first += PAGE,
            Key::Home => self.first = 0,
            Key::End => self.first = guests,
        }
        self.first = self.first.min(guests.saturating_sub(1));
    }

    /// Free memory at the last looks, at most `most`, in pages, the oldest first.
    pub(super) fn free_pages(&self, most: usize) -> Vec<u64> {
        let skipped = self.samples.len().saturating_sub(most);
        self.samples.iter().skip(skipped).map(|sample| sample.free_pages).collect()
    }

    /// How fast saved memory grows, in pages a second: less than 0 when sharing breaks up.
    pub(super) fn merged_pages_per_second(&self) -> f64 {
        self.rate(|sample| sample.saved_pages)
    }

    /// How fast balloons grow, in pages a second: less than 0 when they shrink.
    pub(super) fn ballooned_pages_per_second(&self) -> f64 {
        self.rate(|sample| sample.ballooned_pages)
    }

    fn rate(&self, number: fn(&Sample) -> u64) -> f64 {
        let Some(last) = self.samples.back() else { return 0.0 };
        let interval = self.last.as_ref().map_or(0.0, |management| management.ledger_seconds.1);
        let from = last.seconds - RATE_SECONDS.max(2.0 * interval);
        match self.samples.iter().find(|sample| sample.seconds >= from) {
            Some(first) if first.seconds < last.seconds => {
                (number(last) as f64 - number(first) as f64) / (last.seconds - first.seconds)
            }
            _ => 0.0,
        }
    }
}

impl Sample {
    /// None before the first ledger: from nothing to all is no rate.
    fn of(management: &Management) -> Option<Self> {
        let (host, ledger) = (management.host.as_ref()?, management.ledger.as_ref()?);
        let ballooned = management.guests.iter().filter_map(|guest| guest.balloon);
        Some(Self {
            seconds: host.now_seconds,
            free_pages: host.free_pages,
            saved_pages: ledger.saved,
            ballooned_pages: ballooned.map(|balloon| balloon.actual_pages).sum(),
        })
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
