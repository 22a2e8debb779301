//! `samepage measure`: what sharing would save of any memory, and what it saves already.

mod args;
mod csv;
mod figures;
mod output;
mod subjects;
mod table;
mod types;

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use super::progress::{draw_target, interrupt_flag, is_set};
pub(super) use args::Args;
use measure::MeasureError;
use measure::scan::{Options, Progress, Scan, scan};
use measure::source::Source;
use measure::watch::{MAX_LOOKS, Watched, Watcher};
use memory::PAGE_BYTES;
use os::named_file;
use os::print::outln;
use output::{Measured, SharedNow};
use subjects::Subjects;

/// Pages read a second time where a guest may be writing.
const SECOND_LOOK_PAGES: u64 = 16 * 1024;
/// Poll interval for interrupts between two looks.
const POLL: Duration = Duration::from_millis(50);

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
