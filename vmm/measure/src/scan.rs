//! Every page of every guest read once, hashed, and looked up: by as many threads as there are
//! processors.
//!
//! Threads read and hash chunks; one index takes their tags in the order of the pages, so that the
//! result does not depend on the number of threads. Where the index is full, it goes on with a part
//! of all contents, and another pass over the memory looks at the rest: see [`super::index`].

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::index::SLICES;
use super::numbering::{Extent, Numbering};
pub use super::options::Options;
use super::ordered_queue::{Entered, OrderedQueue};
use super::page_types::{TYPES, TypeCounts};
pub use super::reducer::Counts;
use super::reducer::{Batch, Reducer};
use super::runs::{RunLengths, Runs};
use super::sample::SecondLook;
use super::sets::{SetId, Sets};
use super::source::{PageReader, Source};
use super::tag::{Tag, TagKey};
use super::{MeasureError, PAGE};

/// How often progress is reported.
const PROGRESS_PERIOD: Duration = Duration::from_millis(50);

/// Called with the pages done and their number; false ends the measurement.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// The result of a scan.
pub struct Scan {
    pub guests: Vec<Counts>,
    /// The sets of holders that occur, and
    pub sets: Sets,
    /// how many contents have each, by its number.
    pub contents_by_set: Vec<u64>,
    /// How the cross duplicates lie; None if it took several passes, of which none sees neighbours.
    pub runs: Option<(Runs, Vec<RunLengths>)>,
    /// Each source's pages by what its kernel uses them for, where that is known; None if it took
    /// several passes.
    pub by_type: Option<Vec<[TypeCounts; TYPES]>>,
    /// Passes over the memory.
    pub passes: u32,
    /// Most memory of the index and the sets, in bytes.
    pub index_bytes: u64,
    /// Wall clock.
    pub seconds: f64,
    pub(super) numbering: Numbering,
    /// A random sample of contents, by the page that has each first.
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

/// Reads every page of `sources` and says which contents there are.
///
/// # Errors
/// A source is gone or cannot be read, or `progress` asked to stop.
pub fn scan(
    sources: &[&dyn Source],
    options: &Options,
    progress: Progress<'_>,
) -> Result<Scan, MeasureError> {
    let began = Instant::now();
    let numbering = Numbering::of(sources)?;
    let chunks = numbering.chunks();
    let key = TagKey::random()?;
    let total: u64 = chunks.iter().map(|chunk| chunk.pages).sum();
    let mut reducer = Reducer::new(sources, options);
    let mut contents_by_set = Vec::new();
    let (mut passes, mut all) = (0u32, total);
    loop {
        let before = total * u64::from(passes);
        let mut tell = |done| progress(before + done, all);
        reducer = pass(sources, &chunks, &key, options.threads, reducer, &mut tell)?;
        contents_by_set.resize(reducer.sets.len(), 0);
        reducer.index.holders().for_each(|set| contents_by_set[set.0 as usize] += 1);
        passes += 1;
        let done = reducer.index.slices();
        if !reducer.restart() {
            break;
        }
        // The rest is expected to take one pass for each part of this size.
        all = (total * u64::from(passes)) * u64::from(SLICES) / u64::from(done.end.max(1));
        all = all.max(total * u64::from(passes + 1));
    }
    let done = total * u64::from(passes);
    progress(done, done);
    let index_bytes = reducer.index.peak_bytes() + reducer.sets.bytes();
    Ok(Scan {
        guests: reducer.guests,
        sets: reducer.sets,
        contents_by_set,
        // When the index was full, contents that it had dropped were counted, and are again.
        by_type: (passes == 1).then_some(reducer.by_type),
        runs: (passes == 1).then(|| reducer.runs.finish()),
        passes,
        index_bytes,
        seconds: began.elapsed().as_secs_f64(),
        numbering,
        sample: reducer.sample.into_pages(),
        second_look: reducer.second_look,
        key,
    })
}

/// One pass over all chunks.
fn pass(
    sources: &[&dyn Source],
    chunks: &[Extent],
    key: &TagKey,
    threads: usize,
    reducer: Reducer,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Reducer, MeasureError> {
    let threads = threads.clamp(1, chunks.len().max(1));
    let shared = Shared {
        sources,
        chunks,
        key,
        looker: reducer.is_first_pass.then_some(reducer.looker),
        next: AtomicUsize::new(0),
        done_pages: AtomicU64::new(0),
        queue: OrderedQueue::new(sources, reducer, threads),
    };
    let result = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| shared.work())).collect();
        let mut interrupted = !progress(0);
        while !shared.queue.wait(PROGRESS_PERIOD) {
            interrupted |= !progress(shared.done_pages.load(Ordering::Relaxed));
            if interrupted {
                shared.queue.stop();
            }
        }
        let results = workers.into_iter().map(|worker| worker.join().unwrap_or(Err(MeasureError::Worker)));
        let result = results.collect::<Result<Vec<()>, _>>();
        if interrupted { Err(MeasureError::Interrupted) } else { result }
    });
    result?;
    shared.queue.into_reducer().ok_or(MeasureError::Worker)
}

/// State that the threads of a pass share.
struct Shared<'a> {
    sources: &'a [&'a dyn Source],
    chunks: &'a [Extent],
    key: &'a TagKey,
    /// Which pages to look at again, in the first pass.
    looker: Option<SecondLook>,
    /// The chunk that is read next.
    next: AtomicUsize,
    done_pages: AtomicU64,
    queue: OrderedQueue<'a>,
}

impl Shared<'_> {
    fn work(&self) -> Result<(), MeasureError> {
        let result = self.read_chunks(&self.queue.enter());
        if result.is_err() {
            self.queue.stop();
        }
        result
    }

    fn read_chunks(&self, queue: &Entered<'_>) -> Result<(), MeasureError> {
        let mut reader: Option<(u16, Box<dyn PageReader + '_>)> = None;
        while let Some(tags) = queue.next_vector() {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = self.chunks.get(turn) else { break };
            let open = match reader.take() {
                Some((guest, reader)) if guest == chunk.guest => reader,
                _ => self.sources[usize::from(chunk.guest)].open()?,
            };
            let (_, open) = reader.insert((chunk.guest, open));
            let batch = self.read_chunk(open.as_mut(), chunk, tags)?;
            self.done_pages.fetch_add(chunk.pages, Ordering::Relaxed);
            queue.deliver(turn, batch);
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
            let tag = self.key.tag_unless_zero(content);
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
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
