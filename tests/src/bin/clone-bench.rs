//! What a clone costs: processor time, time until all have answered, frames of its own as it grows older. Run by `tests/bench clone`.
//!
//! A fleet of one guest is brought up and captured; then so many clones are started at once, again and again from the beginning. After that,
//! clones of clones. Nothing but the commands that users have is used; what the processes took the kernel says.
//!
//! Where FIRECRACKER names a program with Firecracker's API, a VM is saved to files and loaded from them by that program and by Samepage, in turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::spread::median;
use serde_json::{Value, json};
use tests::bench::provenance;
use tests::run::Outcome;
use tests::sandbox::{Process, Sandbox};

const USAGE: &str = "\
Measures what clones cost: of the built-in guest, or of a Linux guest.

Usage: clone-bench [--image DIR] [--counts N,N,...] [--memory MIB] [--rounds R] [--ages S,S,...] [--depth N] [--pool] [--json]

  --image DIR       clone a Linux guest of this image, as `samepage image` makes it
  --counts N,N,...  how many at once [default: 1,10,100,500; of a Linux guest 1,10]
  --memory MIB      RAM of each [default: 64; of a Linux guest 256]
  --rounds R        rounds, of which the median is shown [default: 9]
  --ages S,S,...    look at the frames of clones so many seconds after all have answered [default: 0]
  --depth N         clone clones of clones, so often [default: 10]
  --pool            with as many processes standing by as clones are started (`pool` in the fleet file)
  --json            print one JSON object

With FIRECRACKER=PROGRAM in the environment, a VM of the same guest is also saved to files and loaded from them, by that program and by
Samepage by the same requests of the same API, in turns: from exec until the VM runs.

Needs /dev/kvm.";
const LIMIT: Duration = Duration::from_secs(600);

#[derive(Default)]
struct Options {
    image: Option<PathBuf>,
    counts: Option<Vec<usize>>,
    memory: Option<u64>,
    rounds: usize,
    ages: Vec<u64>,
    depth: usize,
    pool: bool,
    json: bool,
}

impl Options {
    fn counts(&self) -> Vec<usize> {
        let usual = if self.image.is_some() { vec![1, 10] } else { vec![1, 10, 100, 500] };
        self.counts.clone().unwrap_or(usual)
    }

    fn memory(&self) -> u64 {
        self.memory.unwrap_or(if self.image.is_some() { 256 } else { 64 })
    }
}

/// One round.
struct Round {
    /// Until all had answered, as the command says.
    seconds: f64,
    /// Of each clone's process, once all had answered; of one that stood by, since it was asked for.
    vm_cpu_ms: f64,
    /// Of each process that stood by, before.
    ahead_cpu_ms: f64,
    /// Of the daemon, for each clone.
    daemon_cpu_ms: f64,
    /// For which the origin stood still.
    pause_ms: f64,
    /// At each age.
    own: Vec<Own>,
}

/// MiB of each clone that it has alone.
#[derive(Clone, Copy)]
struct Own {
    guest: f64,
    vmm: f64,
    page_tables: f64,
}

