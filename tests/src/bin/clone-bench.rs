//! What a clone of the built-in guest costs: processor time, time until all have answered, frames of its own. Run by `tests/bench clone`.
//!
//! A fleet of one guest is brought up and captured; then so many clones are started at once, again and again from the beginning. Nothing but
//! the commands that users have is used; what the processes took the kernel says.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::spread::median;
use serde_json::{Value, json};
use tests::bench::provenance;
use tests::sandbox::{Process, Sandbox};

const USAGE: &str = "\
Measures what clones of the built-in guest cost.

Usage: clone-bench [--counts N,N,...] [--memory MIB] [--rounds R] [--json]

  --counts N,N,...  how many at once [default: 1,10,100,500]
  --memory MIB      RAM of each [default: 64]
  --rounds R        rounds, of which the median is shown [default: 9]
  --json            print one JSON object

Needs /dev/kvm.";
const LIMIT: Duration = Duration::from_secs(600);

struct Options {
    counts: Vec<usize>,
    memory: u64,
    rounds: usize,
    json: bool,
}

/// One round.
struct Round {
    /// Until all had answered, as the command says.
    seconds: f64,
    /// Of each clone's process, once all had answered.
    vm_cpu_ms: f64,
    /// Of the daemon, for each clone.
    daemon_cpu_ms: f64,
    /// For which the origin stood still.
    pause_ms: f64,
    /// MiB of each clone: of the guest, of the VMM, of page tables.
    own: [f64; 3],
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{USAGE}");
        return Ok(());
    };
    let mut results = Vec::new();
    for &count in &options.counts {
        let rounds = (0..options.rounds).map(|_| round(count, options.memory)).collect::<Result<Vec<_>>>()?;
        let of = |number: &dyn Fn(&Round) -> f64| median(rounds.iter().map(number));
        let [guest, vmm, tables] = [0, 1, 2].map(|n| of(&|round| round.own[n]));
        results.push(json!({
            "clones": count,
            "seconds": of(&|round| round.seconds),
            "vm_cpu_ms": of(&|round| round.vm_cpu_ms),
            "daemon_cpu_ms": of(&|round| round.daemon_cpu_ms),
            "pause_ms": of(&|round| round.pause_ms),
            "guest_mib": guest,
            "vmm_mib": vmm,
            "page_tables_mib": tables,
        }));
    }
    let provenance = provenance();
    if options.json {
        println!("{}", json!({ "provenance": provenance, "rounds": options.rounds, "results": results }));
        return Ok(());
    }
    println!("{}", provenance.environment.line());
    println!("medians of {}; each clone of {} MiB", options.rounds, options.memory);
    println!("clones      s   ms CPU VM  ms CPU daemon  pause ms   MiB guest      VMM   tables");
    for result in &results {
        let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
        println!(
            "{:6} {:6.2} {:11.2} {:14.2} {:9.1} {:11.3} {:8.3} {:8.3}",
            number("clones"),
            number("seconds"),
            number("vm_cpu_ms"),
            number("daemon_cpu_ms"),
            number("pause_ms"),
            number("guest_mib"),
            number("vmm_mib"),
            number("page_tables_mib"),
        );
    }
    Ok(())
}

fn round(count: usize, memory: u64) -> Result<Round> {
    let sandbox = Sandbox::new();
    let file = sandbox.file("fleet.toml");
    let text = format!(
        "name = \"bench\"\n[overcommit]\nadmission = \"off\"\npolicy = false\n[[guest]]\nname = \"origin\"\nmemory = \"{memory}M\"\n\
         fill = {{ zero = 10, common = 40, duplicate = 10, unique = 40 }}\n"
    );
    fs::write(&file, text)?;
    let run = |args: &[&str]| sandbox.samepage(args).timeout(LIMIT).output().success();
    let _ = run(&["fleet", "up", file.to_str().context("UTF-8")?]);
    let taken = run(&["snapshot", "origin", "warm", "--json"]).json();
    let daemon = process(&sandbox, |p| p.args.split(' ').nth(1) == Some("host"))?;
    let before = cpu_ms(daemon.pid)?;
    let cloned = run(&["clone", "warm", "--count", &count.to_string(), "--as", "c", "--json"]).json();
    let after = cpu_ms(daemon.pid)?;
    let clones: Vec<Process> =
        sandbox.processes().into_iter().filter(|p| p.args.contains(" --name c-")).collect();
    ensure!(clones.len() == count, "{} of {count} clones are there", clones.len());
    let mut vms = 0.0;
    for clone in &clones {
        vms += threads_ms(clone.pid)?;
    }
    let status = run(&["fleet", "status", "--json"]).json();
    let all = count as f64;
    let accounts = status["ledger"]["guests"].as_array().context("accounts")?.iter();
    let accounts: Vec<&Value> =
        accounts.filter(|guest| guest["name"].as_str().is_some_and(|name| name.starts_with("c-"))).collect();
    let mib = |number: &dyn Fn(&Value) -> Option<u64>| {
        let pages: u64 = accounts.iter().filter_map(|account| number(account)).sum();
        pages as f64 / 256.0 / all
    };
    let own = [
        mib(&|account| account["private"].as_u64()),
        mib(&|account| account["overhead"]["vmm"].as_u64()),
        mib(&|account| account["overhead"]["page_tables"].as_u64()),
    ];
    let verified = run(&["fleet", "verify", "--json"]).json();
    ensure!(verified["mismatched_pages"] == 0, "pages are wrong: {verified}");
    let _ = run(&["fleet", "down"]);
    Ok(Round {
        seconds: cloned["seconds"].as_f64().context("seconds")?,
        vm_cpu_ms: vms / all,
        daemon_cpu_ms: (after - before) / all,
        pause_ms: taken["captured"]["pause_us"].as_f64().context("a pause")? / 1000.0,
        own,
    })
}

fn process(sandbox: &Sandbox, is: impl Fn(&Process) -> bool) -> Result<Process> {
    sandbox.processes().into_iter().find(is).context("a process is not there")
}

/// Processor time of a process, its threads that have ended too, by ticks of 10 ms.
fn cpu_ms(pid: i32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(')').context("a stat")?.1;
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(ticks as f64 * 10.0)
}

/// Processor time of the threads of a process that are there, to the nanosecond.
fn threads_ms(pid: i32) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // One that ends meanwhile is not there.
        let Ok(schedstat) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
        nanoseconds += schedstat.split_whitespace().next().context("a schedstat")?.parse::<u64>()?;
    }
    Ok(nanoseconds as f64 / 1e6)
}

fn options() -> Result<Option<Options>> {
    let mut options = Options { counts: vec![1, 10, 100, 500], memory: 64, rounds: 9, json: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--counts" => {
                options.counts = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            "--memory" => options.memory = value()?.parse()?,
            "--rounds" => options.rounds = value()?.parse::<usize>()?.max(1),
            "--json" => options.json = true,
            "-h" | "--help" => return Ok(None),
            _ => bail!("{arg} is unknown\n\n{USAGE}"),
        }
    }
    Ok(Some(options))
}
