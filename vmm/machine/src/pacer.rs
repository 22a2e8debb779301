//! The arithmetic of pacing: a token bucket of pages, and from it when a vCPU runs, how long before
//! it looks again, and when it is held. Plain numbers; the clock, the counting and the timer are
//! [`super::throttle`]'s and [`super::slice`]'s.
//!
//! *The bound.* A vCPU runs a slice at a time, and begins one only while nothing is owed. So what a
//! guest has is never more than rate x time + [`Pacer::ahead_pages`]: the burst, what each vCPU can
//! touch in the one slice that it had begun before, and what a disk writes for one request. Slices
//! are cut so short that this is at most a second's worth of the rate, or 1200 pages for each vCPU
//! where that is more: a slice is never shorter than [`LEAST_SLICE`], and a huge page comes whole.
//!
//! What is owed is paid before the guest runs on, with one exception: after [`HOLD_LIMIT`] it has
//! one slice, for its clock and its interrupts. So a rate that does not bring in [`HOLD_LIMIT`]
//! what the guest takes in a slice cannot be kept; the guest then has that slice each time.

use std::time::Duration;

/// The longest time without a vCPU running: a quarter of what makes Linux report a processor as
/// stuck.
pub const HOLD_LIMIT: Duration = Duration::from_secs(5);
/// The shortest slice: what cutting it shorter would save goes into looking.
const LEAST_SLICE: Duration = Duration::from_micros(100);
/// The longest: a guest that is far below its rate costs a look this often.
const LONGEST_SLICE: Duration = Duration::from_millis(10);
/// No processor touches more pages than this in a microsecond: it would zero 16 GB a second.
const FASTEST_PAGES_PER_MICRO: u64 = 4;
/// A slice ends when the fault is done that it ends in, and a fault may bring a huge page.
const HUGE_PAGES: u64 = 512;
/// A disk writes as much for one request, which is not interrupted.
const REQUEST_PAGES: u64 = 256;
/// The bucket holds what the rate brings in this time, or [`LEAST_BURST_PAGES`].
const BURST: Duration = Duration::from_millis(10);
/// As many pages as a thread of this process may take by itself for its own affairs.
const LEAST_BURST_PAGES: u64 = 16;
const NANOS: i128 = 1_000_000_000;

/// What a vCPU does next, and for how long, before it looks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It runs.
    Run(Duration),
    /// It is held.
    Hold(Duration),
}

/// A bucket of pages that fills at a rate. All vCPUs of a VM take from the same one.
#[derive(Clone, Debug)]
pub struct Pacer {
    pages_per_second: u64,
    vcpus: u64,
    /// In billionths of a page; below zero what is owed.
    tokens: i128,
    /// How long something has been owed, and since when there was a slice for it.
    held: Duration,
    /// What is left of the slice that is granted though something is owed.
    breath: Duration,
}

impl Pacer {
    /// A full bucket that fills at `pages_per_second`, which is not 0, for `vcpus` vCPUs.
    pub fn new(pages_per_second: u64, vcpus: u8) -> Self {
        let vcpus = u64::from(vcpus).max(1);
        let none = Duration::ZERO;
        let mut pacer = Self { pages_per_second, vcpus, tokens: 0, held: none, breath: none };
        pacer.tokens = pacer.burst();
        pacer
    }

    /// Fills at another rate from now on. What is owed stays owed.
    pub fn set_rate(&mut self, pages_per_second: u64) {
        self.pages_per_second = pages_per_second;
        self.tokens = self.tokens.min(self.burst());
    }

    /// How long a vCPU runs before it looks: all of them together then touch at most half a
    /// second's worth.
    pub fn slice(&self) -> Duration {
        let micros = self.pages_per_second / 2 / (self.vcpus * FASTEST_PAGES_PER_MICRO);
        Duration::from_micros(micros).clamp(LEAST_SLICE, LONGEST_SLICE)
    }

    /// The most that the guest may have above what the rate has brought.
    pub fn ahead_pages(&self) -> u64 {
        let slice = self.slice().as_micros() as u64 * FASTEST_PAGES_PER_MICRO + HUGE_PAGES;
        (self.burst() / NANOS) as u64 + REQUEST_PAGES + self.vcpus * slice
    }

