//! What the kernel's page merging (KSM) shows of one process, and of the host.
//!
//! Source: the kernel's Documentation/admin-guide/mm/ksm.rst and
//! Documentation/filesystems/proc.rst.

use std::fs;
use std::io;
use std::path::Path;

/// `/proc/PID/ksm_stat`. Counters this kernel does not have are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KsmStat {
    /// Pages the process has in KSM's merged frames, the first of each frame included.
    pub merging_pages: u64,
    /// Pages KSM has replaced by the kernel's zero frame.
    pub zero_pages: u64,
    /// Pages KSM keeps records of.
    pub rmap_items: u64,
}

impl KsmStat {
    /// The counters of process `pid`. `NotFound` means no such process, or a kernel before 6.1.
    pub fn of(pid: u32) -> io::Result<Self> {
        fs::read_to_string(format!("/proc/{pid}/ksm_stat")).map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut stat = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(' ') else {
                continue;
            };
            let slot = match key {
                "ksm_merging_pages" => &mut stat.merging_pages,
                "ksm_zero_pages" => &mut stat.zero_pages,
                "ksm_rmap_items" => &mut stat.rmap_items,
                _ => continue,
            };
            *slot = value.trim().parse().unwrap_or(0);
        }
        stat
    }
}

/// Whether KSM has pages of any process of this host, merged or only remembered. If not, each
/// process's counters are 0 and need not be read.
pub fn has_pages() -> bool {
    let directory = Path::new("/sys/kernel/mm/ksm");
    let has = |name: &str| counter(directory, name).is_some_and(|pages| pages > 0);
    ["pages_shared", "pages_unshared", "pages_volatile", "ksm_zero_pages"].into_iter().any(has)
}

/// A number from a file of `/sys/kernel/mm/ksm`.
pub fn counter(directory: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(directory.join(name)).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let stat = KsmStat::parse(
            "ksm_rmap_items 12\nksm_zero_pages 3\nksm_merging_pages 7\nksm_process_profit -4\nksm_merge_any: no\n",
        );
        assert_eq!(stat, KsmStat { merging_pages: 7, zero_pages: 3, rmap_items: 12 });
        assert_eq!(KsmStat::parse(""), KsmStat::default());
    }
}
