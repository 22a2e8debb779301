//! The host's own numbers: what it has, what is free, how it stalls. The only part of this module that opens files.
//!
//! Where a file is absent the reading is None and what is known otherwise counts. What a control group of ours is limited to limits
//! the fleet, in version 2 (`memory.max`) as in version 1 (`memory.limit_in_bytes`), at every level up to the root.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::view::Psi;

/// Bytes of a page.
const PAGE_BYTES: u64 = 4096;
/// Levels of control groups that are looked at.
const MAX_LEVELS: usize = 64;
/// What version 1 shows where there is no limit is about 2^63.
const NO_LIMIT_BYTES: u64 = 1 << 62;

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

/// A control group's limit and use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupMemory {
    /// The least limit on the way up to the root; None if there is none.
    pub limit_pages: Option<u64>,
    /// What may still be taken under that limit.
    pub free_pages: Option<u64>,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Readings {
    /// `MemTotal`.
    pub total_pages: u64,
    /// `MemAvailable`.
    pub available_pages: u64,
    /// `SwapFree`.
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
        let group_paths = self.group_paths();
        let group = GroupMemory::read(&group_paths);
        let own = group.limit_pages.and_then(|_| {
            group_paths.first().and_then(|(directory, _)| read_psi(&directory.join("memory.pressure")))
        });
        Ok(Readings {
            total_pages: pages("MemTotal")?,
            available_pages: pages("MemAvailable")?,
            swap_free_pages: pages("SwapFree")?,
            second_level_pages: meminfo_pages(&text, "SecPageTables").unwrap_or(0),
            psi: own.or_else(|| read_psi(&self.root.join("proc/pressure/memory"))),
            group,
        })
    }

    /// The directories of our control group and of those above it, with the version of each.
    fn group_paths(&self) -> Vec<(PathBuf, Version)> {
        let Ok(text) = fs::read_to_string(self.root.join("proc/self/cgroup")) else { return Vec::new() };
        let base = self.root.join("sys/fs/cgroup");
        let mut found = Vec::new();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let (version, mounts) = if id == "0" && controllers.is_empty() {
                (Version::Two, vec![base.clone(), base.join("unified")])
            } else if controllers.split(',').any(|c| c == "memory") {
                (Version::One, vec![base.join("memory")])
            } else {
                continue;
            };
            let Some(mount) = mounts.into_iter().find(|m| version.is_mounted_at(m)) else { continue };
            // In a namespace or a container the path may lead above the mount, which shows our own group as its root.
            let own = mount.join(path.trim_start_matches('/'));
            let own = if path.contains("..") || !own.is_dir() { mount.clone() } else { own };
            let levels = own.ancestors().take_while(|p| p.starts_with(&mount)).take(MAX_LEVELS);
            found.extend(levels.map(|p| (p.to_path_buf(), version)));
        }
        found
    }
}

/// The version of a hierarchy of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    fn is_mounted_at(self, mount: &Path) -> bool {
        let marker = match self {
            Self::One => "memory.usage_in_bytes",
            Self::Two => "cgroup.controllers",
        };
        mount.join(marker).exists()
    }

    /// The files of the limit and of the use.
    fn files(self) -> (&'static str, &'static str) {
        match self {
            Self::One => ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            Self::Two => ("memory.max", "memory.current"),
        }
    }
}

impl GroupMemory {
    fn read(paths: &[(PathBuf, Version)]) -> Self {
        let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let mut memory = Self { limit_pages: None, free_pages: None };
        for (directory, version) in paths {
            let (limit, current) = version.files();
            // "max" is no number, and no limit.
            let Some(limit) = number(directory.join(limit)).filter(|l| *l < NO_LIMIT_BYTES) else { continue };
            let current = number(directory.join(current)).unwrap_or(0);
            let least = |known: Option<u64>, pages: u64| Some(known.map_or(pages, |k| k.min(pages)));
            memory.limit_pages = least(memory.limit_pages, limit / PAGE_BYTES);
            memory.free_pages = least(memory.free_pages, limit.saturating_sub(current) / PAGE_BYTES);
        }
        memory
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
    /// The least of what the host has, what our control group may take, and what was asked for.
    ///
    /// # Errors
    /// 0 was asked for, or more than there is.
    pub fn capacity(&self, asked_pages: Option<u64>) -> Result<Capacity, ReadingError> {
        let (most_pages, limited_by) = match self.group.limit_pages {
            Some(limit) if limit < self.total_pages => (limit, Limit::ControlGroup),
            _ => (self.total_pages, Limit::Host),
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
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / (PAGE_BYTES / 1024))
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
