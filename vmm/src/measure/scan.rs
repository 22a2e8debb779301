//! Every page of every guest read once, hashed, and looked up: by as many threads as there are processors.
//!
//! Threads read and hash chunks; one index takes their tags in the order of the pages, whoever delivers them, so that
//! the result does not depend on how many threads there were. Where the index is full, it goes on with a part of all contents,
//! and another pass over the memory looks at the rest: see [`super::index`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::index::{Full, Index, SLICES, slice};
use super::page_types::{PageTypes, Seen, TYPES, TypeCounts};
use super::runs::{RunFollower, RunLengths, Runs};
use super::sample::{Contents, SecondLook};
use super::sets::{SetId, Sets};
use super::source::{PageReader, Source, Unread};
use super::tag::{Tag, TagKey};
use super::{MAX_SPACES, MeasureError, PAGE};

/// Pages that a thread reads before it takes the next ones.
const CHUNK_PAGES: u64 = 1024;
/// Chunks that may wait for one before them.
const MAX_WAITING: usize = 64;
/// How often progress is told.
const TELL: Duration = Duration::from_millis(50);

/// Called with the pages done and their number; false ends the measurement.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// How to scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that read and hash.
    pub threads: usize,
    /// Memory that the index may take, in bytes.
    pub index_limit_bytes: u64,
    /// Contents to remember for a closer look.
    pub sample_contents: usize,
    /// Pages to look at a second time, of memory that is written meanwhile.
    pub second_look_pages: u64,
}

impl Default for Options {
    /// As many threads as processors, a quarter of the memory that is available for the index, no samples.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            index_limit_bytes: available_bytes() / 4,
            sample_contents: 0,
            second_look_pages: 0,
        }
    }
}

/// Memory that could be had without swapping, as the kernel estimates it; 1 GiB where it does not tell.
fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(1 << 30, |kib| kib << 10)
}

/// One guest's pages as they were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages of all its memory.
    pub pages: u64,
    /// Pages of zeros only.
    pub zero: u64,
    /// Other pages that were read.
    pub filled: u64,
    /// Pages that were not.
    pub unread: Unread,
}

/// What a scan found.
pub struct Scan {
    /// Each source's pages.
    pub guests: Vec<Counts>,
    /// The sets of holders that occur, and
    pub sets: Sets,
    /// how many contents have each, by its number.
    pub contents_by_set: Vec<u64>,
    /// How the cross duplicates lie; None if it took several passes, of which none sees neighbours.
    pub runs: Option<(Runs, Vec<RunLengths>)>,
    /// Each source's pages by what its kernel uses them for, where that is known; None if it took several passes.
    pub by_type: Option<Vec<[TypeCounts; TYPES]>>,
    /// Passes over the memory.
    pub passes: u32,
    /// Most memory of the index and the sets, in bytes.
    pub index_bytes: u64,
    /// Wall clock.
    pub seconds: f64,
    /// Where pages lie.
    pub(super) layout: Layout,
    /// Some contents, each as likely as any other, by the page that has it first.
    pub(super) sample: Vec<(Tag, u32)>,
    /// Pages that were read once and are to be read again.
    pub(super) second_look: Vec<(u32, Option<Tag>)>,
    pub(super) key: TagKey,
}

impl Scan {
    /// Each set of holders, and how many contents it has.
    pub fn contents(&self) -> impl Iterator<Item = (SetId, u64)> {
        (0..).map(SetId).zip(self.contents_by_set.iter().copied()).filter(|(_, contents)| *contents > 0)
    }
}

/// Pages numbered over all sources, with one number left out after each extent.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// Source, first page in it, pages, number of the first.
    extents: Vec<Extent>,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    guest: u16,
    first: u64,
    pages: u64,
    number: u32,
}

