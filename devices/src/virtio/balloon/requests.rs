//! What the driver asks of the balloon: pages in, pages out, and pages that are free for now.
//!
//! A request is completed when everything in it has been done, hence never before its pages are
//! gone. What makes no sense is counted, warned of at a limited rate, and left out.

use std::fmt;
use std::ops::Range;

use super::config::Kind;
use super::held::Held;
use super::pfn::coalesce;
use super::ram::{Part, Ram, addresses, inner_pages};
use super::state::{Handle, State};
use crate::reclaim::{Gpa, PAGE_BYTES, Reclaim};
use crate::virtio::Chain;
use crate::warn::Limited;

/// Most pages that one request may name, 1 GiB: what is beyond is left out. Linux lists at most 256
/// pages at once (VIRTIO_BALLOON_ARRAY_PFNS_MAX), Windows 1024, and Linux reports at most 32 blocks
/// of 4 MiB.
pub(super) const MAX_REQUEST_PAGES: u64 = 1 << 18;
/// PFNs that are read, sorted and acted on at a time; the handle's lock is released between.
const PIECE_PFNS: usize = 4096;
const PFN_BYTES: usize = size_of::<u32>();

/// Serves requests.
pub(super) struct Requests {
    ram: Ram,
    reclaim: Box<dyn Reclaim>,
    handle: Handle,
    failed: Limited,
    refused: Limited,
    /// Kept from request to request, so that serving one allocates nothing.
    list: Vec<u8>,
    runs: Vec<Range<u64>>,
    ranges: Vec<Range<Gpa>>,
    /// Of granules that are not whole yet.
    parts: Vec<Range<Gpa>>,
    /// See [`Reclaim::granule_bytes`].
    granule_pages: u64,
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("ram", &self.ram).finish_non_exhaustive()
    }
}

