//! Guest RAM and everything that maps, advises or reads it.
//!
//! Every mmap, madvise, fallocate and userfaultfd call on guest RAM is in this crate, and with them
//! the host side's unsafe code. It must not know KVM, a device model, a fleet or why pages are
//! merged: its callers say what to do to which pages, and it checks that this is safe.
//!
//! Begin with [`ram`] (how RAM is mapped, and its lock), then [`replace`] (the only way in which a
//! page is replaced: freeze, compare, map, wake), [`slab`] (sealed memfds), `reclaim` (giving back)
//! and [`parking`] (sampling what is used). [`remote`] and [`scan`] look into other processes; what
//! the kernel shows of them is read by `kernel_view`.

// A page or an address that is cut short is another one. Tests count small numbers.
#![cfg_attr(
    not(test),
    warn(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)
)]

use std::ops::Range;

use serde::{Deserialize, Serialize};

mod discard_log;
pub mod file;
pub mod file_region;
pub mod flat;
mod freeze;
pub mod handler;
pub mod image;
pub mod in_flight;
pub mod layout;
mod mapped_file;
pub mod maps;
pub mod merge_log;
pub mod numa;
pub mod own;
pub mod page;
pub mod page_buffer;
pub mod page_out;
pub mod page_scan;
pub mod page_set;
pub mod parker;
pub mod parking;
pub mod ram;
mod reclaim;
pub mod remote;
pub mod replace;
pub mod resident;
pub mod shared_ram;
pub mod size;
pub mod slab;
pub mod swap_filler;
mod uffd;
pub mod userfault;
pub mod written;

pub use page::{Gpa, Hva, PAGE, PAGE_BYTES, PageNo, PageRange, SlabPage};
pub use page_set::PageSet;

/// One contiguous stretch of guest RAM as mapped in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest-physical address of its first byte.
    #[serde(with = "gpa_number")]
    pub gpa: Gpa,
    /// Its address in the process that runs the guest; a multiple of the page size.
    pub hva: Hva,
    /// Its length in bytes; a multiple of the page size.
    pub bytes: u64,
}

impl Extent {
    /// Where the guest has it.
    pub fn gpas(&self) -> Range<Gpa> {
        self.gpa..Gpa(self.gpa.0.saturating_add(self.bytes))
    }

    /// Where the process has it.
    pub fn hvas(&self) -> Range<Hva> {
        self.hva.span(self.bytes)
    }

    /// Where the process has what the guest has there; None outside.
    pub fn hva_of(&self, gpa: Gpa) -> Option<Hva> {
        self.gpas().contains(&gpa).then(|| self.hva + (gpa.0 - self.gpa.0))
    }

    /// Where the guest has what the process has there; None outside.
    pub fn gpa_of(&self, hva: Hva) -> Option<Gpa> {
        self.hvas().contains(&hva).then(|| Gpa(self.gpa.0 + (hva - self.hva)))
    }
}

/// A guest-physical address is written as its number.
mod gpa_number {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Gpa;

    pub(super) fn serialize<S: Serializer>(gpa: &Gpa, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(gpa.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Gpa, D::Error> {
        u64::deserialize(from).map(Gpa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_written_in_numbers() {
        let extent = Extent { gpa: Gpa(1 << 32), hva: Hva(4096), bytes: 8192 };
        let text = r#"{"gpa":4294967296,"hva":4096,"bytes":8192}"#;
        assert_eq!(serde_json::to_string(&extent).unwrap(), text);
        assert_eq!(serde_json::from_str::<Extent>(text).unwrap(), extent);
    }
}