impl Layout {
    fn of(sources: &[&dyn Source]) -> Result<Self, MeasureError> {
        if sources.len() > MAX_SPACES {
            return Err(MeasureError::TooMany { guests: sources.len() });
        }
        let (mut extents, mut number) = (Vec::new(), 0u64);
        for (guest, source) in sources.iter().enumerate() {
            let mut first = 0;
            for pages in source.extents() {
                if number.saturating_add(pages) >= u64::from(u32::MAX) {
                    return Err(MeasureError::TooLarge { guest: source.name().to_owned(), pages });
                }
                extents.push(Extent { guest: guest as u16, first, pages, number: number as u32 });
                first += pages;
                number += pages + 1;
            }
        }
        Ok(Self { extents })
    }

    /// The source and its page that has this number.
    pub(super) fn place(&self, number: u32) -> (usize, u64) {
        let at = self.extents.partition_point(|extent| extent.number <= number).saturating_sub(1);
        self.extents
            .get(at)
            .map_or((0, 0), |e| (usize::from(e.guest), e.first + u64::from(number - e.number)))
    }

    fn chunks(&self) -> Vec<Extent> {
        let cut = |extent: &Extent| {
            let extent = *extent;
            (0..extent.pages).step_by(CHUNK_PAGES as usize).map(move |from| Extent {
                first: extent.first + from,
                pages: (extent.pages - from).min(CHUNK_PAGES),
                number: extent.number + from as u32,
                ..extent
            })
        };
        self.extents.iter().flat_map(cut).collect()
    }
}

/// What a thread found in one chunk.
#[derive(Default)]
struct Batch {
    guest: u16,
    /// Number and page of the first, of all pages and of those of its guest.
    number: u32,
    first: u64,
    zero: u64,
    zero_by_type: [u64; TYPES],
    unread: Unread,
    /// Number and tag of each page that is not of zeros.
    tags: Vec<(u32, Tag)>,
    second_look: Vec<(u32, Option<Tag>)>,
}

/// Reads every page of `sources` and says which contents there are.
///
/// # Errors
/// A source is gone or cannot be read, or `progress` said to end.
pub fn scan(
    sources: &[&dyn Source],
    options: &Options,
    progress: Progress<'_>,
) -> Result<Scan, MeasureError> {
    let began = Instant::now();
    let layout = Layout::of(sources)?;
    let chunks = layout.chunks();
    let key = TagKey::random()?;
    let live_pages = sources.iter().filter(|s| s.is_live()).map(|s| s.pages()).sum();
    let mut taker = Taker {
        index: Index::new(options.index_limit_bytes),
        sets: Sets::default(),
        guests: vec![Counts::default(); sources.len()],
        by_type: vec![Default::default(); sources.len()],
        runs: RunFollower::default(),
        sample: Contents::new(options.sample_contents),
        second_look: Vec::new(),
        looker: SecondLook::new(options.second_look_pages, live_pages),
        is_first_pass: true,
        next: 0,
        waiting: BTreeMap::new(),
    };
    for ((guest, by_type), source) in taker.guests.iter_mut().zip(&mut taker.by_type).zip(sources) {
        guest.pages = source.pages();
        let pages = source.page_types().map(PageTypes::pages).unwrap_or_default();
        by_type.iter_mut().zip(pages).for_each(|(counts, pages)| counts.pages = pages);
    }
    let total: u64 = chunks.iter().map(|chunk| chunk.pages).sum();
    let mut contents_by_set = Vec::new();
    let (mut passes, mut all) = (0u32, total);
    loop {
        let before = total * u64::from(passes);
        taker =
            pass(sources, &chunks, &key, options.threads, taker, &mut |done| progress(before + done, all))?;
        contents_by_set.resize(taker.sets.len(), 0);
        taker.index.holders().for_each(|set| contents_by_set[set.0 as usize] += 1);
        passes += 1;
        let done = taker.index.slices();
        if done.end >= SLICES {
            break;
        }
        // The rest is expected to take as many passes as its size says.
        all = (total * u64::from(passes)) * u64::from(SLICES) / u64::from(done.end.max(1));
        all = all.max(total * u64::from(passes + 1));
        taker.restart(done.end..(done.end + done.len() as u32).min(SLICES));
    }
    let done = total * u64::from(passes);
    progress(done, done);
    let index_bytes = taker.index.peak_bytes() + taker.sets.bytes();
    Ok(Scan {
        guests: taker.guests,
        sets: taker.sets,
        contents_by_set,
        // When the index was full, contents that it had let go of were counted, and are again.
        by_type: (passes == 1).then_some(taker.by_type),
        runs: (passes == 1).then(|| taker.runs.finish()),
        passes,
        index_bytes,
        seconds: began.elapsed().as_secs_f64(),
        layout,
        sample: taker.sample.into_pages(),
        second_look: taker.second_look,
        key,
    })
}

