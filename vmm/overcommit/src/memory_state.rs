//! How short of memory a host is: four states by free memory, as in ESX (Waldspurger 2002, section
//! 6.3), raised by pressure stall information where the kernel gives it.
//!
//! Downwards a state is entered as soon as free memory falls below its threshold; soft and hard
//! already when it soon will, because the remedies take time. Upwards it goes one state at a time,
//! a margin above the next threshold and after some time only, so that a load at a threshold does
//! not make it swing.

use serde::{Deserialize, Serialize};

use super::knobs::Knobs;
use super::view::{HostView, Psi};

/// The memory state of a host, named by how much is free, as in ESX: from `High`, which is enough,
/// to `Low`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryState {
    /// Enough is free: nothing is taken, and what was taken is given back.
    #[default]
    High,
    /// Balloons are inflated.
    Soft,
    /// First touches are throttled and cold pages paged out too.
    Hard,
    /// Guests are suspended too.
    Low,
}

impl MemoryState {
    /// All of them, from most free memory to least.
    pub const ALL: [Self; 4] = [Self::High, Self::Soft, Self::Hard, Self::Low];

    pub fn name(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Soft => "soft",
            Self::Hard => "hard",
            Self::Low => "low",
        }
    }

    /// The state that is one less short of memory.
    fn eased(self) -> Self {
        match self {
            Self::Low => Self::Hard,
            Self::Hard => Self::Soft,
            Self::Soft | Self::High => Self::High,
        }
    }

    /// Free memory, in percent of capacity, below which this state is entered; for `High`, above
    /// which it is.
    pub fn threshold_percent(self, knobs: &Knobs) -> f64 {
        match self {
            Self::High => knobs.high_percent,
            Self::Soft => knobs.soft_percent,
            Self::Hard => knobs.hard_percent,
            Self::Low => knobs.low_percent,
        }
    }

    /// The same in pages of a host.
    pub fn threshold_pages(self, host: &HostView, knobs: &Knobs) -> u64 {
        percent_of(host.capacity_pages, self.threshold_percent(knobs))
    }
}

/// Why a host is in its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Because {
    /// By what is free now.
    #[default]
    Free,
    /// Free memory falls so fast that it will soon be below the threshold.
    Falling,
    /// Tasks wait for memory, however much is free.
    Stalls,
    /// It was shorter of memory a moment ago: more must be free, or for longer, to leave that
    /// state.
    Before,
}

impl Because {
    pub const ALL: [Self; 4] = [Self::Free, Self::Falling, Self::Stalls, Self::Before];

    pub fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Falling => "falling",
            Self::Stalls => "stalls",
            Self::Before => "before",
        }
    }
}

/// This percentage of `pages`.
pub fn percent_of(pages: u64, percent: f64) -> u64 {
    (pages as f64 * percent / 100.0) as u64
}

/// The state a host is in, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryGauge {
    #[serde(alias = "pressure")]
    pub memory_state: MemoryState,
    /// For how long it could have been left upwards; 0 while it could not.
    pub eased_seconds: f64,
    pub because: Because,
}

impl MemoryGauge {
    /// Advances by `passed_seconds` to the host as it is now. Free memory falls by
    /// `falling_pages_per_second`.
    pub fn advance(
        &mut self,
        host: &HostView,
        falling_pages_per_second: f64,
        passed_seconds: f64,
        knobs: &Knobs,
    ) -> MemoryState {
        let percent = |pages: f64| 100.0 * pages / host.capacity_pages.max(1) as f64;
        let free_percent = percent(host.free_pages as f64);
        let falling_percent = percent(falling_pages_per_second.max(0.0)) * knobs.look_ahead_seconds;
        let soon = by_free(free_percent - falling_percent, knobs).min(MemoryState::Soft);
        let very_soon = by_free(free_percent - falling_percent / 2.0, knobs);
        let very_soon = if very_soon >= MemoryState::Hard { MemoryState::Hard } else { MemoryState::High };
        let short = free_percent < knobs.high_percent;
        let stalled = host.psi.map_or(MemoryState::High, |psi| by_stall(psi, short, knobs));
        let free = by_free(free_percent, knobs);
        let at_least = free.max(soon).max(very_soon).max(stalled);
        let eased = self.memory_state.eased();
        if at_least > self.memory_state {
            *self = Self { memory_state: at_least, eased_seconds: 0.0, ..*self };
        } else if self.memory_state > at_least
            && free_percent >= eased.threshold_percent(knobs) + knobs.margin_percent
        {
            self.eased_seconds += passed_seconds;
            if self.eased_seconds >= knobs.hold_seconds {
                *self = Self { memory_state: eased, eased_seconds: 0.0, ..*self };
            }
        } else {
            self.eased_seconds = 0.0;
        }
        self.because = if self.memory_state == free {
            Because::Free
        } else if self.memory_state == soon.max(very_soon) {
            Because::Falling
        } else if self.memory_state == stalled {
            Because::Stalls
        } else {
            Because::Before
        };
        self.memory_state
    }
}

fn by_free(free_percent: f64, knobs: &Knobs) -> MemoryState {
    let below = |state: &&MemoryState| free_percent < state.threshold_percent(knobs);
    [MemoryState::Low, MemoryState::Hard, MemoryState::Soft].iter().find(below).copied().unwrap_or_default()
}

