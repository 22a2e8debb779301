//! `samepage measure`: what sharing would save of any memory, and what it saves already.

mod csv;
mod figures;
mod output;
mod subjects;
mod table;
mod types;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::ArgGroup;
use indicatif::{ProgressBar, ProgressStyle};

use super::progress::{draw_target, interrupt_flag, is_set};
use measure::MeasureError;
use measure::scan::{Options, Progress, Scan, scan};
use measure::source::Source;
use measure::watch::{MAX_LOOKS, Watched, Watcher};
use memory::PAGE_BYTES;
use memory::size::{SizeError, parse_size};
use os::named_file;
use os::print::outln;
use output::{Measured, SharedNow};
use subjects::Subjects;

/// Bounds of --index-limit.
const INDEX_BYTES: (u64, u64) = (1 << 20, 1 << 44);
/// Pages read a second time where a guest may be writing.
const SECOND_LOOK_PAGES: u64 = 16 * 1024;
/// Poll interval for interrupts between two looks.
const POLL: Duration = Duration::from_millis(50);

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
pub(super) struct Args {
    /// Guests of the fleet, by name; all of them if none is named and nothing else is
    #[arg(value_name = "GUEST", group = "what")]
    guests: Vec<String>,
    /// The fleet; not needed while only one is up
    #[arg(long, visible_alias = "name", value_name = "NAME")]
    fleet: Option<String>,
    /// A process with guest memory; repeatable
    #[arg(long, value_name = "PID", group = "what")]
    pid: Vec<u32>,
    /// Addresses of guest memory in the process, hexadecimal, as in /proc/PID/maps; with more than
    /// one process as PID:START-END; repeatable
    #[arg(long, value_name = "[PID:]START-END", requires = "pid", value_parser = subjects::range)]
    range: Vec<subjects::PidRange>,
    /// A raw memory image; repeatable
    #[arg(long, value_name = "FILE", group = "what")]
    file: Vec<PathBuf>,
    /// Put processes and files into a trust domain of this name: pages are shared within it only;
    /// repeatable
    #[arg(long, value_name = "NAME=PID|FILE,...", value_parser = subjects::domain)]
    domain: Vec<subjects::Domain>,
    /// Break pages down by their use in the guests' kernels: asks the agents of the fleet's Linux
    /// guests
    #[arg(long)]
    page_types: bool,
    /// The same for a process or a file, from a copy of the guest's /proc/kpageflags; with several
    /// as PID=FLAGS or FILE=FLAGS; repeatable
    #[arg(long, value_name = "[PID|FILE=]FLAGS")]
    page_flags: Vec<String>,
    /// RAM of the guests of --page-flags below the hole under 4 GiB
    #[arg(long, value_name = "SIZE", requires = "page_flags", default_value = "3G", value_parser = |text: &str| parse_size(text, 1 << 20, 4 << 30))]
    low_memory: u64,
    /// Stop the processes (SIGSTOP) while they are read; they resume even if this process is killed
    #[arg(long)]
    freeze: bool,
    /// Sample distinct contents for near-duplicates and compressibility
    #[arg(long, value_name = "CONTENTS", num_args = 0..=1, default_missing_value = "2000", value_parser = clap::value_parser!(u32).range(30..=1_000_000))]
    beyond: Option<u32>,
    /// Measure repeatedly for SECONDS: how long pages stay shared
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["freeze", "file"], value_parser = clap::value_parser!(u64).range(1..=864_000))]
    watch: Option<u64>,
    /// Time between two looks of --watch, in seconds
    #[arg(long, value_name = "SECONDS", requires = "watch", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    every: u64,
    /// Threads that read and hash [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Memory for the index, with its unit; if it needs more, guest memory is read several times
    /// [default: a quarter of available memory]
    #[arg(long, value_name = "SIZE", value_parser = index_size)]
    index_limit: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write every number to a CSV file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a self-contained HTML report
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn index_size(text: &str) -> Result<u64, SizeError> {
    let size = parse_size(text, INDEX_BYTES.0, INDEX_BYTES.1);
    size.map_err(|e| match e {
        SizeError::Range { text, .. } => SizeError::Index { text, least: INDEX_BYTES.0 },
        other => other,
    })
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let interrupted = interrupt_flag()?;
    let mut subjects = Subjects::find(&args)?;
    let frozen = subjects.freeze(args.freeze)?;
    let sources: Vec<&dyn Source> = subjects.sources();
    let options = options(&args);
    let scan = read("read", &interrupted, |tell| scan(&sources, &options, tell))?;
    let mut measured = Measured::new(&subjects, &scan, scan.look_again(&sources)?, options.threads)?;
    if args.beyond.is_some() {
        let beyond = read("look closer", &interrupted, |tell| scan.look_beyond(&sources, tell))?;
        measured.beyond = Some(beyond);
    }
    drop(frozen);
    if let Some(seconds) = args.watch {
        let seconds = (Duration::from_secs(seconds), Duration::from_secs(args.every));
        let (watched, note) = watch(&subjects, &scan, &options, seconds, &interrupted)?;
        measured.watched = Some(watched);
        measured.notes.extend(note);
    }
    if let Some(path) = &args.csv {
        let text = csv::text(&measured)?;
        named_file::write(path, text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.html {
        let page = figures::page(&measured).to_string();
        named_file::write(path, page.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    match args.json {
        true => outln!("{}", serde_json::to_string(&measured)?)?,
        false => outln!("{measured}")?,
    }
    Ok(ExitCode::SUCCESS)
}

fn options(args: &Args) -> Options {
    let default = Options::default();
    Options {
        threads: args.threads.map_or(default.threads, usize::from),
        index_limit_bytes: args.index_limit.unwrap_or(default.index_limit_bytes),
        sample_contents: args.beyond.unwrap_or(0) as usize,
        second_look_pages: SECOND_LOOK_PAGES,
    }
}

/// Runs a pass over all memory, with a bar.
fn read<T>(
    name: &'static str,
    interrupted: &AtomicBool,
    work: impl FnOnce(Progress<'_>) -> Result<T, MeasureError>,
) -> Result<T, MeasureError> {
    let style = ProgressStyle::with_template(
        "{prefix} [{bar:32}] {binary_bytes:>11} / {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    );
    let bar = ProgressBar::with_draw_target(Some(1), draw_target()).with_prefix(name);
    let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    let done = work(&mut |done, total| {
        bar.set_length(total * PAGE_BYTES);
        bar.set_position(done * PAGE_BYTES);
        !is_set(interrupted)
    });
    bar.finish_and_clear();
    done
}

/// When to look next, after a look that was due at `last` and ended by `now`. Looks due in between
/// are skipped; the last one is at the end, and there are at least two.
fn next_look(last: Option<Duration>, now: Duration, every: Duration, length: Duration) -> Option<Duration> {
    let Some(last) = last else { return Some(Duration::ZERO) };
    if last >= length || (now >= length && !last.is_zero()) {
        return None;
    }
    let periods = last.max(now).as_nanos() / every.as_nanos().max(1);
    Some(every.saturating_mul(periods as u32 + 1).min(length))
}

/// Looks repeatedly until the time is over, Control-C, or a guest is gone; the latter two return
/// the looks so far, with a note.
fn watch(
    subjects: &Subjects,
    first: &Scan,
    options: &Options,
    (length, every): (Duration, Duration),
    interrupted: &AtomicBool,
) -> anyhow::Result<(Watched, Option<String>)> {
    let sources = subjects.sources();
    let options = Options { sample_contents: 0, second_look_pages: 0, ..*options };
    let bar = ProgressBar::with_draw_target(Some(length.as_secs()), draw_target());
    let style = ProgressStyle::with_template("watch [{bar:32}] {pos:>5} / {len} s");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    let mut watcher = Watcher::new(&subjects.spaces);
    let (mut note, mut last) = (None, None);
    for _ in 0..MAX_LOOKS {
        let Some(at) = next_look(last, Duration::from_secs_f64(watcher.seconds()), every, length) else {
            break;
        };
        let is_first = last.replace(at).is_none();
        while watcher.seconds() < at.as_secs_f64() && !is_set(interrupted) {
            bar.set_position(watcher.seconds() as u64);
            thread::sleep(POLL);
        }
        if is_set(interrupted) {
            note = Some(format!("the watch was interrupted after {:.0} s", watcher.seconds()));
            break;
        }
        let mut look = || {
            let again = match is_first {
                true => None,
                false => Some(scan(&sources, &options, &mut |_, _| !is_set(interrupted))?),
            };
            let (now, ideal) = SharedNow::of(subjects, again.as_ref().unwrap_or(first))?;
            watcher.look(&subjects.spaces, now.freed_pages, ideal)
        };
        if let Err(e) = look() {
            note = Some(format!("the watch ended after {:.0} s: {e}", watcher.seconds()));
            break;
        }
    }
    bar.finish_and_clear();
    Ok((watcher.finish(), note))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When looks are due if each takes `takes` seconds.
    fn looks(takes: u64, every: u64, length: u64) -> Vec<u64> {
        let seconds = Duration::from_secs;
        let (mut due, mut last) = (Vec::new(), None);
        let mut now = seconds(0);
        while let Some(at) = next_look(last, now, seconds(every), seconds(length)) {
            due.push(at.as_secs());
            last = Some(at);
            now = now.max(at) + seconds(takes);
        }
        due
    }

    #[test]
    fn a_watch_ends_at_its_time() {
        assert_eq!(looks(0, 5, 6), [0, 5, 6]);
        assert_eq!(looks(0, 2, 6), [0, 2, 4, 6]);
        assert_eq!(looks(0, 60, 6), [0, 6]);
        // Looks that take longer than the interval are fewer.
        assert_eq!(looks(3, 1, 6), [0, 4]);
        assert_eq!(looks(7, 1, 6), [0, 6]);
    }
}
