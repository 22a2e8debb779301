//! The matchmaker of the slab engine alone: simulated agents offer pages and publish, as fast as it
//! takes them.
//!
//! Run by `tests/bench matchmaker`. No guest, no socket, no page: what is timed is the index, and
//! what is counted is its memory. As it answers all agents of a host from one thread, the longest
//! it takes over one offer is the longest that all agents wait; that is when its table grows.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::spread::median;
use memory::PageNo;
use merge::slab;
use merge::slab::matchmaker::{GuestId, Matchmaker, PageHash, Publish};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tests::bench::provenance;

const USAGE: &str = "\
Measures the matchmaker of the slab engine alone: speed, memory and pauses while the number of pages grows.

Usage: matchmaker-bench [--pages N] [--guests N] [--rounds R] [--json]

  --pages N   pages offered in all; rows at every power of ten from a million on [default: 10000000]
  --guests N  simulated agents, half of whose pages are common to all [default: 64]
  --rounds R  rounds, of which the median is shown [default: 3]
  --json      print one JSON object

Memory is some 20 to 60 bytes for each different page: 100000000 pages take 3 GB at their peak.";

/// Pages in an offer, as agents make them.
const OFFER_PAGES: u64 = slab::OFFER_PAGES as u64;
/// An agent answers an order to publish after this many offers of others.
const ANSWER_AFTER: u64 = 3;
const FIRST_ROW: u64 = 1_000_000;
/// Offered once more at the end, unchanged.
const AGAIN_OFFERS: u64 = 256;

/// Counts what is allocated now, and the most that ever was.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's own promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's own promise. Not by way of `alloc`: the system has zeros that take
        // no memory yet.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let live = LIVE.fetch_add(size, Ordering::Relaxed) + size;
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        PEAK.fetch_max(live - layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's own promise.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's own promise.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What was seen from the row before to this one.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    /// Pages offered by then, and different pages that the matchmaker knows of.
    offered: u64,
    known: u64,
    /// Pages a second, of the time in the matchmaker.
    per_second: f64,
    /// Half of the offers took no longer; the longest; the longest answer to a publication.
    offer_micros: f64,
    worst_offer_micros: f64,
    worst_published_micros: f64,
    /// Allocated now, and at most since the row before.
    live_bytes: f64,
    peak_bytes: f64,
    /// Resident, beyond what there was at the begin of the round.
    resident_bytes: f64,
}

/// The agents of all guests.
struct World {
    matchmaker: Matchmaker,
    guests: u16,
    /// By the number of the offer that brought it about.
    to_publish: VecDeque<(u64, GuestId, Publish)>,
    /// Of the stretch that runs: each offer, each publication.
    offers: Vec<Duration>,
    published: Vec<Duration>,
    merged: u64,
}

impl World {
    /// `guests`, each with `pages` pages.
    fn new(guests: u16, pages: u64) -> Self {
        let mut matchmaker = Matchmaker::default();
        (0..guests).for_each(|guest| matchmaker.join(GuestId(guest), pages));
        Self {
            matchmaker,
            guests,
            to_publish: VecDeque::new(),
            offers: Vec::new(),
            published: Vec::new(),
            merged: 0,
        }
    }

