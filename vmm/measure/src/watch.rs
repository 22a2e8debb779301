//! How long pages stay shared: looked at again and again, page by page, in the page tables alone.
//!
//! A page counts as shared while it is present and not alone on its frame, the zero frame included;
//! that needs no privilege. What comes and goes between two looks is not seen.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{MeasureError, Space};

/// Looks that can be distinguished: their number is kept for each page.
pub const MAX_LOOKS: usize = u16::MAX as usize - 1;

/// One look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Since the first one.
    pub seconds: f64,
    /// Pages that are shared.
    pub shared_pages: u64,
    /// Pages that were not at the look before.
    pub began_pages: u64,
    /// Pages that were, and are not any more.
    pub ended_pages: u64,
    /// Pages that need no frame: saved by sharing, and zeros.
    pub freed_pages: u64,
    /// What ideal sharing within the trust domains would save.
    pub ideal_saved_pages: u64,
}

/// All looks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watched {
    /// One after the other.
    pub looks: Vec<Look>,
    /// Of sharing that was seen to begin and to end: after how many looks it had, and how many
    /// pages.
    pub lifetimes: Vec<Lifetime>,
    /// Pages that are shared at the last look: how long they stay is not known.
    pub still_shared_pages: u64,
    /// Time after which half of the shared pages would not be any more, if they went on to end as
    /// they did on average; `null` if none ended.
    pub half_life_seconds: Option<f64>,
}

/// Sharing that was seen whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lifetime {
    /// From the first look that saw it to the first that did not.
    pub seconds: f64,
    pub pages: u64,
}

/// Follows pages from look to look.
#[derive(Debug)]
pub struct Watcher {
    began: Instant,
    /// For each page the look that saw it shared first, counted from 1; 0 if it is not.
    since: Vec<Vec<u16>>,
    /// Lifetimes of pages, by the looks that saw them.
    ended: Vec<(u16, u16, u64)>,
    looks: Vec<Look>,
}

impl Watcher {
    /// For the memory of `spaces`: 2 bytes a page.
    pub fn new(spaces: &[Space]) -> Self {
        let since = spaces.iter().map(|space| vec![0; space.pages() as usize]).collect();
        Self { began: Instant::now(), since, ended: Vec::new(), looks: Vec::new() }
    }

    /// Looks at every page of `spaces`, the same as before. The caller gives the pages freed and
    /// the ideal.
    ///
    /// # Errors
    /// A process is gone.
    pub fn look(
        &mut self,
        spaces: &[Space],
        freed_pages: u64,
        ideal_saved_pages: u64,
    ) -> Result<(), MeasureError> {
        let number = (self.looks.len() + 1).min(MAX_LOOKS) as u16;
        let seconds = self.began.elapsed().as_secs_f64();
        let mut look = Look { seconds, freed_pages, ideal_saved_pages, ..Look::default() };
        let mut ended = vec![0u64; usize::from(number)];
        for (space, since) in spaces.iter().zip(&mut self.since) {
            let mut since = since.iter_mut();
            space.each_entry(|_, entry| {
                let Some(since) = since.next() else { return };
                let is_shared = entry.present() && !entry.exclusive();
                look.shared_pages += u64::from(is_shared);
                if is_shared && *since == 0 {
                    *since = number;
                    look.began_pages += 1;
                } else if !is_shared && *since > 0 {
                    ended[usize::from(std::mem::take(since))] += 1;
                    look.ended_pages += 1;
                }
            })?;
        }
        let ended = ended.iter().zip(0..).filter(|(pages, _)| **pages > 0);
        self.ended.extend(ended.map(|(pages, from)| (from, number, *pages)));
        if number == 1 {
            // These began before the first look.
            look.began_pages = 0;
        }
        self.looks.push(look);
        Ok(())
    }

    /// Seconds since the watch began.
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    pub fn finish(self) -> Watched {
        let at = |look: u16| self.looks[usize::from(look) - 1].seconds;
        // The age of what was shared at the first look is not known.
        let seen_whole = self.ended.iter().filter(|(from, ..)| *from > 1);
        let mut lifetimes: Vec<Lifetime> = seen_whole
            .map(|(from, to, pages)| Lifetime { seconds: at(*to) - at(*from), pages: *pages })
            .collect();
        lifetimes.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let page_seconds: f64 = self
            .looks
            .windows(2)
            .map(|pair| pair[0].shared_pages as f64 * (pair[1].seconds - pair[0].seconds))
            .sum();
        let ended: u64 = self.looks.iter().map(|look| look.ended_pages).sum();
        Watched {
            still_shared_pages: self.looks.last().map_or(0, |look| look.shared_pages),
            half_life_seconds: (ended > 0).then(|| std::f64::consts::LN_2 * page_seconds / ended as f64),
            lifetimes,
            looks: self.looks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::PAGE_BYTES;

    fn watched(looks: &[(f64, u64, u64)], ended: &[(u16, u16, u64)]) -> Watched {
        let look = |(seconds, shared_pages, ended_pages): &(f64, u64, u64)| Look {
            seconds: *seconds,
            shared_pages: *shared_pages,
            ended_pages: *ended_pages,
            ..Look::default()
        };
        let watcher = Watcher {
            began: Instant::now(),
            since: Vec::new(),
            ended: ended.to_vec(),
            looks: looks.iter().map(look).collect(),
        };
        watcher.finish()
    }

    #[test]
    fn what_began_unseen_has_no_lifetime_but_counts_for_the_half_life() {
        let looks = [(0.0, 100, 0), (10.0, 80, 30), (30.0, 60, 20)];
        let watched = watched(&looks, &[(1, 2, 30), (1, 3, 15), (2, 3, 5)]);
        assert_eq!(watched.lifetimes, [Lifetime { seconds: 20.0, pages: 5 }]);
        let page_seconds = 100.0 * 10.0 + 80.0 * 20.0;
        assert_eq!(watched.half_life_seconds, Some(std::f64::consts::LN_2 * page_seconds / 50.0));
        assert_eq!(watched.still_shared_pages, 60);
    }

    #[test]
    fn unshared_memory_is_never_counted_as_shared() {
        let memory = vec![1u8; 3 * PAGE_BYTES as usize];
        let hva = (memory.as_ptr() as u64).next_multiple_of(PAGE_BYTES);
        let extents =
            vec![super::super::Extent { gpa: memory::Gpa(0), hva: memory::Hva(hva), bytes: 2 * PAGE_BYTES }];
        let spaces = [Space { name: "us".into(), pid: std::process::id(), extents }];
        let mut watcher = Watcher::new(&spaces);
        (0..2).for_each(|_| watcher.look(&spaces, 0, 0).unwrap());
        let watched = watcher.finish();
        assert_eq!((watched.looks.len(), watched.looks[1].shared_pages), (2, 0));
        assert_eq!(watched.half_life_seconds, None);
    }
}
