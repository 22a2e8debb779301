//! How fast memory is measured: against the bandwidth of one core, in place, from a file, from
//! another process, and as it grows.
//!
//! Run by `tests/bench measure`. Rates of one thread are by processor time, so that what else runs
//! on the machine says little; the speed-up of a second thread is by the wall clock, and needs a
//! machine that does nothing else. Ratios are those of each round, of which the median is shown:
//! the bandwidth of a machine that others use, too, changes by the minute.

use std::fs::File;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::spread::median;
use measure::content::Content;
use measure::scan::{Options, scan};
use measure::source::file::FileSource;
use measure::source::mappings::{guest_memory, mappings};
use measure::source::process::ProcessSource;
use measure::source::{EachPage, PageReader, Source, Unread, hand_on};
use measure::{MeasureError, PAGE, Space};
use memory::page_buffer::PageBuffer;
use memory::ram::{Backing, Ram};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use tests::bench::provenance;
use vm_memory::{Bytes, GuestAddress};

const USAGE: &str = "\
Measures how fast `samepage measure` reads and classifies memory.

Usage: measure-bench [--mib N] [--rounds R] [--grow GIB] [--json]

  --mib N     memory of the first part, in MiB [default: 1024]
  --rounds R  rounds, of which the median is shown [default: 5]
  --grow GIB  largest image of the second part, in GiB; they are generated while they are read [default: 16]
  --json      print one JSON object

With --mib 1024 it takes 5 GiB of memory.";

/// Holds memory with the contents of a file: the process that is measured. By pages of 4 KiB, or of
/// 2 MiB where it can, as QEMU's.
const CHILD: &str = "--hold";
const CHILD_HUGE: &str = "--hold-huge";

/// Memory of this process, as a guest.
struct InPlace<'a>(&'a [[u8; PAGE]]);

impl Source for InPlace<'_> {
    fn name(&self) -> &str {
        "memory in place"
    }

    fn extents(&self) -> Vec<u64> {
        vec![self.0.len() as u64]
    }

    fn is_live(&self) -> bool {
        false
    }

    fn open(&self) -> Result<Box<dyn PageReader + '_>, MeasureError> {
        Ok(Box::new(InPlace(self.0)))
    }
}

impl PageReader for InPlace<'_> {
    fn read(&mut self, first: u64, pages: u64, each: EachPage<'_>) -> Result<Unread, MeasureError> {
        hand_on(first, self.0[first as usize..(first + pages) as usize].as_flattened(), each);
        Ok(Unread::default())
    }
}

/// An image that is made while it is read: half of its pages differ from all others.
#[derive(Clone)]
struct Generated {
    pages: u64,
    page: [u8; PAGE],
}

impl Source for Generated {
    fn name(&self) -> &str {
        "generated"
    }

    fn extents(&self) -> Vec<u64> {
        vec![self.pages]
    }

    fn is_live(&self) -> bool {
        false
    }

    fn open(&self) -> Result<Box<dyn PageReader + '_>, MeasureError> {
        Ok(Box::new(self.clone()))
    }
}

impl PageReader for Generated {
    fn read(&mut self, first: u64, pages: u64, each: EachPage<'_>) -> Result<Unread, MeasureError> {
        for page in first..first + pages {
            self.page[..8].copy_from_slice(&content(page, self.pages).to_ne_bytes());
            each(page, &self.page);
        }
        Ok(Unread::default())
    }
}

/// The content of `page` of `pages`: a quarter all alike, a quarter in pairs, half by themselves,
/// no zeros.
fn content(page: u64, pages: u64) -> u64 {
    match page % 4 {
        0 | 1 => page,
        2 => page / 4 % (pages / 8).max(1) * 4 + 2,
        _ => 3,
    }
}

/// How many different contents that makes.
fn distinct(pages: u64) -> u64 {
    pages / 2 + (pages / 8).max(1).min(pages / 4) + 1
}

/// The memory of the first part: a fifth zeros, the rest as above, all bytes of a page different
/// from its neighbours'.
fn fill(memory: &mut [[u8; PAGE]]) {
    let pages = memory.len() as u64;
    for (page, bytes) in (0..).zip(memory) {
        if page % 5 == 4 {
            bytes.fill(0);
            continue;
        }
        let mut state = content(page, pages);
        for word in bytes.as_chunks_mut::<8>().0 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *word = state.to_ne_bytes();
        }
    }
}

/// Processor time of all threads of this process.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// What one reading took.
#[derive(Clone, Copy, Debug, Default)]
struct Took {
    wall: f64,
    cpu: f64,
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Took)> {
    let (wall, cpu) = (Instant::now(), cpu_time());
    let value = work()?;
    let took = Took { wall: wall.elapsed().as_secs_f64(), cpu: (cpu_time() - cpu).as_secs_f64() };
    Ok((value, took))
}

