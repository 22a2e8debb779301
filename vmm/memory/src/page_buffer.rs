//! Room of our own for guests' pages.

use std::ops::{Deref, DerefMut};

use super::PAGE_BYTES;

/// Bytes for whole pages, zeros at first, that begin where a page begins: a copy between places that lie differently in their
/// cache lines, and a vector load across two lines, take up to twice as long.
#[derive(Debug)]
pub struct PageBuffer {
    bytes: Vec<u8>,
    skip: usize,
}

impl PageBuffer {
    /// Room for so many pages.
    pub fn new(pages: usize) -> Self {
        let page = PAGE_BYTES as usize;
        let mut bytes = vec![0; (pages + 1) * page];
        // For bytes there always is such an offset, and it is less than a page; should there be none, it is slow.
        let skip = bytes.as_ptr().align_offset(page).min(page);
        bytes.truncate(skip + pages * page);
        Self { bytes, skip }
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.skip..]
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_where_a_page_begins_and_has_what_was_asked_for() {
        for pages in [0, 1, 3, 64, 1000] {
            let buffer = PageBuffer::new(pages);
            assert_eq!(buffer.len(), pages * PAGE_BYTES as usize);
            assert_eq!(buffer.as_ptr() as usize % PAGE_BYTES as usize, 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }
}
