//! `samepage snapshot` and `samepage clone`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;
use serde::Serialize;

use super::checkpoint::{self, Where};
use super::choice;
use super::table::mib;
use super::transfer;
use fleet::checkpoints::CheckpointInfo;
use fleet::daemon_client::request;
use fleet::images::ImageInfo;
use fleet::living::{choose, is_any};
use fleet::spec::NetSpec;
use fleet::status::Wanted;
use fleet::status::{Reply, Request};
use machine::snapshot::info::{SectionInfo, StateInfo, of_file};
use memory::PAGE_BYTES;
use os::print::{errln, outln};
use store::{Compression, Name};

/// How long the daemon may take: for a capture, and until hundreds of clones have answered.
const LIMIT: Duration = Duration::from_secs(600);

/// Capture a running guest, to clone it or to restore it later; list, show, verify and remove what was captured
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
#[command(after_help = "Examples:
  samepage snapshot web-0 warm            capture guest web-0 as `warm`; it stands still for some milliseconds
  samepage clone warm --count 10          ten guests that go on from there
  samepage snapshot list
  samepage snapshot info warm --json
  samepage snapshot rm warm               clones run on
  samepage snapshot web-0 kept --disk     on the disk: `samepage restore kept` goes on from there, also after the host was restarted

A snapshot is the guest's state and its memory as pages of sealed slabs, in the memory of the fleet's daemon: it is gone when the
daemon ends. With --disk it is a checkpoint instead: in a store of its trust domain, where each page is once, whatever checkpoints have it.
It takes no memory, and is the host's until it is removed. What the guest
wrote to drives with an overlay is in it, but not with --disk; a guest that writes a drive itself cannot be captured.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// The guest to capture
    #[arg(value_name = "GUEST", required = true)]
    guest: Option<String>,
    /// What the snapshot is to be called
    #[arg(value_name = "SNAPSHOT", required = true)]
    snapshot: Option<String>,
    /// Keep it on the disk, and not in memory
    #[arg(long)]
    disk: bool,
    /// How its pages are compressed on the disk
    #[arg(long, value_name = "HOW", default_value = "lz4", value_parser = choice::compression(), requires = "disk")]
    compress: Compression,
    #[command(flatten)]
    place: Where,
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
    /// List the snapshots of a fleet, and those on the disk
    #[command(after_help = "Examples:
  samepage snapshot list
  samepage snapshot list --json

Of one on the disk it says what its pages take there, and what those take that no other one has.")]
    List {
        #[command(flatten)]
        place: Where,
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
        place: Where,
        #[command(flatten)]
        how: How,
    },
    /// Remove one; guests that went on from it run on
    #[command(after_help = "Examples:
  samepage snapshot rm warm
  samepage snapshot rm kept --disk && samepage snapshot gc

The pages of one on the disk stay there until `samepage snapshot gc`.")]
    Rm {
        /// Its name
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
        /// The one on the disk; not needed while no fleet has one of this name
        #[arg(long)]
        disk: bool,
        #[command(flatten)]
        place: Where,
        #[command(flatten)]
        how: How,
    },
    /// Read all that is on the disk, and compare every digest
    #[command(after_help = "The exit status is 1 when a file is damaged; it says which checkpoints need it.

