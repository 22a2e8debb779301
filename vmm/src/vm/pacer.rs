//! The arithmetic of pacing: a token bucket of pages, and from it when a guest runs and when it is held. Plain numbers; the clock, the
//! counting and the holding are [`super::throttle`]'s.
//!
//! What comes of it: a guest that takes at most S pages from one look to the next never gets more than rate x time + burst + S,
//! as long as S is no more than the rate brings in one [`HOLD_LIMIT`]. Who takes more in each look is held [`HOLD_LIMIT`] out of every
//! [`HOLD_LIMIT`] + [`BREATH`], and no longer: its clock and its interrupts are to stay alive. So there is a least rate that can be kept,
//! and it is what the guest takes in a [`BREATH`], twenty times a second.

use std::time::Duration;

/// The longest time without a vCPU running.
pub const HOLD_LIMIT: Duration = Duration::from_millis(50);
/// The shortest time to run between two holds.
pub const BREATH: Duration = Duration::from_millis(1);
/// How long a guest runs unlooked at while its bucket is full.
pub const LOOK: Duration = Duration::from_millis(2);
/// The bucket holds what the rate brings in this time, or [`LEAST_BURST_PAGES`].
const BURST: Duration = Duration::from_millis(10);
/// As many pages as a thread of this process may take by itself for its own affairs.
const LEAST_BURST_PAGES: u64 = 16;
/// What was taken too much is owed, but no more than this time's: a guest that stopped taking is free again after that.
const DEBT: Duration = Duration::from_secs(1);
const NANOS: i128 = 1_000_000_000;

/// What the guest does next, and how long, before it is looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It runs.
    Run(Duration),
    /// It stands still.
    Hold(Duration),
}

/// A bucket of pages that fills at a rate, and what was decided last.
#[derive(Clone, Debug)]
pub struct Pacer {
    pages_per_second: u64,
    /// In billionths of a page; below zero what is owed.
    tokens: i128,
    held: bool,
}

impl Pacer {
    /// A full bucket that fills at `pages_per_second`, which is not 0.
    pub fn new(pages_per_second: u64) -> Self {
        let mut pacer = Self { pages_per_second, tokens: 0, held: false };
        pacer.tokens = pacer.burst();
        pacer
    }

    fn brings(&self, time: Duration) -> i128 {
        i128::from(self.pages_per_second).saturating_mul(time.as_nanos().min(u64::MAX.into()) as i128)
    }

    fn burst(&self) -> i128 {
        self.brings(BURST).max(i128::from(LEAST_BURST_PAGES) * NANOS)
    }

    /// Decides, when `elapsed` has gone by since the last time and the guest has `grown` by so many pages since: below zero when it has
    /// given some back, which pays for others.
    pub fn step(&mut self, elapsed: Duration, grown: i64) -> Next {
        let filled = self.tokens.saturating_add(self.brings(elapsed));
        let taken = i128::from(grown) * NANOS;
        self.tokens = filled.min(self.burst()).saturating_sub(taken).clamp(-self.brings(DEBT), self.burst());
        if self.tokens >= 0 {
            self.held = false;
            return Next::Run(if self.tokens == self.burst() { LOOK } else { BREATH });
        }
        self.held = !self.held;
        match self.held {
            true => Next::Hold(self.until_paid().min(HOLD_LIMIT)),
            false => Next::Run(BREATH),
        }
    }

