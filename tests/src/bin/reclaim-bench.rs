//! How fast a full queue of page frame numbers becomes memory given back, without a VM: a driver's
//! descriptors in guest RAM, the real transport, the real balloon device, the real system calls.
//!
//! Beside it the kernel's own floor, in the same run: the same pages given back by the best system
//! calls for them and nothing else. And what a VMM pays that gives back page by page, as QEMU does.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use devices::bus::BusDevice;
use devices::interrupt::IrqLine;
use devices::reclaim::{Gpa, Reclaim};
use devices::virtio::balloon::{Balloon, Config};
use devices::virtio::mmio::MmioTransport;
use lab::spread::median;
use memory::ram::{Backing, Ram};
use serde_json::json;
use tests::bench::provenance;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const USAGE: &str = "\
Measures how fast a balloon gives back the pages that a full queue names, without a VM.

Usage: reclaim-bench [--rounds N] [--json]

  --rounds N  measured rounds [default: 7]
  --json      print one JSON object";

const PAGE: u64 = 4096;
/// Descriptors in the queue, and numbers in each: what Linux's driver sends is 256 at a time.
const DESCRIPTORS: u64 = 256;
const PFNS: u64 = 256;
/// Pages given back a round: 256 MiB.
const PAGES: u64 = DESCRIPTORS * PFNS;
/// Where the pages begin; below lie the queue and the numbers.
const FIRST_PAGE: u64 = 4096;
const RAM_BYTES: u64 = (FIRST_PAGE + 2 * PAGES) * PAGE;
/// Where the queue and the numbers lie.
const TABLE: u64 = 0x10000;
const AVAIL: u64 = 0x20000;
const USED: u64 = 0x30000;
const NUMBERS: u64 = 0x10_0000;

#[derive(Clone, Copy)]
enum Order {
    Ascending,
    Descending,
    /// Every second page, so that no two can be given back together, in a random order.
    Scattered,
}

const ORDERS: [(Order, &str); 3] = [
    (Order::Ascending, "contiguous, ascending"),
    (Order::Descending, "contiguous, descending"),
    (Order::Scattered, "scattered"),
];

fn pages(order: Order) -> Vec<u32> {
    let first = FIRST_PAGE as u32;
    let count = PAGES as u32;
    match order {
        Order::Ascending => (first..first + count).collect(),
        Order::Descending => (first..first + count).rev().collect(),
        Order::Scattered => {
            let mut all: Vec<u32> = (0..count).map(|n| first + 2 * n).collect();
            // Fisher-Yates with an xorshift: the same order in every run.
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            for i in (1..all.len()).rev() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                all.swap(i, (state % (i as u64 + 1)) as usize);
            }
            all
        }
    }
}

