//! One guest, from its start to its last page verified.
//!
//! Pages of class `common` are its working set; `unique` ones it has written and does not look at
//! again.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use kernel_view::pagemap::PagemapEntry;
use serde_json::{Value, json};

use super::point::{MIB_PAGES, Point, Way, mix};
use crate::merging::figures::Round;
use crate::sandbox::Sandbox;
use crate::vm::{Client, Vm, field};

/// How long taking memory may last, or rewriting a working set.
const LIMIT: Duration = Duration::from_secs(60);
/// A balloon that has not moved for this long has reached its size.
const STANDSTILL: Duration = Duration::from_millis(500);
/// From one look at a balloon, or at how much of its working set a guest has rewritten, to the
/// next.
const LOOK: Duration = Duration::from_millis(2);
/// From one look at what a guest has come to hold, where swap keeps it small, to the next.
const KEEP: Duration = Duration::from_millis(10);
/// The most pages that the host is asked to page out at once.
const BATCH_PAGES: u64 = 10_000;
/// More than any guest can write in a second.
const AS_FAST_AS_IT_CAN: u64 = 10_000_000;

/// What the host sees of a guest, and does to it.
struct Host {
    vm: Vm,
    /// Anonymous memory of its process that is not guest RAM, in pages.
    overhead_pages: u64,
}

impl Host {
    /// Anonymous memory of its process, in pages: guest RAM and some more.
    fn anonymous_pages(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.vm.running().pid());
        let status = fs::read_to_string(&path).with_context(|| path.clone())?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("no RssAnon in {path}"))? / 4)
    }

    /// What it has of host memory beyond what it is to have, in pages.
    fn excess_pages(&self, left_pages: u64) -> Result<u64> {
        Ok(self.anonymous_pages()?.saturating_sub(self.overhead_pages + left_pages))
    }

    /// Pages of guest RAM in memory, and those on swap.
    fn present_and_swapped(&self) -> (u64, u64) {
        let entries = self.vm.page_entries();
        let count = |is: fn(&PagemapEntry) -> bool| entries.iter().filter(|entry| is(entry)).count() as u64;
        (count(|entry| entry.present()), count(|entry| entry.swapped()))
    }

    /// Asks for a balloon of `pages`, and waits until it has them or can give no more. Returns its
    /// size and the seconds taken.
    fn balloon(&self, pages: u64) -> Result<(u64, f64)> {
        let began = Instant::now();
        self.vm.ask(&json!({"op": "balloon_target", "pages": pages}));
        let (mut size, mut moved) = (0, began.elapsed());
        while size < pages && began.elapsed() - moved < STANDSTILL {
            let now = number(&self.vm.ask(&json!({"op": "balloon_size"})), "/balloon_size/actual_pages")?;
            if now != size {
                (size, moved) = (now, began.elapsed());
            }
            thread::sleep(LOOK);
        }
        Ok((size, moved.as_secs_f64()))
    }

    /// Pushes pages out to swap.
    fn page_out(&self, pages: u64) -> Result<()> {
        let answer = self.vm.ask(&json!({"op": "page_out", "pages": pages.min(BATCH_PAGES)}));
        number(&answer, "/paged_out/swapped_pages").map(drop)
    }

    /// Pushes pages out until it has no more than `left_pages` of host memory. Returns how long
    /// that took.
    fn push_out(&self, left_pages: u64, interrupted: &AtomicBool) -> Result<f64> {
        let began = Instant::now();
        loop {
            let excess = self.excess_pages(left_pages)?;
            if excess == 0 {
                return Ok(began.elapsed().as_secs_f64());
            }
            ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
            ensure!(
                began.elapsed() < LIMIT,
                "after {LIMIT:?} of pushing pages out {excess} too many are in memory"
            );
            self.page_out(excess)?;
        }
    }

    /// Keeps it there while it works: what comes back from swap has others paged out.
    fn keep(&self, left_pages: u64, working: &AtomicBool) -> Result<()> {
        while working.load(Ordering::Relaxed) {
            match self.excess_pages(left_pages)? {
                0 => thread::sleep(KEEP),
                excess => self.page_out(excess)?,
            }
        }
        Ok(())
    }
}

/// Commands to the guest.
struct Agent(Client);

impl Agent {
    fn obey(&mut self, command: &str) -> Result<String> {
        let answer = self.0.command(command);
        ensure!(answer.starts_with("ok "), "{command:?} was answered {answer:?}");
        Ok(answer)
    }

    fn fill(&mut self, pages: u64, common_percent: u64) -> Result<()> {
        let unique = 100 - common_percent;
        let mix = format!("zero=0 common_pct={common_percent} dup=0 unique={unique}");
        self.obey(&format!("fill seed=1 common=7 {mix} pages={pages}")).map(drop)
    }

    /// Rewrites its working set once, in order. Returns pages a second.
    fn rewrite(&mut self, pages: u64) -> Result<f64> {
        let before = field(&self.obey("report")?, "churned");
        let began = Instant::now();
        self.obey(&format!("churn class=common rate={AS_FAST_AS_IT_CAN}"))?;
        let mut churned = 0;
        while churned < pages {
            ensure!(began.elapsed() < LIMIT, "{churned} of {pages} pages were rewritten in {LIMIT:?}");
            thread::sleep(LOOK);
            churned = field(&self.obey("report")?, "churned") - before;
        }
        let seconds = began.elapsed().as_secs_f64();
        self.obey("churn class=common rate=0")?;
        Ok(churned as f64 / seconds)
    }

