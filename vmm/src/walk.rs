//! `samepage walk`: an address of a guest's, through its page tables, down to the host's frame.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde::Serialize;

use super::progress::{draw_target, interrupt_flag, is_set};
use super::table::{counted, mib};
use super::which::Which;
use fleet::host_page::{HostPage, Place};
use fleet::target::Target;
use fleet::walk::{Finding, TableAudit};
use machine::paging::{End, Paging, Rights, Step};
use machine::walk::{Tables, Walked};
use os::print::outln;

/// How often a watched page is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Follow a guest's address through its page tables to the host's frame
#[derive(clap::Args)]
#[command(
    after_help = "Every level of the guest's table is shown with its bits, then the page in the VM process, its frame (as root), the
slab that it lies in, and which other guests have the same frame. Any address of the guest's kernel will do; those of a
process only while it runs on that vCPU, or with --root. The guest is paused for the microseconds it takes to read its
registers.

Examples:
  samepage walk web-0 0xffffffff81000000          where a Linux guest's kernel begins
  samepage walk vm-0 0x400000 --watch             say when merging shares the page, and when a write breaks it again
  samepage walk web-0 --audit                     what is mapped, and what of it is writable and executable at once
  samepage walk ./vm.sock 0x400000 --json

GUEST is a guest of the fleet that is up (or of --name FLEET), or the path of a control socket made by
`samepage run --control`, which has a / in it."
)]
pub(super) struct Args {
    #[command(flatten)]
    guest: Which,
    /// The guest's address, in hexadecimal with 0x, or in decimal
    #[arg(value_name = "ADDRESS", value_parser = number, required_unless_present = "audit", conflicts_with = "audit")]
    address: Option<u64>,
    /// Look through all of the guest's tables instead: memory that is writable and executable, user
    /// memory that the kernel can execute, the null page
    #[arg(long, conflicts_with = "watch")]
    audit: bool,
    /// Go on, and print a line whenever the page is elsewhere; until SECONDS are over, or Control-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "86400", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
    /// The vCPU whose tables are meant
    #[arg(long, value_name = "N", default_value_t = 0)]
    vcpu: u8,
    /// The guest-physical address of other tables, as the guest has it in CR3 for another process
    #[arg(long, value_name = "ADDRESS", value_parser = number)]
    root: Option<u64>,
    /// Print one JSON object; with --watch one a line
    #[arg(long)]
    json: bool,
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(&digits.replace('_', ""), 16),
        None => text.parse(),
    };
    parsed.map_err(|e| format!("{e}: expected an address such as 0xffffffff81000000"))
}

/// One look.
#[derive(Serialize)]
struct Look<'a> {
    guest: &'a str,
    vcpu: u8,
    address: u64,
    #[serde(flatten)]
    walked: Walked,
    host: Option<HostPage>,
    /// Since the first look.
    seconds: f64,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let target = args.guest.find()?;
    let tables = Tables { vcpu: args.vcpu, root: args.root };
    match (args.address, args.watch) {
        (None, _) => audit(&target, tables, args.json),
        (Some(address), None) => {
            let look = look(&target, address, tables, Instant::now())?;
            match args.json {
                true => outln!("{}", serde_json::to_string(&look)?)?,
                false => outln!("{}", text(&look))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        (Some(address), Some(seconds)) => {
            watch(&target, address, tables, Duration::from_secs(seconds), args.json)
        }
    }
}

fn look<'a>(target: &'a Target, address: u64, tables: Tables, began: Instant) -> anyhow::Result<Look<'a>> {
    let walked = target.walk(address, tables)?;
    let host = walked.hva.map(|hva| target.host_page(hva)).transpose()?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Look { guest: &target.guest, vcpu: tables.vcpu, address, walked, host, seconds })
}

fn watch(
    target: &Target,
    address: u64,
    tables: Tables,
    limit: Duration,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let (interrupted, began) = (interrupt_flag()?, Instant::now());
    let mut last: Option<Look> = None;
    while !is_set(&interrupted) && began.elapsed() < limit {
        let now = look(target, address, tables, began)?;
        let is_same = last.as_ref().is_some_and(|last| {
            let place = |host: &Option<HostPage>| host.as_ref().map(|host| (host.place, host.frame));
            last.walked.walk.end == now.walked.walk.end && place(&last.host) == place(&now.host)
        });
        if !is_same {
            match (json, &last) {
                (true, _) => outln!("{}", serde_json::to_string(&now)?)?,
                (false, None) => outln!("{}\n\nwatching; Control-C ends it", text(&now))?,
                (false, Some(before)) => outln!("{}", change(before, &now))?,
            }
            last = Some(now);
        }
        thread::sleep(LOOK);
    }
    Ok(ExitCode::SUCCESS)
}

