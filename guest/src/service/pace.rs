//! Pacing: a rate per second, in batches, for a limited time.

use super::{MICROS, STEP_PAGES, Wait};

/// How often, and until when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    rate: u64,
    until_micros: u64,
    seen_micros: u64,
    /// Times due, in millionths.
    credit: u64,
    /// Least time between two batches.
    batch_millis: u64,
    /// When the next call was due, if one was asked for.
    next_micros: Option<u64>,
}

/// What a [`Pace`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    /// How many times to do it now; at most [`STEP_PAGES`].
    pub(super) times: u64,
    /// When to ask again. `Forever`: it is over.
    pub(super) wait: Wait,
    /// How long after the time it had asked for this is, if that has come.
    pub(super) late_micros: Option<u64>,
}

impl Pace {
    /// `rate` times a second, above 0, from now on, for `seconds` or for ever.
    pub(super) fn new(rate: u64, seconds: Option<u64>, batch_millis: u64, now_micros: u64) -> Self {
        let end = |seconds: u64| now_micros.saturating_add(seconds.saturating_mul(MICROS));
        Self {
            rate: rate.max(1),
            until_micros: seconds.map_or(u64::MAX, end),
            seen_micros: now_micros,
            credit: 0,
            batch_millis,
            next_micros: None,
        }
    }

    /// The work due by now.
    pub(super) fn due(&mut self, now_micros: u64) -> Due {
        let late_micros =
            self.next_micros.take().filter(|next| *next <= now_micros).map(|next| now_micros - next);
        let now = now_micros.min(self.until_micros);
        let elapsed = now.saturating_sub(self.seen_micros);
        self.seen_micros = now;
        // A guest that cannot keep up falls behind by a second at most: it must not make up for an
        // hour's pause.
        let second = self.rate.saturating_mul(MICROS);
        self.credit = self.credit.saturating_add(self.rate.saturating_mul(elapsed)).min(second);
        let due = self.credit / MICROS;
        let times = due.min(STEP_PAGES);
        self.credit -= times * MICROS;
        let wait = if due > times {
            Wait::No
        } else if now == self.until_micros {
            Wait::Forever
        } else {
            let next_micros = (MICROS - self.credit).div_ceil(self.rate);
            let millis = next_micros.div_ceil(1000).max(self.batch_millis);
            Wait::Millis(u32::try_from(millis).unwrap_or(u32::MAX - 1))
        };
        if let Wait::Millis(millis) = wait {
            self.next_micros = Some(now_micros.saturating_add(u64::from(millis) * 1000));
        }
        Due { times, wait, late_micros }
    }
}

impl Wait {
    /// The shorter of two.
    pub(super) fn or(self, other: Wait) -> Wait {
        match (self, other) {
            (Wait::No, _) | (_, Wait::No) => Wait::No,
            (Wait::Forever, wait) | (wait, Wait::Forever) => wait,
            (Wait::Millis(a), Wait::Millis(b)) => Wait::Millis(a.min(b)),
        }
    }
}
