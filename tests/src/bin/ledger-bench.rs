//! What a look at a fleet's frames costs: by kind, as the ledger does it, against entry by entry
//! and frame by frame, on the same guests at the same moment. Run by `tests/bench ledger`, as root:
//! others do not see frame numbers.
//!
//! By processor time, so that what else runs on the machine says little. The guests are paused, so
//! that both have to come to the same.
//!
//! Then what it costs each second when it is read as the daemon does, walks now and then and
//! counters in between, with as much time for each GiB as there would be on a larger host: with
//! guests that are idle, and with guests that write to all that they have. What it says is held
//! against a whole walk at the end.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::spread::median;
use measure::by_kind;
use measure::frames::{self, Frames, Pages};
use measure::rolling::{REFRESH, Rolling, Subject, WALK_PART};
use measure::{Extent, MeasureError, Space};
use memory::PAGE_BYTES;
use merge::Engine;
use merge::slab::engine::SlabEngine;
use os::process::thread_time;
use serde_json::json;
use tests::bench::provenance;
use tests::sandbox::Sandbox;
use tests::vm::{Client, Vm, eventually};

const USAGE: &str = "\
Compares what reading the ledger's frames costs by kind with what it costs frame by frame.

Usage: ledger-bench [--guests N] [--memory MIB] [--rounds R] [--json]

  --guests N    guests that are merged [default: 4]
  --memory MIB  RAM of each [default: 512]
  --rounds R    rounds, of which the median is shown [default: 5]
  --host GIB    the host that guests are taken to be a part of, which bounds the time for walks [default: 256]
  --seconds S   how long it is read each second, of guests that are idle and of guests that write [default: 20]
  --json        print one JSON object

Needs root and /dev/kvm.";

/// One state of the fleet.
struct State {
    name: &'static str,
    /// Milliseconds of a processor for each GiB of guest memory.
    by_frame: f64,
    by_kind: f64,
    frames: Frames,
}

impl State {
    fn of(name: &'static str, spaces: &[Space], rounds: usize) -> Result<Self> {
        let gib = gib(spaces);
        let (mut slow, mut fast) = (Vec::new(), Vec::new());
        let mut last = Frames::default();
        for _ in 0..rounds {
            let (frames, took) = timed(|| frames::measure(spaces))?;
            ensure!(!frames.estimated, "frame numbers are hidden from this user: run it as root");
            slow.push(took.as_secs_f64() * 1e3 / gib);
            let (kinds, took) = timed(|| by_kind::measure(spaces))?;
            fast.push(took.as_secs_f64() * 1e3 / gib);
            ensure!(
                (kinds.pages, kinds.frames, &kinds.shared_by)
                    == (frames.pages, frames.frames, &frames.shared_by),
                "they do not agree on {name}: {:?}, and frame by frame {:?}",
                kinds.pages,
                frames.pages
            );
            last = frames;
        }
        Ok(Self { name, by_frame: median(slow), by_kind: median(fast), frames: last })
    }
}

fn timed(work: impl FnOnce() -> Result<Frames, MeasureError>) -> Result<(Frames, Duration)> {
    let before = thread_time();
    let frames = work()?;
    Ok((frames, thread_time() - before))
}

/// The ledger's frames, read once a second for a while.
struct Watch {
    name: &'static str,
    readings: usize,
    /// Milliseconds of a processor for each GiB and reading: counters and accounts, and walks.
    counters: f64,
    walks: f64,
    /// The same by kind, once, at the end.
    by_kind: f64,
    /// Age of the oldest walk in the end, in seconds.
    oldest: f64,
    /// How far off the last reading was, in percent of all pages: frames, absent pages, shared
    /// pages.
    off_percent: [f64; 3],
}