Examples:
  samepage snapshot verify
  samepage snapshot verify --domain webs --json")]
    Verify {
        #[command(flatten)]
        place: Where,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write one that is on the disk to a file, with all that it needs
    #[command(after_help = "Examples:\n  samepage snapshot export warm ./warm.checkpoint")]
    Export {
        /// Its name
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
        /// The file, which must not be there yet
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// How its pages are compressed
        #[arg(long, value_name = "HOW", default_value = "zstd", value_parser = choice::compression())]
        compress: Compression,
        #[command(flatten)]
        place: Where,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Take one from a file that `export` wrote
    #[command(after_help = "Examples:
  samepage snapshot import ./warm.checkpoint
  samepage snapshot import ./warm.checkpoint --as warm-2 --domain webs

A guest with drives, network interfaces or sockets is not taken: they are another host's.")]
    Import {
        /// The file
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// What it is to be called [default: as the file, without its extension]
        #[arg(long = "as", value_name = "SNAPSHOT")]
        called: Option<String>,
        /// How its pages are compressed on the disk
        #[arg(long, value_name = "HOW", default_value = "lz4", value_parser = choice::compression())]
        compress: Compression,
        #[command(flatten)]
        place: Where,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Give back what no checkpoint has any more
    #[command(after_help = "Examples:
  samepage snapshot gc
  samepage snapshot gc --compress zstd

Files of which less than half is used are written anew, and so are small ones once they are many.")]
    Gc {
        /// How pages are compressed that are moved
        #[arg(long, value_name = "HOW", default_value = "lz4", value_parser = choice::compression())]
        compress: Compression,
        #[command(flatten)]
        place: Where,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Some(Command::List { place, how }) => list(&place, how),
        Some(Command::Info { snapshot, how, .. }) if snapshot.contains('/') => {
            file(Path::new(&snapshot), how.json)
        }
        Some(Command::Info { snapshot, place, how }) => info(&snapshot, &place, how),
        Some(Command::Rm { snapshot, disk, place, how }) => remove(snapshot, disk, &place, how),
        Some(Command::Export { snapshot, file, compress, place, json }) => {
            transfer::export(&place, &snapshot, &file, compress, json)
        }
        Some(Command::Import { file, called, compress, place, json }) => {
            transfer::import(&place, &file, called.as_deref(), compress, json)
        }
        Some(Command::Verify { place, json }) => checkpoint::verify(&place, json),
        Some(Command::Gc { compress, place, json }) => checkpoint::collect(&place, compress, json),
        None => {
            // Clap requires both.
            let (guest, name) = (args.guest.unwrap_or_default(), args.snapshot.unwrap_or_default());
            let disk = args.disk.then(|| args.place.on_disk(args.compress)).transpose()?;
            match checkpoint::ask(&choose(args.how.name)?, &Request::Snapshot { guest, name, disk })? {
                Reply::Snapshot(taken) => show(&taken, args.how.json),
                Reply::Checkpoint(saved) => show_saved(&saved, args.how.json),
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

/// Those in memory; none where no fleet is up, unless one is named. What is on the disk can be seen whatever is with a fleet.
fn in_memory(fleet: Option<String>) -> anyhow::Result<Vec<ImageInfo>> {
    match fleet {
        None if !is_any() => Ok(Vec::new()),
        None => Ok(all(None).unwrap_or_else(|error| {
            errln!("note: those in memory are not among these: {error:#}");
            Vec::new()
        })),
        fleet => all(fleet),
    }
}

/// One of either kind, as JSON: `where` says which.
#[derive(Serialize)]
#[serde(tag = "where", rename_all = "snake_case")]
enum Kept<'a> {
    Memory(&'a ImageInfo),
    Disk(&'a CheckpointInfo),
}

fn list(place: &Where, how: How) -> anyhow::Result<ExitCode> {
    let (images, checkpoints) = (in_memory(how.name)?, place.list()?);
    if how.json {
        let all = images.iter().map(Kept::Memory).chain(checkpoints.iter().map(Kept::Disk));
        outln!("{}", serde_json::to_string(&all.collect::<Vec<_>>())?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if images.is_empty() && checkpoints.is_empty() {
        outln!("no snapshots")?;
    }
    for one in &images {
        outln!("{}", line(one))?;
    }
    for one in &checkpoints {
        outln!("{}", checkpoint::line(one))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(snapshot: String, disk: bool, place: &Where, how: How) -> anyhow::Result<ExitCode> {
    let is_in_memory = || -> anyhow::Result<bool> {
        Ok(how.name.is_some() || in_memory(None)?.iter().any(|one| one.name == snapshot))
    };
    let is_on_disk = || Name::new(&snapshot).is_ok_and(|name| place.domain_of(&name).is_ok());
    if disk || (!is_in_memory()? && (is_on_disk() || !is_any())) {
        return checkpoint::remove(place, &snapshot, how.json);
    }
    ask(how.name, &Request::RemoveSnapshot { name: snapshot }).map(|_| ExitCode::SUCCESS)
}

fn show_saved(one: &CheckpointInfo, json: bool) -> anyhow::Result<ExitCode> {
    match json {
        true => outln!("{}", serde_json::to_string(&Kept::Disk(one))?)?,
        false => outln!("{}", checkpoint::line(one))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn info(snapshot: &str, place: &Where, how: How) -> anyhow::Result<ExitCode> {
    let (all, checkpoints) = (in_memory(how.name)?, place.list()?);
    if let Some(one) = checkpoints.iter().find(|one| one.name == snapshot)
        && !all.iter().any(|one| one.name == snapshot)
    {
        return show_saved(one, how.json);
    }
    match all.iter().find(|one| one.name == snapshot) {
        Some(one) => show(one, how.json),
        None => {
            let known = all.iter().map(|one| one.name.as_str());
            let known: Vec<&str> = known.chain(checkpoints.iter().map(|one| one.name.as_str())).collect();
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