fn main() -> Result<()> {
    let (mut rounds, mut as_json) = (7, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--rounds" => rounds = args.next().context("--rounds needs a number")?.parse()?,
            "--json" => as_json = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    ensure!(rounds > 0, "--rounds must be at least 1");
    let ram = Ram::new(RAM_BYTES, Backing::Anonymous)?;
    ram.set_huge_pages(false)?;
    let mut results = Vec::new();
    for (order, name) in ORDERS {
        let pages = pages(order);
        let mut seconds = [Vec::new(), Vec::new(), Vec::new()];
        // The first round is not measured.
        for round in 0..=rounds {
            let took = [device(&ram, &pages)?, floor(&ram, &pages)?, page_by_page(&ram, &pages)?];
            if round > 0 {
                seconds.iter_mut().zip(took).for_each(|(all, one)| all.push(one));
            }
        }
        let gib = (PAGES * PAGE) as f64 / f64::from(1 << 30);
        let [device, floor, single] = seconds.map(|all| gib / median(all));
        if !as_json {
            println!(
                "{name:<23} device {device:>6.2} GiB/s   floor {floor:>6.2} GiB/s ({:>3.0} %)   page by page {single:>6.2} GiB/s ({:.1}x)",
                100.0 * device / floor,
                device / single
            );
        }
        results.push(json!({
            "order": name, "device_gib_per_second": device, "floor_gib_per_second": floor,
            "page_by_page_gib_per_second": single,
        }));
    }
    if as_json {
        println!(
            "{:#}",
            json!({"provenance": provenance(), "rounds": rounds, "pages": PAGES, "orders": results})
        );
    }
    Ok(())
}

/// Makes every page resident.
fn touch(ram: &Ram, pages: &[u32]) -> Result<()> {
    for page in pages {
        ram.memory().write_obj(1u8, GuestAddress(u64::from(*page) * PAGE))?;
    }
    Ok(())
}

/// Seconds from the notification of a full queue until all is given back.
fn device(ram: &Ram, pages: &[u32]) -> Result<f64> {
    let memory = ram.memory();
    let (balloon, handle) = Balloon::new(Config::default(), memory, Box::new(ram.clone()));
    let irq = IrqLine::new(EventFd::new(libc::EFD_NONBLOCK)?);
    let mut transport = MmioTransport::new(Arc::clone(memory), Box::new(balloon), irq);
    drive(&mut transport);
    memory.write_slice(&[0; 8], GuestAddress(AVAIL))?;
    memory.write_slice(&[0; 8], GuestAddress(USED))?;
    for (n, numbers) in pages.chunks(PFNS as usize).enumerate() {
        let n = n as u64;
        let at = NUMBERS + n * PFNS * 4;
        let bytes: Vec<u8> = numbers.iter().flat_map(|page| page.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(at))?;
        // A descriptor: address, length, no flags, no next.
        memory.write_obj(at, GuestAddress(TABLE + n * 16))?;
        memory.write_obj(PFNS as u32 * 4, GuestAddress(TABLE + n * 16 + 8))?;
        memory.write_obj(0u32, GuestAddress(TABLE + n * 16 + 12))?;
        memory.write_obj(n as u16, GuestAddress(AVAIL + 4 + n * 2))?;
    }
    memory.write_obj(DESCRIPTORS as u16, GuestAddress(AVAIL + 2))?;
    touch(ram, pages)?;
    let began = Instant::now();
    transport.notify(0);
    let seconds = began.elapsed().as_secs_f64();
    let used: u16 = memory.read_obj(GuestAddress(USED + 2))?;
    ensure!(u64::from(used) == DESCRIPTORS, "{used} descriptors were completed");
    let reclaimed = handle.counters().reclaimed_bytes;
    ensure!(reclaimed == PAGES * PAGE, "{reclaimed} bytes were given back");
    Ok(seconds)
}

/// What Linux's driver does to the registers, with one queue.
fn drive(transport: &mut MmioTransport) {
    let mut write = |offset: u64, value: u32| transport.write(offset, &value.to_le_bytes());
    for status in [0, 1, 3] {
        write(0x70, status);
    }
    // VIRTIO_F_VERSION_1, in the second word of the features.
    write(0x24, 1);
    write(0x20, 1);
    write(0x70, 11);
    write(0x30, 0);
    write(0x38, DESCRIPTORS as u32);
    for (register, address) in [(0x80, TABLE), (0x90, AVAIL), (0xa0, USED)] {
        write(register, address as u32);
        write(register + 4, 0);
    }
    write(0x44, 1);
    write(0x70, 15);
}

/// Seconds for the system calls alone: each of the queue's descriptors has its ranges sorted and
/// joined beforehand.
fn floor(ram: &Ram, pages: &[u32]) -> Result<f64> {
    let ranges: Vec<_> = pages.chunks(PFNS as usize).map(joined).collect();
    touch(ram, pages)?;
    let began = Instant::now();
    for ranges in ranges {
        for range in ranges {
            ram.discard(range)?;
        }
    }
    Ok(began.elapsed().as_secs_f64())
}

fn joined(pages: &[u32]) -> Vec<std::ops::Range<Gpa>> {
    let mut pages = pages.to_vec();
    pages.sort_unstable();
    let runs = pages.chunk_by(|a, b| a + 1 == *b);
    let gpa = |page: u32| Gpa(u64::from(page) * PAGE);
    runs.map(|run| gpa(run[0])..gpa(run[run.len() - 1] + 1)).collect()
}

fn page_by_page(ram: &Ram, pages: &[u32]) -> Result<f64> {
    touch(ram, pages)?;
    let began = Instant::now();
    for page in pages {
        let start = u64::from(*page) * PAGE;
        ram.discard(Gpa(start)..Gpa(start + PAGE))?;
    }
    Ok(began.elapsed().as_secs_f64())
}