/// What became of the page.
fn change(before: &Look, now: &Look) -> String {
    let place = |look: &Look| look.host.as_ref().map_or_else(|| "no RAM".into(), on_host);
    let kind = |look: &Look| look.host.as_ref().map(|host| host.place);
    let why = match (kind(before), kind(now)) {
        (Some(Place::Slab { .. } | Place::Ksm | Place::Shared), Some(Place::Private)) => {
            ": a write broke the sharing, and the guest has a copy of its own"
        }
        (Some(Place::Private), Some(Place::Slab { .. } | Place::Ksm | Place::Shared)) => ": merged",
        (Some(Place::Absent), Some(Place::Private)) => ": touched for the first time",
        (Some(Place::Zero), Some(Place::Private)) => ": written for the first time",
        (Some(_), Some(Place::Absent)) => ": given back to the host",
        (Some(_), Some(Place::Swapped)) => ": paged out",
        (Some(Place::Swapped), Some(_)) => ": read back",
        _ => "",
    };
    format!("{:8.2} s  {} -> {}{why}", now.seconds, place(before), place(now))
}

fn text(look: &Look) -> String {
    let Look { guest, vcpu, address, walked: Walked { paging, walk, .. }, host, .. } = look;
    let mut lines = vec![format!("{guest}, vCPU {vcpu}: {address:#x} by {}", rules(paging))];
    lines.extend(walk.steps.iter().map(|step| level(step, paging)));
    lines.push(match walk.end {
        End::Page { gpa, page_bytes, rights } => {
            format!("page      guest-physical {gpa:#x}, {} page: {}", size(page_bytes), words(rights))
        }
        End::NotPresent => "page      none: the last entry is not present, a fault in the guest".into(),
        End::NoTable { table } => format!("page      none: the table at {table:#x} is outside guest RAM"),
    });
    match (host, walk.end) {
        (Some(host), _) => {
            lines.push(format!("host      process {}, {:#x}: {}", host.pid, host.hva, on_host(host)));
            lines.push(format!("shared    {}", shared(host)));
        }
        (None, End::Page { .. }) => {
            lines.push("host      none: no RAM is there, but a device or nothing".into())
        }
        (None, _) => {}
    }
    lines.join("\n")
}

fn rules(paging: &Paging) -> String {
    let on = |name, on| format!("{name} {}", if on { "on" } else { "off" });
    format!(
        "{}-level tables at {:#x} ({}, {}, {}, {})",
        paging.levels,
        paging.root,
        on("NX", paging.no_execute),
        on("WP", paging.write_protect),
        on("SMEP", paging.smep),
        on("SMAP", paging.smap)
    )
}

/// An entry, with the names of its bits.
fn level(step: &Step, paging: &Paging) -> String {
    const BITS: [(u32, &str); 9] = [
        (0, "present"),
        (1, "writable"),
        (2, "user"),
        (3, "write-through"),
        (4, "uncached"),
        (5, "accessed"),
        (6, "dirty"),
        (8, "global"),
        (63, "no-execute"),
    ];
    let Step { level, table, index, entry } = *step;
    let is_set = |bit: u32| entry & (1 << bit) != 0;
    let is_huge = matches!(level, 2 | 3) && is_set(7);
    let is_leaf = level == 1 || is_huge;
    let mut names: Vec<_> = BITS
        .iter()
        .filter(|(bit, _)| is_set(*bit))
        // These mean nothing in an entry that points to a table, or without the rule.
        .filter(|(bit, _)| (is_leaf || !matches!(bit, 6 | 8)) && (*bit != 63 || paging.no_execute))
        .map(|(_, name)| *name)
        .collect();
    if is_huge {
        names.push("huge");
    }
    if names.is_empty() {
        names.push("not present");
    }
    format!("level {level}   table {table:#014x}  entry {index:3}  {entry:#018x}  {}", names.join(" "))
}

fn words(rights: Rights) -> String {
    let Rights { writable, user, executable } = rights;
    let says = |yes, if_yes: &str, if_no: &str| if yes { if_yes.to_owned() } else { if_no.to_owned() };
    [
        says(user, "user", "kernel only"),
        says(writable, "writable", "read-only"),
        says(executable, "executable", "not executable"),
    ]
    .join(", ")
}

fn size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 30 => format!("{} GiB", bytes >> 30),
        _ if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
        _ => format!("{} KiB", bytes >> 10),
    }
}

