//! Control groups: which one a process is in, what it and those above it may take, and what they
//! could still take.
//!
//! Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst;
//! mountinfo and cgroup in proc(5).

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::PAGE_BYTES;

/// Levels of control groups that are read.
const MAX_LEVELS: usize = 64;
/// Without a limit version 1 shows about 2^63.
const NO_LIMIT_BYTES: u64 = 1 << 62;

/// The version of a hierarchy of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A process's control group in a hierarchy that may limit memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    version: Version,
    directory: PathBuf,
    /// The directory of the highest group that can be seen: the mount.
    top: PathBuf,
}

/// The limits of one group, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Level {
    /// Its limit; None without one.
    limit: Option<u64>,
    /// Its use.
    used: u64,
    /// What the kernel would reclaim from it at once, at its limit.
    droppable: u64,
    /// Swap that it may still use; None without a limit.
    swap_free: Option<u64>,
}

/// A control group's limit and use, with all groups above it. Pages of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupMemory {
    /// The least limit on the way up to the root; None if there is none.
    pub limit_pages: Option<u64>,
    /// Memory that may still be taken under the limits: unused, or droppable at once.
    pub free_pages: Option<u64>,
    /// Swap that may still be used; None if no group limits it.
    pub swap_free_pages: Option<u64>,
}

/// The control group of the process whose files in `/proc` are in `process`, on the host whose
/// files are below `root`: what it may take, and the file of its own stalls.
pub(super) fn read(root: &Path, process: &Path) -> (GroupMemory, Option<PathBuf>) {
    let text = |name: &str| fs::read_to_string(process.join(name)).unwrap_or_default();
    let places = places(&text("cgroup"), &text("mountinfo"));
    let group = GroupMemory::of(places.iter().flat_map(|place| levels(root, place)));
    let stalls = places.first().map(|place| below(root, &place.directory).join("memory.pressure"));
    (group, stalls)
}

/// The groups of a process in hierarchies that may have the memory controller, by its
/// `/proc/PID/cgroup`, where `mountinfo` shows them.
fn places(cgroup: &str, mountinfo: &str) -> Vec<Place> {
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::parse).collect();
    let place = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (id, controllers, group) = (fields.next()?, fields.next()?, fields.next()?);
        let version = match (id, controllers) {
            ("0", "") => Version::Two,
            _ if controllers.split(',').any(|controller| controller == "memory") => Version::One,
            _ => return None,
        };
        // The group was removed while a process is in it.
        let group = Path::new(group.strip_suffix(" (deleted)").unwrap_or(group));
        let mounts = || mounts.iter().filter(|mount| mount.version == version);
        // The mount that shows the most levels: its root is the shortest.
        let showing =
            mounts().filter(|mount| mount.shows(group)).min_by_key(|mount| mount.root.as_os_str().len());
        // In a container or a namespace that shows none of it, what is mounted is the container's
        // own group.
        let mount = showing.or_else(|| mounts().next())?;
        let inside = group.strip_prefix(&mount.root).ok().filter(|_| mount.shows(group));
        let directory = mount.point.join(inside.unwrap_or(Path::new("")));
        Some(Place { version, directory, top: mount.point.clone() })
    };
    cgroup.lines().filter_map(place).collect()
}

/// A mounted hierarchy of control groups.
#[derive(Debug)]
struct Mount {
    version: Version,
    /// The group that is seen at the mount.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// A line such as `35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup
    /// rw,memory`.
    fn parse(line: &str) -> Option<Self> {
        let (mount, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let version = match (kind.next()?, kind.nth(1)?) {
            ("cgroup2", _) => Version::Two,
            ("cgroup", options) if options.split(',').any(|option| option == "memory") => Version::One,
            _ => return None,
        };
        let mut mount = mount.split(' ').skip(3).map(unescape);
        Some(Self { version, root: mount.next()?.into(), point: mount.next()?.into() })
    }

    /// Whether `group` is this mount's root or below it. A group outside of our namespace is shown
    /// with `..`.
    fn shows(&self, group: &Path) -> bool {
        group.starts_with(&self.root) && !group.components().any(|part| part == Component::ParentDir)
    }
}

/// A space, a tab, a newline and a backslash are three octal digits in mountinfo.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (escape, character)| text.replace(escape, character))
}

