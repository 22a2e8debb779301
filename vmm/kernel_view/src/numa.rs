//! NUMA as the host's kernel shows it: which nodes have memory, which processors are near, and on
//! which nodes a process's pages lie.
//!
//! Source: the kernel's Documentation/ABI/stable/sysfs-devices-node and numa(7) of the manual
//! pages.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};

const NODES: &str = "/sys/devices/system/node";
/// More numbers than this in one list are nonsense: no kernel has so many nodes or processors.
const MAX_NUMBERS: u32 = 1 << 16;

/// Pages on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePages {
    pub node: u32,
    pub pages: u64,
}

/// The nodes with memory, or an error where the kernel knows none.
pub fn nodes() -> io::Result<Vec<u32>> {
    fs::read_to_string(format!("{NODES}/has_memory")).map(|text| list(&text))
}

/// The processors of a node; none of one that is memory alone.
pub fn processors(node: u32) -> io::Result<Vec<u32>> {
    fs::read_to_string(format!("{NODES}/node{node}/cpulist")).map(|text| list(&text))
}

/// A list as `0-3,8`.
fn list(text: &str) -> Vec<u32> {
    let ranges = text.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?.min(MAX_NUMBERS))
    });
    ranges.flatten().collect()
}

/// The pages with a frame of the mappings of `pid` that begin in `memory`, by node. Reading it
/// walks the page tables.
pub fn pages_of(pid: u32, memory: &[Range<u64>]) -> io::Result<Vec<NodePages>> {
    Ok(parse(&fs::read_to_string(format!("/proc/{pid}/numa_maps"))?, memory))
}

fn parse(text: &str, memory: &[Range<u64>]) -> Vec<NodePages> {
    let mut pages: BTreeMap<u32, u64> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let start = words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
        if !start.is_some_and(|start| memory.iter().any(|range| range.contains(&start))) {
            continue;
        }
        let small =
            line.rsplit_once("kernelpagesize_kB=").and_then(|(_, kib)| kib.trim().parse::<u64>().ok());
        let small = small.unwrap_or(4) / 4;
        for (node, count) in words.filter_map(|word| word.strip_prefix('N')?.split_once('=')) {
            if let (Ok(node), Ok(count)) = (node.parse(), count.parse::<u64>()) {
                *pages.entry(node).or_default() += count.saturating_mul(small);
            }
        }
    }
    pages.into_iter().map(|(node, pages)| NodePages { node, pages }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_of_ranges_and_of_numbers() {
        assert_eq!(list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(list("\n"), [] as [u32; 0]);
        assert!(list("0-4294967295").len() <= MAX_NUMBERS as usize + 1);
    }

    #[test]
    fn pages_are_counted_by_node_within_the_memory_alone() {
        let text = "7f0000000000 default anon=3 dirty=3 N0=1 N1=2 kernelpagesize_kB=4\n\
                    7f0000200000 bind:1 file=/memfd:x\\040(deleted) huge dirty=2 N1=2 kernelpagesize_kB=2048\n\
                    7f1000000000 default anon=9 N0=9 kernelpagesize_kB=4\n";
        let memory = 0x7f00_0000_0000..0x7f00_1000_0000;
        let pages = parse(text, std::slice::from_ref(&memory));
        let on = |node, pages| NodePages { node, pages };
        assert_eq!(pages, [on(0, 1), on(1, 2 + 1024)]);
    }

    #[test]
    fn a_node_of_this_host_has_memory_and_our_own_pages_are_somewhere() {
        let Ok(nodes) = nodes() else {
            testing::skipped(module_path!(), "this kernel has no NUMA");
            return;
        };
        assert!(!nodes.is_empty() && processors(nodes[0]).is_ok());
        let Ok(pages) = pages_of(std::process::id(), std::slice::from_ref(&(0..u64::MAX))) else {
            testing::skipped(module_path!(), "this kernel has no numa_maps");
            return;
        };
        assert!(!pages.is_empty() && pages.iter().all(|on| nodes.contains(&on.node)), "{pages:?}");
    }
}
