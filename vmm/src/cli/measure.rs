//! `samepage measure`: what sharing would save of any memory, what is saved already.

mod output;
mod subjects;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ArgGroup;
use indicatif::{ProgressBar, ProgressStyle};

use super::progress::{draw_target, interrupt_flag, is_set};
use crate::measure::scan::{Options, scan};
use crate::measure::source::Source;
use crate::memory::PAGE_BYTES;
use crate::memory::size::{SizeError, parse_size};
use output::Measured;
use subjects::Subjects;

/// The smallest index that may be asked for, and the largest.
const INDEX_BYTES: (u64, u64) = (1 << 20, 1 << 44);
/// Pages that are looked at a second time where somebody may be writing.
const SECOND_LOOK_PAGES: u64 = 64 * 1024;

/// Measure what sharing equal pages would save: of a fleet, of any process, of memory images
#[derive(clap::Args)]
#[command(group = ArgGroup::new("what").multiple(true))]
#[command(after_help = "Examples:
  samepage measure                                   the fleet that is up
  samepage measure web-0 web-1                       two of its guests
  samepage measure --pid 4711 --pid 4712             two VMs of QEMU, Firecracker or Cloud Hypervisor
  samepage measure --pid 4711 --range 7f0000000000-7f0040000000
  samepage measure --pid 4711 --freeze               while the VM stands still
  samepage measure --file a.mem --file b.mem --json  raw memory images

Nothing is stopped or changed by it, unless --freeze is given. resources/docs/measuring.md says what each number means, which memory of a
process is taken for a guest's, and how sure it is that pages that are called equal are.")]
pub(super) struct Args {
    /// Guests of the fleet, by name; all of them if none is named and nothing else is
    #[arg(value_name = "GUEST", group = "what")]
    guests: Vec<String>,
    /// Which fleet; not needed while only one is up
    #[arg(long, value_name = "NAME")]
    fleet: Option<String>,
    /// A process with guest memory; may be given more than once
    #[arg(long, value_name = "PID", group = "what")]
    pid: Vec<u32>,
    /// Addresses of guest memory in the process, hexadecimal, as in /proc/PID/maps; with more than one process as
    /// PID:START-END; may be given more than once
    #[arg(long, value_name = "[PID:]START-END", requires = "pid", value_parser = subjects::range)]
    range: Vec<subjects::PidRange>,
    /// A raw memory image; may be given more than once
    #[arg(long, value_name = "FILE", group = "what")]
    file: Vec<PathBuf>,
    /// Put processes and files into a trust domain of this name: pages are shared within it only; may be given more than once
    #[arg(long, value_name = "NAME=PID|FILE,...", value_parser = subjects::domain)]
    domain: Vec<subjects::Domain>,
    /// Stop the processes (SIGSTOP) while they are read; they go on whatever happens to this one
    #[arg(long)]
    freeze: bool,
    /// Threads that read and hash [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Memory for the index, with its unit; with less than it needs the memory is read several times [default: a quarter of
    /// what is available]
    #[arg(long, value_name = "SIZE", value_parser = index_size)]
    index_limit: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn index_size(text: &str) -> Result<u64, SizeError> {
    parse_size(text, INDEX_BYTES.0, INDEX_BYTES.1)
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let interrupted = interrupt_flag()?;
    let mut subjects = Subjects::find(&args)?;
    let frozen = subjects.freeze(args.freeze)?;
    let sources: Vec<&dyn Source> = subjects.sources();
    let mut options = Options { second_look_pages: SECOND_LOOK_PAGES, ..Options::default() };
    if let Some(threads) = args.threads {
        options.threads = threads.into();
    }
    if let Some(bytes) = args.index_limit {
        options.index_limit_bytes = bytes;
    }
    let bar = bar();
    let scan = scan(&sources, &options, &mut |done, total| {
        bar.set_length(total * PAGE_BYTES);
        bar.set_position(done * PAGE_BYTES);
        !is_set(&interrupted)
    });
    bar.finish_and_clear();
    let scan = scan?;
    let measured = Measured::new(&subjects, &scan, scan.look_again(&sources)?, options.threads)?;
    drop(frozen);
    measured.print(args.json)?;
    Ok(ExitCode::SUCCESS)
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template(
        "read [{bar:32}] {binary_bytes:>11} / {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    );
    let bar = ProgressBar::with_draw_target(Some(1), draw_target());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "))
}
