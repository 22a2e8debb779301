//! `samepage snapshot` and `samepage clone`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;

use super::table::mib;
use fleet::daemon_client::request;
use fleet::images::ImageInfo;
use fleet::living::choose;
use fleet::spec::NetSpec;
use fleet::status::Wanted;
use fleet::status::{Reply, Request};
use machine::snapshot::info::{SectionInfo, StateInfo, of_file};
use memory::PAGE_BYTES;
use os::print::outln;

/// How long the daemon may take: for a capture, and until hundreds of clones have answered.
const LIMIT: Duration = Duration::from_secs(600);

/// Capture a running guest, to clone it later; list, show and remove what was captured
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
#[command(after_help = "Examples:
  samepage snapshot web-0 warm            capture guest web-0 as `warm`; it stands still for some milliseconds
  samepage clone warm --count 10          ten guests that go on from there
  samepage snapshot list
  samepage snapshot info warm --json
  samepage snapshot rm warm               clones run on

A snapshot is the guest's state and its memory as pages of sealed slabs, in the memory of the fleet's daemon: it is gone when the
daemon ends. What the guest wrote to drives with an overlay is in it; a guest that writes a drive itself cannot be captured.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// The guest to capture
    #[arg(value_name = "GUEST", required = true)]
    guest: Option<String>,
    /// What the snapshot is to be called
    #[arg(value_name = "SNAPSHOT", required = true)]
    snapshot: Option<String>,
    #[command(flatten)]
    how: How,
}

#[derive(clap::Args)]
struct How {
    /// Which fleet; not needed while only one is up
    #[arg(long, visible_alias = "fleet", value_name = "FLEET")]
    name: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// List the snapshots of a fleet
    #[command(after_help = "Examples:\n  samepage snapshot list\n  samepage snapshot list --json")]
    List {
        #[command(flatten)]
        how: How,
    },
    /// Show one, or a state file
    #[command(after_help = "Examples:
  samepage snapshot info warm
  samepage snapshot info warm --json
  samepage snapshot info ./vm.state    a file that PUT /snapshot/create wrote: what it is of, and its sections")]
    Info {
        /// Its name; with a slash, the path of a state file
        #[arg(value_name = "SNAPSHOT|FILE")]
        snapshot: String,
        #[command(flatten)]
        how: How,
    },
    /// Remove one; guests that went on from it run on
    #[command(after_help = "Examples:\n  samepage snapshot rm warm")]
    Rm {
        /// Its name
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
        #[command(flatten)]
        how: How,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Some(Command::List { how }) => list(how),
        Some(Command::Info { snapshot, how }) if snapshot.contains('/') => {
            file(Path::new(&snapshot), how.json)
        }
        Some(Command::Info { snapshot, how }) => info(&snapshot, how),
        Some(Command::Rm { snapshot, how }) => {
            ask(how.name, &Request::RemoveSnapshot { name: snapshot }).map(|_| ExitCode::SUCCESS)
        }
        None => {
            // Clap requires both.
            let (guest, name) = (args.guest.unwrap_or_default(), args.snapshot.unwrap_or_default());
            match ask(args.how.name, &Request::Snapshot { guest, name })? {
                Reply::Snapshot(taken) => show(&taken, args.how.json),
                other => bail!("the daemon answered something else: {other:?}"),
            }
        }
    }
}

fn ask(fleet: Option<String>, question: &Request) -> anyhow::Result<Reply> {
    Ok(request(&choose(fleet)?, question, LIMIT)?)
}

fn all(fleet: Option<String>) -> anyhow::Result<Vec<ImageInfo>> {
    match ask(fleet, &Request::Snapshots)? {
        Reply::Snapshots(all) => Ok(all),
        other => bail!("the daemon answered something else: {other:?}"),
    }
}