impl Watch {
    fn of(
        name: &'static str,
        spaces: &[Space],
        rolling: &mut Rolling,
        held: &dyn Fn() -> Option<u64>,
        seconds: usize,
    ) -> Result<Self> {
        let subject = |space: &Space| Subject { space: space.clone(), parked_pages: 0, given_back_pages: 0 };
        let subjects: Vec<Subject> = spaces.iter().map(subject).collect();
        let gib = gib(spaces);
        let mut read = || -> Result<_> {
            let before = thread_time();
            let reading = rolling.read(&subjects, held(), Duration::from_millis(50))?;
            Ok((reading.context("guests without page types")?, thread_time() - before))
        };
        // An unknown process is walked once, whatever it costs.
        read()?;
        let (mut counters, mut walks) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..seconds {
            std::thread::sleep(Duration::from_secs(1));
            let (reading, took) = read()?;
            counters += took;
            walks += reading.walks;
        }
        let (last, _) = read()?;
        let (exact, took) = timed(|| by_kind::measure(spaces))?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3 / gib;
        let sum = |pages: fn(&Pages) -> u64| {
            last.guests.iter().map(|guest| pages(&guest.frames.pages)).sum::<u64>()
        };
        let all = exact.pages.total as f64;
        let off = |seen: u64, exact: u64| 100.0 * seen.abs_diff(exact) as f64 / all;
        Ok(Self {
            name,
            readings: seconds,
            counters: ms(counters) / seconds as f64,
            walks: ms(walks) / seconds as f64,
            by_kind: ms(took),
            oldest: last.guests.iter().map(|guest| guest.walk_age.as_secs_f64()).fold(0.0, f64::max),
            off_percent: [
                off(last.frames, exact.frames),
                off(sum(|pages| pages.absent), exact.pages.absent),
                off(sum(|pages| pages.shared), exact.pages.shared),
            ],
        })
    }
}

fn gib(spaces: &[Space]) -> f64 {
    spaces.iter().map(Space::pages).sum::<u64>() as f64 * PAGE_BYTES as f64 / (1u64 << 30) as f64
}

fn space(vm: &Vm) -> Result<Space> {
    let status = vm.ask(&json!({"op": "status"}))["status"].clone();
    let extents: Vec<Extent> = serde_json::from_value(status["extents"].clone()).context("no extents")?;
    Ok(Space { name: "guest".into(), pid: vm.running().pid(), extents })
}

