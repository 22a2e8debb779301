//! A VM's RAM: private anonymous memory, demand-paged, never reserved, with guard pages around it.
#![expect(unsafe_code, reason = "maps and advises guest RAM")]

use std::io;
use std::sync::Arc;

use devices::GuestMemory;
use thiserror::Error;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::Extent;
use super::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES, Stretch, stretches};

/// Alignment of each mapping, so that the host can use 2 MiB pages; also the size of each guard.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Why guest RAM could not be set up.
#[derive(Debug, Error)]
pub enum RamError {
    /// The size is not one a guest can have.
    #[error(
        "memory of {bytes} bytes is not possible: expected {} MiB to {} GiB in whole 4 KiB pages",
        MIN_RAM_BYTES >> 20,
        MAX_RAM_BYTES >> 30
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The host refused the mapping.
    #[error("cannot map {} MiB of guest RAM: check `ulimit -v` and vm.overcommit_memory", bytes >> 20)]
    Map {
        /// Length of the stretch.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The host refused the advice.
    #[error("cannot {what} for guest RAM")]
    Advise {
        /// What was asked of the kernel.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The stretches overlap, which `layout` never makes.
    #[error("guest RAM regions do not fit together")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
}

/// Guest RAM. It stays mapped until the process ends, for a VM lives in a process of its own and
/// devices keep references to it.
#[derive(Clone)]
pub struct Ram {
    memory: Arc<GuestMemory>,
}

impl Ram {
    /// Maps `bytes` of RAM in the layout of [`stretches`].
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        if !(MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&bytes) || !bytes.is_multiple_of(super::PAGE_BYTES) {
            return Err(RamError::Size { bytes });
        }
        let mut regions = Vec::new();
        for stretch in stretches(bytes) {
            regions.extend(map(stretch)?);
        }
        Ok(Self { memory: Arc::new(GuestMemory::from_regions(regions)?) })
    }

    /// The memory, for devices and loaders.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Where each stretch lies in this process.
    pub fn extents(&self) -> Vec<Extent> {
        self.memory
            .iter()
            .map(|r| Extent { gpa: r.start_addr().0, hva: r.as_ptr() as u64, bytes: r.len() })
            .collect()
    }

    /// Total bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Opts all of RAM in to (or out of) the host kernel's samepage merging. Opting out breaks every merge.
    pub fn set_mergeable(&self, on: bool) -> Result<(), RamError> {
        match on {
            true => self.advise(libc::MADV_MERGEABLE, "allow samepage merging (MADV_MERGEABLE)"),
            false => self.advise(libc::MADV_UNMERGEABLE, "undo samepage merging (MADV_UNMERGEABLE)"),
        }
    }

    /// Lets the host back RAM with 2 MiB pages where it can, or forbids it.
    pub fn set_huge_pages(&self, on: bool) -> Result<(), RamError> {
        match on {
            true => self.advise(libc::MADV_HUGEPAGE, "allow huge pages (MADV_HUGEPAGE)"),
            false => self.advise(libc::MADV_NOHUGEPAGE, "forbid huge pages (MADV_NOHUGEPAGE)"),
        }
    }

    fn advise(&self, advice: i32, what: &'static str) -> Result<(), RamError> {
        for s in self.extents() {
            // SAFETY: the range is a mapping this Ram made and never unmaps; the advices used keep its contents.
            let done = unsafe { libc::madvise(s.hva as *mut libc::c_void, s.bytes as usize, advice) };
            if done != 0 {
                return Err(RamError::Advise { what, source: io::Error::last_os_error() });
            }
        }
        Ok(())
    }
}

/// Reserves the stretch with a guard before and behind it, then makes the inside usable.
fn map(stretch: Stretch) -> Result<Option<GuestRegionMmap>, RamError> {
    let len = stretch.bytes as usize;
    let failed = |source| RamError::Map { bytes: stretch.bytes, source };
    // The guards take up the slack of the alignment: at least one page each.
    let reserve = len + 2 * HUGE_PAGE_BYTES;
    // SAFETY: a fresh reservation at an address of the kernel's choice touches no other mapping.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            reserve,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    let start = (base as usize + 1).next_multiple_of(HUGE_PAGE_BYTES);
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: [start, start + len) lies inside the reservation made above, which nothing else uses yet.
    let inside = unsafe { libc::mmap(start as *mut libc::c_void, len, prot, flags | libc::MAP_FIXED, -1, 0) };
    if inside == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    // Dumps of the VMM must not hold what guests keep in memory. Failure costs nothing but dump size.
    // SAFETY: the range is the mapping just made; the advice changes no contents.
    unsafe { libc::madvise(inside, len, libc::MADV_DONTDUMP) };
    // SAFETY: the mapping has this address, length and protection and is never unmapped.
    let region = unsafe { MmapRegion::build_raw(inside.cast(), len, prot, flags) }
        .map_err(|e| failed(io::Error::other(e)))?;
    Ok(GuestRegionMmap::new(region, GuestAddress(stretch.gpa)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn a_guest_above_the_hole_has_two_stretches_and_costs_nothing_until_touched() {
        let ram = Ram::new(8 << 30).unwrap();
        assert_eq!(ram.bytes(), 8 << 30);
        assert_eq!(ram.extents().len(), 2);
        assert!(ram.extents().iter().all(|m| m.hva.is_multiple_of(HUGE_PAGE_BYTES as u64)));
        ram.memory().write_obj(7u64, GuestAddress((9 << 30) - 8)).unwrap();
        assert!(ram.memory().write_obj(7u64, GuestAddress((3 << 30) - 4)).is_err());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [0, 4096, (16 << 20) + 1, MAX_RAM_BYTES + 4096] {
            assert!(matches!(Ram::new(bytes), Err(RamError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn merging_can_be_allowed_and_undone_where_the_kernel_has_it() {
        let ram = Ram::new(16 << 20).unwrap();
        if std::path::Path::new("/sys/kernel/mm/ksm").exists() {
            ram.set_mergeable(true).unwrap();
            ram.set_mergeable(false).unwrap();
        }
    }
}
