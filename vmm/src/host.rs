//! `samepage host`: the daemon over one fleet.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::progress::interrupt_flag;
use fleet::HostError;
use fleet::checkpoints::Shelf;
use fleet::daemon::{Daemon, Plan};
use fleet::spec::FleetSpec;
use fleet::status::{ErrorKind, Refusal};
use fleet::watch::Watch;
use os::one_line;
use os::print::{is_reader_gone, outln};

/// Be the daemon over one fleet, in the foreground; `samepage fleet up` starts it by itself
#[derive(clap::Args)]
#[command(
    after_help = "Standard output carries one JSON object a line: {\"stage\", \"guest\", \"done\", \"total\"} while the
fleet comes up, then {\"up\": STATUS} or {\"error\": TEXT}. SIGINT and SIGTERM take the fleet down: Linux
guests are asked to power off, and cut off after 30 s. At a second signal the daemon ends at once, and each VM sees to that by itself. After a
SIGKILL the guests run on: start it again to take them over, or `samepage fleet down` to end them.

Examples:
  samepage host resources/fleets/builtin.toml
  samepage host --open vms                       then, as the same user:
    samepage run --control ./a.ctl --merge /run/samepage/fleets/vms/merge.sock
    samepage fleet status --name vms"
)]
pub(super) struct Args {
    /// The fleet file
    #[arg(value_name = "FILE", required_unless_present = "open")]
    file: Option<PathBuf>,
    /// Be the daemon over a fleet of this name without guests of its own: VMs of this user that are
    /// started with `samepage run --control PATH --merge SOCKET` join it. To admit other VMs, write
    /// a fleet file with [open]
    #[arg(long, value_name = "NAME", conflicts_with = "file")]
    open: Option<String>,
    /// End guests of an earlier daemon that do not match the file, and start them anew
    #[arg(long)]
    replace: bool,
    /// Leave the session of the terminal, and write messages to the log in the fleet's directory
    #[arg(long, hide = true)]
    detach: bool,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.detach {
        // Fails only for a process that leads its group already, which then has no terminal to
        // leave.
        let _ = rustix::process::setsid();
    }
    let spec = match (&args.file, &args.open) {
        (Some(file), _) => FleetSpec::read(file)?,
        (None, name) => FleetSpec::open(name.as_deref().unwrap_or_default())?,
    };
    let interrupted = interrupt_flag()?;
    let say = {
        let interrupted = interrupted.clone();
        move |line: serde_json::Value| {
            // The process that started us is gone before the fleet was up: nothing wants it any
            // more.
            if outln!("{line}").is_err() || is_reader_gone() {
                interrupted.store(true, Ordering::Relaxed);
            }
        }
    };
    let tell = say.clone();
    let watch = Watch::new(
        move |stage, guest, done, total| {
            tell(serde_json::json!({ "stage": stage, "guest": guest, "done": done, "total": total }));
        },
        interrupted.clone(),
    );
    let failure = Mutex::new(None);
    let failed = |error: HostError| {
        say(serde_json::json!(Refusal::new(ErrorKind::from(&error), one_line(&error))));
        *os::lock(&failure) = Some(error);
    };
    // Without a place nothing was saved there.
    let shelf = Shelf::find(None).ok();
    let plan = Plan { spec, replace: args.replace, log: args.detach, shelf };
    match Daemon::up(plan, &watch, interrupted) {
        Ok(daemon) => daemon.serve(&watch, |up| match up {
            Ok(status) => say(serde_json::json!({ "up": status })),
            Err(error) => failed(error),
        }),
        Err(error) => failed(error),
    }
    match os::unpoisoned(failure.into_inner()) {
        // The process that started us prints it.
        Some(_) if args.detach => Ok(ExitCode::FAILURE),
        Some(error) => Err(error.into()),
        None => Ok(ExitCode::SUCCESS),
    }
}
