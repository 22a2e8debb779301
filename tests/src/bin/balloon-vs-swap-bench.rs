//! Takes memory from a guest by its balloon, by swap on zram and by both, and compares what its
//! work comes to with that of a guest that was sized so from the start. Run by `tests/bench
//! balloon-vs-swap`, as root.
//!
//! The guest is the built-in one. It writes all of its memory once, and works on a part of it from
//! then on, its working set. A balloon takes only what holds nothing, so before it is asked the
//! guest frees what is beyond its working set, which is what a kernel does with caches that it is
//! asked for. Swap takes what it finds: the host does not know which pages the guest will want
//! again. It goes round all of them, and goes on while the guest works, so that the guest stays as
//! small.
//!
//! The swap is made here and is in memory, compressed; what the guest writes cannot be compressed.
//! So this compares what is taken and how, and not what is gained; and a disk would be slower.

use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use memory::page_out::{PageOutError, has_swap};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tests::bench::provenance;
use tests::reclaiming::course;
use tests::reclaiming::point::{Point, Way};
use tests::reclaiming::table::Record;
use tests::zram::Zram;

const USAGE: &str = "\
Takes memory from a guest by its balloon, by swap on zram, by both, and compares with a guest sized so from the start.

Usage: balloon-vs-swap-bench [--memory MIB] [--reclaim PERCENT,...] [--working-set PERCENT,...] [--rounds N]
                             [--seconds N] [--json]

  --memory MIB           RAM of the guest, 64 to 16384 [default: 256]
  --reclaim PERCENT,...  how much of it is taken, 1 to 90 [default: 25,50,75]
  --working-set PERCENT,...
                         what the guest works on, of what it is left, 1 to 120 [default: 50,90,120]
  --rounds N             each way runs once in each, another one first each time [default: 3]
  --seconds N            for which it works in each [default: 2]
  --json                 print one JSON object

Needs root and the kernel's zram module; there must be no other swap. The zram device is removed however this ends, but by SIGKILL.";

/// Swap beyond what the guest has, in MiB.
const SPARE_SWAP_MIB: u64 = 64;

struct Options {
    memory_mib: u64,
    reclaim_percent: Vec<u64>,
    working_set_percent: Vec<u64>,
    rounds: usize,
    window: Duration,
    json: bool,
}

fn main() -> Result<ExitCode> {
    let Some(options) = parse()? else {
        println!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    if let Some(why) = tests::host::without_kvm() {
        bail!("no VM can run here: {why}; expected a /dev/kvm that can be read and written");
    }
    match has_swap() {
        Err(PageOutError::NoSwap) => {}
        Err(error @ PageOutError::Swaps(_)) => return Err(error.into()),
        _ => bail!(
            "this host has swap already, and pages would go there too: expected none; see `swapon --show`"
        ),
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    let provenance = provenance();
    // Dropped last, when no guest has anything there any more.
    let zram = Zram::new(options.memory_mib + SPARE_SWAP_MIB)?;
    let mut records = Vec::new();
    for reclaim_percent in &options.reclaim_percent {
        for working_set_percent in &options.working_set_percent {
            let point = Point {
                memory_mib: options.memory_mib,
                reclaim_percent: *reclaim_percent,
                working_set_percent: *working_set_percent,
            };
            let record = measure(point, &options, &interrupted)
                .with_context(|| format!("{point:?}; everything is stopped"))?;
            if !options.json {
                print!("{}", record.text());
            }
            records.push(record);
        }
    }
    drop(zram);
    if options.json {
        let points: Vec<_> = records.iter().map(Record::json).collect();
        let seconds = options.window.as_secs_f64();
        let all = json!({"provenance": provenance, "rounds": options.rounds, "window_seconds": seconds, "points": points});
        println!("{all:#}");
    } else {
        println!(
            "{} rounds of {} s; {}",
            options.rounds,
            options.window.as_secs(),
            provenance.environment.line()
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(point: Point, options: &Options, interrupted: &AtomicBool) -> Result<Record> {
    let working_set_pages = course::working_set_pages(&point)?;
    let mut record = Record { point, working_set_pages, rounds: Default::default() };
    for round in 0..options.rounds {
        for n in 0..Way::ALL.len() {
            // The order alternates.
            let place = (round + n) % Way::ALL.len();
            let way = Way::ALL[place];
            let name = way.name();
            let figures = course::run(&point, way, working_set_pages, options.window, interrupted)
                .with_context(|| format!("{name} in round {}", round + 1))?;
            let Point { reclaim_percent, working_set_percent, .. } = point;
            let writes = figures.get("writes_per_second").copied().unwrap_or_default();
            eprintln!(
                "{reclaim_percent} % taken, working set {working_set_percent} %, round {} {name:<8} {writes:.0} writes/s",
                round + 1
            );
            record.rounds[place].push(figures);
        }
    }
    Ok(record)
}

fn parse() -> Result<Option<Options>> {
    let mut options = Options {
        memory_mib: 256,
        reclaim_percent: vec![25, 50, 75],
        working_set_percent: vec![50, 90, 120],
        rounds: 3,
        window: Duration::from_secs(2),
        json: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--memory" => options.memory_mib = number(&arg, &value()?, 64, 16_384)?,
            "--reclaim" => options.reclaim_percent = numbers(&arg, &value()?, 90)?,
            "--working-set" => options.working_set_percent = numbers(&arg, &value()?, 120)?,
            "--rounds" => options.rounds = number(&arg, &value()?, 1, 1000)?,
            "--seconds" => options.window = Duration::from_secs(number(&arg, &value()?, 1, 3600)?),
            "--json" => options.json = true,
            "-h" | "--help" => return Ok(None),
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    Ok(Some(options))
}

fn number<T: FromStr + PartialOrd + std::fmt::Display>(
    key: &str,
    text: &str,
    least: T,
    most: T,
) -> Result<T> {
    let number = text.parse().ok().filter(|number| (&least..=&most).contains(&number));
    number
        .with_context(|| format!("{key} {text:?} is not possible: expected a number from {least} to {most}"))
}

fn numbers(key: &str, text: &str, most: u64) -> Result<Vec<u64>> {
    let numbers: Vec<u64> = text.split(',').map(|one| number(key, one, 1, most)).collect::<Result<_>>()?;
    ensure!(!numbers.is_empty(), "{key} needs a number");
    Ok(numbers)
}
