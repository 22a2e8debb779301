//! What has been read, taken in the order of the pages: looked up, counted, followed.

use super::index::{Full, Index, SLICES, slice};
use super::options::Options;
use super::page_types::{PageTypes, Seen, TYPES, TypeCounts};
use super::runs::RunFollower;
use super::sample::{Contents, SecondLook};
use super::sets::{SetId, Sets};
use super::source::{Source, Unread};
use super::tag::Tag;

/// How many pages ahead the index is read from memory: first the marks, and when they have come,
/// the entries.
const MARKS_AHEAD: usize = 32;
const ENTRIES_AHEAD: usize = 12;

/// One guest's pages as they were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages of all its memory.
    pub pages: u64,
    /// Pages of zeros only.
    pub zero: u64,
    /// Other pages that were read.
    pub filled: u64,
    /// Pages that were not read.
    pub unread: Unread,
}

/// The pages that a thread read in one chunk.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) guest: u16,
    /// Number and page of the first, of all pages and of those of its guest.
    pub(super) number: u32,
    pub(super) first: u64,
    pub(super) zero: u64,
    pub(super) zero_by_type: [u64; TYPES],
    pub(super) unread: Unread,
    /// Number and tag of each page that is not of zeros.
    pub(super) tags: Vec<(u32, Tag)>,
    pub(super) second_look: Vec<(u32, Option<Tag>)>,
}

/// Takes batches in the order of the pages.
pub(super) struct Reducer {
    pub(super) index: Index,
    pub(super) sets: Sets,
    pub(super) guests: Vec<Counts>,
    pub(super) by_type: Vec<[TypeCounts; TYPES]>,
    pub(super) runs: RunFollower,
    pub(super) sample: Contents,
    /// Which pages to look at again, and those that were chosen so.
    pub(super) looker: SecondLook,
    pub(super) second_look: Vec<(u32, Option<Tag>)>,
    pub(super) is_first_pass: bool,
}

impl Reducer {
    /// Has taken nothing yet.
    pub(super) fn new(sources: &[&dyn Source], options: &Options) -> Self {
        let live_pages = sources.iter().filter(|s| s.is_live()).map(|s| s.pages()).sum();
        let of_type = |source: &&dyn Source| {
            let pages = source.page_types().map(PageTypes::pages).unwrap_or_default();
            pages.map(|pages| TypeCounts { pages, ..TypeCounts::default() })
        };
        Self {
            index: Index::new(options.index_limit_bytes),
            sets: Sets::default(),
            guests: sources.iter().map(|s| Counts { pages: s.pages(), ..Counts::default() }).collect(),
            by_type: sources.iter().map(of_type).collect(),
            runs: RunFollower::default(),
            sample: Contents::new(options.sample_contents),
            looker: SecondLook::new(options.second_look_pages, live_pages),
            second_look: Vec::new(),
            is_first_pass: true,
        }
    }

    /// Gets ready for the pass after this one. False: this was the last.
    pub(super) fn restart(&mut self) -> bool {
        let done = self.index.slices();
        if done.end >= SLICES {
            return false;
        }
        self.index.restart(done.end..(done.end + done.len() as u32).min(SLICES));
        self.is_first_pass = false;
        true
    }

    /// Reduces the batch that is next; `types` are its source's.
    pub(super) fn take(&mut self, batch: &Batch, types: Option<&PageTypes>) {
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
        // Entries lie all over memory: fetching ahead lets the processor wait for many at a time.
        let tags = &batch.tags;
        tags.iter().take(MARKS_AHEAD).for_each(|(_, tag)| self.index.prefetch_marks(*tag));
        for (at, (number, tag)) in tags.iter().enumerate() {
            if let Some((_, later)) = tags.get(at + MARKS_AHEAD) {
                self.index.prefetch_marks(*later);
            }
            if let Some((_, next)) = tags.get(at + ENTRIES_AHEAD) {
                self.index.prefetch_entry(*next);
            }
            let seen = self.take_page(batch.guest, *number, *tag);
            if let Some((types, seen)) = types.zip(seen) {
                let page = batch.first + u64::from(number - batch.number);
                self.by_type[guest][types.of(page).code()].count(seen);
            }
        }
    }

    /// None: the content is for another pass.
    fn take_page(&mut self, guest: u16, number: u32, tag: Tag) -> Option<Seen> {
        // Each time the index is full it drops half; at the latest with one slice left it grows
        // beyond its limit.
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