    /// How long the rate takes to bring what is owed, a nanosecond at least.
    fn until_paid(&self) -> Duration {
        let rate = i128::from(self.pages_per_second.max(1));
        let nanos = (rate - 1 - self.tokens) / rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A guest that takes `appetite(n)` pages in its `n`th time of running. Hands every step to `see`: what was decided, the time
    /// until then, the pages until then. Returns time, pages and time held.
    fn guest(
        pacer: &mut Pacer,
        steps: u64,
        mut appetite: impl FnMut(u64) -> u64,
        mut see: impl FnMut(Next, Duration, u64),
    ) -> (Duration, u64, Duration) {
        let (mut time, mut pages, mut held) = (Duration::ZERO, 0, Duration::ZERO);
        let mut next = Next::Run(LOOK);
        for n in 0..steps {
            let (elapsed, grown) = match next {
                Next::Run(time) => (time, appetite(n)),
                Next::Hold(time) => {
                    held += time;
                    (time, 0)
                }
            };
            time += elapsed;
            pages += grown;
            next = pacer.step(elapsed, grown as i64);
            see(next, time, pages);
        }
        (time, pages, held)
    }

    proptest! {
        #[test]
        fn nobody_gets_more_than_rate_and_burst_and_one_look(
            rate in 1u64..2_000_000,
            appetites in prop::collection::vec(0u64..100_000, 1..40),
        ) {
            // What the rate brings in the longest hold is the most that can be paid for before the next look.
            let most = (u128::from(rate) * HOLD_LIMIT.as_nanos() / NANOS as u128) as u64;
            let mut pacer = Pacer::new(rate);
            let burst = (pacer.burst() / NANOS) as u64;
            let appetite = |n: u64| appetites[n as usize % appetites.len()].min(most);
            guest(&mut pacer, 500, appetite, |_, time, pages| {
                let due = (u128::from(rate) * time.as_nanos() / NANOS as u128) as u64;
                assert!(pages <= due + burst + most + 1, "{pages} of {due} + {burst} + {most} after {time:?}");
            });
        }

        #[test]
        fn nobody_starves(rate in 1u64..10_000_000, appetites in prop::collection::vec(0u64..1 << 40, 1..40)) {
            let mut pacer = Pacer::new(rate);
            let mut before = Next::Run(LOOK);
            let appetite = |n: u64| appetites[n as usize % appetites.len()];
            guest(&mut pacer, 500, appetite, |next, _, _| {
                match next {
                    Next::Hold(time) => {
                        assert!(matches!(before, Next::Run(_)), "held twice in a row");
                        assert!(!time.is_zero() && time <= HOLD_LIMIT, "{time:?}");
                    }
                    Next::Run(time) => assert!((BREATH..=LOOK).contains(&time), "{time:?}"),
                }
                before = next;
            });
        }

        #[test]
        fn who_takes_less_than_the_rate_is_never_held(rate in 1000u64..2_000_000, part in 1u64..100) {
            let each = rate * BREATH.as_micros() as u64 / 1_000_000 * part / 100;
            let (_, _, held) = guest(&mut Pacer::new(rate), 500, |_| each, |_, _, _| {});
            prop_assert_eq!(held, Duration::ZERO);
        }

        #[test]
        fn who_is_hungry_gets_the_rate(rate in 1000u64..1_000_000, times in 2u64..20) {
            let most = (u128::from(rate) * HOLD_LIMIT.as_nanos() / NANOS as u128) as u64;
            let each = (rate / 1000 * times).min(most);
            let (time, pages, held) = guest(&mut Pacer::new(rate), 500, |_| each, |_, _, _| {});
            let due = (u128::from(rate) * time.as_nanos() / NANOS as u128) as u64;
            prop_assert!(pages + 1 >= due, "{} of {}", pages, due);
            prop_assert!(!held.is_zero());
        }
    }

    #[test]
    fn pages_given_back_pay_for_others_and_for_no_more_than_a_burst() {
        let mut pacer = Pacer::new(1000);
        assert!(matches!(pacer.step(Duration::ZERO, 500), Next::Hold(HOLD_LIMIT)));
        assert!(matches!(pacer.step(Duration::ZERO, -10_000), Next::Run(_)));
        assert_eq!(pacer.tokens, pacer.burst());
    }

    #[test]
    fn what_is_owed_is_forgotten_after_a_while() {
        let mut pacer = Pacer::new(1000);
        pacer.step(Duration::ZERO, i64::MAX);
        assert!(matches!(pacer.step(DEBT, 0), Next::Run(_)));
        // No number makes it overflow.
        let mut pacer = Pacer::new(u64::MAX);
        pacer.step(Duration::MAX, i64::MIN);
        pacer.step(Duration::MAX, i64::MAX);
    }
}
