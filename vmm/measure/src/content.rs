//! What could be shared: which pages hold the same, within a guest and across guests.
//!
//! Every present page is read once and known by its tag from then on, of which [`super::tag`] says
//! how sure it is. Absent and swapped pages are not read.

use serde::{Deserialize, Serialize};

use super::runs::Runs;
use super::scan::{Options, Scan, scan};
use super::source::Source;
use super::source::process::ProcessSource;
use super::{MeasureError, Space, check};

/// What the present pages hold. `zero + self_duplicates + cross_duplicates + distinct` is their
/// number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Pages of zeros only.
    pub zero: u64,
    /// Pages whose content stands earlier in the same guest.
    pub self_duplicates: u64,
    /// Pages whose content was first seen in another guest, and not before in this one.
    pub cross_duplicates: u64,
    /// Different contents, zeros not counted.
    pub distinct: u64,
    /// Frames that ideal sharing frees: zero and duplicate pages.
    pub ideal_saved_pages: u64,
    /// How the cross duplicates lie; nothing if the index was too small for one pass.
    pub runs: Runs,
    /// Pages on swap, which were not read.
    pub swapped_unread: u64,
    /// Memory the index took.
    pub index_bytes: u64,
}

impl Content {
    /// Pages that were read.
    pub fn present(&self) -> u64 {
        self.zero + self.self_duplicates + self.cross_duplicates + self.distinct
    }

    /// Adds what guests of another trust domain hold, with which these share nothing.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        self.self_duplicates += other.self_duplicates;
        self.cross_duplicates += other.cross_duplicates;
        self.distinct += other.distinct;
        self.ideal_saved_pages += other.ideal_saved_pages;
        self.runs.join(&other.runs);
        self.swapped_unread += other.swapped_unread;
        self.index_bytes = self.index_bytes.max(other.index_bytes);
    }

    /// The result of a scan, all of it in one domain.
    pub fn of(scan: &Scan) -> Self {
        let zero = scan.guests.iter().map(|guest| guest.zero).sum();
        let filled: u64 = scan.guests.iter().map(|guest| guest.filled).sum();
        let (mut distinct, mut held) = (0, 0);
        for (set, contents) in scan.contents() {
            distinct += contents;
            held += contents * scan.sets.guests(set).count() as u64;
        }
        let (self_duplicates, cross_duplicates) = (filled.saturating_sub(held), held - distinct);
        Self {
            zero,
            self_duplicates,
            cross_duplicates,
            distinct,
            ideal_saved_pages: zero + self_duplicates + cross_duplicates,
            runs: scan.runs.as_ref().map(|(runs, _)| *runs).unwrap_or_default(),
            swapped_unread: scan.guests.iter().map(|guest| guest.unread.swapped).sum(),
            index_bytes: scan.index_bytes,
        }
    }
}

/// Reads every present page of `spaces`; calls `progress` with the pages done and their total
/// at the beginning, at the end, and now and then.
///
/// # Errors
/// Names the guest and its process when either is gone or may not be read.
pub fn measure(spaces: &[Space], progress: &mut dyn FnMut(u64, u64)) -> Result<Content, MeasureError> {
    check(spaces)?;
    let sources: Vec<ProcessSource> =
        spaces.iter().map(|space| ProcessSource::new(space.clone(), true)).collect();
    let sources: Vec<&dyn Source> = sources.iter().map(|source| source as &dyn Source).collect();
    let scan = scan(&sources, &Options::default(), &mut |done, total| {
        progress(done, total);
        true
    })?;
    Ok(Content::of(&scan))
}

#[cfg(test)]
#[path = "content_tests.rs"]
mod tests;
