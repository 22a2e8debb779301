//! How a guest stands against the others when memory is short.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use memory::PAGE_BYTES;
use memory::size::{SizeError, parse_size};

/// A guest's default shares for each MiB: a guest of twice the memory weighs twice.
const SHARES_PER_MIB: u64 = 10;
/// The most shares of a guest.
const MAX_SHARES: u32 = 100_000_000;
/// The default minimum is a guest's memory divided by this.
const MINIMUM_PART: u64 = 4;

/// What a guest is promised when memory is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// It is left at least this much.
    pub min_bytes: u64,
    /// It is left at most this much while others want more.
    pub max_bytes: u64,
    /// Its weight against the others.
    pub shares: u32,
    /// Higher suffers later.
    pub priority: u32,
}

impl Reservation {
    /// The default for a guest of this much memory.
    pub fn usual(memory_bytes: u64) -> Self {
        let min_bytes = (memory_bytes / MINIMUM_PART).next_multiple_of(PAGE_BYTES);
        let shares = (memory_bytes >> 20).saturating_mul(SHARES_PER_MIB).clamp(1, MAX_SHARES.into()) as u32;
        Self { min_bytes, max_bytes: memory_bytes, shares, priority: 0 }
    }
}

/// What is wrong with a guest's reservation.
#[derive(Debug, Error)]
pub enum ReservationError {
    /// A size.
    #[error("{key}")]
    Size {
        /// Which.
        key: &'static str,
        /// What is wrong with it.
        #[source]
        source: SizeError,
    },
    /// The minimum is above the maximum.
    #[error("min = {min_bytes} bytes is more than max = {max_bytes} bytes: expected at most as much")]
    Order {
        /// The minimum.
        min_bytes: u64,
        /// The maximum.
        max_bytes: u64,
    },
    /// No shares, or too many.
    #[error("shares = {0} is not possible: expected 1 to {MAX_SHARES}")]
    Shares(u32),
}

/// The keys of a fleet file.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReservationKeys<'a> {
    pub(super) min: Option<&'a String>,
    pub(super) max: Option<&'a String>,
    pub(super) shares: Option<u32>,
    pub(super) priority: Option<u32>,
}

impl ReservationKeys<'_> {
    /// The reservation of a guest of this much memory.
    pub(super) fn of(&self, memory_bytes: u64) -> Result<Reservation, ReservationError> {
        let size = |key: &'static str, text: Option<&String>, usual| match text {
            None => Ok(usual),
            Some(text) => {
                parse_size(text, 0, memory_bytes).map_err(|source| ReservationError::Size { key, source })
            }
        };
        let usual = Reservation::usual(memory_bytes);
        let max_bytes = size("max", self.max, usual.max_bytes)?;
        let min_bytes = size("min", self.min, usual.min_bytes.min(max_bytes))?;
        if min_bytes > max_bytes {
            return Err(ReservationError::Order { min_bytes, max_bytes });
        }
        let shares = self.shares.unwrap_or(usual.shares);
        if !(1..=MAX_SHARES).contains(&shares) {
            return Err(ReservationError::Shares(shares));
        }
        Ok(Reservation { min_bytes, max_bytes, shares, priority: self.priority.unwrap_or(usual.priority) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reservation(min: &str, max: &str, shares: Option<u32>) -> Result<Reservation, String> {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let (min, max) = (text(min), text(max));
        let keys = ReservationKeys { min: min.as_ref(), max: max.as_ref(), shares, priority: None };
        keys.of(64 << 20).map_err(|e| os::one_line(&e))
    }

    #[test]
    fn what_is_not_said_is_usual() {
        let usual = Reservation { min_bytes: 16 << 20, max_bytes: 64 << 20, shares: 640, priority: 0 };
        assert_eq!(reservation("", "", None).unwrap(), usual);
        assert_eq!(reservation("0M", "", Some(1)).unwrap(), Reservation { min_bytes: 0, shares: 1, ..usual });
        // A maximum below the usual minimum brings that down.
        assert_eq!(
            reservation("", "8M", None).unwrap(),
            Reservation { min_bytes: 8 << 20, max_bytes: 8 << 20, ..usual }
        );
        assert_eq!(Reservation::usual(u64::MAX).shares, MAX_SHARES);
    }

    #[test]
    fn every_mistake_is_named() {
        for (min, max, shares, expected) in [
            ("32M", "16M", None, "expected at most as much"),
            ("", "", Some(0), "shares = 0 is not possible"),
            ("65M", "", None, "min: it cannot be 65M: expected 0M to 64M"),
            ("", "1G", None, "max: it cannot be 1G"),
            ("", "12", None, "no unit"),
        ] {
            let error = reservation(min, max, shares).unwrap_err();
            assert!(error.contains(expected), "{min} {max} {shares:?} gave {error}");
        }
    }
}
