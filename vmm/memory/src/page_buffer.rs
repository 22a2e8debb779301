//! Room of our own for guests' pages.

use std::ops::{Deref, DerefMut};

use super::PAGE;

/// Bytes for whole pages, zeros at first, that begin where a page begins: a copy between places
/// that lie differently in their cache lines, and a vector load across two lines, take up to twice
/// as long.
#[derive(Debug)]
pub struct PageBuffer {
    bytes: Vec<u8>,
    skip: usize,
}

impl PageBuffer {
    /// Room for `pages` pages.
    pub fn new(pages: usize) -> Self {
        let mut bytes = vec![0; (pages + 1) * PAGE];
        // For bytes there always is such an offset, and it is less than a page; should there be
        // none, it is slow.
        let skip = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        bytes.truncate(skip + pages * PAGE);
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
            assert_eq!(buffer.len(), pages * PAGE);
            assert_eq!(buffer.as_ptr().addr() % PAGE, 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }
}