    fn brings(&self, time: Duration) -> i128 {
        i128::from(self.pages_per_second).saturating_mul(time.as_nanos().min(u64::MAX.into()) as i128)
    }

    fn burst(&self) -> i128 {
        self.brings(BURST).max(i128::from(LEAST_BURST_PAGES) * NANOS)
    }

    /// Decides, when `elapsed` has gone by since the last time any vCPU looked and the guest has
    /// `grown` by pages since: below zero when it has given some back, which pays for others.
    pub fn step(&mut self, elapsed: Duration, grown: i64) -> Next {
        let (burst, most) = (self.burst(), i128::from(self.ahead_pages()) * NANOS);
        let filled = self.tokens.saturating_add(self.brings(elapsed)).min(burst);
        // More than the guest can have taken is the process's own affair, and the guest does not
        // pay for it.
        self.tokens = filled.saturating_sub(i128::from(grown) * NANOS).clamp(-most, burst);
        if self.tokens >= 0 {
            (self.held, self.breath) = (Duration::ZERO, Duration::ZERO);
            return Next::Run(self.slice());
        }
        self.breath = self.breath.saturating_sub(elapsed);
        self.held = self.held.saturating_add(elapsed);
        if self.breath.is_zero() && self.held >= HOLD_LIMIT {
            (self.held, self.breath) = (Duration::ZERO, LEAST_SLICE);
        }
        match self.breath.is_zero() {
            true => Next::Hold(self.until_paid().min(HOLD_LIMIT - self.held)),
            false => Next::Run(LEAST_SLICE),
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

    /// What each vCPU may have ahead, however low the rate.
    const LEAST_AHEAD_PAGES: u64 = LEAST_SLICE.as_micros() as u64 * FASTEST_PAGES_PER_MICRO + HUGE_PAGES;

    /// vCPUs that each look when their slice or hold is over, and take pages as the next of
    /// `appetites` says, in each slice. Calls `see` for every look: what was decided, the time, the
    /// pages so far. Returns time, pages, and the time that the first was held.
    fn guest(
        pacer: &mut Pacer,
        vcpus: u8,
        looks: usize,
        mut appetite: impl FnMut(Duration) -> u64,
        mut see: impl FnMut(Next, Duration, u64),
    ) -> (Duration, u64, Duration) {
        let (mut time, mut pages, mut seen, mut held) = (Duration::ZERO, 0, 0, Duration::ZERO);
        // When each looks next, and what it is about until then.
        let mut vcpus = vec![(Duration::ZERO, 0u64); usize::from(vcpus)];
        for _ in 0..looks {
            let (n, at) = vcpus.iter().map(|(at, _)| *at).enumerate().min_by_key(|(_, at)| *at).expect("one");
            // What it takes it has taken by the end of the slice: the latest that can be seen.
            pages += std::mem::take(&mut vcpus[n].1);
            let next = pacer.step(at - time, (pages - seen) as i64);
            (time, seen) = (at, pages);
            vcpus[n] = match next {
                Next::Run(slice) => (at + slice, appetite(slice)),
                Next::Hold(hold) => {
                    held += if n == 0 { hold } else { Duration::ZERO };
                    (at + hold, 0)
                }
            };
            see(next, time, pages);
        }
        (time, pages, held)
    }

    fn due(rate: u64, time: Duration) -> u64 {
        (u128::from(rate) * time.as_nanos() / NANOS as u128) as u64
    }

    /// What fits in a slice.
    fn most(slice: Duration) -> u64 {
        slice.as_micros() as u64 * FASTEST_PAGES_PER_MICRO + HUGE_PAGES
    }

    proptest! {
        #[test]
        fn no_guest_is_further_ahead_than_is_stated(
            rate in 1u64..2_000_000,
            vcpus in 1u8..9,
            appetites in prop::collection::vec(0u64..100_000, 1..40),
        ) {
            // Below this the guest has its slice every HOLD_LIMIT instead.
            let least = u64::from(vcpus) * LEAST_AHEAD_PAGES / HOLD_LIMIT.as_secs() + 1;
            let mut pacer = Pacer::new(rate, vcpus);
            let ahead = pacer.ahead_pages();
            let mut appetites = appetites.iter().cycle();
            let appetite = |slice| (*appetites.next().expect("one")).min(most(slice));
            guest(&mut pacer, vcpus, 500, appetite, |_, time, pages| {
                let due = due(rate.max(least), time);
                assert!(pages <= due + ahead + 1, "{pages} of {due} + {ahead} after {time:?}");
            });
        }

        #[test]
        fn a_second_is_the_most(rate in 1u64..100_000_000, vcpus in 1u8..33) {
            let ahead = Pacer::new(rate, vcpus).ahead_pages();
            prop_assert!(ahead <= rate.max(u64::from(vcpus) * 1200), "{ahead} at {rate}");
        }

        #[test]
        fn no_guest_is_held_for_ever(rate in 1u64..10_000_000, appetites in prop::collection::vec(0u64..1 << 40, 1..40)) {
            let (mut pacer, mut held) = (Pacer::new(rate, 1), Duration::ZERO);
            let mut appetites = appetites.iter().cycle();
            guest(&mut pacer, 1, 500, |_| *appetites.next().expect("one"), |next, _, _| match next {
                Next::Hold(time) => {
                    held += time;
                    assert!(!time.is_zero() && held <= HOLD_LIMIT, "{held:?}");
                }
                Next::Run(time) => {
                    assert!((LEAST_SLICE..=LONGEST_SLICE).contains(&time), "{time:?}");
                    held = Duration::ZERO;
                }
            });
        }

        #[test]
        fn who_takes_less_than_the_rate_is_never_held(rate in 1000u64..2_000_000, part in 1u64..100) {
            let each = |slice: Duration| due(rate, slice) * part / 100;
            let (_, _, held) = guest(&mut Pacer::new(rate, 1), 1, 500, each, |_, _, _| {});
            prop_assert_eq!(held, Duration::ZERO);
        }

        #[test]
        fn who_is_hungry_gets_the_rate(rate in 1000u64..1_000_000, vcpus in 1u8..5) {
            let (time, pages, held) = guest(&mut Pacer::new(rate, vcpus), vcpus, 2000, most, |_, _, _| {});
            prop_assert!(pages + 1 >= due(rate, time), "{} of {}", pages, due(rate, time));
            prop_assert!(!held.is_zero());
        }
    }

    #[test]
    fn pages_given_back_pay_for_others_and_for_no_more_than_a_burst() {
        let mut pacer = Pacer::new(1000, 1);
        assert!(matches!(pacer.step(Duration::ZERO, 500), Next::Hold(_)));
        assert!(matches!(pacer.step(Duration::ZERO, -10_000), Next::Run(_)));
        assert_eq!(pacer.tokens, pacer.burst());
    }

    #[test]
    fn another_rate_changes_how_long_it_takes_to_pay_and_not_what_is_owed() {
        let mut pacer = Pacer::new(1000, 1);
        let owed = Duration::from_millis(490);
        assert_eq!(pacer.step(Duration::ZERO, 16 + 490), Next::Hold(owed));
        pacer.set_rate(490_000);
        assert_eq!(pacer.step(Duration::ZERO, 0), Next::Hold(Duration::from_millis(1)));
        pacer.set_rate(1);
        assert_eq!(pacer.step(Duration::ZERO, 0), Next::Hold(HOLD_LIMIT));
    }

    #[test]
    fn a_breath_is_for_all_vcpus() {
        let mut pacer = Pacer::new(1, 2);
        assert!(matches!(pacer.step(Duration::ZERO, 1000), Next::Hold(HOLD_LIMIT)));
        assert_eq!(pacer.step(HOLD_LIMIT, 0), Next::Run(LEAST_SLICE));
        assert_eq!(pacer.step(LEAST_SLICE / 2, 0), Next::Run(LEAST_SLICE));
        assert!(matches!(pacer.step(LEAST_SLICE, 0), Next::Hold(_)));
    }

    #[test]
    fn no_number_makes_it_overflow() {
        let mut pacer = Pacer::new(u64::MAX, u8::MAX);
        pacer.step(Duration::MAX, i64::MIN);
        pacer.step(Duration::MAX, i64::MAX);
        pacer.step(Duration::MAX, i64::MAX);
        let mut pacer = Pacer::new(1, 1);
        pacer.step(Duration::ZERO, i64::MAX);
        pacer.step(Duration::MAX, i64::MAX);
    }
}
