//! What is measured: memory that is read page by page, whatever it is.

pub mod choice;
pub mod core;
pub mod file;
pub mod mappings;
pub mod process;

use super::page_types::PageTypes;
use super::{MeasureError, PAGE};

/// The pages of a stretch that were not read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unread {
    /// Pages without a frame: never touched, or given back.
    pub absent: u64,
    /// Pages on swap.
    pub swapped: u64,
    /// Pages that were present at first and gone when they were read.
    pub vanished: u64,
}

impl Unread {
    /// Adds those of another stretch.
    pub fn add(&mut self, other: Self) {
        self.absent += other.absent;
        self.swapped += other.swapped;
        self.vanished += other.vanished;
    }
}

/// One guest's memory, or memory that is measured as such.
pub trait Source: Sync {
    /// Its name, for reports.
    fn name(&self) -> &str;

    /// Pages of each stretch that is contiguous in it. Pages are counted over all of them, from 0.
    fn extents(&self) -> Vec<u64>;

    /// Whether it may be written while it is read.
    fn is_live(&self) -> bool;

    /// The types of its pages, if known.
    fn page_types(&self) -> Option<&PageTypes> {
        None
    }

    /// A reader for one thread.
    ///
    /// # Errors
    /// It is gone or may not be read.
    fn open(&self) -> Result<Box<dyn PageReader + '_>, MeasureError>;

    fn pages(&self) -> u64 {
        self.extents().iter().sum()
    }
}

/// Called with a page's number and what it holds.
pub type EachPage<'a> = &'a mut dyn FnMut(u64, &[u8; PAGE]);

/// Reads pages of a [`Source`].
pub trait PageReader {
    /// Passes each page of `first..first + pages`, all of one extent, that is in memory to `each`,
    /// by its number and ascending. Returns the pages that were not.
    ///
    /// # Errors
    /// The memory is gone or cannot be read.
    fn read(&mut self, first: u64, pages: u64, each: EachPage<'_>) -> Result<Unread, MeasureError>;

    /// The same for pages that lie anywhere, ascending.
    ///
    /// # Errors
    /// The memory is gone or cannot be read.
    fn read_scattered(&mut self, pages: &[u64], each: EachPage<'_>) -> Result<Unread, MeasureError> {
        let mut unread = Unread::default();
        for page in pages {
            unread.add(self.read(*page, 1, each)?);
        }
        Ok(unread)
    }
}

/// Passes on the whole pages in `bytes`, the first of which has the number `first`.
pub fn hand_on(first: u64, bytes: &[u8], each: EachPage<'_>) {
    let (contents, _) = bytes.as_chunks::<PAGE>();
    (first..).zip(contents).for_each(|(page, content)| each(page, content));
}
