//! Where pages lie: one number for each, over all that is measured, and the pieces that they are
//! read in.

use super::source::Source;
use super::{MAX_SPACES, MeasureError};

/// Pages that a thread reads before it takes the next ones.
const CHUNK_PAGES: u64 = 1024;

/// Pages numbered over all sources, with one number left out after each extent.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbering {
    extents: Vec<Extent>,
}

/// Pages of one source that follow each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) guest: u16,
    /// The first one's place among the pages of its source.
    pub(super) first: u64,
    pub(super) pages: u64,
    /// The first one's number.
    pub(super) number: u32,
}

impl Numbering {
    /// The numbering of these sources, in this order.
    ///
    /// # Errors
    ///
    /// There are too many of them, or too many pages.
    pub(super) fn of(sources: &[&dyn Source]) -> Result<Self, MeasureError> {
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

    /// All pages, in pieces of at most [`CHUNK_PAGES`].
    pub(super) fn chunks(&self) -> Vec<Extent> {
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
