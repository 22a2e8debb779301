//! The host's own numbers: what it has, what is free, how it stalls. The only part of this module that opens files.
//!
//! Where a file is absent the reading is None and what is known otherwise counts. What our control group is limited to limits
//! the fleet: see [`super::groups`].

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::PAGE_BYTES;
use super::groups;
pub use super::groups::GroupMemory;
use super::view::Psi;

/// What keeps a host from being read.
#[derive(Debug, Error)]
pub enum ReadingError {
    /// A file that every Linux has.
    #[error("cannot read {path}: expected a Linux with /proc")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A field that every Linux has.
    #[error("{path} has no {field}: expected a line such as \"{field}: 123 kB\"")]
    Field {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        field: &'static str,
    },
    /// A capacity of nothing.
    #[error(
        "a capacity of 0 is not possible: expected what all guests may take together, at most {most_pages} pages here"
    )]
    NoCapacity {
        /// What there is.
        most_pages: u64,
    },
    /// A capacity beyond what there is.
    #[error(
        "a capacity of {asked_pages} pages is not possible: {limited_by} has {most_pages} pages; give less, or leave it out to \
         use all"
    )]
    TooMuch {
        /// What was asked for.
        asked_pages: u64,
        /// What there is.
        most_pages: u64,
        /// What sets the limit.
        limited_by: Limit,
    },
}

/// What limits the capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// The host's memory.
    Host,
    /// The control group that this process is in, or one above it.
    ControlGroup,
    /// What was asked for.
    Asked,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Host => "this host",
            Self::ControlGroup => "our control group",
            Self::Asked => "the configuration",
        })
    }
}

/// What was read.
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
    /// Stalls: our control group's if it has a limit and says so, else the whole host's; None without `CONFIG_PSI`.
    pub psi: Option<Psi>,
    /// Our control group.
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
        let text =
            fs::read_to_string(&path).map_err(|source| ReadingError::Read { path: path.clone(), source })?;
        let pages = |field: &'static str| {
            meminfo_pages(&text, field).ok_or_else(|| ReadingError::Field { path: path.clone(), field })
        };
        let (group, stalls) = groups::read(&self.root, &self.root.join("proc/self"));
        let own = group.limit_pages.and(stalls).and_then(|path| read_psi(&path));
        let (total_pages, swap_free) = (pages("MemTotal")?, pages("SwapFree")?);
        let pool = meminfo_pages(&text, "Hugetlb").or_else(|| {
            // Before 4.20 there was one size only.
            let count = meminfo_number(&text, "HugePages_Total")?;
            Some(count * meminfo_pages(&text, "Hugepagesize")?)
        });
        Ok(Readings {
            total_pages,
            pool_pages: pool.unwrap_or(0),
            available_pages: pages("MemAvailable")?,
            swap_free_pages: group.swap_free_pages.map_or(swap_free, |most| most.min(swap_free)),
            second_level_pages: meminfo_pages(&text, "SecPageTables").unwrap_or(0),
            psi: own.or_else(|| read_psi(&self.root.join("proc/pressure/memory"))),
            group,
        })
    }
}

/// What guests may take together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// So much.
    pub pages: u64,
    /// What sets it.
    pub limited_by: Limit,
}

impl Readings {
    /// The least of what the host has besides its pool of huge pages, what our control group may take, and what was asked for.
    ///
    /// # Errors
    /// 0 was asked for, or more than there is.
    pub fn capacity(&self, asked_pages: Option<u64>) -> Result<Capacity, ReadingError> {
        let host_pages = self.total_pages.saturating_sub(self.pool_pages);
        let (most_pages, limited_by) = match self.group.limit_pages {
            Some(limit) if limit < host_pages => (limit, Limit::ControlGroup),
            _ => (host_pages, Limit::Host),
        };
        match asked_pages {
            _ if most_pages == 0 => Err(ReadingError::NoCapacity { most_pages }),
            Some(0) => Err(ReadingError::NoCapacity { most_pages }),
            Some(asked_pages) if asked_pages > most_pages => {
                Err(ReadingError::TooMuch { asked_pages, most_pages, limited_by })
            }
            Some(pages) => Ok(Capacity { pages, limited_by: Limit::Asked }),
            None => Ok(Capacity { pages: most_pages, limited_by }),
        }
    }

    /// What the fleet may still take: of its capacity, of the host, and of its control group.
    pub fn free_pages(&self, capacity_pages: u64, used_pages: u64) -> u64 {
        let free = capacity_pages.saturating_sub(used_pages).min(self.available_pages);
        self.group.free_pages.map_or(free, |group| free.min(group))
    }
}

/// The pages of a field of `/proc/meminfo`, which counts in KiB.
fn meminfo_pages(text: &str, field: &str) -> Option<u64> {
    meminfo_number(text, field).map(|kib| kib / (PAGE_BYTES / 1024))
}

/// The number of a field of `/proc/meminfo`.
fn meminfo_number(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().trim_end_matches("kB").trim().parse().ok()
}

fn read_psi(path: &Path) -> Option<Psi> {
    parse_psi(&fs::read_to_string(path).ok()?)
}

/// Parses `some avg10=0.00 avg60=...` and `full avg10=...`.
fn parse_psi(text: &str) -> Option<Psi> {
    let avg10 = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let value: f64 = line.split_whitespace().find_map(|w| w.strip_prefix("avg10="))?.parse().ok()?;
        value.is_finite().then_some(value)
    };
    Some(Psi { some_avg10_percent: avg10("some")?, full_avg10_percent: avg10("full")? })
}

#[cfg(test)]
#[path = "readings_tests.rs"]
mod tests;