fn classify(source: &dyn Source, threads: usize) -> Result<(Content, Took)> {
    let options = Options { threads, ..Options::default() };
    timed(|| Ok(Content::of(&scan(&[source], &options, &mut |_, _| true)?)))
}

/// Has every page read and does nothing with it: what the kernel's part of it takes.
fn read_only(source: &dyn Source) -> Result<()> {
    let mut reader = source.open()?;
    let (chunk, mut first) = (1024, 0);
    for pages in source.extents() {
        for at in (0..pages).step_by(chunk) {
            let count = (pages - at).min(chunk as u64);
            reader.read(first + at, count, &mut |_, page| {
                black_box(page);
            })?;
        }
        first += pages;
    }
    Ok(())
}

/// Reads all of it as fast as one core can.
fn sum(memory: &[[u8; PAGE]]) -> u64 {
    let words = memory.as_flattened().as_chunks::<8>().0;
    // Four sums at a time, so that no addition waits for the one before.
    let mut sums = [0u64; 16];
    for group in words.as_chunks::<16>().0 {
        for (sum, word) in sums.iter_mut().zip(group) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// The same by two threads, each half of it: what two cores can have at most.
fn sum_by_two(memory: &[[u8; PAGE]]) -> u64 {
    let (first, second) = memory.split_at(memory.len() / 2);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| sum(second));
        sum(first).wrapping_add(other.join().unwrap_or_default())
    })
}

/// A process that holds the bytes of a file in anonymous memory.
struct Holder(Child);

