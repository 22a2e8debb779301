//! The host's own numbers: what it has, what is free, how it stalls.
//!
//! Where a file is absent the reading is None. The limits of our control group limit the fleet: see
//! [`super::groups`].

use std::path::PathBuf;

use thiserror::Error;

use super::PAGE_BYTES;
use super::groups;
pub use super::groups::GroupMemory;
use super::meminfo::Meminfo;
use super::psi::Psi;

/// Why a host cannot be read.
#[derive(Debug, Error)]
pub enum ReadingError {
    /// A file that every Linux has.
    #[error("cannot read {path}: expected a Linux with /proc")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A field that every Linux has.
    #[error("{path} has no {field}: expected a line such as \"{field}: 123 kB\"")]
    Field { path: PathBuf, field: &'static str },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Readings {
    /// `MemTotal`.
    pub total_pages: u64,
    /// `Hugetlb`: the pool of huge pages, of all sizes, used or not. Nothing else gets any of it.
    pub pool_pages: u64,
    /// `MemAvailable`.
    pub available_pages: u64,
    /// `SwapFree`, or what our control group may still have of it.
    pub swap_free_pages: u64,
    /// `SecPageTables`, all VMs' second-level page tables; 0 where the kernel does not count them.
    pub second_level_pages: u64,
    /// Stalls: our control group's if it has a limit and shows them, else the whole host's; None
    /// without `CONFIG_PSI`.
    pub psi: Option<Psi>,
    pub group: GroupMemory,
}

/// Where files are read.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl Host {
    /// A host whose files are below `root`: for tests.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Reads everything.
    ///
    /// # Errors
    /// `/proc/meminfo` cannot be read or lacks a field. Everything else may be absent.
    pub fn read(&self) -> Result<Readings, ReadingError> {
        let path = self.root.join("proc/meminfo");
        let meminfo =
            Meminfo::at(&path).map_err(|source| ReadingError::Read { path: path.clone(), source })?;
        let known = |field: &str| meminfo.bytes(field).map(|bytes| bytes / PAGE_BYTES);
        let pages = |field: &'static str| {
            known(field).ok_or_else(|| ReadingError::Field { path: path.clone(), field })
        };
        let (group, stalls) = groups::read(&self.root, &self.root.join("proc/self"));
        let own = group.limit_pages.and(stalls).and_then(|path| Psi::at(&path));
        let (total_pages, swap_free) = (pages("MemTotal")?, pages("SwapFree")?);
        let pool = known("Hugetlb").or_else(|| {
            // Before 4.20 there was one size only.
            meminfo.number("HugePages_Total")?.checked_mul(known("Hugepagesize")?)
        });
        Ok(Readings {
            total_pages,
            pool_pages: pool.unwrap_or(0),
            available_pages: pages("MemAvailable")?,
            swap_free_pages: group.swap_free_pages.map_or(swap_free, |most| most.min(swap_free)),
            second_level_pages: known("SecPageTables").unwrap_or(0),
            psi: own.or_else(|| Psi::at(&self.root.join("proc/pressure/memory"))),
            group,
        })
    }
}

impl Readings {
    /// Memory of the host besides its pool of huge pages.
    pub fn host_pages(&self) -> u64 {
        self.total_pages.saturating_sub(self.pool_pages)
    }

    /// Memory that may still be taken: of the host, and of its control group.
    pub fn free_pages(&self) -> u64 {
        self.group.free_pages.map_or(self.available_pages, |group| group.min(self.available_pages))
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
