//! The bus: non-overlapping address ranges and the device behind each.
//!
//! One type serves port I/O and MMIO; the VMM keeps one instance of each. It is built before the
//! vCPUs run and only read afterwards, so lookups take no lock; a device has its own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::lock::lock;

/// A device that answers reads and writes in its own range.
///
/// Neither method can fail: an access that makes no sense to the device reads as whatever hardware
/// would show (often zeros) and is counted. `data` is one access, 1, 2, 4 or 8 bytes in
/// little-endian order; any other length must still not panic.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset` bytes into the range. Every byte must be
    /// filled.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` bytes into the range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a range could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusError {
    /// The range has no bytes.
    #[error("device {name} at {base:#x} has an empty range: give it a length of at least 1")]
    Empty {
        /// The device.
        name: &'static str,
        /// First address of the range.
        base: u64,
    },
    /// The range goes past the last address.
    #[error("device {name} at {base:#x} with {len:#x} bytes goes past the last 64-bit address")]
    PastEnd {
        /// The device.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// Bytes in the range.
        len: u64,
    },
    /// Another device is already there. Ranges are given as first and last address.
    #[error(
        "device {name} at {first:#x}..={last:#x} overlaps device {other} at {other_first:#x}..={other_last:#x}"
    )]
    Overlap {
        /// The device to be inserted.
        name: &'static str,
        /// Its first address.
        first: u64,
        /// Its last address.
        last: u64,
        /// The device already there.
        other: &'static str,
        /// Its first address.
        other_first: u64,
        /// Its last address.
        other_last: u64,
    },
}

struct Entry {
    /// Inclusive, so that a range may end at the last address.
    last: u64,
    name: &'static str,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Address ranges, each with its device. Keyed by first address.
#[derive(Default)]
pub struct Bus {
    entries: BTreeMap<u64, Entry>,
}

impl Bus {
    /// Puts `device` at the `len` addresses from `base` on. `name` is for error messages.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        name: &'static str,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let above_base = len.checked_sub(1).ok_or(BusError::Empty { name, base })?;
        let last = base.checked_add(above_base).ok_or(BusError::PastEnd { name, base, len })?;
        // Ranges never overlap, so the one that starts latest at or before `last` is the only
        // candidate.
        if let Some((&other_first, other)) = self.entries.range(..=last).next_back()
            && other.last >= base
        {
            return Err(BusError::Overlap {
                name,
                first: base,
                last,
                other: other.name,
                other_first,
                other_last: other.last,
            });
        }
        self.entries.insert(base, Entry { last, name, device });
        Ok(())
    }

    /// Reads from the device at `addr`. Where no device covers the whole access, fills `data` with
    /// 0xff, as an open bus does, and answers false.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some((offset, entry)) = self.find(addr, data.len()) else {
            data.fill(0xff);
            return false;
        };
        lock(&entry.device).read(offset, data);
        true
    }

    /// Writes to the device at `addr`. Where no device covers the whole access, answers false.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((offset, entry)) = self.find(addr, data.len()) else {
            return false;
        };
        lock(&entry.device).write(offset, data);
        true
    }

    /// The device whose range holds all of `len` bytes from `addr` on, and the offset into that
    /// range.
    fn find(&self, addr: u64, len: usize) -> Option<(u64, &Entry)> {
        let above_addr = u64::try_from(len).ok()?.checked_sub(1)?;
        let last = addr.checked_add(above_addr)?;
        let (&first, entry) = self.entries.range(..=addr).next_back()?;
        (last <= entry.last).then(|| (addr - first, entry))
    }
}

#[cfg(test)]
mod tests;
