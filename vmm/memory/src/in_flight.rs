//! Pages that a device is about to have written behind the processor's back.
//!
//! Whoever has pinned a page before it is frozen (O_DIRECT, io_uring with registered buffers, vhost) writes to the old frame
//! when it is replaced, and the write is lost. So a device marks the range first, pins it then, and unmarks it when the
//! write is done; and who has frozen a run looks at the marks after it froze and before it compares.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use devices::reclaim::Gpa;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::PAGE_BYTES;
use super::ram::Ram;

/// Pages behind one counter: as many as the longest run, so that a run looks at two at most.
const BLOCK_PAGES: u64 = 64;

/// The marks on one stretch of guest RAM. Pages count from its beginning.
#[derive(Debug)]
pub struct InFlight {
    blocks: Box<[AtomicU32]>,
}

impl InFlight {
    /// No marks on `bytes` of RAM: 4 bytes for each 256 KiB of it.
    pub fn new(bytes: u64) -> Self {
        let blocks = bytes.div_ceil(PAGE_BYTES * BLOCK_PAGES);
        Self { blocks: (0..blocks).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Marks pages until what it returns is dropped. Take it before the system call that pins them, and keep it until the
    /// last write is done. Pages outside are not there to be pinned.
    #[must_use = "the mark is gone at once"]
    pub fn mark(&self, pages: Range<u64>) -> Mark<'_> {
        let mark = Mark { blocks: self.blocks(&pages) };
        for block in mark.blocks {
            block.fetch_add(1, Ordering::SeqCst);
        }
        mark
    }

    /// Whether any of `pages` may be marked. True too where only a neighbour is: a run that is refused is tried again.
    pub fn any(&self, pages: Range<u64>) -> bool {
        // Pairs with the marker's: either we see the mark, or it pins the page after we froze it, which waits.
        fence(Ordering::SeqCst);
        self.blocks(&pages).iter().any(|block| block.load(Ordering::SeqCst) > 0)
    }

    fn blocks(&self, pages: &Range<u64>) -> &[AtomicU32] {
        let len = self.blocks.len();
        let clip = |block: u64| usize::try_from(block).map_or(len, |block| block.min(len));
        let first = clip(pages.start / BLOCK_PAGES);
        let end = if pages.is_empty() { first } else { clip(pages.end.div_ceil(BLOCK_PAGES)) };
        &self.blocks[first..end]
    }
}

/// A mark; gone when it is dropped.
#[derive(Debug)]
pub struct Mark<'a> {
    blocks: &'a [AtomicU32],
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        for block in self.blocks {
            block.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl devices::in_flight::InFlight for Ram {
    fn during(&self, range: Range<Gpa>, transfer: &mut dyn FnMut()) {
        let mut marks = Vec::new();
        for (region, in_flight) in self.memory().iter().zip(self.in_flight()) {
            let first = region.start_addr().0;
            let (start, end) = (range.start.0.max(first), range.end.0.min(first + region.len()));
            if start < end {
                marks.push(in_flight.mark((start - first) / PAGE_BYTES..(end - first).div_ceil(PAGE_BYTES)));
            }
        }
        transfer();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Backing;

    #[test]
    fn what_a_device_writes_is_marked_as_long_as_it_does() {
        let ram = Ram::new((3 << 30) + (16 << 20), Backing::Anonymous).unwrap();
        let marked = |ram: &Ram| -> Vec<bool> { ram.in_flight().iter().map(|m| m.any(0..64)).collect() };
        let device: &dyn devices::in_flight::InFlight = &ram;
        let mut seen = Vec::new();
        device.during(Gpa(4095)..Gpa(4097), &mut || seen = marked(&ram));
        assert_eq!(seen, [true, false]);
        let above = 4u64 << 30;
        device.during(Gpa(above)..Gpa(above + 1), &mut || seen = marked(&ram));
        assert_eq!(seen, [false, true]);
        assert_eq!(marked(&ram), [false, false]);
    }

    #[test]
    fn marks_are_seen_where_they_are_and_go() {
        let marks = InFlight::new(1000 * PAGE_BYTES);
        assert!(!marks.any(0..1000));
        let (a, b) = (marks.mark(60..70), marks.mark(64..65));
        assert!(marks.any(0..1) && marks.any(69..70) && marks.any(127..128));
        assert!(!marks.any(128..1000) && !marks.any(64..64));
        drop(a);
        assert!(!marks.any(0..64) && marks.any(64..128));
        drop(b);
        assert!(!marks.any(0..1000));
    }

    #[test]
    fn what_is_outside_is_not_marked() {
        let marks = InFlight::new(10 * PAGE_BYTES);
        let _all = marks.mark(0..u64::MAX);
        assert!(marks.any(9..10) && !marks.any(64..u64::MAX));
        #[expect(clippy::reversed_empty_ranges, reason = "what a broken caller may give")]
        let _none = marks.mark(9..3);
    }
}
