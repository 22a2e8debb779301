//! Merges the same guests by the slab engine and by the kernel's KSM with three sets of knobs, one
//! after the other, and compares. Run by `tests/bench merge`.
//!
//! Each contender has fresh guests, all of them ready and filled before it begins, and the machine
//! to itself. What is counted as KSM's work is the thread `ksmd` alone; as the slab engine's, its
//! threads in the VM processes and in this one, system calls included. Faults that merging causes
//! the guests later are in neither: see the VMs' other threads.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fleet::watch::Watch;
use lab::contender::Contender;
use lab::environment::ksm_knobs;
use lab::provenance::Provenance;
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use memory::size::parse_size;
use merge::ksm;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tests::bench::provenance;
use tests::merging::course;
use tests::merging::setting::Setting;
use tests::merging::table::{Record, Table};

const USAGE: &str = "\
Merges the same guests with Samepage's engine slab and with the kernel's KSM, alternating, and compares.

Usage: merge-bench [--guests N] [--memory SIZE] [--rounds R] [--window SECONDS] [--limit SECONDS]
                   [--engines NAME,...] [--merging-only] [--image DIR] [--json]

  --guests N        guests, half of their memory in common [default: 8]
  --memory SIZE     RAM of each [default: 128M]
  --rounds R        rounds; each contender runs once in each, another one first each time [default: 3]
  --window SECONDS  of each stretch in which processor time is counted [default: 10]
  --limit SECONDS   for merging, after which a contender has not got there [default: 300]
  --engines NAMES   of off, ksm-default, ksm, ksm-advisor, slab, slab-10 [default: all but slab-10]
  --merging-only    ends each course once merging has got there: what is measured at rest and under change is left out
  --image DIR       Linux guests, of what `samepage image --out DIR` made [default: the built-in guest]
  --json            print one JSON object

KSM needs root, and its settings are put back however this ends; without root only off and slab run.";

/// Subcommands of `samepage` that a fleet starts from its own executable, which here is this one.
const OWN_SUBCOMMANDS: [&str; 2] = ["run", "ksm-guard"];

/// The default contenders.
const CONTENDERS: [Contender; 5] =
    [Contender::Off, Contender::KsmDefault, Contender::Ksm, Contender::KsmAdvisor, Contender::Slab];

struct Options {
    setting: Setting,
    rounds: usize,
    contenders: Vec<Contender>,
    json: bool,
}

