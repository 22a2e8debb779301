//! The environment of a measurement: everything that a figure depends on besides its subject.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;

use serde::{Deserialize, Serialize};

use kernel_view::meminfo::Meminfo;
use machine::probe;
use os::executable;

/// Where the kernel has KSM's knobs.
const KSM: &str = "/sys/kernel/mm/ksm";
/// The knobs that decide how KSM works.
const KSM_KNOBS: [&str; 12] = [
    "run",
    "pages_to_scan",
    "sleep_millisecs",
    "use_zero_pages",
    "smart_scan",
    "advisor_mode",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "max_page_sharing",
    "merge_across_nodes",
];
/// Knobs of the host that are recorded, by the directory they are in.
const KNOBS: [(&str, &[&str]); 3] = [
    (KSM, &KSM_KNOBS),
    ("/sys/kernel/mm/transparent_hugepage", &["enabled", "defrag", "shmem_enabled"]),
    ("/proc/sys/vm", &["max_map_count", "overcommit_memory", "swappiness"]),
];

/// Names and values of KSM's knobs.
pub type KsmKnobs = Vec<(&'static str, String)>;

/// Those that decide how KSM works, as they are now.
pub fn ksm_knobs() -> KsmKnobs {
    let value = |name| Some(fs::read_to_string(Path::new(KSM).join(name)).ok()?.trim().to_owned());
    KSM_KNOBS.iter().filter_map(|name| Some((*name, value(name)?))).collect()
}

/// A machine, its kernel and their settings, when a measurement began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    pub memory_bytes: u64,
    pub swap_bytes: u64,
    pub kernel: String,
    /// The KVM that guests run on.
    pub backend: String,
    pub samepage: String,
    /// Which build of it; empty where that is not known.
    #[serde(default)]
    pub build: String,
    /// Whether root ran it: other users see no frame numbers and cannot set KSM.
    pub root: bool,
    /// Knobs of KSM, of huge pages, of memory, by path. An engine sets those of KSM while it
    /// merges.
    pub knobs: BTreeMap<String, String>,
    /// Processes that wanted a processor in the minute before: other load spoils times.
    pub load: f64,
}

impl Environment {
    /// This machine, now. What cannot be read is left empty.
    pub fn now() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let meminfo = Meminfo::read().unwrap_or_default();
        let bytes = |key| meminfo.bytes(key).unwrap_or(0);
        let mut knobs = BTreeMap::new();
        for (directory, names) in KNOBS {
            for path in names.iter().map(|name| Path::new(directory).join(name)) {
                if let Ok(text) = fs::read_to_string(&path) {
                    knobs.insert(path.display().to_string(), text.trim().to_owned());
                }
            }
        }
        Self {
            cpu: cpu.map_or(String::new(), |(_, name)| name.trim().to_owned()),
            cores: thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: bytes("MemTotal"),
            swap_bytes: bytes("SwapTotal"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            backend: probe::backend_name().into(),
            samepage: env!("CARGO_PKG_VERSION").into(),
            build: executable::build().unwrap_or_default(),
            root: rustix::process::geteuid().is_root(),
            knobs,
            load: read("/proc/loadavg").split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0),
        }
    }

    /// Whether figures of both may be compared: the same machine, kernel and program, run with the
    /// same rights. Knobs are left out: whether KSM was on or off before changes nothing while an
    /// engine sets it.
    pub fn is_like(&self, other: &Self) -> bool {
        let same = |e: &Self| (e.cpu.clone(), e.cores, e.memory_bytes, e.kernel.clone(), e.backend.clone());
        same(self) == same(other) && self.samepage == other.samepage && self.root == other.root
    }

    /// KSM scanned when it began, so that it scans while others are measured too.
    pub fn ksm_runs(&self) -> bool {
        self.knobs.get(&format!("{KSM}/run")).is_some_and(|run| run == "1")
    }

    /// One line of it.
    pub fn line(&self) -> String {
        format!(
            "{}, {} processors, {:.1} GiB; Linux {}, KVM {}, samepage {}; load {:.2}",
            self.cpu,
            self.cores,
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.kernel,
            self.backend,
            self.samepage,
            self.load,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_and_like_itself() {
        let now = Environment::now();
        assert!(now.memory_bytes > 0 && !now.kernel.is_empty() && now.cores > 0, "{now:?}");
        let later = Environment { load: now.load + 1.0, knobs: BTreeMap::new(), ..now.clone() };
        assert!(now.is_like(&later));
        assert!(!now.is_like(&Environment { kernel: "2.6.32".into(), ..now.clone() }));
        assert!(!now.is_like(&Environment { cores: now.cores + 1, ..now.clone() }));
    }
}
