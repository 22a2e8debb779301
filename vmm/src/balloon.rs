//! `samepage balloon`: set, get, stats.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::balloon_table::{line, statistics_table};
use super::progress::{draw_target, interrupt_flag, is_set};
use super::table::mib;
use super::which::Which;
use fleet::HostError;
use fleet::balloon::{Judge, Stop, why};
use fleet::target::Target;
use machine::balloon::BalloonStatus;
use memory::PAGE_BYTES;
use memory::layout::MAX_RAM_BYTES;
use memory::size::{SizeError, parse_size};
use os::print::{errln, is_reader_gone, out, outln};

/// Poll interval while a balloon moves.
const POLL: Duration = Duration::from_millis(50);
/// Time limit for fresh statistics from the guest; then the last ones are shown.
const STATISTICS: Duration = Duration::from_secs(2);

/// Take memory from a guest and give it back, with its balloon
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage balloon set web-0 128M --wait     take 128 MiB from guest web-0, and print the size reached
  samepage balloon set web-0 0               give all of it back
  samepage balloon get web-0 --json
  samepage balloon stats web-0 --watch       the guest's statistics beside the host's

GUEST is a guest of the fleet that is up (or of --name FLEET), or the path of a control socket made by
`samepage run --control`, which has a / in it.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Asked {
    #[command(flatten)]
    guest: Which,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Set the target size of a guest's balloon
    #[command(
        after_help = "With --wait the exit status is 1 if the size was not reached. A fleet's policy ([overcommit] in its
file) sets balloons too, and overrides this size.

Examples:
  samepage balloon set web-0 128M
  samepage balloon set web-0 128M --wait --timeout 10
  samepage balloon set ./vm.sock 0 --wait --json"
    )]
    Set {
        #[command(flatten)]
        which: Asked,
        /// Memory to take from the guest, with its unit; 0 gives all back
        #[arg(value_name = "SIZE", value_parser = size)]
        size: u64,
        /// Wait until the size is reached, or the balloon stops short of it
        #[arg(long)]
        wait: bool,
        /// Longest wait
        #[arg(long, value_name = "SECONDS", default_value_t = 120, requires = "wait")]
        timeout: u64,
    },
    /// Show the target size, the actual size, and the memory reclaimed by the host
    #[command(after_help = "Examples:\n  samepage balloon get web-0\n  samepage balloon get web-0 --json")]
    Get {
        #[command(flatten)]
        which: Asked,
    },
    /// Show the guest's memory statistics beside the host's
    #[command(after_help = "Examples:
  samepage balloon stats web-0
  samepage balloon stats web-0 --watch           every second, until Control-C
  samepage balloon stats web-0 --watch 5 --json  one JSON object a line")]
    Stats {
        #[command(flatten)]
        which: Asked,
        /// Repeat every SECONDS
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
        watch: Option<u64>,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Set { which, size, wait, timeout } => {
            set(&which, size, wait.then_some(Duration::from_secs(timeout)))
        }
        Command::Get { which } => {
            let target = which.guest.find()?;
            show(&target, which.json)
        }
        Command::Stats { which, watch } => stats(&which, watch.map(Duration::from_secs)),
    }
}