    /// Rewrites random pages of its working set as fast as it can.
    fn work(&mut self, window: Duration, figures: &mut Round) -> Result<()> {
        let began = Instant::now();
        self.obey(&format!("latency class=common rate={AS_FAST_AS_IT_CAN}"))?;
        thread::sleep(window);
        let timed = self.obey("latency class=common rate=0")?;
        let seconds = began.elapsed().as_secs_f64();
        figures.insert("writes_per_second", field(&timed, "writes") as f64 / seconds);
        figures.insert("write_p50_ns", field(&timed, "p50_ns") as f64);
        figures.insert("write_p99_ns", field(&timed, "p99_ns") as f64);
        Ok(())
    }
}

struct Guest {
    host: Host,
    agent: Agent,
    /// Pages that it can fill.
    pages: u64,
}

impl Guest {
    fn start(sandbox: &Sandbox, memory_mib: u64) -> Result<Self> {
        let vm = Vm::start(sandbox, "vm", &["--memory", &format!("{memory_mib}M")]);
        let mut com2 = vm.com2();
        let ready = com2.line().context("the connection closed before it was ready")?;
        let mut host = Host { vm, overhead_pages: 0 };
        host.overhead_pages = host.anonymous_pages()?.saturating_sub(host.present_and_swapped().0);
        Ok(Self { host, agent: Agent(com2), pages: field(&ready, "pages") })
    }

    /// Checks every page that it holds, and ends it.
    fn end(mut self, held_pages: u64) -> Result<()> {
        let verified = self.agent.obey("verify")?;
        let report = self.agent.obey("report")?;
        ensure!(
            field(&verified, "checked") == held_pages && field(&report, "mismatched") == 0,
            "of {held_pages} pages held some were lost: {verified:?}, {report:?}"
        );
        self.host.vm.ask(&json!({"op": "stop"}));
        let outcome = self.host.vm.into_running().wait();
        ensure!(outcome.code == Some(0) && outcome.stderr.is_empty(), "its VM did not end well: {outcome}");
        Ok(())
    }
}

fn number(answer: &Value, pointer: &str) -> Result<u64> {
    answer.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no {pointer} in {answer}"))
}

/// Pages of the working set: the same for all ways, so one guest is asked.
///
/// # Errors
/// The guest does not carry out its command.
///
/// # Panics
/// If its VM does not answer at all.
pub fn working_set_pages(point: &Point) -> Result<u64> {
    let sandbox = Sandbox::new();
    let mut guest = Guest::start(&sandbox, point.memory_mib)?;
    let pages = guest.pages;
    guest.agent.fill(pages, point.common_percent(pages))?;
    let common = field(&guest.agent.obey("report")?, "common");
    guest.end(pages)?;
    Ok(common)
}

/// Runs a guest whose memory is taken in this way, and which then works for `window`.
///
/// # Errors
/// The guest or its VM fails a command, a page is lost, or it is interrupted.
///
/// # Panics
/// If the VM does not answer at all.
pub fn run(
    point: &Point,
    way: Way,
    working_set_pages: u64,
    window: Duration,
    interrupted: &AtomicBool,
) -> Result<Round> {
    ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
    let (sandbox, mut figures) = (Sandbox::new(), Round::new());
    let memory_mib = if way == Way::Sized { point.control_mib(working_set_pages) } else { point.memory_mib };
    let mut guest = Guest::start(&sandbox, memory_mib)?;
    let pages = guest.pages;
    let all = (pages, point.common_percent(pages));
    if way != Way::Sized {
        // All of it was in use once.
        guest.agent.fill(all.0, all.1)?;
    }
    let cold_pages = pages.saturating_sub(working_set_pages);
    let (held, balloon_pages) = match way {
        Way::Sized => ((working_set_pages, 100), 0),
        Way::Balloon => ((working_set_pages, 100), point.reclaim_pages()),
        Way::Swap => (all, 0),
        Way::Both => (mix(working_set_pages, cold_pages / 2, pages), point.reclaim_pages() / 2),
    };
    if way != Way::Swap {
        // What is not among these is free from now on.
        guest.agent.fill(held.0, held.1)?;
    }
    let (mut ballooned_pages, mut seconds) = (0, 0.0);
    if balloon_pages > 0 {
        (ballooned_pages, seconds) = guest.host.balloon(balloon_pages)?;
    }
    let left_pages = point.left_mib() * MIB_PAGES;
    if way.swaps() {
        seconds += guest.host.push_out(left_pages, interrupted)?;
    }
    if way != Way::Sized {
        figures.insert("reclaim_seconds", seconds);
    }
    let working = AtomicBool::new(true);
    let (host, agent) = (&guest.host, &mut guest.agent);
    let (present, swapped) = thread::scope(|scope| {
        let keeper = way.swaps().then(|| scope.spawn(|| host.keep(left_pages, &working)));
        let worked = agent.rewrite(working_set_pages).and_then(|pages_per_second| {
            figures.insert("first_pages_per_second", pages_per_second);
            agent.work(window, &mut figures)
        });
        let held = host.present_and_swapped();
        working.store(false, Ordering::Relaxed);
        let kept = keeper.map(|keeper| keeper.join().map_err(|_| anyhow!("the VM no longer answers")));
        kept.transpose()?.transpose()?;
        worked.map(|()| held)
    })?;
    for (name, pages) in
        [("present_mib", present), ("swapped_mib", swapped), ("ballooned_mib", ballooned_pages)]
    {
        figures.insert(name, pages as f64 / MIB_PAGES as f64);
    }
    guest.end(held.0)?;
    Ok(figures)
}
