//! Boots the same Linux guest with `samepage run` and with `qemu-system-x86_64 -M microvm`, alternating, and
//! compares the time from exec to the first line of /init, and the memory that each VMM itself needs.
//!
//! Run by `tests/bench boot`, in the nested-paging lab. Fair to QEMU:
//! - same vmlinux (so that QEMU boots it by PVH, without unpacking), initrd, command line, RAM and vCPU;
//! - microvm with what an ACPI guest needs. The PIT and the PIC stay on: without them this guest boots slower (16 s
//!   against 9 s), and without ACPI it does not find its interrupts. No network, no disk, no RNG;
//! - an unmeasured round warms the page cache; kernel and initrd are read from memory;
//! - transparent huge pages are set to one value for both (`--thp`), and QEMU asks for them by itself.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tests::boot::{Boot, boot, median};

const USAGE: &str = "\
Boots a Linux guest with Samepage and with QEMU's microvm, alternating, and compares.

Usage: boot-bench --image DIR [--rounds N] [--memory MIB] [--thp always|madvise|never] [--json]

  --image DIR    what `samepage image --out DIR` made
  --rounds N     measured boots of each [default: 3]
  --memory MIB   guest RAM [default: 256]
  --thp VALUE    transparent huge pages of the host while it runs [default: always]
  --json         print one JSON object

Changes this host's huge page setting: run it in the lab, with tests/bench boot.";

/// What both guests get: no PCI probing that no VMM here answers, and the lines that count.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
const MACHINE: &str = "microvm,x-option-roms=off,isa-serial=on,acpi=on";
const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

struct Options {
    image: PathBuf,
    rounds: usize,
    memory_mib: u64,
    thp: String,
    json: bool,
}

fn options() -> Result<Option<Options>> {
    let mut options =
        Options { image: PathBuf::new(), rounds: 3, memory_mib: 256, thp: "always".into(), json: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--image" => options.image = value()?.into(),
            "--rounds" => options.rounds = value()?.parse().context("--rounds takes a number")?,
            "--memory" => options.memory_mib = value()?.parse().context("--memory takes a number of MiB")?,
            "--thp" => options.thp = value()?,
            "--json" => options.json = true,
            "-h" | "--help" => return Ok(None),
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    ensure!(
        options.image.is_dir(),
        "--image DIR is needed; make one with `samepage image --out DIR`\n\n{USAGE}"
    );
    ensure!(options.rounds > 0, "--rounds must be at least 1");
    Ok(Some(options))
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{USAGE}");
        return Ok(());
    };
    fs::write(THP, &options.thp).with_context(|| format!("cannot write '{}' to {THP}", options.thp))?;
    let in_memory = tempfile::tempdir_in("/dev/shm").context("cannot make a directory in /dev/shm")?;
    let mut files = Vec::new();
    for name in ["vmlinux", "initrd.cpio"] {
        let (from, to) = (options.image.join(name), in_memory.path().join(name));
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        files.push(to);
    }
    let [kernel, initrd] = files.as_slice() else { bail!("an image is a kernel and an initrd") };
    let words = |list: &[&str]| -> Vec<OsString> { list.iter().map(OsString::from).collect() };
    let mib = options.memory_mib.to_string();
    let mut samepage: Vec<OsString> = vec![tests::samepage().into()];
    samepage.extend(words(&["run", "--memory", &format!("{mib}M"), "--cmdline", CMDLINE, "--kernel"]));
    samepage.extend([kernel.into(), "--initrd".into(), initrd.into()]);
    let mut qemu =
        words(&["qemu-system-x86_64", "-M", MACHINE, "-cpu", "host", "-enable-kvm", "-m", &mib, "-smp", "1"]);
    qemu.extend(words(&["-nodefaults", "-no-user-config", "-no-reboot", "-nographic", "-serial", "stdio"]));
    qemu.extend(words(&["-append", CMDLINE, "-kernel"]));
    qemu.extend([kernel.into(), "-initrd".into(), initrd.into()]);

    let memory_bytes = options.memory_mib << 20;
    let mut rounds: Vec<(Boot, Boot)> = Vec::new();
    for round in 0..=options.rounds {
        // Who goes first alternates too.
        let pair = if round % 2 == 0 {
            let ours = boot(&samepage, memory_bytes)?;
            (ours, boot(&qemu, memory_bytes)?)
        } else {
            let theirs = boot(&qemu, memory_bytes)?;
            (boot(&samepage, memory_bytes)?, theirs)
        };
        if round > 0 {
            rounds.push(pair);
        }
        if !options.json {
            row(&if round == 0 { "warm-up".into() } else { format!("round {round}") }, &pair);
        }
    }
    let seconds = |of: fn(&(Boot, Boot)) -> Boot| median(rounds.iter().map(|r| of(r).seconds));
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52 bytes")]
    let bytes = |of: fn(&(Boot, Boot)) -> Boot| median(rounds.iter().map(|r| of(r).overhead_bytes as f64));
    let (ours, theirs) = (seconds(|r| r.0), seconds(|r| r.1));
    let (our_bytes, their_bytes) = (bytes(|r| r.0), bytes(|r| r.1));
    if options.json {
        let list = |of: fn(&(Boot, Boot)) -> Boot| {
            let boots = rounds.iter().map(of);
            boots
                .map(|b| json!({"seconds": b.seconds, "overhead_bytes": b.overhead_bytes}))
                .collect::<Vec<_>>()
        };
        let result = json!({
            "rounds": options.rounds, "memory_mib": options.memory_mib, "thp": options.thp,
            "samepage": {"median_seconds": ours, "median_overhead_bytes": our_bytes, "boots": list(|r| r.0)},
            "qemu": {"machine": MACHINE, "median_seconds": theirs, "median_overhead_bytes": their_bytes, "boots": list(|r| r.1)},
            "time_ratio": ours / theirs,
        });
        println!("{result:#}");
    } else {
        println!(
            "{:<9} samepage {ours:>6.2} s {:>7.2} MB   qemu {theirs:>6.2} s {:>7.2} MB   ratio {:.2}",
            "median",
            our_bytes / 1e6,
            their_bytes / 1e6,
            ours / theirs
        );
    }
    Ok(())
}

fn row(name: &str, (ours, theirs): &(Boot, Boot)) {
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52 bytes")]
    let mb = |boot: &Boot| boot.overhead_bytes as f64 / 1e6;
    println!(
        "{name:<9} samepage {:>6.2} s {:>7.2} MB   qemu {:>6.2} s {:>7.2} MB   ratio {:.2}",
        ours.seconds,
        mb(ours),
        theirs.seconds,
        mb(theirs),
        ours.seconds / theirs.seconds
    );
}