/// Stalls may have causes elsewhere on the host: while enough is free they do not make it low.
fn by_stall(psi: Psi, short: bool, knobs: &Knobs) -> MemoryState {
    if short && psi.full_avg10_percent >= knobs.psi_low_percent {
        MemoryState::Low
    } else if psi.full_avg10_percent >= knobs.psi_hard_percent {
        MemoryState::Hard
    } else if psi.some_avg10_percent >= knobs.psi_soft_percent {
        MemoryState::Soft
    } else {
        MemoryState::High
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(free_pages: u64) -> HostView {
        HostView { capacity_pages: 10_000, free_pages, ..HostView::default() }
    }

    fn after(gauge: &mut MemoryGauge, free_pages: u64, seconds: usize) -> MemoryState {
        for _ in 0..seconds {
            gauge.advance(&host(free_pages), 0.0, 1.0, &Knobs::default());
        }
        gauge.memory_state
    }

    #[test]
    fn down_at_once_and_up_by_steps() {
        let mut gauge = MemoryGauge::default();
        for (free, state) in [
            (600, MemoryState::High),
            (400, MemoryState::High),
            (399, MemoryState::Soft),
            (199, MemoryState::Hard),
            (99, MemoryState::Low),
        ] {
            assert_eq!(after(&mut gauge, free, 1), state, "{free}");
        }
        assert_eq!(after(&mut gauge, 1000, 4), MemoryState::Low, "it must hold for five seconds");
        assert_eq!(after(&mut gauge, 1000, 1), MemoryState::Hard);
        assert_eq!(after(&mut gauge, 449, 100), MemoryState::Hard, "soft begins at 4 %, and a margin above");
        assert_eq!(after(&mut gauge, 450, 5), MemoryState::Soft);
        assert_eq!(after(&mut gauge, 649, 100), MemoryState::Soft);
        assert_eq!(after(&mut gauge, 650, 5), MemoryState::High);
    }

    #[test]
    fn a_state_has_its_reason() {
        let mut gauge = MemoryGauge::default();
        let mut look = |free, falling, full| {
            let psi = Some(Psi { some_avg10_percent: full, full_avg10_percent: full });
            let memory_state =
                gauge.advance(&HostView { psi, ..host(free) }, falling, 1.0, &Knobs::default());
            (memory_state, gauge.because)
        };
        assert_eq!(look(2000, 0.0, 0.0), (MemoryState::High, Because::Free));
        assert_eq!(look(2000, 500.0, 0.0), (MemoryState::Soft, Because::Falling));
        assert_eq!(look(2000, 0.0, 0.0), (MemoryState::Soft, Because::Before));
        assert_eq!(look(2000, 0.0, 20.0), (MemoryState::Hard, Because::Stalls));
        assert_eq!(look(50, 0.0, 20.0), (MemoryState::Low, Because::Free));
        assert_eq!(look(8000, 0.0, 0.0), (MemoryState::Low, Because::Before));
    }

    #[test]
    fn time_below_the_margin_does_not_count() {
        let mut gauge = MemoryGauge { memory_state: MemoryState::Soft, ..MemoryGauge::default() };
        for _ in 0..10 {
            assert_eq!(after(&mut gauge, 700, 4), MemoryState::Soft);
            assert_eq!(after(&mut gauge, 500, 1), MemoryState::Soft);
        }
    }

    #[test]
    fn what_falls_fast_is_met_before_it_is_gone() {
        let falling = |rate| MemoryGauge::default().advance(&host(2000), rate, 1.0, &Knobs::default());
        assert_eq!(falling(400.0), MemoryState::High, "20 %, and in four seconds 4 %");
        assert_eq!(falling(401.0), MemoryState::Soft);
        assert_eq!(falling(901.0), MemoryState::Hard, "in two seconds less than 2 %");
        assert_eq!(falling(1e9), MemoryState::Hard, "it is not yet gone");
        assert_eq!(falling(f64::NAN), MemoryState::High);
    }

    #[test]
    fn stalls_raise_it() {
        let with = |free, some, full| {
            let psi = Psi { some_avg10_percent: some, full_avg10_percent: full };
            let view = HostView { psi: Some(psi), ..host(free) };
            MemoryGauge::default().advance(&view, 0.0, 1.0, &Knobs::default())
        };
        assert_eq!(with(5000, 0.0, 0.0), MemoryState::High);
        assert_eq!(with(5000, 20.0, 0.0), MemoryState::Soft);
        assert_eq!(with(5000, 20.0, 15.0), MemoryState::Hard);
        assert_eq!(
            with(5000, 99.0, 99.0),
            MemoryState::Hard,
            "half of it is free: no guest may be suspended"
        );
        assert_eq!(with(500, 99.0, 99.0), MemoryState::Low);
        assert_eq!(with(500, f64::NAN, f64::NAN), MemoryState::High);
    }

    proptest! {
        /// However free memory swings within a margin of one value, the state changes at most three
        /// times.
        #[test]
        fn noise_within_the_margin_does_not_make_it_swing(
            base in 0_u64..2000, noise in prop::collection::vec(0_u64..50, 200),
        ) {
            let mut gauge = MemoryGauge::default();
            let mut changes = 0;
            for more in noise {
                let before = gauge.memory_state;
                changes += usize::from(gauge.advance(&host(base + more), 0.0, 1.0, &Knobs::default()) != before);
            }
            prop_assert!(changes <= 3, "{changes}");
        }
    }
}