impl Holder {
    fn start(how: &str, file: &Path) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(how)
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        ensure!(line.trim() == "ready", "the process that holds memory has failed: {line}");
        Ok(Self(child))
    }

    fn space(&self) -> Result<Space> {
        let pid = self.0.id();
        let extents = guest_memory(pid, &mappings(pid)?)?.extents();
        Ok(Space { name: "process".into(), pid, extents })
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Holds what is in the file until there is a line on standard input or its end.
fn hold(path: &str, huge: bool) -> Result<()> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let ram = Ram::new(bytes, Backing::Anonymous)?;
    ram.set_huge_pages(huge)?;
    let mut piece = PageBuffer::new(16);
    for at in (0..bytes).step_by(piece.len()) {
        let len = piece.len().min((bytes - at) as usize);
        file.read_exact(&mut piece[..len])?;
        ram.memory().write_slice(&piece[..len], GuestAddress(at))?;
    }
    drop(file);
    println!("ready");
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// What is timed in each round of the first part.
#[derive(Clone, Copy)]
enum Reading {
    Sum,
    SumByTwo,
    InPlace,
    InPlaceByTwo,
    File,
    Pid,
    PidHuge,
    FileReadOnly,
    PidReadOnly,
}

/// How long each reading took, round by round.
struct Rounds(Vec<[Took; 9]>);

impl Rounds {
    /// Gibibytes per second of processor time.
    fn rate(&self, gib: f64, reading: Reading) -> f64 {
        gib / median(self.0.iter().map(|took| took[reading as usize].cpu))
    }

    /// How many times as fast as another, by `seconds`.
    fn times(&self, reading: Reading, other: Reading, seconds: fn(Took) -> f64) -> f64 {
        median(self.0.iter().map(|took| seconds(took[other as usize]) / seconds(took[reading as usize])))
    }
}

fn speed(mib: usize, rounds: usize) -> Result<Rounds> {
    let mut buffer = PageBuffer::new(mib << 20 >> 12);
    let memory = buffer.as_chunks_mut().0;
    fill(memory);
    let memory = &*memory;
    let dir = tempfile::tempdir_in("/dev/shm").context("cannot make a directory in /dev/shm")?;
    let path = dir.path().join("image");
    File::create(&path)?.write_all(memory.as_flattened())?;
    let (small_pages, huge_pages) = (Holder::start(CHILD, &path)?, Holder::start(CHILD_HUGE, &path)?);
    let process = ProcessSource::new(small_pages.space()?, true);
    let huge = ProcessSource::new(huge_pages.space()?, true);
    let file = FileSource::open(&path, "file".into())?;
    let in_place = InPlace(memory);
    let mut expected: Option<Content> = None;
    let mut classified = |source: &dyn Source, threads| -> Result<Took> {
        let (content, took) = classify(source, threads)?;
        let first = *expected.get_or_insert(content);
        // The process may have a few pages more than the file, its allocator's own.
        let differ = content.distinct.abs_diff(first.distinct) + content.zero.abs_diff(first.zero);
        ensure!(differ <= 64, "{} of {}: {content:?}, and {first:?} before", source.name(), mib);
        Ok(took)
    };
    let mut round = || -> Result<[Took; 9]> {
        Ok([
            timed(|| Ok(black_box(sum(memory))))?.1,
            timed(|| Ok(black_box(sum_by_two(memory))))?.1,
            classified(&in_place, 1)?,
            classified(&in_place, 2)?,
            classified(&file, 1)?,
            classified(&process, 1)?,
            classified(&huge, 1)?,
            timed(|| read_only(&file))?.1,
            timed(|| read_only(&process))?.1,
        ])
    };
    Ok(Rounds((0..rounds).map(|_| round()).collect::<Result<_>>()?))
}

fn main() -> Result<()> {
    let (mut mib, mut rounds, mut grow, mut as_json) = (1024, 5, 16, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--mib" => mib = value()?.parse().context("--mib takes a number")?,
            "--rounds" => rounds = value()?.parse().context("--rounds takes a number")?,
            "--grow" => grow = value()?.parse::<u64>().context("--grow takes a number of GiB")?,
            "--json" => as_json = true,
            CHILD => return hold(&value()?, false),
            CHILD_HUGE => return hold(&value()?, true),
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    ensure!(
        rounds > 0 && (64..=3072).contains(&mib),
        "--rounds must be at least 1, and --mib 64 to 3072, below the hole in a guest's addresses"
    );
    let speed = speed(mib, rounds)?;
    let gib = mib as f64 / 1024.0;
    let rate = |reading| speed.rate(gib, reading);
    let (sum, in_place, file, pid) =
        (rate(Reading::Sum), rate(Reading::InPlace), rate(Reading::File), rate(Reading::Pid));
    let of_sum = speed.times(Reading::InPlace, Reading::Sum, |took| took.cpu);
    let pid_of_file = speed.times(Reading::Pid, Reading::File, |took| took.cpu);
    let huge_of_file = speed.times(Reading::PidHuge, Reading::File, |took| took.cpu);
    let read_pid_of_file = speed.times(Reading::PidReadOnly, Reading::FileReadOnly, |took| took.cpu);
    let by_two = speed.times(Reading::InPlaceByTwo, Reading::InPlace, |took| took.wall);
    let sum_by_two = speed.times(Reading::SumByTwo, Reading::Sum, |took| took.wall);
    let mut rows = Vec::new();
    let mut size = 1;
    while size <= grow {
        let pages = size << 18;
        let source = Generated { pages, page: [0x5a; PAGE] };
        let (content, took) = classify(&source, 1)?;
        ensure!(
            content.distinct == distinct(pages),
            "{} contents, and {} were made",
            content.distinct,
            distinct(pages)
        );
        rows.push((size, took.cpu, content.index_bytes, content.distinct));
        size *= 2;
    }
    let provenance = provenance();
    if as_json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(gib, cpu, index, distinct)| {
                json!({"gib": gib, "cpu_seconds": cpu, "index_bytes": index, "distinct": distinct})
            })
            .collect();
        let result = json!({
            "provenance": provenance, "mib": mib, "rounds": rounds,
            "sum_gib_per_second": sum, "classify_gib_per_second": in_place, "classify_of_sum": of_sum,
            "speed_up_of_two_threads": by_two, "speed_up_of_two_summing": sum_by_two,
            "file_gib_per_second": file, "pid_gib_per_second": pid, "pid_of_file": pid_of_file,
            "pid_with_huge_pages_of_file": huge_of_file, "reading_pid_of_reading_file": read_pid_of_file,
            "growth": rows,
        });
        println!("{result:#}");
        return Ok(());
    }
    println!(
        "{}\n{mib} MiB, {rounds} rounds, medians; GiB a second of one core",
        provenance.environment.line()
    );
    println!("  summing memory            {sum:6.2}");
    println!("  classifying it in place   {in_place:6.2}   {:.0} % of that", 100.0 * of_sum);
    println!(
        "  two threads               x {by_two:.2} by the wall clock; two that only sum x {sum_by_two:.2}"
    );
    println!("  --file                    {file:6.2}");
    println!("  --pid                     {pid:6.2}   {:.0} % of --file", 100.0 * pid_of_file);
    println!("    with huge pages         {:6.2}   {:.0} %", rate(Reading::PidHuge), 100.0 * huge_of_file);
    println!(
        "  reading only: --file      {:6.2}\n                --pid       {:6.2}   {:.0} % of that",
        rate(Reading::FileReadOnly),
        rate(Reading::PidReadOnly),
        100.0 * read_pid_of_file
    );
    println!("growth, one thread: GiB, processor seconds, seconds a GiB, bytes of index a content");
    for (gib, cpu, index, distinct) in rows {
        let each = index as f64 / distinct as f64;
        println!("  {gib:4} {cpu:8.2} {:8.3} {each:6.1}", cpu / gib as f64);
    }
    Ok(())
}
