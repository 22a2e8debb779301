//! Addresses in processes of the host, and the size of a page.

use std::fmt;
use std::ops::{Add, Range, Sub};

use serde::{Deserialize, Serialize};

/// Bytes of a page of the host, the unit of everything here.
pub const PAGE_BYTES: u64 = 4096;

/// [`PAGE_BYTES`] as the length of a slice.
pub const PAGE: usize = to_usize(PAGE_BYTES);

/// A length or an index in this process's memory, which is addressed by 64 bits.
#[expect(clippy::cast_possible_truncation, reason = "a usize has 64 bits, or this does not compile")]
pub const fn to_usize(n: u64) -> usize {
    const { assert!(size_of::<usize>() == size_of::<u64>()) };
    n as usize
}

/// An address in a process of the host, in bytes: in this one, or in one that is read. It promises
/// nothing about the memory there: operations on guest RAM take a `GuestRange`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hva(pub u64);

impl Hva {
    /// The address of a value of this process.
    pub fn of<T>(value: *const T) -> Self {
        Self(value.expose_provenance() as u64)
    }

    /// The address of the page that it is in.
    pub const fn page(self) -> Self {
        Self(self.0 & !(PAGE_BYTES - 1))
    }

    /// Whether a page begins there.
    pub const fn is_page(self) -> bool {
        self.0.is_multiple_of(PAGE_BYTES)
    }

    /// The addresses of `bytes` bytes from here on, cut at the end of the address space.
    pub const fn span(self, bytes: u64) -> Range<Self> {
        self..Self(self.0.saturating_add(bytes))
    }
}

impl Add<u64> for Hva {
    type Output = Self;

    fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl Sub for Hva {
    type Output = u64;

    fn sub(self, other: Self) -> u64 {
        self.0 - other.0
    }
}

impl fmt::Display for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_written_as_a_number() {
        assert_eq!(serde_json::to_string(&Hva(4096)).unwrap(), "4096");
        assert_eq!(serde_json::from_str::<Hva>("4096").unwrap(), Hva(4096));
        assert_eq!(
            (Hva(0x1fff).page(), Hva(0x1fff).is_page(), Hva(0x2000).is_page()),
            (Hva(0x1000), false, true)
        );
        assert_eq!(Hva(u64::MAX - 1).span(4096), Hva(u64::MAX - 1)..Hva(u64::MAX));
    }
}