fn list(how: How) -> anyhow::Result<ExitCode> {
    let all = all(how.name)?;
    if how.json {
        outln!("{}", serde_json::to_string(&all)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if all.is_empty() {
        outln!("no snapshots")?;
    }
    for one in &all {
        outln!("{}", line(one))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn info(snapshot: &str, how: How) -> anyhow::Result<ExitCode> {
    let all = all(how.name)?;
    match all.iter().find(|one| one.name == snapshot) {
        Some(one) => show(one, how.json),
        None => {
            let known: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            bail!("there is no snapshot {snapshot:?}; there is: {known}")
        }
    }
}

/// Shows a state file.
fn file(path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let state = of_file(path)?;
    if json {
        outln!("{}", serde_json::to_string(&state)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let StateInfo { samepage, memory_file, backend, memory_bytes, vcpus, .. } = &state;
    outln!(
        "{}: {} MiB of memory, {vcpus} vCPUs, backend {backend}, with a {memory_file} memory file; written by samepage {samepage} at {}",
        path.display(),
        mib(*memory_bytes),
        os::Moment::of(state.realtime_ns / 1_000_000_000)
    )?;
    for drive in &state.drives {
        let mode = if drive.read_only { "read-only" } else { "writable" };
        outln!(
            "drive {}: {} ({mode}, {} bytes, device {}, inode {})",
            drive.id,
            drive.path,
            drive.bytes,
            drive.device,
            drive.inode
        )?;
    }
    for SectionInfo { kind, version, bytes, digest } in &state.sections {
        outln!("{kind:8} version {version}  {bytes:>8} bytes  {digest}")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(one: &ImageInfo, json: bool) -> anyhow::Result<ExitCode> {
    match json {
        true => outln!("{}", serde_json::to_string(one)?)?,
        false => outln!("{}", line(one))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn line(one: &ImageInfo) -> String {
    let taken = &one.captured;
    format!(
        "{}: guest {}, domain {}, {} MiB of memory; {} MiB in slabs ({} copied, {} referenced), state {} KiB; the guest stood still for {:.1} ms; {} clones",
        one.name,
        one.guest,
        one.domain,
        mib(one.memory_bytes),
        mib(one.slab_bytes),
        mib(taken.copied_pages * PAGE_BYTES),
        mib(taken.referenced_pages * PAGE_BYTES),
        taken.state_bytes.div_ceil(1024),
        taken.pause_us as f64 / 1000.0,
        one.clones
    )
}

/// Start guests that go on from where another guest is, or was
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage clone web-0                      one guest more, web-0-0, which goes on from where web-0 is
  samepage clone web-0 --count 100 --as w   w-0 to w-99
  samepage snapshot web-0 warm && samepage clone warm --count 10
  samepage clone web-0 --count 10 --net auto,bridge=br0   each on a TAP of its own, with an address of its own

Each clone is a VM process of its own. It shares every page with its origin's image, and with its siblings, until one of them writes
to it; merging, balloons and everything else work on it as on any guest. All of them come up, or none does.")]
pub(super) struct CloneArgs {
    /// A guest that runs, or a snapshot
    #[arg(value_name = "GUEST")]
    of: String,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    count: u64,
    /// How their names begin; each gets a number behind it [default: the guest's name]
    #[arg(long = "as", value_name = "PREFIX")]
    prefix: Option<String>,
    /// The TAP of each clone, or one made for it (`auto`); an n in braces in its name is the least number whose TAP no guest of the
    /// fleet has. Once for each interface of the guest [default: as the fleet file gives the guest's]
    #[arg(long, value_name = "TAP|auto[,mac=ADDRESS][,bridge=NAME]")]
    net: Vec<NetSpec>,
    #[command(flatten)]
    how: How,
}

pub(super) fn run_clone(args: CloneArgs) -> anyhow::Result<ExitCode> {
    let wanted =
        Wanted { of: args.of, count: usize::try_from(args.count)?, prefix: args.prefix, net: args.net };
    let cloned = match ask(args.how.name, &Request::Clone(wanted))? {
        Reply::Cloned(cloned) => cloned,
        other => bail!("the daemon answered something else: {other:?}"),
    };
    if args.how.json {
        outln!("{}", serde_json::to_string(&cloned)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let named = match &cloned.guests[..] {
        [] => "none".to_owned(),
        [one] => one.clone(),
        [first, .., last] => format!("{first} to {last}"),
    };
    outln!("{} clones answer after {:.2} s: {named}", cloned.guests.len(), cloned.seconds)?;
    if let Some(image) = &cloned.image {
        outln!("{}", line(image))?;
    }
    Ok(ExitCode::SUCCESS)
}
