//! What `/proc/PID/smaps` and `/proc/PID/status` show of a process's memory, in pages of 4096
//! bytes.
//!
//! Source: the kernel's Documentation/filesystems/proc.rst. These are the kernel's own counters,
//! kept apart from the page table entries that `/proc/PID/pagemap` shows; so each can be checked
//! against the other.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::maps::addresses;
use super::meminfo::value;
use super::{Hva, PAGE_BYTES};

/// The value of `key` in a line such as `VmPTE:   132 kB`, in pages; parts of a page count.
fn kib_line(line: &str, key: &str) -> Option<u64> {
    value(line, key).map(|kib| kib.saturating_mul(1024).div_ceil(PAGE_BYTES))
}

fn kib_field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| kib_line(line, key))
}

/// Whole-process figures, which the kernel keeps ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessPages {
    /// Anonymous pages with a frame, the zero frame not counted.
    pub anonymous: u64,
    /// Pages of files with a frame, those of slabs and other shared memory not counted.
    pub file: u64,
    /// Pages of shared memory (memory files) with a frame.
    pub shared_memory: u64,
    pub page_tables: u64,
    /// Anonymous pages on swap.
    pub swapped: u64,
}

impl ProcessPages {
    /// Of process `pid`. `NotFound` means that there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        std::fs::read_to_string(format!("/proc/{pid}/status")).map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let field = |key| kib_field(text, key).unwrap_or(0);
        Self {
            anonymous: field("RssAnon"),
            file: field("RssFile"),
            shared_memory: field("RssShmem"),
            page_tables: field("VmPTE"),
            swapped: field("VmSwap"),
        }
    }
}

/// Page faults of all threads of process `pid` so far, including those that the kernel takes on
/// their behalf (for a guest, say). While the count does not change, no page is added to the page
/// table, and none is replaced, except by KSM.
pub fn faults(pid: u32) -> io::Result<u64> {
    parse_faults(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?)
        .ok_or(io::ErrorKind::InvalidData.into())
}

/// Minor and major ones are the tenth and the twelfth field. The second is a name in parentheses,
/// which may hold anything.
fn parse_faults(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split_ascii_whitespace();
    let minor: u64 = fields.nth(7)?.parse().ok()?;
    let major: u64 = fields.nth(1)?.parse().ok()?;
    Some(minor.wrapping_add(major))
}

/// One mapping of a process, by the kernel's books.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Area {
    /// Its line, as in `/proc/PID/maps`.
    pub header: String,
    /// Bytes that have a frame here or are on swap. Pages of a file or of shared memory that this
    /// process has not touched are not among them.
    pub held_bytes: u64,
    /// It maps a device and no memory (VM_IO, VM_PFNMAP): it cannot be read from outside.
    pub is_device: bool,
}

impl Area {
    /// Every mapping of process `pid`, by address. A zombie and a thread of the kernel have none.
    pub fn of(pid: u32) -> io::Result<Vec<Self>> {
        Self::read(BufReader::new(File::open(format!("/proc/{pid}/smaps"))?))
    }

    fn read(smaps: impl BufRead) -> io::Result<Vec<Self>> {
        let mut areas: Vec<Self> = Vec::new();
        for line in smaps.lines() {
            let line = line?;
            if mapping_start(&line).is_some() {
                areas.push(Self { header: line, ..Self::default() });
            } else if let Some(area) = areas.last_mut() {
                // Huge pages of the pool are not in Rss.
                for key in ["Rss", "Shared_Hugetlb", "Private_Hugetlb", "Swap"] {
                    area.held_bytes += kib_line(&line, key).unwrap_or(0) * PAGE_BYTES;
                }
                if let Some(flags) = line.strip_prefix("VmFlags:") {
                    area.is_device = flags.split_ascii_whitespace().any(|flag| matches!(flag, "io" | "pf"));
                }
            }
        }
        Ok(areas)
    }
}

/// Pages of some ranges of a process, by the kernel's books.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RangePages {
    /// With a frame, the zero frame not counted.
    pub resident: u64,
    /// On swap.
    pub swapped: u64,
}

impl RangePages {
    /// Sums up all mappings of process `pid` that begin inside one of `ranges` (addresses).
    pub fn of(pid: u32, ranges: &[Range<Hva>]) -> io::Result<Self> {
        Self::read(BufReader::new(File::open(format!("/proc/{pid}/smaps"))?), ranges)
    }

    fn read(smaps: impl BufRead, ranges: &[Range<Hva>]) -> io::Result<Self> {
        let (mut sum, mut inside) = (Self::default(), false);
        for line in smaps.lines() {
            let line = line?;
            if let Some(start) = mapping_start(&line) {
                inside = ranges.iter().any(|range| range.contains(&start));
            } else if inside {
                // Huge pages of the pool are not in Rss.
                for key in ["Rss", "Shared_Hugetlb", "Private_Hugetlb"] {
                    sum.resident += kib_line(&line, key).unwrap_or(0);
                }
                sum.swapped += kib_line(&line, "Swap").unwrap_or(0);
            }
        }
        Ok(sum)
    }
}