    /// Offer number `number` of all: guests take turns.
    fn offer(&mut self, number: u64) -> Result<()> {
        let guests = u64::from(self.guests);
        let (guest, first) = (GuestId((number % guests) as u16), number / guests * OFFER_PAGES);
        let pages: Vec<(PageNo, PageHash)> =
            (first..first + OFFER_PAGES).map(|page| (PageNo(page), hash(guest, page))).collect();
        let began = cpu_time();
        let orders = self.matchmaker.offer(guest, black_box(pages));
        self.offers.push(cpu_time() - began);
        self.merged += orders.merge.iter().map(|run| u64::from(run.pages)).sum::<u64>();
        self.to_publish.extend(orders.publish.into_iter().map(|publish| (number, guest, publish)));
        while self.to_publish.front().is_some_and(|(asked, ..)| asked + ANSWER_AFTER <= number) {
            self.publish()?;
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        let Some((_, guest, Publish { slab, pages })) = self.to_publish.pop_front() else { return Ok(()) };
        let hashes: Vec<PageHash> = pages.iter().map(|page| hash(guest, page.0)).collect();
        let began = cpu_time();
        let orders = self.matchmaker.published(guest, slab, &hashes).context("it was asked for")?;
        self.published.push(cpu_time() - began);
        let runs = orders.values().flat_map(|orders| &orders.merge);
        self.merged += runs.map(|run| u64::from(run.pages)).sum::<u64>();
        Ok(())
    }

    /// What was seen since the last call.
    fn row(&mut self, offered: u64, (base_bytes, base_resident): (usize, f64)) -> Row {
        let (offers, published) = (std::mem::take(&mut self.offers), std::mem::take(&mut self.published));
        let micros = |time: &Duration| time.as_secs_f64() * 1e6;
        let worst = |times: &[Duration]| times.iter().max().map_or(0.0, micros);
        let seconds = offers.iter().chain(&published).sum::<Duration>().as_secs_f64();
        // What the bench itself has measured is not the matchmaker's.
        let own = (offers.capacity() + published.capacity()) * size_of::<Duration>();
        let live = LIVE.load(Ordering::Relaxed);
        let peak = PEAK.swap(live, Ordering::Relaxed);
        Row {
            offered,
            known: self.matchmaker.len() as u64,
            per_second: offers.len() as f64 * OFFER_PAGES as f64 / seconds,
            offer_micros: median(offers.iter().map(micros)),
            worst_offer_micros: worst(&offers),
            worst_published_micros: worst(&published),
            live_bytes: live.saturating_sub(base_bytes + own) as f64,
            peak_bytes: peak.saturating_sub(base_bytes + own) as f64,
            resident_bytes: (resident_bytes() - base_resident - own as f64).max(0.0),
        }
    }
}

/// Time that this thread was on a processor. What it waits for others' work would say nothing of
/// the matchmaker.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Resident anonymous memory of this process.
fn resident_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0.0) * 1024.0
}

/// A stand-in for the keyed hash of a page: the first half of each offer is common to all guests.
fn hash(guest: GuestId, page: u64) -> PageHash {
    let is_common = page % OFFER_PAGES < OFFER_PAGES / 2;
    let owner = if is_common { 0 } else { u64::from(guest.0) + 1 };
    // One to one, so that different pages have different hashes.
    splitmix::mix(owner << 40 | page)
}

/// One round: a row at each power of ten, one at the end, and one for pages that are offered again.
fn round(pages: u64, guests: u16) -> Result<Vec<Row>> {
    let base = (LIVE.load(Ordering::Relaxed), resident_bytes());
    PEAK.store(base.0, Ordering::Relaxed);
    let offers = pages.div_ceil(OFFER_PAGES);
    let each = offers.div_ceil(u64::from(guests)) * OFFER_PAGES;
    let mut world = World::new(guests, each);
    let (mut rows, mut next) = (Vec::new(), FIRST_ROW);
    for number in 0..offers {
        world.offer(number)?;
        let offered = (number + 1) * OFFER_PAGES;
        if offered >= next || number + 1 == offers {
            next *= 10;
            rows.push(world.row(offered, base));
        }
    }
    while !world.to_publish.is_empty() {
        world.publish()?;
    }
    // With two guests or more, all of their common halves must be merged: else the matchmaker has
    // not worked.
    let guests = u64::from(guests);
    let whole = offers / guests * guests * OFFER_PAGES / 2;
    ensure!(world.merged >= whole, "{} pages were merged, and {whole} are equal", world.merged);
    world.row(0, base);
    for number in 0..offers.min(AGAIN_OFFERS) {
        world.offer(number)?;
    }
    rows.push(world.row(offers * OFFER_PAGES, base));
    Ok(rows)
}

