//! `samepage fleet`: up, status, verify, metrics, down.

use crate::choice;
use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::Subcommand;
use indicatif::ProgressBar;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::checkpoint::{Where, watching};
use super::fleet_table::{kvm_table, status_table};
use super::ledger_table::admission_text;
use super::progress::{Bars, draw_target, interrupt_flag, is_set};
use super::which::WhichFleet;
use fleet::HostError;
use fleet::admission::{Admission, judge};
use fleet::daemon_client::{request, unexpected};
use fleet::down::{clean_up, take_down};
use fleet::living::{choose, choose_to_end, holder, pids, vms};
use fleet::metrics::Format;
use fleet::preflight::{self, Problem};
use fleet::runtime::FleetDir;
use fleet::shutdown::DEFAULT_LIMIT;
use fleet::spec::FleetSpec;
use fleet::status::{FleetStatus, OnDisk, Refusal, Reply, Request};
use fleet::watch::Stage;
use os::Process;
use os::executable;
use os::print::{errln, out, outln};
use store::Compression;
use wire::LineBuffer;

/// Time limits for the daemon's answer: for requests it answers at once, and for those that read
/// all memory.
const SHORT: Duration = Duration::from_secs(120);
const LONG: Duration = Duration::from_secs(3600);
/// Interval of the check for suspended guests during a long request.
const LOOK: Duration = Duration::from_secs(2);
/// Time limit of `status --settle`.
const SETTLE_SECONDS: u64 = 300;
/// Longest line of a daemon that comes up: its last one is the whole status.
const MAX_LINE_BYTES: usize = 64 << 20;

/// Launch a fleet of guests from a file; show it, verify it, take it down
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage fleet up resources/fleets/builtin.toml
  samepage fleet status --settle --content
  samepage fleet verify
  samepage fleet down

Each guest is a process of its own; a daemon (`samepage host`) manages them. Their sockets and logs are in
a directory of this user's alone: below $SAMEPAGE_RUNTIME_DIR, else /run/samepage (root), else
$XDG_RUNTIME_DIR/samepage.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start all guests of a fleet file, fill them, begin to merge
    #[command(after_help = "Examples:
  samepage fleet up resources/fleets/builtin.toml
  samepage fleet up resources/fleets/linux.toml --json     after `samepage image`
  samepage fleet up resources/fleets/builtin.toml --dry-run
  samepage fleet up fleet.toml --replace             its daemon was killed, and the file was changed since

Guests that a killed daemon left behind are taken over if they match the file. If one does not match, or is no longer
in the file, each difference is named and nothing is touched, unless --replace is given.

These two files are examples; resources/docs/reference/fleet-file.md lists every key.")]
    Up {
        /// The fleet file
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Print one JSON object, as `fleet status --json` does
        #[arg(long)]
        json: bool,
        /// Start nothing; show whether each guest would be admitted
        #[arg(long)]
        dry_run: bool,
        /// End guests of an earlier daemon that do not match the file, and start them anew
        #[arg(long)]
        replace: bool,
    },
    /// Show the guests, their pages and what merging saved
    #[command(after_help = "Examples:
  samepage fleet status
  samepage fleet status --settle --content      what is shared, against what could be
  samepage fleet status --audit                 the ledger, checked against the kernel's own books
  samepage fleet status --kvm                   faults, mappings, TLB flushes and exits of each guest")]
    Status {
        #[command(flatten)]
        which: WhichFleet,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// Add KVM's own statistics of each guest
        #[arg(long)]
        kvm: bool,
        /// Add potential sharing: pauses the guests while every page is hashed and compared
        #[arg(long)]
        content: bool,
        /// Add an audit of the ledger: pauses the guests while every frame is counted by other
        /// means
        #[arg(long)]
        audit: bool,
        /// Wait first until merging has settled, at most 5 minutes
        #[arg(long)]
        settle: bool,
    },
    /// Check every page of every guest, from inside and from the host
    #[command(
        after_help = "The exit status is 1 when a page does not hold what was written to it.\n\nExamples:
  samepage fleet verify
  samepage fleet verify builtin --json"
    )]
    Verify {
        #[command(flatten)]
        which: WhichFleet,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print the fleet's metrics once, as Prometheus gets them
    #[command(after_help = "Examples:
  samepage fleet metrics
  samepage fleet metrics builtin | grep samepage_guest_memory_bytes
  samepage fleet metrics | promtool check metrics
  samepage fleet metrics --format openmetrics

It asks the daemon's own socket, and needs no `metrics` in the fleet file. With metrics = \"127.0.0.1:9464\" at the top
of the fleet file the daemon serves the same at http://127.0.0.1:9464/metrics, in the format that the client's Accept
header asks for. For the textfile collector of node_exporter, write it beside the .prom file and rename it:
  samepage fleet metrics > DIR/samepage.tmp && mv DIR/samepage.tmp DIR/samepage.prom")]
    Metrics {
        #[command(flatten)]
        which: WhichFleet,
        /// Output format
        #[arg(long, default_value = "text", value_parser = choice::format())]
        format: Format,
    },
    /// End all guests and the daemon, even if the daemon is already gone
    #[command(
        after_help = "Linux guests are asked to power off: their ACPI power button is pressed, and the agent gets `poweroff` on COM2. A guest
that has not powered off within the timeout is cut off, as by pulling the plug: data not yet written to its drives is lost. The
exit status is then 1, unless that was requested by --now, or by Control-C while they power off.

Examples:
  samepage fleet down
  samepage fleet down builtin --timeout 120
  samepage fleet down --now                          cut all guests off at once
  samepage fleet down --save                         `samepage fleet up` with the same file goes on from there"
    )]
    Down {
        #[command(flatten)]
        which: WhichFleet,
        /// Time limit for Linux guests to power off
        #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_LIMIT.as_secs(), value_parser = clap::value_parser!(u64).range(0..=86_400))]
        timeout: u64,
        /// Ask no guest to power off: cut all off at once
        #[arg(long, conflicts_with = "timeout")]
        now: bool,
        /// Save each guest on the disk and end it: `fleet up` with the same file goes on from there. If one cannot be saved, the fleet
        /// stays up
        #[arg(long, conflicts_with_all = ["timeout", "now"])]
        save: bool,
        /// How what is saved is compressed
        #[arg(long, value_name = "HOW", default_value = "lz4", value_parser = choice::compression(), requires = "save")]
        compress: Compression,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Up { file, json, dry_run: true, .. } => dry_run(&FleetSpec::read(&file)?, json),
        Command::Up { file, json, replace, .. } => up(&file, replace, json),
        Command::Status { which, json, kvm, content, audit, settle } => {
            let settle_seconds = settle.then_some(SETTLE_SECONDS);
            let limit = if content || settle || audit { LONG } else { SHORT };
            status(
                &choose(which.name()?)?,
                json,
                &Request::Status { kvm, content, audit, settle_seconds },
                limit,
            )
        }
        Command::Verify { which, json } => verify(&choose(which.name()?)?, json),
        Command::Metrics { which, format } => metrics(&choose(which.name()?)?, format),
        Command::Down { which, timeout, now, save, compress, json } => {
            let limit = Duration::from_secs(if now { 0 } else { timeout });
            let save = save.then(|| Where::usual().on_disk(compress)).transpose()?;
            down(&choose_to_end(which.name()?)?, limit, save.as_ref(), json)
        }
    }
}

