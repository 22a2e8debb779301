//! Inflates and deflates the balloon of the same Linux guest under `samepage run` and under
//! `qemu-system-x86_64 -M microvm`, alternating, and compares how fast memory comes back and what
//! that costs the VMM.
//!
//! Run by `tests/bench balloon`, in the nested-paging lab. One boot of each a round, and in it, in
//! this order:
//! - *reclaim untouched*: inflate over memory that the guest has never touched;
//! - *return + install*: deflate, then the guest fills as much memory;
//! - *reclaim touched*: the guest frees it, then inflate over it;
//! - *return*: deflate.
//!
//! Fair to QEMU: same kernel, initrd, command line, RAM and vCPU; the same wait on the driver's own
//! word (`actual`); transparent huge pages at one value for both. QEMU has no free page reporting
//! on, and neither has Samepage.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use lab::spread::median;
use serde_json::{Value, json};
use tests::bench::provenance;
use tests::linux_bench::{InMemory, Options};
use tests::peer::{Balloon, Linux, Moved, Qemu, Samepage, move_to};

const USAGE: &str = "\
Inflates and deflates a Linux guest's balloon with Samepage and with QEMU's microvm, alternating, and compares.

Usage: balloon-bench --image DIR [--rounds N] [--memory MIB] [--balloon MIB] [--thp always|madvise|never]
                     [--append TEXT] [--json]

  --image DIR    what `samepage image --out DIR` made
  --rounds N     measured boots of each [default: 3]
  --memory MIB   guest RAM [default: 512]
  --balloon MIB  size of the balloon [default: 192]
  --thp VALUE    transparent huge pages of the host while it runs [default: never]
  --append TEXT  more for the guest's command line: Debian's kernel zeroes every page that it allocates, and so touches
                 what was untouched; with init_on_alloc=0 it does not
  --json         print one JSON object

Changes this host's huge page setting: run it in the lab, with tests/bench balloon.";

/// What is measured, in the order in which it happens.
const STEPS: [&str; 4] = ["reclaim untouched", "return + install", "reclaim touched", "return"];

type Round = [Moved; STEPS.len()];

fn main() -> Result<()> {
    let (mut balloon_mib, mut append) = (192u32, String::new());
    let options = Options::new(512, "never").parse(USAGE, |arg, value| {
        match arg {
            "--balloon" => balloon_mib = value()?.parse().context("--balloon takes a number of MiB")?,
            "--append" => append = value()?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let Some(options) = options else {
        println!("{USAGE}");
        return Ok(());
    };
    let InMemory { kernel, initrd, dir } = options.prepare()?;
    let linux = Linux { kernel: &kernel, initrd: &initrd, memory_mib: options.memory_mib, append: &append };
    let bytes = u64::from(balloon_mib) << 20;
    let mut rounds: Vec<[Round; 2]> = Vec::new();
    for round in 0..options.rounds {
        // The order alternates.
        let pair = if round % 2 == 0 {
            let ours = ours(&linux, dir.path(), bytes)?;
            [ours, theirs(&linux, dir.path(), bytes)?]
        } else {
            let theirs = theirs(&linux, dir.path(), bytes)?;
            [ours(&linux, dir.path(), bytes)?, theirs]
        };
        if !options.json {
            show(&format!("round {}", round + 1), bytes, |n, who| pair[who][n]);
        }
        rounds.push(pair);
    }
    let middle = |n: usize, who: usize| Moved {
        seconds: median(rounds.iter().map(|r| r[who][n].seconds)),
        vmm_cpu_seconds: median(rounds.iter().map(|r| r[who][n].vmm_cpu_seconds)),
    };
    if options.json {
        println!("{:#}", report(&options, &linux, bytes, middle, &rounds));
    } else {
        show("median", bytes, middle);
    }
    Ok(())
}

fn ours(linux: &Linux<'_>, dir: &Path, bytes: u64) -> Result<Round> {
    let dir = tempfile::tempdir_in(dir)?;
    steps(&mut Samepage::start(linux, dir.path())?, bytes)
}

fn theirs(linux: &Linux<'_>, dir: &Path, bytes: u64) -> Result<Round> {
    let dir = tempfile::tempdir_in(dir)?;
    steps(&mut Qemu::start(linux, dir.path())?, bytes)
}

fn steps(vm: &mut dyn Balloon, bytes: u64) -> Result<Round> {
    let untouched = move_to(vm, bytes)?;
    let began = Instant::now();
    let mut install = move_to(vm, 0)?;
    let fill = format!("fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages={}", bytes / 4096);
    vm.agent().command(&fill)?;
    install.seconds = began.elapsed().as_secs_f64();
    vm.agent().command("free percent=100")?;
    let touched = move_to(vm, bytes)?;
    Ok([untouched, install, touched, move_to(vm, 0)?])
}

#[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52 bytes")]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn show(title: &str, bytes: u64, of: impl Fn(usize, usize) -> Moved) {
    println!("{title:<8} {:<18} {:>22} {:>22} {:>7}", "", "samepage", "qemu", "ratio");
    for (n, step) in STEPS.iter().enumerate() {
        let cell = |who| {
            let moved = of(n, who);
            let (rate, cpu) = (gib(bytes) / moved.seconds, moved.vmm_cpu_seconds / gib(bytes));
            format!("{rate:.3} GiB/s {cpu:.2} s/GiB")
        };
        let ratio = of(n, 1).seconds / of(n, 0).seconds;
        println!("{:<8} {step:<18} {:>22} {:>22} {ratio:>6.2}x", "", cell(0), cell(1));
    }
}

fn report(
    options: &Options,
    linux: &Linux<'_>,
    bytes: u64,
    middle: impl Fn(usize, usize) -> Moved,
    rounds: &[[Round; 2]],
) -> Value {
    let entry = |moved: Moved| {
        json!({
            "seconds": moved.seconds,
            "gib_per_second": gib(bytes) / moved.seconds,
            "vmm_cpu_seconds_per_gib": moved.vmm_cpu_seconds / gib(bytes),
        })
    };
    let steps = STEPS.iter().enumerate().map(|(n, step)| {
        let of = |who: usize| {
            json!({"median": entry(middle(n, who)),
                   "rounds": rounds.iter().map(|r| entry(r[who][n])).collect::<Vec<_>>()})
        };
        let ratio = middle(n, 1).seconds / middle(n, 0).seconds;
        json!({"step": step, "samepage": of(0), "qemu": of(1), "rate_ratio": ratio})
    });
    json!({
        "provenance": provenance(), "rounds": options.rounds, "memory_mib": options.memory_mib, "balloon_mib": bytes >> 20,
        "thp": options.thp, "append": linux.append, "steps": steps.collect::<Vec<_>>(),
    })
}