/// Where a page is, in a few words.
fn on_host(host: &HostPage) -> String {
    let frame = host.frame.map_or_else(|| "a frame".into(), |frame| format!("frame {frame:#x}"));
    match host.place {
        Place::Absent => "absent, reads as zeros".into(),
        Place::Swapped => "on swap".into(),
        Place::Zero => "the zero page".into(),
        Place::Slab { inode, page } => format!("slab {inode}, page {page} of it ({frame})"),
        Place::Ksm => format!("{frame}, merged by KSM"),
        Place::Private => format!("{frame} of its own"),
        Place::Shared => format!("{frame} that others map, too, or the zero page"),
    }
}

fn shared(host: &HostPage) -> String {
    let frame = match (host.frame, host.mappings) {
        (None, _) if matches!(host.place, Place::Shared) => "the kernel shows frames to root alone; ",
        _ => "",
    };
    let mapped = host.mappings.filter(|_| host.place != Place::Zero);
    let mapped = mapped.map_or_else(String::new, |n| format!("; mapped {}", counted(n, "time")));
    if host.sharers.is_empty() {
        return format!("{frame}with no other page of this fleet{mapped}");
    }
    let each = host.sharers.iter().map(|sharer| format!("{} at {:#x}", sharer.guest, sharer.gpa));
    let more = if host.more_sharers { ", and more" } else { "" };
    format!("{frame}with {}{more}{mapped}", each.collect::<Vec<_>>().join(", "))
}

/// What an audit prints as JSON.
#[derive(Serialize)]
struct Audited<'a> {
    guest: &'a str,
    vcpu: u8,
    #[serde(flatten)]
    audit: &'a TableAudit,
}

fn audit(target: &Target, tables: Tables, json: bool) -> anyhow::Result<ExitCode> {
    let interrupted = interrupt_flag()?;
    let bar = ProgressBar::with_draw_target(None, draw_target());
    let audit = target.audit_tables(tables, &mut |at| {
        bar.set_message(format!("reading page tables, at {at:#x} (Control-C ends it)"));
        bar.tick();
        !is_set(&interrupted)
    })?;
    bar.finish_and_clear();
    if json {
        let audited = Audited { guest: &target.guest, vcpu: tables.vcpu, audit: &audit };
        outln!("{}", serde_json::to_string(&audited)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    outln!("{}, vCPU {}: {}", target.guest, tables.vcpu, rules(&audit.paging))?;
    for (page_bytes, bytes) in &audit.mapped_bytes {
        outln!("mapped by pages of {}: {} MiB", size(*page_bytes), mib(*bytes))?;
    }
    finding("kernel memory that is writable and executable", &audit.writable_and_executable)?;
    finding("user memory that the kernel can execute", &audit.executable_by_kernel)?;
    outln!("the null page is {}", if audit.maps_null { "mapped" } else { "not mapped" })?;
    if audit.is_partial {
        outln!("not all was read: the tables map more than can be, or Control-C came")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn finding(what: &str, finding: &Finding) -> anyhow::Result<()> {
    match finding.bytes {
        0 => outln!("{what}: none")?,
        bytes => outln!("{what}: {} MiB", mib(bytes))?,
    }
    for run in &finding.ranges {
        let end = run.start.wrapping_add(run.bytes - 1);
        outln!("  {:#x} to {end:#x}, pages of {}", run.start, size(run.page_bytes))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        assert_eq!(number("0xffff_ffff_8100_0000"), Ok(0xffff_ffff_8100_0000));
        assert_eq!(number("4194304"), Ok(0x40_0000));
        for wrong in ["", "0x", "12ab", "0x1_0000_0000_0000_0000", "-1"] {
            assert!(number(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_entry_is_shown_by_the_bits_that_mean_something() {
        let paging =
            Paging { root: 0, levels: 4, no_execute: true, write_protect: true, smep: false, smap: false };
        let step = |level, entry| level_names(&Step { level, table: 0x1000, index: 3, entry }, &paging);
        let no_execute = 1 << 63;
        assert_eq!(step(1, 0x63 | no_execute), "present writable accessed dirty no-execute");
        assert_eq!(step(2, 0xe7), "present writable user accessed dirty huge");
        assert_eq!(step(4, 0x67), "present writable user accessed");
        assert_eq!(step(1, 0), "not present");
    }

    fn level_names(step: &Step, paging: &Paging) -> String {
        let line = level(step, paging);
        line.splitn(4, "  ").last().and_then(|rest| rest.rsplit("  ").next()).unwrap_or_default().to_owned()
    }
}
