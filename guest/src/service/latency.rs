//! Writing to random pages and timing each write: the cost, as the guest sees it, of work on its
//! memory by the host.

use super::pace::Pace;
use super::{Service, Wait, refusal};
use crate::histogram::Histogram;
use crate::protocol::{Done, ErrorCode, Latency, Reply, Target};
use crate::tsc;
use crate::virtio::Transport;
use crate::workload::Pages;

/// Writes come in batches at least this far apart: close together, so that hardly anything happens
/// between two unseen.
const BATCH_MILLIS: u64 = 1;

/// The writes that go on, and the times of those since the last answer.
#[derive(Debug)]
pub(super) struct TimedWrites {
    running: Option<(Target, Pace)>,
    histogram: Histogram,
    /// How many microseconds late the batches began.
    late: Histogram,
    /// Ticks and microseconds at the last answer, to tell how long a tick is.
    began: (u64, u64),
    /// State of the generator that picks pages.
    random: u64,
}

impl TimedWrites {
    pub(super) fn new() -> Self {
        Self {
            running: None,
            histogram: Histogram::new(),
            late: Histogram::new(),
            began: (0, 0),
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Picks other pages than a copy of this guest does.
    pub(super) fn reseed(&mut self, number: u64) {
        // The generator's state is never 0.
        self.random = (self.random ^ number).max(1);
    }

    /// Ends the writing; the times are kept.
    pub(super) fn stop(&mut self) {
        self.running = None;
    }

    /// What was timed since the last answer, in nanoseconds.
    fn take(&mut self, now_micros: u64) -> Latency {
        let ticks = tsc::now();
        let elapsed = (ticks.saturating_sub(self.began.0), now_micros.saturating_sub(self.began.1));
        self.began = (ticks, now_micros);
        let nanoseconds = |ticks: u64| match elapsed.0 {
            0 => 0,
            all => (u128::from(ticks) * u128::from(elapsed.1) * 1000 / u128::from(all)) as u64,
        };
        let seen = &self.histogram;
        let latency = Latency {
            writes: seen.total(),
            p50_ns: nanoseconds(seen.quantile(500)),
            p99_ns: nanoseconds(seen.quantile(990)),
            p999_ns: nanoseconds(seen.quantile(999)),
            max_ns: nanoseconds(seen.max()),
            late_p99_us: self.late.quantile(990),
            late_max_us: self.late.max(),
        };
        (self.histogram, self.late) = (Histogram::new(), Histogram::new());
        latency
    }

    /// A number below `below`, which is not 0.
    fn pick(&mut self, below: u64) -> u64 {
        self.number() % below
    }

    /// The next number of the generator.
    pub(super) fn number(&mut self) -> u64 {
        // Xorshift.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

impl<P: Pages, T: Transport> Service<'_, P, T> {
    /// Says what was timed, and begins anew with `rate` writes a second, or none.
    pub(super) fn obey_latency(
        &mut self,
        target: Target,
        rate: u64,
        seconds: Option<u64>,
        now_micros: u64,
    ) -> Reply {
        if rate > 0 && self.workload.held(target) == 0 {
            return refusal(ErrorCode::Empty, format_args!("no pages of class {target} are held"));
        }
        self.timed.running = (rate > 0).then(|| (target, Pace::new(rate, seconds, BATCH_MILLIS, now_micros)));
        Reply::Ok(Done::Latency(self.timed.take(now_micros)))
    }

    /// Does the writes that are due.
    pub(super) fn step_latency(&mut self, now_micros: u64) -> Wait {
        let Some((target, pace)) = &mut self.timed.running else { return Wait::Forever };
        let (target, due) = (*target, pace.due(now_micros));
        let held = self.workload.held(target);
        if let Some(micros) = due.late_micros {
            self.timed.late.record(micros);
        }
        if due.wait == Wait::Forever || held == 0 {
            self.timed.stop();
        }
        if held == 0 {
            return Wait::Forever;
        }
        for _ in 0..due.times {
            let ordinal = self.timed.pick(held);
            if let Some(ticks) = self.workload.timed_rewrite(target, ordinal) {
                self.timed.histogram.record(ticks);
            }
        }
        due.wait
    }
}
