//! Which pages were given back: no write log has them, and a copy that was made before holds what
//! they were.

use std::sync::{Arc, Mutex};

use super::PageSet;
use super::page::PageRange;

/// Pages that were given back since it was last cleared, while it is on. Clones are the same log.
#[derive(Clone, Debug, Default)]
pub struct DiscardLog(Arc<Mutex<Option<PageSet>>>);

impl DiscardLog {
    /// Switches it on, for `pages` pages, with none in it.
    pub fn start(&self, pages: u64) {
        *os::lock(&self.0) = Some(PageSet::none(pages));
    }

    /// Puts what is in it into `pages`.
    pub fn read_into(&self, pages: &mut PageSet) {
        if let Some(given) = &*os::lock(&self.0) {
            pages.union_with(given);
        }
    }

    /// Takes everything out of it.
    pub fn clear(&self) {
        if let Some(given) = &mut *os::lock(&self.0) {
            given.clear();
        }
    }

    /// These are gone, or may be in part.
    pub(super) fn add(&self, pages: PageRange) {
        if let Some(given) = &mut *os::lock(&self.0) {
            given.insert_range(pages);
        }
    }
}