/// One pass over all chunks.
fn pass(
    sources: &[&dyn Source],
    chunks: &[Extent],
    key: &TagKey,
    threads: usize,
    taker: Taker,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Taker, MeasureError> {
    let shared = Shared {
        sources,
        chunks,
        key,
        looker: taker.is_first_pass.then_some(taker.looker),
        next: AtomicUsize::new(0),
        done_pages: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        taker: Mutex::new(taker),
        moved_on: Condvar::new(),
    };
    let result = std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads.clamp(1, chunks.len().max(1))).map(|_| scope.spawn(|| shared.work())).collect();
        let mut interrupted = !progress(0);
        while workers.iter().any(|worker| !worker.is_finished()) {
            interrupted |= !progress(shared.done_pages.load(Ordering::Relaxed));
            if interrupted {
                shared.stop();
            }
            let guard = shared.lock();
            // Woken by each chunk; told at a human pace.
            let all_done = |taker: &mut Taker| taker.next < chunks.len() && !shared.stopped();
            drop(shared.moved_on.wait_timeout_while(guard, TELL, all_done));
            std::thread::yield_now();
        }
        let results = workers.into_iter().map(|worker| worker.join().unwrap_or(Err(MeasureError::Worker)));
        let result = results.collect::<Result<Vec<()>, _>>();
        if interrupted { Err(MeasureError::Interrupted) } else { result }
    });
    result?;
    Ok(shared.taker.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// What the threads of a pass have in common.
struct Shared<'a> {
    sources: &'a [&'a dyn Source],
    chunks: &'a [Extent],
    key: &'a TagKey,
    /// Which pages to look at again, in the first pass.
    looker: Option<SecondLook>,
    next: AtomicUsize,
    done_pages: AtomicU64,
    stop: AtomicBool,
    taker: Mutex<Taker>,
    moved_on: Condvar,
}

impl Shared<'_> {
    fn lock(&self) -> MutexGuard<'_, Taker> {
        self.taker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.moved_on.notify_all();
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn work(&self) -> Result<(), MeasureError> {
        let result = self.read_chunks();
        if result.is_err() {
            self.stop();
        }
        result
    }

    fn read_chunks(&self) -> Result<(), MeasureError> {
        let mut reader: Option<(u16, Box<dyn PageReader + '_>)> = None;
        let mut spare = Vec::new();
        while !self.stopped() {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = self.chunks.get(turn) else { break };
            let open = match reader.take() {
                Some((guest, reader)) if guest == chunk.guest => reader,
                _ => self.sources[usize::from(chunk.guest)].open()?,
            };
            let (_, open) = reader.insert((chunk.guest, open));
            let batch = self.read_chunk(open.as_mut(), chunk, std::mem::take(&mut spare))?;
            self.done_pages.fetch_add(chunk.pages, Ordering::Relaxed);
            spare = self.deliver(turn, batch);
        }
        Ok(())
    }

    fn read_chunk(
        &self,
        reader: &mut dyn PageReader,
        chunk: &Extent,
        tags: Vec<(u32, Tag)>,
    ) -> Result<Batch, MeasureError> {
        let Extent { guest, first, number, .. } = *chunk;
        let mut batch = Batch { guest, first, number, tags, ..Batch::default() };
        let source = self.sources[usize::from(guest)];
        let types = source.page_types();
        let looker = self.looker.filter(|_| source.is_live());
        let mut each = |page: u64, content: &[u8; PAGE]| {
            let number = chunk.number + (page - chunk.first) as u32;
            let tag = (content != &[0; PAGE]).then(|| self.key.tag(content));
            match tag {
                Some(tag) => batch.tags.push((number, tag)),
                None => {
                    batch.zero += 1;
                    if let Some(types) = types {
                        batch.zero_by_type[types.of(page).code()] += 1;
                    }
                }
            }
            if looker.is_some_and(|looker| looker.wants(number)) {
                batch.second_look.push((number, tag));
            }
        };
        batch.unread = reader.read(chunk.first, chunk.pages, &mut each)?;
        Ok(batch)
    }

    /// Has what is next in turn taken, this batch or those that waited for it. Returns an empty vector for use again.
    fn deliver(&self, turn: usize, batch: Batch) -> Vec<(u32, Tag)> {
        let mut taker = self.lock();
        taker.waiting.insert(turn, batch);
        let mut spare = Vec::new();
        let before = taker.next;
        while let Some(batch) = {
            let next = taker.next;
            taker.waiting.remove(&next)
        } {
            taker.take(&batch, self.sources[usize::from(batch.guest)].page_types());
            taker.next += 1;
            spare = batch.tags;
        }
        if taker.next > before {
            self.moved_on.notify_all();
        }
        // Whoever is next in turn is not among those who wait here.
        let full = |taker: &mut Taker| taker.waiting.len() > MAX_WAITING && !self.stopped();
        drop(self.moved_on.wait_while(taker, full));
        spare.clear();
        spare
    }
}