/// A clone of a clone.
struct Link {
    seconds: f64,
    pause_ms: f64,
    copied_mib: f64,
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{USAGE}");
        return Ok(());
    };
    let mut results = Vec::new();
    for count in options.counts() {
        let rounds = (0..options.rounds).map(|_| round(count, &options)).collect::<Result<Vec<_>>>()?;
        let of = |number: &dyn Fn(&Round) -> f64| median(rounds.iter().map(number));
        let ages: Vec<Value> = (options.ages.iter().enumerate())
            .map(|(n, age)| {
                json!({
                    "age_seconds": age,
                    "guest_mib": of(&|round| round.own[n].guest),
                    "vmm_mib": of(&|round| round.own[n].vmm),
                    "page_tables_mib": of(&|round| round.own[n].page_tables),
                })
            })
            .collect();
        results.push(json!({
            "clones": count,
            "seconds": of(&|round| round.seconds),
            "vm_cpu_ms": of(&|round| round.vm_cpu_ms),
            "ahead_cpu_ms": of(&|round| round.ahead_cpu_ms),
            "daemon_cpu_ms": of(&|round| round.daemon_cpu_ms),
            "pause_ms": of(&|round| round.pause_ms),
            "ages": ages,
        }));
    }
    let chains = match options.depth {
        0 => Vec::new(),
        depth => (0..options.rounds).map(|_| chain(depth, &options)).collect::<Result<Vec<_>>>()?,
    };
    let links: Vec<Value> = (0..options.depth)
        .map(|n| {
            let of = |number: &dyn Fn(&Link) -> f64| median(chains.iter().map(|chain| number(&chain[n])));
            json!({
                "depth": n + 1,
                "seconds": of(&|link| link.seconds),
                "pause_ms": of(&|link| link.pause_ms),
                "copied_mib": of(&|link| link.copied_mib),
            })
        })
        .collect();
    let loads = match std::env::var_os("FIRECRACKER") {
        Some(program) => tests::saved::compare(Path::new(&program), &saved_guest(&options), options.rounds)?,
        None => Vec::new(),
    };
    let provenance = provenance();
    if options.json {
        let (rounds, memory) = (options.rounds, options.memory());
        let guest = if options.image.is_some() { "linux" } else { "built-in" };
        println!(
            "{}",
            json!({ "provenance": provenance, "guest": guest, "memory_mib": memory, "rounds": rounds, "pool": options.pool, "results": results, "chain": links, "loads": loads })
        );
        return Ok(());
    }
    println!("{}", provenance.environment.line());
    let pool = if options.pool { "from a pool" } else { "without a pool" };
    println!("medians of {}; each clone of {} MiB, {pool}", options.rounds, options.memory());
    println!(
        "clones      s   ms CPU VM    (ahead)  ms CPU daemon  pause ms    age s  MiB guest      VMM   tables"
    );
    let number = |of: &Value, key: &str| of[key].as_f64().unwrap_or(f64::NAN);
    for result in &results {
        print!(
            "{:6} {:6.2} {:11.2} {:10.2} {:14.2} {:9.1}",
            number(result, "clones"),
            number(result, "seconds"),
            number(result, "vm_cpu_ms"),
            number(result, "ahead_cpu_ms"),
            number(result, "daemon_cpu_ms"),
            number(result, "pause_ms"),
        );
        for (n, age) in result["ages"].as_array().into_iter().flatten().enumerate() {
            println!(
                "{:indent$} {:8} {:10.3} {:8.3} {:8.3}",
                "",
                number(age, "age_seconds"),
                number(age, "guest_mib"),
                number(age, "vmm_mib"),
                number(age, "page_tables_mib"),
                indent = if n == 0 { 0 } else { 61 },
            );
        }
    }
    if !links.is_empty() {
        println!("clone of clone      s  pause ms  MiB copied");
    }
    for link in &links {
        let [depth, seconds, pause, copied] =
            ["depth", "seconds", "pause_ms", "copied_mib"].map(|key| number(link, key));
        println!("{depth:14} {seconds:6.3} {pause:9.1} {copied:11.2}");
    }
    if !loads.is_empty() {
        println!("loaded from files  ms until it runs  ms CPU  ms to save");
    }
    for load in &loads {
        let [runs, cpu, save] = ["running_ms", "cpu_ms", "save_ms"].map(|key| number(load, key));
        println!("{:17} {runs:17.1} {cpu:7.1} {save:11.1}", load["program"].as_str().unwrap_or_default());
    }
    Ok(())
}

/// The same guest, for programs that know no fleets.
fn saved_guest(options: &Options) -> tests::saved::Guest {
    let boot = options.image.as_ref().map(|image| (image.join("vmlinux"), image.join("initrd.cpio")));
    tests::saved::Guest { boot, memory_mib: options.memory() }
}

/// A fleet of one guest, called `origin`.
struct Fleet {
    sandbox: Sandbox,
}

impl Fleet {
    fn up(options: &Options, pool: usize) -> Result<Self> {
        let sandbox = Sandbox::new();
        let file = sandbox.file("fleet.toml");
        let kernel = options.image.as_ref().map_or(String::new(), |image| {
            format!("kernel = {:?}\ninitrd = {:?}\n", image.join("vmlinux"), image.join("initrd.cpio"))
        });
        let text = format!(
            "name = \"bench\"\npool = {pool}\n[overcommit]\nadmission = \"off\"\npolicy = false\n[[guest]]\nname = \"origin\"\nmemory = \"{}M\"\n{kernel}\
             fill = {{ zero = 10, common = 40, duplicate = 10, unique = 40 }}\n",
            options.memory()
        );
        fs::write(&file, text)?;
        let fleet = Self { sandbox };
        let _ = fleet.run(&["fleet", "up", file.to_str().context("UTF-8")?]);
        Ok(fleet)
    }

    fn run(&self, args: &[&str]) -> Outcome {
        self.sandbox.samepage(args).timeout(LIMIT).output().success()
    }

    /// The processes that stand by, once all do.
    fn standbys(&self) -> Result<Vec<Process>> {
        let until = Instant::now() + LIMIT;
        loop {
            let pool = self.run(&["fleet", "status", "--json"]).json()["pool"].take();
            if pool.is_null() || pool["standing_by"] == pool["wanted"] {
                break;
            }
            ensure!(Instant::now() < until, "they do not stand by: {pool}");
            thread::sleep(Duration::from_millis(200));
        }
        Ok(self.sandbox.processes().into_iter().filter(|p| p.args.contains(" standby ")).collect())
    }

