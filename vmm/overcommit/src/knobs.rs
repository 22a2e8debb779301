//! Everything about the policy that can be set, with its defaults.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest that any time may be set to: a day.
const MAX_SECONDS: f64 = 86_400.0;

/// A knob outside of its range.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum KnobError {
    #[error("{knob} = {value} is not possible: expected {least} to {most}")]
    Range {
        knob: &'static str,
        value: f64,
        /// The least it may be.
        least: f64,
        most: f64,
    },
    /// Two that must be in order.
    #[error("{lower} = {low} and {upper} = {high}: expected {lower} below {upper}")]
    Order {
        /// Which must be less.
        lower: &'static str,
        low: f64,
        /// Which must be more.
        upper: &'static str,
        high: f64,
    },
}

macro_rules! knobs {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty = $default:literal, $least:literal ..= $most:expr;)+) => {
        /// The policy's knobs. As TOML or JSON any may be left out, and one that does not exist is
        /// an error.
        #[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, expecting = "a table of knobs")]
        pub struct Knobs {
            $($(#[doc = $doc])+ pub $name: $type,)+
            /// Whether a guest may be stopped at all, after everything else.
            pub may_stop: bool,
        }

        impl Default for Knobs {
            fn default() -> Self {
                Self { $($name: $default,)+ may_stop: true }
            }
        }

        impl Knobs {
            /// Sees that each is within its range; see [`Knobs::check`].
            fn check_ranges(&self) -> Result<(), KnobError> {
                $(
                    let value = self.$name as f64;
                    if !(f64::from($least)..=$most).contains(&value) {
                        let (least, most) = (f64::from($least), $most);
                        return Err(KnobError::Range { knob: stringify!($name), value, least, most });
                    }
                )+
                Ok(())
            }
        }
    };
}

knobs! {
    /// Free memory, in percent of capacity, above which nothing is taken from any guest. Balloons
    /// aim a margin above it.
    high_percent: f64 = 6.0, 0 ..= 90.0;
    /// Below it balloons are inflated and engines merge at urgent priority.
    soft_percent: f64 = 4.0, 0 ..= 90.0;
    /// Below it first touches are throttled and cold pages paged out too.
    hard_percent: f64 = 2.0, 0 ..= 90.0;
    /// Below it guests are suspended too.
    low_percent: f64 = 1.0, 0 ..= 90.0;
    /// A state is left upwards this far above the next higher threshold.
    margin_percent: f64 = 0.5, 0 ..= 10.0;
    /// And only after this time in it.
    hold_seconds: f64 = 5.0, 0 ..= MAX_SECONDS;
    /// Soft begins already when memory falls so fast that it will be below the threshold after this
    /// time; hard after half of it.
    look_ahead_seconds: f64 = 4.0, 0 ..= 600.0;
    /// PSI `some` avg10 that makes it at least soft.
    psi_soft_percent: f64 = 10.0, 0 ..= 100.0;
    /// PSI `full` avg10 that makes it at least hard.
    psi_hard_percent: f64 = 10.0, 0 ..= 100.0;
    /// PSI `full` avg10 that makes it low, if free memory is below the high threshold too.
    psi_low_percent: f64 = 50.0, 0 ..= 100.0;

    /// What an idle page costs more than a used one: 0 nothing, 0.75 four times as much.
    idle_tax: f64 = 0.75, 0 ..= 0.99;
    /// A guest wants memory when it says that it has less to spare than this, in percent of what it
    /// is left.
    wanting_spare_percent: f64 = 5.0, 0 ..= 100.0;
    /// A guest wants memory when it uses more than this, in percent of what it is left.
    wanting_active_percent: f64 = 80.0, 1 ..= 100.0;

    /// What a guest used counts as used for about this time after.
    forget_seconds: f64 = 30.0, 0 ..= MAX_SECONDS;

    /// A balloon is left as it is for a change of less than this, in percent of what the guest was
    /// promised ...
    dead_band_percent: f64 = 1.0, 0 ..= 50.0;
    /// ... or of less than this.
    dead_band_pages: u64 = 256, 0 ..= 1e9;
    /// How fast the size asked for grows.
    inflate_pages_per_second: u64 = 32_768, 1 ..= 1e9;
    /// How fast it shrinks.
    deflate_pages_per_second: u64 = 65_536, 1 ..= 1e9;
    /// A balloon refuses if for this time it hardly comes nearer to its size: by less than a
    /// quarter of what is missing ...
    refusal_seconds: f64 = 15.0, 1 ..= MAX_SECONDS;
    /// ... and more slowly than this.
    refusal_pages_per_second: u64 = 512, 1 ..= 1e9;
    /// It is asked again after this time, and each time after twice that ...
    retry_seconds: f64 = 60.0, 1 ..= MAX_SECONDS;
    /// ... up to this.
    retry_most_seconds: f64 = 3600.0, 1 ..= MAX_SECONDS;

    /// All guests together may touch no more for the first time than would use up free memory in
    /// this time, however much is free.
    brake_seconds: f64 = 1.0, 0 ..= MAX_SECONDS;
    /// First touches are throttled so that free memory lasts for this time.
    throttle_horizon_seconds: f64 = 20.0, 1 ..= MAX_SECONDS;
    /// A guest below its minimum is never held to less than this.
    throttle_floor_pages_per_second: u64 = 1024, 1 ..= 1e9;
    /// How fast pages go to swap, all guests together.
    page_out_pages_per_second: u64 = 16_384, 0 ..= 1e9;
    /// Swap that is left alone.
    swap_reserve_pages: u64 = 4096, 0 ..= 1e12;

    /// Between one guest's suspension and the next one's. The first comes when free memory will not
    /// last for this time.
    suspend_hold_seconds: f64 = 10.0, 0 ..= MAX_SECONDS;
    /// A guest stays suspended for at least this time; each time twice as long ...
    resume_hold_seconds: f64 = 30.0, 0 ..= MAX_SECONDS;
    /// ... up to this, or `turn_seconds` if that is less. A guest that has run for this time since
    /// does not count as suspended lately.
    resume_most_seconds: f64 = 3600.0, 0 ..= MAX_SECONDS;
    /// But no longer than this without its turn: then it changes places with a guest that runs and
    /// has the same priority; with one of a lower priority after a quarter of it, with one of a
    /// higher priority after four times as long.
    turn_seconds: f64 = 120.0, 1 ..= MAX_SECONDS;
    /// A guest that runs again does so for at least this time before another one takes its turn.
    turn_run_seconds: f64 = 15.0, 0 ..= MAX_SECONDS;
    /// A guest is stopped when nothing else has helped for this time, and another one after the
    /// same time again.
    stop_after_seconds: f64 = 60.0, 1 ..= MAX_SECONDS;
}

impl Knobs {
    /// Sees that each knob is within its range, that thresholds are in order, and that nothing is
    /// NaN.
    ///
    /// # Errors
    /// The first knob that is wrong, with its range.
    pub fn check(&self) -> Result<(), KnobError> {
        self.check_ranges()?;
        let order = [
            ("low_percent", self.low_percent, "hard_percent", self.hard_percent),
            ("hard_percent", self.hard_percent, "soft_percent", self.soft_percent),
            ("soft_percent", self.soft_percent, "high_percent", self.high_percent),
        ];
        for (lower, low, upper, high) in order {
            if low >= high {
                return Err(KnobError::Order { lower, low, upper, high });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_possible() {
        assert_eq!(Knobs::default().check(), Ok(()));
    }

    #[test]
    fn what_is_impossible_is_named_with_its_range() {
        let error = |knobs: Knobs| knobs.check().expect_err("an error").to_string();
        let taxed = error(Knobs { idle_tax: 1.0, ..Knobs::default() });
        assert_eq!(taxed, "idle_tax = 1 is not possible: expected 0 to 0.99");
        assert!(error(Knobs { high_percent: f64::NAN, ..Knobs::default() }).contains("high_percent = NaN"));
        assert!(error(Knobs { hold_seconds: -1.0, ..Knobs::default() }).contains("hold_seconds"));
        assert!(error(Knobs { throttle_floor_pages_per_second: 0, ..Knobs::default() }).contains("floor"));
        let crossed = error(Knobs { hard_percent: 5.0, ..Knobs::default() });
        assert_eq!(
            crossed,
            "hard_percent = 5 and soft_percent = 4: expected hard_percent below soft_percent"
        );
    }

    #[test]
    fn unknown_knobs_are_refused() {
        let knobs: Knobs = toml::from_str("idle_tax = 0.5").expect("a knob");
        assert_eq!(knobs, Knobs { idle_tax: 0.5, ..Knobs::default() });
        assert!(toml::from_str::<Knobs>("idle_taxes = 0.5").is_err());
    }
}