fn main() -> Result<()> {
    let (mut pages, mut guests, mut rounds, mut as_json) = (10_000_000, 64_u64, 3, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || -> Result<u64> {
            let text = args.next().with_context(|| format!("{arg} needs a value"))?;
            text.parse().with_context(|| format!("{arg} takes a number, not {text:?}"))
        };
        match arg.as_str() {
            "--pages" => pages = value()?,
            "--guests" => guests = value()?,
            "--rounds" => rounds = value()?,
            "--json" => as_json = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    let guests = u16::try_from(guests).ok().filter(|guests| *guests >= 2);
    let guests = guests.with_context(|| format!("--guests must be 2 to {}", u16::MAX))?;
    ensure!(
        pages >= u64::from(guests) * OFFER_PAGES,
        "--pages must be at least an offer of {OFFER_PAGES} a guest"
    );
    ensure!(rounds > 0, "--rounds must be at least 1");
    let provenance = provenance();
    let all: Vec<Vec<Row>> = (0..rounds).map(|_| round(pages, guests)).collect::<Result<_>>()?;
    let rows: Vec<Row> = (0..all[0].len())
        .map(|n| {
            let of = |field: fn(&Row) -> f64| median(all.iter().map(|rows| field(&rows[n])));
            Row {
                per_second: of(|row| row.per_second),
                offer_micros: of(|row| row.offer_micros),
                worst_offer_micros: of(|row| row.worst_offer_micros),
                worst_published_micros: of(|row| row.worst_published_micros),
                live_bytes: of(|row| row.live_bytes),
                peak_bytes: of(|row| row.peak_bytes),
                resident_bytes: of(|row| row.resident_bytes),
                ..all[0][n]
            }
        })
        .collect();
    if as_json {
        let rows: Vec<Value> =
            rows.iter().enumerate().map(|(n, row)| entry(row, n + 1 == rows.len())).collect();
        let result = json!({"provenance": provenance, "pages": pages, "guests": guests, "rounds": rounds, "rows": rows});
        println!("{result:#}");
        return Ok(());
    }
    println!("{guests} agents, offers of {OFFER_PAGES} pages, half of them common; {rounds} rounds, medians");
    println!(
        "{:>13} {:>11} {:>10} {:>9} {:>11} {:>14} {:>11} {:>12}",
        "pages offered",
        "different",
        "M pages/s",
        "offer us",
        "worst offer",
        "worst publish",
        "resident B",
        "allocated B"
    );
    for (n, row) in rows.iter().enumerate() {
        let known = row.known as f64;
        println!(
            "{:>13} {:>11} {:>10.2} {:>9.0} {:>8.1} ms {:>11.2} ms {:>11.1} {:>12.1}{}",
            row.offered,
            row.known,
            row.per_second / 1e6,
            row.offer_micros,
            row.worst_offer_micros / 1e3,
            row.worst_published_micros / 1e3,
            row.resident_bytes / known,
            row.peak_bytes / known,
            if n + 1 == rows.len() { "  again" } else { "" }
        );
    }
    println!(
        "times: on a processor, of the offers since the row above; B: for each different page, allocated at most"
    );
    Ok(())
}

fn entry(row: &Row, again: bool) -> Value {
    json!({
        "offered_pages": row.offered, "different_pages": row.known, "again": again,
        "pages_per_second": row.per_second, "offer_median_us": row.offer_micros,
        "offer_worst_us": row.worst_offer_micros, "published_worst_us": row.worst_published_micros,
        "live_bytes": row.live_bytes, "peak_bytes": row.peak_bytes, "resident_bytes": row.resident_bytes,
        "resident_bytes_per_different_page": row.resident_bytes / row.known as f64,
    })
}
