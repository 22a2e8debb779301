//! Pages that a device is about to have written behind the processor's back.
//!
//! I/O that has pinned a page before it is frozen (O_DIRECT, io_uring with registered buffers,
//! vhost) writes to the old frame once it is replaced, and the write is lost. So a device marks the
//! range first, pins it then, and unmarks it when the write is done; and the merge step looks at
//! the marks after it has frozen a run and before it compares.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::page::PageRange;

/// Pages behind one counter: as many as the longest run, so that a run looks at two at most.
const BLOCK_PAGES: u64 = 64;

/// The marks on one VM's RAM.
#[derive(Debug)]
pub struct InFlight {
    blocks: Box<[AtomicU32]>,
}

impl InFlight {
    /// No marks on `pages` pages: 4 bytes for each 256 KiB of RAM.
    pub fn new(pages: u64) -> Self {
        let blocks = pages.div_ceil(BLOCK_PAGES);
        Self { blocks: (0..blocks).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Marks pages until what it returns is dropped. Take it before the system call that pins them,
    /// and keep it until the last write is done. Pages outside are not there to be pinned.
    #[must_use = "the mark is gone at once"]
    pub fn mark(&self, pages: PageRange) -> Mark<'_> {
        let mark = Mark { blocks: self.blocks(pages) };
        for block in mark.blocks {
            block.fetch_add(1, Ordering::SeqCst);
        }
        mark
    }

    /// Whether any of `pages` may be marked. True too where only a neighbour is: a run that is
    /// refused is tried again.
    pub fn any(&self, pages: PageRange) -> bool {
        // Pairs with the marker's: either we see the mark, or it pins the page after we froze it,
        // which waits.
        fence(Ordering::SeqCst);
        self.blocks(pages).iter().any(|block| block.load(Ordering::SeqCst) > 0)
    }

    fn blocks(&self, pages: PageRange) -> &[AtomicU32] {
        let len = self.blocks.len();
        let clip = |block: u64| usize::try_from(block).map_or(len, |block| block.min(len));
        let first = clip(pages.first().0 / BLOCK_PAGES);
        let end = if pages.is_empty() { first } else { clip(pages.end().0.div_ceil(BLOCK_PAGES)) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageNo;
    use crate::ram::{Backing, Ram};
    use devices::reclaim::Gpa;

    fn pages(first: u64, end: u64) -> PageRange {
        PageRange::between(PageNo(first), PageNo(end))
    }

    #[test]
    fn what_a_device_writes_is_marked_as_long_as_it_does() {
        let ram = Ram::new((3 << 30) + (16 << 20), Backing::Anonymous).unwrap();
        const ABOVE: u64 = 3 << 18;
        let marked = |ram: &Ram| [0, ABOVE].map(|first| ram.in_flight().any(pages(first, first + 64)));
        let device: &dyn devices::in_flight::InFlight = &ram;
        let mut seen = [false; 2];
        device.during(Gpa(4095)..Gpa(4097), &mut || seen = marked(&ram));
        assert_eq!(seen, [true, false]);
        let above = 4u64 << 30;
        device.during(Gpa(above)..Gpa(above + 1), &mut || seen = marked(&ram));
        assert_eq!(seen, [false, true]);
        assert_eq!(marked(&ram), [false, false]);
    }

    #[test]
    fn marks_are_seen_where_they_are_and_go() {
        let marks = InFlight::new(1000);
        let any = |first, end| marks.any(pages(first, end));
        assert!(!any(0, 1000));
        let (a, b) = (marks.mark(pages(60, 70)), marks.mark(pages(64, 65)));
        assert!(any(0, 1) && any(69, 70) && any(127, 128));
        assert!(!any(128, 1000) && !any(64, 64));
        drop(a);
        assert!(!any(0, 64) && any(64, 128));
        drop(b);
        assert!(!any(0, 1000));
    }

    #[test]
    fn what_is_outside_is_not_marked() {
        let marks = InFlight::new(10);
        let _all = marks.mark(pages(0, u64::MAX));
        assert!(marks.any(pages(9, 10)) && !marks.any(pages(64, u64::MAX)));
        let _none = marks.mark(pages(9, 3));
    }
}