impl Requests {
    /// The RAM that requests are about.
    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    pub(super) fn new(ram: Ram, reclaim: Box<dyn Reclaim>, handle: Handle) -> Self {
        let granule_pages = (reclaim.granule_bytes() / PAGE_BYTES).max(1);
        Self {
            granule_pages,
            ram,
            reclaim,
            handle,
            failed: Limited::new("virtio-balloon: the host did not take pages back"),
            refused: Limited::new("virtio-balloon: request refused, or a part of it"),
            list: vec![0; PIECE_PFNS * PFN_BYTES],
            runs: Vec::new(),
            ranges: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Serves one request. Returns its size in pages, at least 1.
    pub(super) fn serve(&mut self, kind: Kind, chain: &mut Chain<'_>) -> u64 {
        match kind {
            Kind::Inflate | Kind::Deflate => self.list(kind, chain),
            Kind::Hint => self.hint(chain),
            Kind::Report => self.report(chain),
        }
        .max(1)
    }

    /// A list of PFNs of 32 bits, little-endian (5.5.6).
    fn list(&mut self, kind: Kind, chain: &mut Chain<'_>) -> u64 {
        let bytes = chain.readable_bytes();
        let listed = u64::from(bytes) / PFN_BYTES as u64;
        if listed == 0 || !(bytes as usize).is_multiple_of(PFN_BYTES) || listed > MAX_REQUEST_PAGES {
            self.refuse(1, format_args!("a list of page frame numbers of {bytes} bytes"));
        }
        if chain.writable_bytes() > 0 {
            self.refuse(
                1,
                format_args!("{} device-writable bytes with a list of pages", chain.writable_bytes()),
            );
        }
        let pages = listed.min(MAX_REQUEST_PAGES);
        let mut left = pages as usize;
        while left > 0 {
            let piece = left.min(PIECE_PFNS) * PFN_BYTES;
            if chain.read(&mut self.list[..piece]) < piece {
                break;
            }
            self.piece(kind, piece);
            left -= piece / PFN_BYTES;
        }
        pages
    }

    /// The first `bytes` of the list that has been read.
    fn piece(&mut self, kind: Kind, bytes: usize) {
        let pfns = || self.list[..bytes].as_chunks().0.iter().map(|pfn| u32::from_le_bytes(*pfn));
        coalesce(pfns(), &mut self.runs);

        let mut state = self.handle.lock();
        let (mut named, mut inside) = (0, 0);
        self.ranges.clear();
        self.parts.clear();
        for run in &self.runs {
            named += run.end - run.start;
            for part in self.ram.parts(run.clone()) {
                inside += part.len();
                match kind {
                    Kind::Inflate if self.granule_pages == 1 => {
                        state.held.insert(&part);
                        self.ranges.push(addresses(&part.pages));
                    }
                    Kind::Inflate => {
                        let granules = self.ram.granules(&part, self.granule_pages);
                        gather(&mut state.held, granules, &mut self.ranges, &mut self.parts);
                    }
                    _ => state.held.remove(&part),
                }
            }
        }
        let reclaimed_bytes = self.discard(&mut state, &self.ranges);
        // These free nothing, but read as zeros from now on.
        self.discard(&mut state, &self.parts);
        let listed = (bytes / PFN_BYTES) as u64;
        // Only for a driver that is wrong is it worth finding out how often.
        let outside = |pfn: &u32| !self.ram.contains(u64::from(*pfn));
        let refused = if inside == named { 0 } else { pfns().filter(outside).count() as u64 };
        let counters = &mut state.counters;
        match kind {
            Kind::Inflate => counters.inflated_pages += listed - refused,
            _ => counters.deflated_pages += listed - refused,
        }
        counters.reclaimed_bytes += reclaimed_bytes;
        drop(state);
        if let Some(pfn) = pfns().find(|pfn| refused > 0 && outside(pfn)) {
            self.refuse(refused, format_args!("page {pfn:#x} and {} more outside RAM", refused - 1));
        }
    }

    /// Free pages as the device-writable buffers themselves (5.5.6.7).
    fn report(&mut self, chain: &Chain<'_>) -> u64 {
        if chain.readable_bytes() > 0 || chain.writable().is_empty() {
            self.refuse(1, format_args!("a report with {} device-readable bytes", chain.readable_bytes()));
        }
        let mut ranges = std::mem::take(&mut self.ranges);
        let mut state = self.handle.lock();
        let (pages, bytes) = self.free_pages(&mut state, chain, true, &mut ranges);
        state.counters.reported_bytes += bytes;
        drop(state);
        self.ranges = ranges;
        pages
    }

    /// A command ID to read, pages that are free in the run that it named, or both (5.5.6.4).
    fn hint(&mut self, chain: &mut Chain<'_>) -> u64 {
        let mut cmd = [0; size_of::<u32>()];
        let cmd = match (chain.readable_bytes() as usize, chain.read(&mut cmd)) {
            (4, 4) => Some(u32::from_le_bytes(cmd)),
            (0, _) if !chain.writable().is_empty() => None,
            (bytes, _) => {
                self.refuse(1, format_args!("a hint with {bytes} device-readable bytes"));
                None
            }
        };
        let mut ranges = std::mem::take(&mut self.ranges);
        // One lock for the question and the deed: after a stop nothing may go.
        let mut state = self.handle.lock();
        if let Some(cmd) = cmd {
            state.answer_hinting(cmd);
        }
        let wanted = state.is_hinting();
        let (pages, bytes) = self.free_pages(&mut state, chain, wanted, &mut ranges);
        state.counters.hinted_bytes += bytes;
        drop(state);
        self.ranges = ranges;
        pages
    }

    /// Discards the whole pages in the device-writable buffers, if they are `wanted`. Returns how
    /// many pages were named, and how many bytes discarded.
    fn free_pages(
        &self,
        state: &mut State,
        chain: &Chain<'_>,
        wanted: bool,
        ranges: &mut Vec<Range<Gpa>>,
    ) -> (u64, u64) {
        let wanted = wanted && !state.keeps_free_pages();
        let mut named = 0;
        ranges.clear();
        for buffer in chain.writable() {
            let (start, len) = (buffer.start.0, u64::from(buffer.len_bytes));
            let pages = inner_pages(start, start + len);
            if !start.is_multiple_of(PAGE_BYTES) || !len.is_multiple_of(PAGE_BYTES) {
                state.counters.refused += 1;
                self.refused.hit(format_args!("{len} free bytes at {}: not whole pages", buffer.start));
            }
            named += pages.end - pages.start;
            if named > MAX_REQUEST_PAGES {
                state.counters.refused += 1;
                self.refused.hit(format_args!("more than {MAX_REQUEST_PAGES} free pages in one request"));
                break;
            }
            if wanted && self.granule_pages == 1 {
                ranges.extend(self.ram.parts(pages).map(|part| addresses(&part.pages)));
            } else if wanted {
                // Pages that are only free now are not kept for a granule that may become whole
                // later.
                for part in self.ram.parts(pages) {
                    let whole = |(piece, whole): (Part, Option<Part>)| (whole? == piece).then_some(piece);
                    let granules = self.ram.granules(&part, self.granule_pages).filter_map(whole);
                    granules.for_each(|granule| add(ranges, &granule));
                }
            }
        }
        (named.min(MAX_REQUEST_PAGES), self.discard(state, ranges))
    }

    /// Gives pages to the host. Returns how many bytes it took.
    fn discard(&self, state: &mut State, ranges: &[Range<Gpa>]) -> u64 {
        let bytes = |range: &Range<Gpa>| range.end.0 - range.start.0;
        let mut taken = self.reclaim.framed_bytes(ranges);
        self.reclaim.discard_all(ranges, &mut |range, error| {
            taken = taken.saturating_sub(bytes(range));
            state.counters.failed_discards += 1;
            self.failed.hit(format_args!("{} to {}: {error}", range.start, range.end));
        });
        taken
    }

    fn refuse(&self, count: u64, what: fmt::Arguments<'_>) {
        self.refused.hit(what);
        self.handle.refuse(count);
    }
}

/// Puts the pieces of granules into the balloon. Those granules that become whole by it go to
/// `whole`, pieces of others to `parts`. What is in a granule that was whole before has been given
/// back already.
fn gather(
    held: &mut Held,
    granules: impl Iterator<Item = (Part, Option<Part>)>,
    whole: &mut Vec<Range<Gpa>>,
    parts: &mut Vec<Range<Gpa>>,
) {
    for (piece, granule) in granules {
        if granule.as_ref().is_some_and(|granule| held.contains_all(granule)) {
            continue;
        }
        held.insert(&piece);
        match granule.filter(|granule| held.contains_all(granule)) {
            Some(granule) => add(whole, &granule),
            None => add(parts, &piece),
        }
    }
}

/// Adds pages that lie behind all of `ranges`.
fn add(ranges: &mut Vec<Range<Gpa>>, part: &Part) {
    let range = addresses(&part.pages);
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