    /// Ends it, if no page is wrong.
    fn down(self) -> Result<()> {
        let verified = self.run(&["fleet", "verify", "--json"]).json();
        ensure!(verified["mismatched_pages"] == 0, "pages are wrong: {verified}");
        let _ = self.run(&["fleet", "down"]);
        Ok(())
    }

    /// What each of `count` clones has alone.
    fn own(&self, count: usize) -> Result<Own> {
        let status = self.run(&["fleet", "status", "--json"]).json();
        let accounts = status["ledger"]["guests"].as_array().context("accounts")?.iter();
        let accounts: Vec<&Value> = accounts
            .filter(|guest| guest["name"].as_str().is_some_and(|name| name.starts_with("c-")))
            .collect();
        ensure!(accounts.len() == count, "{} of {count} clones are in the ledger", accounts.len());
        let mib = |pointer: &str| {
            let pages: u64 = accounts.iter().filter_map(|account| account.pointer(pointer)?.as_u64()).sum();
            pages as f64 / 256.0 / count as f64
        };
        Ok(Own {
            guest: mib("/private"),
            vmm: mib("/overhead/vmm"),
            page_tables: mib("/overhead/page_tables"),
        })
    }
}

fn round(count: usize, options: &Options) -> Result<Round> {
    let fleet = Fleet::up(options, if options.pool { count } else { 0 })?;
    let taken = fleet.run(&["snapshot", "origin", "warm", "--json"]).json();
    let mut ahead = 0.0;
    for standby in fleet.standbys()? {
        ahead += threads_ms(standby.pid)?;
    }
    let daemon = process(&fleet.sandbox, |p| p.args.split(' ').nth(1) == Some("host"))?;
    let before = cpu_ms(daemon.pid)?;
    let cloned = fleet.run(&["clone", "warm", "--count", &count.to_string(), "--as", "c", "--json"]).json();
    let (after, began) = (cpu_ms(daemon.pid)?, Instant::now());
    let clones: Vec<Process> =
        fleet.sandbox.processes().into_iter().filter(|p| p.args.contains(" --name c-")).collect();
    ensure!(clones.len() == count, "{} of {count} clones are there", clones.len());
    let mut vms = 0.0;
    for clone in &clones {
        vms += threads_ms(clone.pid)?;
    }
    let mut own = Vec::new();
    for age in &options.ages {
        thread::sleep(Duration::from_secs(*age).saturating_sub(began.elapsed()));
        own.push(fleet.own(count)?);
    }
    fleet.down()?;
    let all = count as f64;
    Ok(Round {
        seconds: cloned["seconds"].as_f64().context("seconds")?,
        vm_cpu_ms: (vms - ahead) / all,
        ahead_cpu_ms: ahead / all,
        daemon_cpu_ms: (after - before) / all,
        pause_ms: pause_ms(&taken["captured"])?,
        own,
    })
}

/// A clone, a clone of that, and so on.
fn chain(depth: usize, options: &Options) -> Result<Vec<Link>> {
    let fleet = Fleet::up(options, usize::from(options.pool))?;
    let (mut of, mut links) = ("origin".to_owned(), Vec::new());
    for number in 1..=depth {
        let cloned = fleet.run(&["clone", &of, "--as", &format!("d{number}"), "--json"]).json();
        let captured = &cloned["image"]["captured"];
        links.push(Link {
            seconds: cloned["seconds"].as_f64().context("seconds")?,
            pause_ms: pause_ms(captured)?,
            copied_mib: captured["copied_pages"].as_f64().context("pages")? / 256.0,
        });
        of = format!("d{number}-0");
    }
    fleet.down()?;
    Ok(links)
}

fn pause_ms(captured: &Value) -> Result<f64> {
    Ok(captured["pause_us"].as_f64().context("a pause")? / 1000.0)
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
    let mut options = Options { rounds: 9, ages: vec![0], depth: 10, ..Options::default() };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--image" => options.image = Some(value()?.into()),
            "--counts" => {
                options.counts = Some(value()?.split(',').map(str::parse).collect::<Result<_, _>>()?);
            }
            "--memory" => options.memory = Some(value()?.parse()?),
            "--rounds" => options.rounds = value()?.parse::<usize>()?.max(1),
            "--ages" => options.ages = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--depth" => options.depth = value()?.parse()?,
            "--pool" => options.pool = true,
            "--json" => options.json = true,
            "-h" | "--help" => return Ok(None),
            _ => bail!("{arg} is unknown\n\n{USAGE}"),
        }
    }
    Ok(Some(options))
}