/// Prints a balloon as it is now.
fn show(target: &Target, json: bool) -> anyhow::Result<ExitCode> {
    let status = target.status()?;
    match json {
        true => outln!("{}", serde_json::to_string(&status)?)?,
        false => outln!("{}", line(&target.guest, &status))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What `balloon set --wait --json` prints.
#[derive(Serialize)]
struct Waited<'a> {
    guest: &'a str,
    stopped: Stop,
    reason: &'a str,
    /// The size asked for. The target may have changed since.
    asked_pages: u32,
    seconds: f64,
    #[serde(flatten)]
    status: &'a BalloonStatus,
}

fn set(which: &Asked, bytes: u64, wait: Option<Duration>) -> anyhow::Result<ExitCode> {
    let target = which.guest.find()?;
    let interrupted = interrupt_flag()?;
    let began = Instant::now();
    let from = target.size()?;
    // At most 2^28 pages, checked by `size`.
    let asked_pages = (bytes / PAGE_BYTES) as u32;
    target.set(asked_pages)?;
    let Some(limit) = wait else {
        match target.has_policy() {
            Ok(false) => {}
            Ok(true) => errln!(
                "note: this fleet's policy ([overcommit] in its file) sets balloons too, and overrides this size"
            ),
            Err(error) => errln!(
                "note: cannot determine whether this fleet's policy sets balloons too: {}",
                os::one_line(&error)
            ),
        }
        return show(&target, which.json);
    };
    let bar = bar(from.actual_pages.abs_diff(asked_pages).into());
    let mut judge = Judge::new(asked_pages, limit);
    let (stopped, size) = loop {
        if is_set(&interrupted) {
            bar.finish_and_clear();
            return Err(HostError::Interrupted.into());
        }
        let size = target.size()?;
        bar.set_position(from.actual_pages.abs_diff(size.actual_pages).into());
        if let Some(stopped) = judge.look(began.elapsed(), size, target.is_paused()?) {
            break (stopped, size);
        }
        thread::sleep(POLL);
    };
    bar.finish_and_clear();
    let (guest, seconds) = (target.guest.as_str(), began.elapsed().as_secs_f64());
    let status = target.fresh(STATISTICS, &interrupted)?;
    let stopped = why(stopped, &status);
    let reason = match stopped {
        Stop::Overruled => {
            let now = mib(u64::from(size.target_pages) * PAGE_BYTES);
            let by = match target.has_policy() {
                Ok(true) => {
                    "by the fleet's policy ([overcommit] in the fleet file), which overrides this size"
                }
                Ok(false) => "by another client",
                Err(_) => "by another client or by the fleet's policy (its daemon does not answer)",
            };
            format!("not {} MiB: the target was set to {now} MiB meanwhile, {by}", mib(bytes))
        }
        _ => stopped.reason().to_owned(),
    };
    match which.json {
        true => {
            let waited = Waited { guest, stopped, reason: &reason, asked_pages, seconds, status: &status };
            outln!("{}", serde_json::to_string(&waited)?)?;
        }
        false => outln!("{}\n{reason}, after {seconds:.1} s", line(guest, &status))?,
    }
    Ok(if stopped == Stop::Reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn bar(pages: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("balloon [{bar:32}] {human_pos:>9} / {human_len} pages, {per_sec}");
    let bar = ProgressBar::with_draw_target(Some(pages), draw_target());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "))
}

fn stats(which: &Asked, watch: Option<Duration>) -> anyhow::Result<ExitCode> {
    let target = which.guest.find()?;
    let interrupted = interrupt_flag()?;
    let mut before: Option<(Instant, BalloonStatus)> = None;
    loop {
        let status = target.fresh(STATISTICS, &interrupted)?;
        match which.json {
            true => outln!("{}", serde_json::to_string(&status)?)?,
            false => {
                if before.is_some() && std::io::stdout().is_terminal() {
                    out!("\x1b[H\x1b[J")?;
                } else if watch.is_some() && std::io::stdout().is_terminal() {
                    out!("\x1b[2J\x1b[H")?;
                }
                let earlier = before.as_ref().map(|(at, status)| (at.elapsed().as_secs_f64(), status));
                outln!("{}", statistics_table(&target.guest, &status, earlier))?;
            }
        }
        let Some(pause) = watch.filter(|_| !is_reader_gone()) else { return Ok(ExitCode::SUCCESS) };
        before = Some((Instant::now(), status));
        let until = Instant::now() + pause;
        while Instant::now() < until {
            if is_set(&interrupted) {
                return Ok(ExitCode::SUCCESS);
            }
            thread::sleep(POLL);
        }
    }
}

fn size(text: &str) -> Result<u64, SizeError> {
    match text {
        "0" => Ok(0),
        _ => parse_size(text, PAGE_BYTES, MAX_RAM_BYTES),
    }
}