fn main() -> Result<ExitCode> {
    if std::env::args().nth(1).is_some_and(|word| OWN_SUBCOMMANDS.contains(&word.as_str())) {
        return Ok(vmm::main());
    }
    let Some(mut options) = parse()? else {
        println!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    let mut notes = Vec::new();
    if ksm::available() != ksm::Availability::Full && options.contenders.iter().any(|who| who.is_ksm()) {
        options.contenders.retain(|who| !who.is_ksm());
        let note =
            format!("KSM cannot be driven here ({:?}), so it is left out: run as root", ksm::available());
        eprintln!("{note}");
        notes.push(note);
    }
    ensure!(!options.contenders.is_empty(), "nothing is left to measure");
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // A second one ends this at once, and with it all guests; the guard of KSM's settings sees
        // to those.
        signal_hook::flag::register_conditional_shutdown(signal, 130, interrupted.clone())?;
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    let watch = Watch::new(|_, _, _, _| {}, interrupted);
    let (provenance, knobs) = (provenance(), ksm_knobs());
    if provenance.environment.ksm_runs() {
        notes.push("KSM ran before this began, and so runs while the others are measured".into());
    }
    let mut records: Vec<Record> =
        options.contenders.iter().map(|who| Record { contender: *who, outcomes: Vec::new() }).collect();
    for round in 0..options.rounds {
        for n in 0..records.len() {
            // The order alternates.
            let place = (round + n) % records.len();
            let record = &mut records[place];
            let who = record.contender;
            let outcome = course::run(&options.setting, who, &watch)
                .with_context(|| format!("{} in round {}; everything is stopped", who.name(), round + 1))?;
            let seconds = outcome.figures.get("seconds").map_or("not there".into(), |s| format!("{s:.2} s"));
            eprintln!("round {} {:<12} {seconds}", round + 1, who.name());
            record.outcomes.push(outcome);
        }
    }
    let now = ksm_knobs();
    if now != knobs {
        notes.push(format!(
            "KSM is not set as it was before, and no engine runs: another program did that. It was {knobs:?} and is {now:?}"
        ));
    }
    print(&options, &records, &provenance, &notes);
    Ok(ExitCode::SUCCESS)
}

fn print(options: &Options, records: &[Record], provenance: &Provenance, notes: &[String]) {
    let table = Table::of(records);
    let Setting { guests, memory_bytes, linux, window, limit, merging_only: _ } = &options.setting;
    if options.json {
        let mut result = json!({
            "provenance": provenance, "guests": guests, "memory_bytes": memory_bytes,
            "kind": if linux.is_some() { "linux" } else { "builtin" },
            "mix_percent": {"common": 50, "unique": 50}, "rounds": options.rounds,
            "window_seconds": window.as_secs_f64(), "limit_seconds": limit.as_secs_f64(), "notes": notes,
        });
        if let (Some(all), serde_json::Value::Object(figures)) = (result.as_object_mut(), table.json(records))
        {
            all.extend(figures);
        }
        println!("{result:#}");
        return;
    }
    println!(
        "{guests} guests of {} MiB, half of it common; {} rounds; {}",
        memory_bytes >> 20,
        options.rounds,
        provenance.environment.line(),
    );
    for record in records {
        let knobs = record.outcomes.last().map(|outcome| outcome.knobs.as_slice()).unwrap_or_default();
        let knobs: Vec<String> = knobs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !knobs.is_empty() {
            println!("{}: {}", record.contender.name(), knobs.join(" "));
        }
        for note in record.outcomes.iter().flat_map(|outcome| &outcome.notes) {
            println!("{}: {note}", record.contender.name());
        }
    }
    for note in notes {
        println!("{note}");
    }
    print!("{}", table.text());
}

fn parse() -> Result<Option<Options>> {
    let seconds = Duration::from_secs;
    let mut setting = Setting {
        guests: 8,
        memory_bytes: 128 << 20,
        linux: None,
        window: seconds(10),
        limit: seconds(300),
        merging_only: false,
    };
    let (mut rounds, mut json, mut contenders) = (3, false, CONTENDERS.to_vec());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        let number = |text: String| text.parse::<u64>().with_context(|| format!("{arg} takes a number"));
        match arg.as_str() {
            "--guests" => setting.guests = number(value()?)?.try_into().context("too many guests")?,
            "--memory" => setting.memory_bytes = parse_size(&value()?, MIN_RAM_BYTES, MAX_RAM_BYTES)?,
            "--rounds" => rounds = number(value()?)?,
            "--window" => setting.window = seconds(number(value()?)?),
            "--limit" => setting.limit = seconds(number(value()?)?),
            "--image" => {
                let image = std::path::PathBuf::from(value()?);
                setting.linux = Some((image.join("vmlinux"), image.join("initrd.cpio")));
            }
            "--engines" => {
                contenders = value()?
                    .split(',')
                    .map(|name| {
                        // What KSM with the knobs of fleets was called here before.
                        let name = if name == "ksm-fast" { "ksm" } else { name };
                        Contender::named(name).with_context(|| format!("no engine {name:?}\n\n{USAGE}"))
                    })
                    .collect::<Result<_>>()?;
            }
            "--merging-only" => setting.merging_only = true,
            "--json" => json = true,
            "-h" | "--help" => return Ok(None),
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    ensure!(setting.guests >= 2, "--guests must be at least 2: one has no other to share with");
    ensure!(rounds > 0, "--rounds must be at least 1");
    ensure!(!setting.window.is_zero(), "--window must be at least 1 second");
    Ok(Some(Options { setting, rounds: rounds as usize, contenders, json }))
}
