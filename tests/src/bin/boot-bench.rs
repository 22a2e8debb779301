//! Boots the same Linux guest with `samepage run` and with `qemu-system-x86_64 -M microvm`,
//! alternating, and compares the time from exec to the first line of /init, and the memory that
//! each VMM itself needs.
//!
//! Run by `tests/bench boot`, in the nested-paging lab. Fair to QEMU:
//! - same vmlinux (so that QEMU boots it by PVH, without unpacking), initrd, command line, RAM and
//!   vCPU;
//! - microvm with what an ACPI guest needs. The PIT and the PIC stay on: without them this guest
//!   boots slower (16 s against 9 s), and without ACPI it does not find its interrupts. No network,
//!   no disk, no RNG;
//! - an unmeasured round warms the page cache; kernel and initrd are read from memory;
//! - transparent huge pages are set to one value for both (`--thp`), and QEMU asks for them by
//!   itself.

use std::ffi::OsString;

use anyhow::Result;
use lab::spread::{Spread, median};
use serde_json::json;
use tests::bench::provenance;
use tests::boot::{Boot, boot};
use tests::linux_bench::{InMemory, Options};
use tests::peer::{CMDLINE, MICROVM};

const USAGE: &str = "\
Boots a Linux guest with Samepage and with QEMU's microvm, alternating, and compares.

Usage: boot-bench --image DIR [--rounds N] [--memory MIB] [--thp always|madvise|never] [--json]

  --image DIR    what `samepage image --out DIR` made
  --rounds N     measured boots of each [default: 3]
  --memory MIB   guest RAM [default: 256]
  --thp VALUE    transparent huge pages of the host while it runs [default: always]
  --json         print one JSON object

Changes this host's huge page setting: run it in the lab, with tests/bench boot.";

fn main() -> Result<()> {
    let Some(options) = Options::new(256, "always").parse(USAGE, |_, _| Ok(false))? else {
        println!("{USAGE}");
        return Ok(());
    };
    let InMemory { kernel, initrd, dir: _dir } = options.prepare()?;
    let words = |list: &[&str]| -> Vec<OsString> { list.iter().map(OsString::from).collect() };
    let mib = options.memory_mib.to_string();
    let mut samepage: Vec<OsString> = vec![tests::samepage().into()];
    samepage.extend(words(&["run", "--memory", &format!("{mib}M"), "--cmdline", CMDLINE, "--kernel"]));
    samepage.extend([kernel.as_os_str(), "--initrd".as_ref(), initrd.as_os_str()].map(OsString::from));
    let mut qemu =
        words(&["qemu-system-x86_64", "-M", MICROVM, "-cpu", "host", "-enable-kvm", "-m", &mib, "-smp", "1"]);
    qemu.extend(words(&["-nodefaults", "-no-user-config", "-no-reboot", "-nographic", "-serial", "stdio"]));
    qemu.extend(words(&["-append", CMDLINE, "-kernel"]));
    qemu.extend([kernel.as_os_str(), "-initrd".as_ref(), initrd.as_os_str()].map(OsString::from));

    let memory_bytes = options.memory_mib << 20;
    let mut rounds: Vec<(Boot, Boot)> = Vec::new();
    for round in 0..=options.rounds {
        // The order alternates too.
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
        let ratios: Vec<f64> = rounds.iter().map(|(ours, theirs)| ours.seconds / theirs.seconds).collect();
        let result = json!({
            "provenance": provenance(), "rounds": options.rounds, "memory_mib": options.memory_mib, "thp": options.thp,
            "samepage": {"median_seconds": ours, "median_overhead_bytes": our_bytes, "boots": list(|r| r.0)},
            "qemu": {"machine": MICROVM, "median_seconds": theirs, "median_overhead_bytes": their_bytes, "boots": list(|r| r.1)},
            "time_ratio": ours / theirs, "time_ratio_of_rounds": Spread::of(&ratios),
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
