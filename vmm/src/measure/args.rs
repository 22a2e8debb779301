//! What `samepage measure` is asked for.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::ArgGroup;
use memory::PAGE_BYTES;
use memory::size::{SizeError, parse_size};

/// Bounds of --index-limit.
const INDEX_BYTES: (u64, u64) = (1 << 20, 1 << 44);
/// Measure what sharing equal pages would save: of a fleet, of any process, of memory images
#[derive(clap::Args)]
#[command(group = ArgGroup::new("what").multiple(true))]
#[command(after_help = "Examples:
  samepage measure                                   the fleet that is up
  samepage measure web-0 web-1                       two of its guests
  samepage measure --pid 4711 --pid 4712             two VMs of QEMU, Firecracker or Cloud Hypervisor
  samepage measure --pid 4711 --freeze               while the VM is stopped
  samepage measure --pid 4711 --range 7f0000000000-7f0040000000
  samepage measure --file a.mem --file b.mem --json  raw memory images
  samepage measure --page-types                      by what the Linux guests' kernels use pages for
  samepage measure --html report.html --beyond       near-duplicates and compression too, as a page of plots
  samepage measure --watch 60 --every 5              how long pages stay shared

Nothing is stopped or changed by it, unless --freeze is given. resources/docs/guide/measuring.md says what each number means, which memory of a
process is taken for a guest's, and how sure it is that pages that are called equal are.")]
pub(crate) struct Args {
    /// Guests of the fleet, by name; all of them if none is named and nothing else is
    #[arg(value_name = "GUEST", group = "what")]
    pub(super) guests: Vec<String>,
    /// The fleet; not needed while only one is up
    #[arg(long, visible_alias = "name", value_name = "NAME")]
    pub(super) fleet: Option<String>,
    /// A process with guest memory; repeatable
    #[arg(long, value_name = "PID", group = "what")]
    pub(super) pid: Vec<u32>,
    /// Addresses of guest memory in the process, hexadecimal, as in /proc/PID/maps; with more than
    /// one process as PID:START-END; repeatable
    #[arg(long, value_name = "[PID:]START-END", requires = "pid", value_parser = range)]
    pub(super) range: Vec<PidRange>,
    /// A raw memory image; repeatable
    #[arg(long, value_name = "FILE", group = "what")]
    pub(super) file: Vec<PathBuf>,
    /// Put processes and files into a trust domain of this name: pages are shared within it only;
    /// repeatable
    #[arg(long, value_name = "NAME=PID|FILE,...", value_parser = domain)]
    pub(super) domain: Vec<Domain>,
    /// Break pages down by their use in the guests' kernels: asks the agents of the fleet's Linux
    /// guests
    #[arg(long)]
    pub(super) page_types: bool,
    /// The same for a process or a file, from a copy of the guest's /proc/kpageflags; with several
    /// as PID=FLAGS or FILE=FLAGS; repeatable
    #[arg(long, value_name = "[PID|FILE=]FLAGS")]
    pub(super) page_flags: Vec<String>,
    /// RAM of the guests of --page-flags below the hole under 4 GiB
    #[arg(long, value_name = "SIZE", requires = "page_flags", default_value = "3G", value_parser = |text: &str| parse_size(text, 1 << 20, 4 << 30))]
    pub(super) low_memory: u64,
    /// Stop the processes (SIGSTOP) while they are read; they resume even if this process is killed
    #[arg(long)]
    pub(super) freeze: bool,
    /// Sample distinct contents for near-duplicates and compressibility
    #[arg(long, value_name = "CONTENTS", num_args = 0..=1, default_missing_value = "2000", value_parser = clap::value_parser!(u32).range(30..=1_000_000))]
    pub(super) beyond: Option<u32>,
    /// Measure repeatedly for SECONDS: how long pages stay shared
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["freeze", "file"], value_parser = clap::value_parser!(u64).range(1..=864_000))]
    pub(super) watch: Option<u64>,
    /// Time between two looks of --watch, in seconds
    #[arg(long, value_name = "SECONDS", requires = "watch", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(super) every: u64,
    /// Threads that read and hash [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) threads: Option<u16>,
    /// Memory for the index, with its unit; if it needs more, guest memory is read several times
    /// [default: a quarter of available memory]
    #[arg(long, value_name = "SIZE", value_parser = index_size)]
    pub(super) index_limit: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    /// Write every number to a CSV file
    #[arg(long, value_name = "FILE")]
    pub(super) csv: Option<PathBuf>,
    /// Write a self-contained HTML report
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
}

fn index_size(text: &str) -> Result<u64, SizeError> {
    let size = parse_size(text, INDEX_BYTES.0, INDEX_BYTES.1);
    size.map_err(|e| match e {
        SizeError::Range { text, .. } => SizeError::Index { text, least: INDEX_BYTES.0 },
        other => other,
    })
}

/// Addresses, and their process if given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PidRange {
    pub(super) pid: Option<u32>,
    pub(super) hvas: Range<u64>,
}

/// Parses `[PID:]START-END`.
pub(super) fn range(text: &str) -> anyhow::Result<PidRange> {
    let expected = "expected [PID:]START-END in hexadecimal, as in /proc/PID/maps";
    let (pid, hvas) = match text.split_once(':') {
        Some((pid, rest)) => {
            (Some(pid.parse().with_context(|| format!("{pid:?} is no process; {expected}"))?), rest)
        }
        None => (None, text),
    };
    let hex = |text: &str| {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        u64::from_str_radix(digits, 16).with_context(|| format!("{text:?} is no address; {expected}"))
    };
    let (start, end) = hvas.split_once('-').with_context(|| format!("no '-' in {hvas:?}; {expected}"))?;
    let hvas = hex(start)?..hex(end)?;
    ensure!(hvas.start < hvas.end, "{:x} is not above {:x}; {expected}", hvas.end, hvas.start);
    let is_page = |at: u64| at.is_multiple_of(PAGE_BYTES);
    ensure!(is_page(hvas.start) && is_page(hvas.end), "not whole pages: both addresses must end in 000");
    Ok(PidRange { pid, hvas })
}

/// A trust domain, and the processes and files in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Domain {
    pub(super) name: String,
    pub(super) members: Vec<String>,
}

/// Parses `NAME=MEMBER,...`.
pub(super) fn domain(text: &str) -> anyhow::Result<Domain> {
    let (name, members) = text.split_once('=').context("expected NAME=PID,... or NAME=FILE,...")?;
    ensure!(!name.is_empty() && !members.is_empty(), "expected NAME=PID,... or NAME=FILE,...");
    Ok(Domain { name: name.into(), members: members.split(',').map(str::to_owned).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_written_as_in_maps() {
        assert!(range("7f000-1000").unwrap_err().to_string().contains("not above"));
        assert_eq!(
            range("4711:7f0000000000-0x7f0000002000").unwrap(),
            PidRange { pid: Some(4711), hvas: 0x7f00_0000_0000..0x7f00_0000_2000 }
        );
        for wrong in ["", "1000", "x-y", "a:1000-2000", "1000-2001", "2000-1000", "1000-1000"] {
            assert!(range(wrong).is_err(), "{wrong}");
        }
    }
}