/// Takes batches in the order of the pages.
struct Taker {
    index: Index,
    sets: Sets,
    guests: Vec<Counts>,
    by_type: Vec<[TypeCounts; TYPES]>,
    runs: RunFollower,
    sample: Contents,
    looker: SecondLook,
    second_look: Vec<(u32, Option<Tag>)>,
    is_first_pass: bool,
    /// The batch that is next.
    next: usize,
    waiting: BTreeMap<usize, Batch>,
}

impl Taker {
    fn restart(&mut self, slices: std::ops::Range<u32>) {
        self.index.restart(slices);
        self.is_first_pass = false;
        self.next = 0;
    }

    fn take(&mut self, batch: &Batch, types: Option<&PageTypes>) {
        let guest = usize::from(batch.guest);
        if self.is_first_pass {
            let by_type = self.by_type[guest].iter_mut().zip(batch.zero_by_type);
            by_type.for_each(|(counts, zero)| counts.zero += zero);
            let guest = &mut self.guests[guest];
            guest.zero += batch.zero;
            guest.filled += batch.tags.len() as u64;
            guest.unread.add(batch.unread);
            self.second_look.extend(&batch.second_look);
        }
        // Entries lie all over memory: reading ahead lets the processor wait for many at a time.
        for part in batch.tags.chunks(64) {
            let touched = part.iter().fold(0, |all, (_, tag)| all ^ self.index.touch(*tag));
            std::hint::black_box(touched);
            for (number, tag) in part {
                let seen = self.take_page(batch.guest, *number, *tag);
                if let Some((types, seen)) = types.zip(seen) {
                    let page = batch.first + u64::from(number - batch.number);
                    self.by_type[guest][types.of(page).code()].count(seen);
                }
            }
        }
    }

    /// None: the content is for another pass.
    fn take_page(&mut self, guest: u16, number: u32, tag: Tag) -> Option<Seen> {
        // Each time that it is full it gives half away; at the latest with one slice left it grows beyond its limit.
        while self.index.slices().contains(&slice(tag)) {
            let sets = &mut self.sets;
            match self.index.look_up(tag, number, |set| sets.with(set, guest)) {
                Ok(Some(known)) => {
                    let elsewhere = !self.sets.ends_with(known.set, guest) && known.set != SetId::NONE;
                    self.runs.step(number, elsewhere.then_some(known.at));
                    return Some(if elsewhere { Seen::Between } else { Seen::Within });
                }
                Ok(None) => {
                    self.sample.offer(tag, number);
                    self.runs.step(number, None);
                    return Some(Seen::First);
                }
                Err(Full) => {
                    self.index.narrow();
                    let end = self.index.slices().end;
                    self.sample.retain(|tag| slice(tag) < end);
                }
            }
        }
        None
    }
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