/// A process's part of the host's frames, in pages. Reading it walks its whole page table: some
/// milliseconds a GiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharePages {
    /// Pages with a frame, its own or one that it shares; the zero frame not counted.
    pub resident_pages: u64,
    /// Its part of their frames: of a frame that n pages share 1/n (the kernel's Pss).
    pub frames: u64,
    /// The frames that it alone has: what it adds to the host, and what comes back when it ends.
    pub marginal_frames: u64,
}

impl SharePages {
    /// Of process `pid`, guest memory and everything else.
    pub fn of(pid: u32) -> io::Result<Self> {
        std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let sum = |keys: &[&str]| keys.iter().filter_map(|key| kib_field(text, key)).sum();
        // Huge pages of the pool are in none of the other fields.
        Self {
            resident_pages: sum(&["Rss", "Shared_Hugetlb", "Private_Hugetlb"]),
            frames: sum(&["Pss", "Private_Hugetlb"]),
            marginal_frames: sum(&["Private_Clean", "Private_Dirty", "Private_Hugetlb"]),
        }
    }
}

/// The first address of the mapping that `line` introduces, if it introduces one.
fn mapping_start(line: &str) -> Option<Hva> {
    addresses(line.split_once(' ')?.0).map(|hvas| hvas.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_by_key() {
        let text = "Name:\tx\nRssAnon:\t     412 kB\nRssFile:\t    8 kB\nRssShmem:\t       0 kB\nVmPTE:\t      13 kB\nVmSwap:\t       8 kB\n";
        let pages = ProcessPages { anonymous: 103, file: 2, shared_memory: 0, page_tables: 4, swapped: 2 };
        assert_eq!(ProcessPages::parse(text), pages);
        assert!(ProcessPages::of(std::process::id()).unwrap().anonymous > 0);
        assert_eq!(ProcessPages::of(u32::MAX).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn faults_are_found_behind_any_name() {
        let stat = "12 (a) b (c) R 1 2 3 4 5 6 70 8 9 10 11 12 13\n";
        assert_eq!(parse_faults(stat), Some(79));
        assert_eq!((parse_faults("12 (a"), parse_faults("12 (a) R 1 2")), (None, None));
        let own = faults(std::process::id()).unwrap();
        std::hint::black_box(vec![1u8; 8 << 20]);
        assert!(faults(std::process::id()).unwrap() > own);
    }

    #[test]
    fn each_mapping_has_what_it_holds() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0 \nRss:    8 kB\nSwap:   4 kB\nSwapPss: 400 kB\nVmFlags: rd wr mr\n\
                     9000-a000 rw-s 00000000 00:01 4711 /x (deleted)\nShared_Hugetlb:    2048 kB\nVmFlags: rd wr io pf\n";
        let areas = Area::read(smaps.as_bytes()).unwrap();
        let area =
            |header: &str, held_bytes, is_device| Area { header: header.into(), held_bytes, is_device };
        assert_eq!(
            areas,
            [
                area("1000-3000 rw-p 00000000 00:00 0 ", 12 << 10, false),
                area("9000-a000 rw-s 00000000 00:01 4711 /x (deleted)", 2 << 20, true)
            ]
        );
        assert!(Area::of(std::process::id()).unwrap().iter().any(|area| area.held_bytes > 0));
    }

    #[test]
    fn what_a_process_adds_is_its_own() {
        let text = "Rss:  100 kB\nPss:   60 kB\nPss_Dirty:  8 kB\nPrivate_Clean:  4 kB\nPrivate_Dirty:  40 kB\nPrivate_Hugetlb:  2048 kB\n";
        let expected = SharePages { resident_pages: 25 + 512, frames: 15 + 512, marginal_frames: 11 + 512 };
        assert_eq!(SharePages::parse(text), expected);
        let own = SharePages::of(std::process::id()).unwrap();
        assert!(
            own.marginal_frames > 0 && own.marginal_frames <= own.frames && own.frames <= own.resident_pages
        );
    }

    #[test]
    fn only_mappings_inside_the_ranges_count() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0 \nRss:    8 kB\nSwap:   4 kB\nSwapPss: 400 kB\n\
                     3000-5000 rw-p 00000000 00:01 4711 /memfd:x (deleted)\nRss:    4 kB\n\
                     7000-8000 ---p 00000000 00:00 0 \nRss:   40 kB\n\
                     9000-a000 rw-p 00000000 00:00 0 \nPrivate_Hugetlb:    2048 kB\nVmFlags: rd wr\n";
        let read = |ranges: &[Range<u64>]| {
            let ranges: Vec<_> = ranges.iter().map(|range| Hva(range.start)..Hva(range.end)).collect();
            RangePages::read(smaps.as_bytes(), &ranges).unwrap()
        };
        assert_eq!(read(std::slice::from_ref(&(0x1000..0x5000))), RangePages { resident: 3, swapped: 1 });
        assert_eq!(read(&[0x3000..0x5000, 0x9000..0xa000]), RangePages { resident: 513, swapped: 0 });
        assert_eq!(read(&[]), RangePages::default());
    }
}