fn main() -> Result<()> {
    let (mut guests, mut memory_mib, mut rounds, mut as_json) = (4, 512, 5, false);
    let (mut host_gib, mut seconds) = (256.0f64, 20);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--guests" => guests = value()?.parse().context("--guests takes a number")?,
            "--memory" => memory_mib = value()?.parse::<u64>().context("--memory takes a number of MiB")?,
            "--rounds" => rounds = value()?.parse().context("--rounds takes a number")?,
            "--host" => host_gib = value()?.parse().context("--host takes a number of GiB")?,
            "--seconds" => seconds = value()?.parse().context("--seconds takes a number")?,
            "--json" => as_json = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    ensure!((1..=64).contains(&guests) && rounds > 0, "--guests must be 1 to 64, --rounds at least 1");
    ensure!(
        (1.0..=1e6).contains(&host_gib) && (1..=3600).contains(&seconds),
        "--host must be 1 to 1000000, --seconds 1 to 3600"
    );
    ensure!((32..=65_536).contains(&memory_mib), "--memory must be 32 to 65536");
    let sandbox = Sandbox::new();
    let socket = sandbox.file("merge.sock");
    let mut engine = SlabEngine::new(socket.clone());
    let (memory, merge) = (format!("{memory_mib}M"), socket.to_str().context("no UTF-8")?);
    let pages = memory_mib * 256 * 3 / 4;
    let mut vms: Vec<(Vm, Client)> = Vec::new();
    for n in 0..guests {
        let vm = Vm::start(
            &sandbox,
            &format!("vm-{n}"),
            &["--memory", &memory, "--huge-pages", "no", "--merge", merge],
        );
        let mut com2 = vm.com2();
        com2.line().context("no ready line")?;
        let fill = format!("fill seed={n} common=7 zero=10 common_pct=50 dup=20 unique=20 pages={pages}");
        com2.command(&fill);
        vms.push((vm, com2));
    }
    let spaces = vms.iter().map(|(vm, _)| space(vm)).collect::<Result<Vec<_>>>()?;
    let hold = |op: &str| vms.iter().for_each(|(vm, _)| _ = vm.ask(&json!({"op": op})));
    hold("pause");
    let before = State::of("before it is merged", &spaces, rounds)?;
    hold("resume");
    engine.start(&[]).context("the engine does not start")?;
    let mut last = (0, 0);
    eventually("nothing new is merged", || {
        let merged = engine.progress().map_or(0, |progress| progress.merged_pages);
        last = if merged == last.0 && merged > 0 { (merged, last.1 + 1) } else { (merged, 0) };
        last.1 > 100
    });
    hold("pause");
    // What was under way comes to its end.
    std::thread::sleep(Duration::from_secs(2));
    let states = [before, State::of("merged by slabs", &spaces, rounds)?];
    let part = f64::from(WALK_PART) * (host_gib / gib(&spaces)).max(1.0);
    let mut rolling = Rolling::new(part as u32, REFRESH);
    let slab_pages = engine.slab_pages();
    let held = || slab_pages.as_ref().map(|ask| ask());
    hold("resume");
    let idle = Watch::of("guests are idle", &spaces, &mut rolling, &held, seconds)?;
    // A tenth of each guest every second.
    let churn = format!("churn class=all rate={} seconds={}", pages / 10, seconds + 5);
    vms.iter_mut().for_each(|(_, com2)| _ = com2.command(&churn));
    let watches = [idle, Watch::of("guests write", &spaces, &mut rolling, &held, seconds)?];
    let provenance = provenance();
    if as_json {
        let states: Vec<_> = states
            .iter()
            .map(|s| {
                json!({"state": s.name, "by_frame_ms_a_gib": s.by_frame, "by_kind_ms_a_gib": s.by_kind,
                    "pages": s.frames.pages, "frames": s.frames.frames})
            })
            .collect();
        let watches: Vec<_> = watches
            .iter()
            .map(|w| {
                json!({"state": w.name, "readings": w.readings, "counters_ms_a_gib": w.counters, "walks_ms_a_gib": w.walks,
                    "by_kind_ms_a_gib": w.by_kind, "oldest_walk_seconds": w.oldest, "off_percent": w.off_percent})
            })
            .collect();
        println!(
            "{:#}",
            json!({"provenance": provenance, "guests": guests, "memory_mib": memory_mib, "states": states,
                "host_gib": host_gib, "watches": watches})
        );
        return Ok(());
    }
    println!(
        "{}\n{guests} guests of {memory_mib} MiB; milliseconds of a processor for each GiB of guest memory",
        provenance.environment.line()
    );
    for State { name, by_frame, by_kind, frames } in states {
        let shared = 100.0 * frames.pages.shared as f64 / frames.pages.total as f64;
        println!(
            "  {name:20} frame by frame {by_frame:7.2}   by kind {by_kind:6.2}   {:.1} times less; {shared:.0} % shared",
            by_frame / by_kind
        );
    }
    println!("read every second, with as much time for walks as a GiB has on a host of {host_gib} GiB:");
    for Watch { name, counters, walks, by_kind, oldest, off_percent: [frames, absent, shared], .. } in watches
    {
        let each = counters + walks;
        println!(
            "  {name:20} counters {counters:6.3} + walks {walks:6.3} = {each:6.3}   by kind {by_kind:6.2}   {:.0} times less",
            by_kind / each
        );
        println!(
            "  {:20} oldest walk {oldest:.0} s ago; off by {frames:.2} % of all pages in frames, {absent:.2} in absent, {shared:.2} in shared",
            ""
        );
    }
    println!("  counters are read of each guest, whatever its size: larger guests cost less a GiB");
    Ok(())
}