/// `path`, which is absolute, on the host whose files are below `root`.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// The group of `place` and those above it.
fn levels(root: &Path, place: &Place) -> Vec<Level> {
    let (own, top) = (below(root, &place.directory), below(root, &place.top));
    // The group is not where it should be: use the mount, the most that is visible.
    let own = if own.is_dir() { own } else { top.clone() };
    let up = own.ancestors().take_while(|path| path.starts_with(&top)).take(MAX_LEVELS);
    up.enumerate()
        .filter_map(|(n, directory)| {
            let file = |name: &str| fs::read_to_string(directory.join(name)).ok();
            match place.version {
                // A parent limits its children only if it says so.
                Version::One
                    if n > 0 && file("memory.use_hierarchy").is_some_and(|text| text.trim() == "0") =>
                {
                    None
                }
                Version::One => Level::of_version_1(file),
                Version::Two => Level::of_version_2(file),
            }
        })
        .collect()
}

impl Level {
    /// By the files of version 1; None without the memory controller.
    fn of_version_1(file: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let limit_of = |name: &str| number(&file(name)?).filter(|limit| *limit < NO_LIMIT_BYTES);
        let used = number(&file("memory.usage_in_bytes")?)?;
        let stat = file("memory.stat").unwrap_or_default();
        // Including the groups below it, whose use is in its own.
        let field =
            |name: &str| field(&stat, &format!("total_{name}")).or_else(|| field(&stat, name)).unwrap_or(0);
        // The least limit of the groups above it, also where they are outside of the mount.
        let above =
            Some(field("hierarchical_memory_limit")).filter(|limit| (1..NO_LIMIT_BYTES).contains(limit));
        let limit = limit_of("memory.limit_in_bytes").into_iter().chain(above).min();
        let file_pages = FilePages {
            inactive: field("inactive_file"),
            active: field("active_file"),
            unwritten: field("dirty") + field("writeback"),
            slab: 0,
        };
        let memory = Self { limit, used, droppable: file_pages.droppable(), swap_free: None };
        // This limit is for memory and swap together: what memory may still take of it is not left
        // for swap.
        let swap_free = limit_of("memory.memsw.limit_in_bytes").map(|limit| {
            let used = file("memory.memsw.usage_in_bytes").and_then(|text| number(&text)).unwrap_or(used);
            let both = Self { limit: Some(limit), used, ..memory };
            both.free().unwrap_or(0).saturating_sub(memory.free().unwrap_or(0))
        });
        Some(Self { swap_free, ..memory })
    }

    /// By the files of version 2; None without the memory controller, and at the root, which has no
    /// limit.
    fn of_version_2(file: impl Fn(&str) -> Option<String>) -> Option<Self> {
        // "max" is no number, and no limit.
        let limit_of = |name: &str| number(&file(name)?);
        let used = number(&file("memory.current")?)?;
        let stat = file("memory.stat").unwrap_or_default();
        let field = |name: &str| field(&stat, name).unwrap_or(0);
        // Above `high` it is throttled until it makes no progress: no memory can be taken there.
        let limit = [limit_of("memory.max"), limit_of("memory.high")].into_iter().flatten().min();
        let swap_free = limit_of("memory.swap.max")
            .map(|limit| limit.saturating_sub(limit_of("memory.swap.current").unwrap_or(0)));
        let file_pages = FilePages {
            inactive: field("inactive_file"),
            active: field("active_file"),
            unwritten: field("file_dirty") + field("file_writeback"),
            slab: field("slab_reclaimable"),
        };
        Some(Self { limit, used, droppable: file_pages.droppable(), swap_free })
    }

    fn free(&self) -> Option<u64> {
        Some(self.limit?.saturating_sub(self.used.saturating_sub(self.droppable)))
    }
}

/// Copies of data on disk that a group has, in bytes.
#[derive(Clone, Copy, Debug)]
struct FilePages {
    inactive: u64,
    active: u64,
    /// Of these, pages that must be written first.
    unwritten: u64,
    /// Kernel objects that can be made again.
    slab: u64,
}

impl FilePages {
    /// What can be dropped at once. As for the whole host's `MemAvailable`, half of what is in use
    /// counts as needed: programs run from it.
    fn droppable(self) -> u64 {
        let clean = (self.inactive + self.active / 2).saturating_sub(self.unwritten);
        clean + self.slab / 2
    }
}

impl GroupMemory {
    fn of(levels: impl Iterator<Item = Level>) -> Self {
        let least = |known: Option<u64>, bytes: Option<u64>| {
            let pages = bytes.map(|bytes| bytes / PAGE_BYTES);
            known.into_iter().chain(pages).min()
        };
        levels.fold(Self::default(), |memory, level| Self {
            limit_pages: least(memory.limit_pages, level.limit),
            free_pages: least(memory.free_pages, level.free()),
            swap_free_pages: least(memory.swap_free_pages, level.swap_free),
        })
    }
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A field of `memory.stat`: lines of a name and a number.
fn field(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| number(line.strip_prefix(name)?.strip_prefix(' ')?))
}

#[cfg(test)]
#[path = "groups_tests.rs"]
mod tests;