/// A line that the daemon prints while it comes up.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Progress { stage: Stage, guest: usize, done: u64, total: u64 },
    Up { up: Box<FleetStatus> },
    Error(Refusal),
}

/// What a dry run prints.
#[derive(Serialize)]
struct DryRun {
    #[serde(flatten)]
    admission: Admission,
    /// Other reasons why the fleet would not come up.
    problems: Vec<Problem>,
}

fn dry_run(spec: &FleetSpec, json: bool) -> anyhow::Result<ExitCode> {
    let problems = preflight::problems(spec, &FleetDir::of(&spec.name));
    let dry = DryRun { admission: judge(spec)?, problems };
    match json {
        true => outln!("{}", serde_json::to_string(&dry)?)?,
        false => outln!("{}", admission_text(&dry.admission))?,
    }
    dry.problems.iter().for_each(|problem| errln!("error: {problem}"));
    let would_come_up = dry.admission.check().is_ok() && dry.problems.is_empty();
    Ok(if would_come_up { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn up(file: &Path, replace: bool, json: bool) -> anyhow::Result<ExitCode> {
    // Read here too, so that a mistake in the file is reported with its causes and nothing is
    // started.
    let spec = FleetSpec::read(file)?;
    let interrupted = interrupt_flag()?;
    // Before even a directory is made. Joining guests that still run is checked by the daemon.
    let dir = FleetDir::of(&spec.name);
    if holder(&spec.name).is_none() && vms(&dir).is_empty() {
        preflight::check(&spec, &dir)?;
    }
    // Only the daemon can tell whether the fleet is up already: it alone claims the name.
    let mut daemon = executable::command()
        .arg("host")
        .arg(file)
        .args(replace.then_some("--replace"))
        .arg("--detach")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("cannot start the daemon")?;
    let bars = Bars::new(spec.guests.len());
    let (sender, lines) = std::sync::mpsc::channel();
    let mut out = daemon.stdout.take().context("the daemon has no output")?;
    std::thread::spawn(move || {
        let mut buffer = LineBuffer::new(MAX_LINE_BYTES);
        while let Ok(()) = buffer.read_from(&mut out) {
            while let Ok(Some(line)) = buffer.next_line() {
                let Ok(line) = serde_json::from_slice::<Line>(&line) else { continue };
                let last = !matches!(line, Line::Progress { .. });
                if sender.send(line).is_err() || last {
                    return;
                }
            }
        }
    });
    let result = loop {
        if is_set(&interrupted) {
            break Err(HostError::Interrupted.into());
        }
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(Line::Progress { stage, guest, done, total }) => bars.tell(stage, guest, done, total),
            Ok(Line::Up { up }) => break Ok(up),
            Ok(Line::Error(refusal)) => break Err(anyhow::Error::msg(refusal.text)),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                break Err(anyhow::Error::msg("the daemon ended without an error message"));
            }
        }
    };
    bars.finish();
    match result {
        Ok(status) => {
            print(&status, json)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(e) => Err(not_up(&spec.name, daemon, e)?),
    }
}

/// Explains why a fleet did not come up and what still runs. On return `daemon` and everything it
/// started have ended.
fn not_up(fleet: &str, mut daemon: Child, error: anyhow::Error) -> anyhow::Result<anyhow::Error> {
    // It is our child and not waited for yet, so its number is not reused.
    if let Ok(process) = Process::of_child(&daemon) {
        let _ = process.signal(Signal::TERM);
        while !process.ends_within(Duration::from_secs(1)) {}
    }
    let left = clean_up(fleet, daemon.id())?;
    let _ = daemon.wait();
    Ok(match &left[..] {
        // Another daemon holds the fleet, and this one touched nothing.
        _ if holder(fleet).is_some() => error,
        [] => error.context(format!("fleet {fleet} is not up; everything that was started is stopped")),
        left => error.context(format!(
            "fleet {fleet} is not up; VMs started for it are stopped, and those that ran before run on: {}",
            pids(left)
        )),
    })
}

fn status(fleet: &str, json: bool, ask: &Request, limit: Duration) -> anyhow::Result<ExitCode> {
    match request(fleet, ask, limit)? {
        Reply::Status(status) => print(&status, json)?,
        other => return Err(unexpected(&other).into()),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(status: &FleetStatus, json: bool) -> anyhow::Result<()> {
    if json {
        outln!("{}", serde_json::to_string(status)?)?;
        return Ok(());
    }
    outln!("{}", status_table(status))?;
    if status.guests.iter().any(|g| g.kvm.is_some()) {
        outln!("{}", kvm_table(status))?;
    }
    Ok(())
}

fn verify(fleet: &str, json: bool) -> anyhow::Result<ExitCode> {
    let result = match telling_who_waits(fleet, || request(fleet, &Request::Verify, LONG))? {
        Reply::Verified(result) => result,
        other => return Err(unexpected(&other).into()),
    };
    match json {
        true => outln!("{}", serde_json::to_string(&result)?)?,
        false => {
            outln!("{} of {} pages wrong", result.mismatched_pages, result.verified_pages)?;
            if !result.skipped.is_empty() {
                outln!(
                    "not asked, because they are paused, do not answer, or joined by themselves: {}",
                    result.skipped.join(", ")
                )?;
            }
        }
    }
    Ok(if result.mismatched_pages == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Reports on standard error which guests are suspended while `work` waits for an answer. Control-C
/// ends this command, and the daemon drops a request without a client.
fn telling_who_waits<T>(fleet: &str, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let teller = scope.spawn(|| {
            let mut told = BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                std::thread::park_timeout(LOOK);
                let Ok(Reply::Management(now)) = request(fleet, &Request::Management, SHORT) else { continue };
                for (guest, why) in now.suspended {
                    if !done.load(Ordering::Relaxed) && told.insert(guest.clone()) {
                        errln!("guest {guest} is suspended ({why}); waiting for it if it has begun; Control-C stops");
                    }
                }
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        teller.thread().unpark();
        result
    })
}

fn metrics(fleet: &str, format: Format) -> anyhow::Result<ExitCode> {
    let text = match request(fleet, &Request::Metrics { format }, SHORT)? {
        Reply::Metrics(text) => text,
        other => return Err(unexpected(&other).into()),
    };
    out!("{text}")?;
    Ok(ExitCode::SUCCESS)
}

fn down(fleet: &str, limit: Duration, save: Option<&OnDisk>, json: bool) -> anyhow::Result<ExitCode> {
    let interrupted = interrupt_flag()?;
    let bar = ProgressBar::with_draw_target(None, draw_target());
    let down = watching(fleet, save.is_some(), || {
        take_down(fleet, limit, save, &mut |left| {
            if save.is_some() && left.guests.is_empty() {
                return !is_set(&interrupted);
            }
            let names: Vec<_> = left.guests.iter().map(String::as_str).collect();
            bar.set_message(format!(
                "{} s for {} to power off (Control-C cuts them off)",
                left.seconds,
                names.join(", ")
            ));
            bar.tick();
            !is_set(&interrupted)
        })
    })?;
    bar.finish_and_clear();
    match (json, down.orphans) {
        (true, _) => outln!("{}", serde_json::to_string(&down)?)?,
        (false, None) => outln!("fleet {fleet} is down")?,
        (false, Some(vms)) => {
            outln!(
                "fleet {fleet} is down; its daemon was gone already, and {vms} guests were still running"
            )?;
        }
    }
    if !json {
        for note in &down.notes {
            outln!("note: {note}")?;
        }
    }
    if down.cut_off.is_empty() || is_set(&interrupted) {
        return Ok(ExitCode::SUCCESS);
    }
    let guests: Vec<_> = down.cut_off.iter().map(|cut| format!("{}: {}", cut.guest, cut.why)).collect();
    errln!("error: cut off, data not yet written to their drives is lost: {}", guests.join("; "));
    Ok(ExitCode::FAILURE)
}
