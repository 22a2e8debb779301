//! Pages that change while they are measured: read once more, and compared by their tags.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::sample::Estimate;
use super::scan::Scan;
use super::source::Source;
use super::{MeasureError, PAGE};

/// Pages that are asked for at a time.
const SOME_PAGES: usize = 1024;

/// How much of what was measured did not stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Volatile {
    /// Pages that were read twice.
    pub looked_pages: u64,
    /// Of these, how many held something else the second time, or were gone.
    pub changed_pages: u64,
    /// Their part of all pages that were read.
    pub share: Estimate,
    /// How many of all pages that makes: counted where all were read twice, else estimated.
    pub pages: u64,
    /// Half the width of the interval that holds their true number in 95 of 100 samples; 0 where all were read twice.
    pub pages_error_95: u64,
    /// From the begin of the scan to the end of the second look, wall clock.
    pub seconds: f64,
}

impl Scan {
    /// Reads pages of `sources`, which are those of the scan, that may have been written since once more. None if nobody can have
    /// written there.
    ///
    /// # Errors
    /// A source is gone.
    pub fn look_again(&self, sources: &[&dyn Source]) -> Result<Option<Volatile>, MeasureError> {
        if sources.iter().all(|source| !source.is_live()) {
            return Ok(None);
        }
        let began = Instant::now();
        let mut changed = Vec::with_capacity(self.second_look.len());
        let placed: Vec<_> =
            self.second_look.iter().map(|(number, tag)| (self.layout.place(*number), *tag)).collect();
        for same in placed.chunk_by(|((a, _), _), ((b, _), _)| a == b) {
            let Some(((guest, _), _)) = same.first() else { continue };
            let mut reader = sources[*guest].open()?;
            for some in same.chunks(SOME_PAGES) {
                let pages: Vec<u64> = some.iter().map(|((_, page), _)| *page).collect();
                let mut same = vec![false; some.len()];
                let mut at = 0;
                reader.read_scattered(&pages, &mut |page, content| {
                    // Pages come in this order, some of them not at all.
                    at += pages[at..].partition_point(|before| *before < page);
                    let tag = (content != &[0; PAGE]).then(|| self.key.tag(content));
                    if let (Some(same), Some((_, before))) = (same.get_mut(at), some.get(at)) {
                        *same = tag == *before;
                    }
                })?;
                changed.extend(same.iter().map(|same| f64::from(u8::from(!same))));
            }
        }
        let of = |(guest, source): (usize, &&dyn Source)| {
            if source.is_live() { self.guests[guest].zero + self.guests[guest].filled } else { 0 }
        };
        let all: u64 = sources.iter().enumerate().map(of).sum();
        let share = Estimate::of(&changed, all);
        Ok(Some(Volatile {
            looked_pages: changed.len() as u64,
            changed_pages: changed.iter().sum::<f64>() as u64,
            share,
            pages: (share.mean * all as f64).round() as u64,
            pages_error_95: (share.error_95 * all as f64).ceil() as u64,
            seconds: self.seconds + began.elapsed().as_secs_f64(),
        }))
    }
}
