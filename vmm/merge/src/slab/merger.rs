//! Carries out what is to be merged in one guest, within what it may cost: mappings, and huge pages that would be broken up.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use super::bits;
use super::breaks::Breaks;
use super::counters::Counters;
use super::courtesy::Courtesy;
use super::matchmaker::{DRAFT_PAGES, Run, SlabPage, runs};
use super::wire::{Live, Settings};
use memory::merge_run::{MAX_RUN_PAGES, Refusal};
use memory::slab::Slab;
use memory::slabbed::{Mapped, Slabbed};

/// Pages of a huge page of 2 MiB.
pub const HUGE_PAGES: u64 = 512;
/// Runs that wait for mappings to be had again; more are let go.
const MAX_LATER: usize = 1 << 14;

/// See the module's description.
///
/// *Mappings.* A run may cost two mappings, of which a process has vm.max_map_count. While more than half of them are left, every run that is
/// as long as the settings say is merged; then only runs of 4 pages, of 16 below a quarter, of 64 below an eighth: what is left is for
/// the longest. The others wait.
///
/// *Huge pages.* Where the host has put a huge page, what could be saved in it is added up first; it is broken up once that is as
/// much of it as the settings say.
pub struct Merger {
    slabbed: Slabbed,
    /// Those the matchmaker has spoken of.
    slabs: HashMap<u32, Slab>,
    pub settings: Settings,
    /// Lets others run between two runs.
    pub courtesy: Courtesy,
    /// What is held back in each huge page, by its number.
    held: HashMap<u64, Vec<Work>>,
    /// What waits for mappings.
    later: Vec<Run>,
    /// Which pages are those of slabs, as far as is known: a page that the guest has written to is not until the next count.
    shared: Vec<u64>,
    breaks: Breaks,
}

/// Something to merge: pages with those of a slab, or zeros with nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// These pages are those of a slab.
    Merge(Run),
    /// So many pages from this one on are zeros.
    Zeros(u64, u64),
}

impl Work {
    fn page(self) -> u64 {
        match self {
            Self::Merge(run) => run.page,
            Self::Zeros(page, _) => page,
        }
    }

    fn pages(self) -> u64 {
        match self {
            Self::Merge(run) => run.pages.into(),
            Self::Zeros(_, pages) => pages,
        }
    }

    /// Its first `pages` pages, and the rest. Asked for all of it or more, there is no rest.
    fn split(self, pages: u64) -> (Self, Option<Self>) {
        if pages >= self.pages() {
            return (self, None);
        }
        match self {
            Self::Merge(run) => {
                let first = pages as u32;
                let rest = Run {
                    page: run.page + pages,
                    pages: run.pages - first,
                    slab_page: run.slab_page.saturating_add(first),
                    ..run
                };
                (Self::Merge(Run { pages: first, ..run }), Some(Self::Merge(rest)))
            }
            Self::Zeros(page, all) => {
                (Self::Zeros(page, pages), Some(Self::Zeros(page + pages, all - pages)))
            }
        }
    }
}

impl Merger {
    /// Merges pages of `slabbed`, of which there are `pages`.
    pub fn new(slabbed: Slabbed, pages: u64) -> Self {
        Self {
            slabbed,
            slabs: HashMap::new(),
            settings: Settings { min_run_pages: 1, ..Settings::default() },
            courtesy: Courtesy::new(),
            held: HashMap::new(),
            later: Vec::new(),
            shared: bits::none(pages),
            breaks: Breaks::new(pages),
        }
    }

    /// The memory that is merged.
    pub fn slabbed(&mut self) -> &mut Slabbed {
        &mut self.slabbed
    }

    /// The slab of that number, if it is known.
    pub fn slab(&self, slab: u32) -> Option<&Slab> {
        self.slabs.get(&slab)
    }

    /// How many slabs are known.
    pub fn slab_count(&self) -> usize {
        self.slabs.len()
    }

    /// The matchmaker calls this slab by that number.
    pub fn learn(&mut self, number: u32, slab: Slab) {
        self.slabs.insert(number, slab);
    }

    /// The matchmaker will speak of that slab no more.
    pub fn forget(&mut self, slab: u32) {
        self.slabs.remove(&slab);
        self.later.retain(|run| run.slab != slab);
        for held in self.held.values_mut() {
            held.retain(|work| !matches!(work, Work::Merge(run) if run.slab == slab));
        }
    }

    /// There is another matchmaker. Returns the slabs that were known to the old one.
    pub fn start_over(&mut self) -> Vec<Slab> {
        self.held.clear();
        self.later.clear();
        self.slabs.drain().map(|(_, slab)| slab).collect()
    }

    /// These pages were written: what was found out about them is true no more.
    pub fn written(&mut self, written: &[u64], counters: &mut Counters) {
        if written.iter().all(|word| *word == 0) {
            return;
        }
        for (n, (shared, written)) in self.shared.iter_mut().zip(written).enumerate() {
            counters.broken_soon_pages += u64::from(self.breaks.written(n, *written, *shared).count_ones());
            let broken = u64::from((*shared & written).count_ones());
            counters.broken_pages += broken;
            counters.shared_now -= broken.min(counters.shared_now);
            *shared &= !written;
        }
        for held in self.held.values_mut() {
            held.retain(|work| {
                let stays = !(work.page()..work.page() + work.pages()).any(|page| bits::has(written, page));
                counters.huge_pages -= if stays { 0 } else { work.pages().min(counters.huge_pages) };
                stays
            });
        }
    }

    /// Which merges did not last.
    pub fn breaks(&mut self) -> &mut Breaks {
        &mut self.breaks
    }

    /// Of the pages of each word, in order, those whose merge has lasted.
    pub fn lasted(&self) -> impl Iterator<Item = u64> {
        self.shared.iter().enumerate().map(|(n, shared)| self.breaks.lasted(n, *shared))
    }

    /// Whether some of these pages may be those of slabs.
    pub fn any_shared(&self, pages: Range<u64>) -> bool {
        let words = (pages.start / 64) as usize..pages.end.div_ceil(64) as usize;
        self.shared.get(words).is_none_or(|words| words.iter().any(|word| *word != 0))
    }

    /// These pages are the guest's alone: what was a slab's has been written to, at a time when nobody watched.
    pub fn private(&mut self, page: u64, pages: u64, counters: &mut Counters) {
        for page in (page..page + pages).filter(|page| bits::has(&self.shared, *page)).collect::<Vec<_>>() {
            bits::put(&mut self.shared, page, false);
            let soon = self.breaks.written((page / 64) as usize, 1 << (page % 64), 1 << (page % 64));
            counters.broken_soon_pages += u64::from(soon != 0);
            counters.broken_pages += 1;
            counters.shared_now = counters.shared_now.saturating_sub(1);
        }
    }

    /// The host has huge pages here.
    pub fn is_huge(&mut self, page: u64, pages: u64) {
        if self.settings.huge_page_percent > 0 {
            for huge in page / HUGE_PAGES..(page + pages).div_ceil(HUGE_PAGES) {
                self.held.entry(huge).or_default();
            }
        }
    }

    /// Merges runs, the longest first, as far as that may be.
    pub fn merge_all(&mut self, mut runs: Vec<Run>, counters: &mut Counters) {
        runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.pages));
        for run in runs {
            counters.matched_pages += u64::from(run.pages);
            self.take(Work::Merge(run), counters);
        }
    }

    /// Does what is to be done, or holds it back.
    pub fn take(&mut self, work: Work, counters: &mut Counters) {
        // A run comes from another process: it may be anything.
        if self.held.is_empty() || work.page().checked_add(work.pages()).is_none() {
            return self.carry_out(work, counters);
        }
        let mut rest = Some(work);
        while let Some(work) = rest {
            let huge = work.page() / HUGE_PAGES;
            let (part, after) = work.split((huge + 1) * HUGE_PAGES - work.page());
            rest = after;
            match self.held.get_mut(&huge) {
                None => self.carry_out(part, counters),
                Some(held) => {
                    held.push(part);
                    counters.huge_pages += part.pages();
                    let saved: u64 = held.iter().map(|work| work.pages()).sum();
                    if saved * 100 >= self.settings.huge_page_percent * HUGE_PAGES {
                        let held = self.held.remove(&huge).unwrap_or_default();
                        counters.huge_pages -= saved.min(counters.huge_pages);
                        held.into_iter().for_each(|work| self.carry_out(work, counters));
                    }
                }
            }
        }
    }

    fn carry_out(&mut self, work: Work, counters: &mut Counters) {
        if let Work::Merge(run) = work
            && u64::from(run.pages) < self.shortest()
        {
            counters.over_budget_pages += u64::from(run.pages);
            if self.later.len() < MAX_LATER {
                self.later.push(run);
            }
            return;
        }
        self.carry_out_now(work, counters);
    }

    /// Does it whatever it costs, a piece at a time.
    fn carry_out_now(&mut self, work: Work, counters: &mut Counters) {
        let mut rest = Some(work);
        while let Some(work) = rest {
            let (piece, after) = work.split(MAX_RUN_PAGES);
            rest = after;
            match piece {
                Work::Merge(run) => self.merge(run, counters),
                Work::Zeros(page, pages) => self.drop_zeros(page, pages, counters),
            }
        }
    }

    /// Pages of the shortest run that is worth what is left of the mappings.
    fn shortest(&self) -> u64 {
        let (left, all) = self.slabbed.mappings_left();
        let worth = match () {
            () if left >= all / 2 => 1,
            () if left >= all / 4 => 4,
            () if left >= all / 8 => 16,
            () => 64,
        };
        self.settings.min_run_pages.max(worth)
    }

    fn drop_zeros(&mut self, page: u64, pages: u64, counters: &mut Counters) {
        self.courtesy.breathe();
        match self.slabbed.drop_zeros(page, pages) {
            Ok(()) => {
                counters.zero_pages += pages;
                (page..page + pages).for_each(|page| self.breaks.merged(page));
            }
            Err(refusal) => refused(&refusal, pages, counters),
        }
    }

    /// Merges a run of at most [`MAX_RUN_PAGES`]; the halves of it, if a page in it has changed.
    fn merge(&mut self, run: Run, counters: &mut Counters) {
        // Before, not after: the pages are frozen at the beginning of a turn of ours, and hardly ever while others have theirs.
        self.courtesy.breathe();
        let pages = u64::from(run.pages);
        let Some(slab) = self.slabs.get(&run.slab) else { return refused(&Refusal::Run, pages, counters) };
        match self.slabbed.merge((run.page, pages), (slab, run.slab_page.into())) {
            Ok(()) => {
                counters.merged_pages += pages;
                counters.runs += 1;
                // What was a slab's before, and only moves, is no newer for that.
                for page in run.page..run.page + pages {
                    if !bits::has(&self.shared, page) {
                        counters.shared_now += 1;
                        self.breaks.merged(page);
                        bits::put(&mut self.shared, page, true);
                    }
                }
            }
            Err(Refusal::Differs) if run.pages > 1 => {
                let (half, rest) = Work::Merge(run).split(pages / 2);
                for part in [Some(half), rest] {
                    if let Some(Work::Merge(run)) = part {
                        self.merge(run, counters);
                    }
                }
            }
            Err(refusal) => refused(&refusal, pages, counters),
        }
    }

    /// Uses the `n`th page of slab `new` wherever it uses the `n`th one of `old`.
    pub fn put_together(&mut self, new: u32, old: &[SlabPage], counters: &mut Counters) -> io::Result<()> {
        let places: HashMap<SlabPage, u32> = old.iter().copied().zip(0..).collect();
        let numbers = self.numbers();
        let mut found: Vec<Run> = Vec::new();
        for Mapped { inode, slab_page, page, pages } in self.slabbed.mapped()? {
            let Some(slab) = numbers.get(&inode) else { continue };
            for n in 0..pages {
                let place = SlabPage { slab: *slab, page: (slab_page + n) as u32 };
                if let Some(slab_page) = places.get(&place) {
                    found.push(Run { page: page + n, pages: 1, slab: new, slab_page: *slab_page });
                }
            }
        }
        let before = counters.merged_pages;
        for run in runs(found) {
            self.carry_out_now(Work::Merge(run), counters);
        }
        counters.moved_pages += counters.merged_pages - before;
        Ok(())
    }

    /// The number of each slab that is known, by that of its file.
    fn numbers(&self) -> HashMap<u64, u32> {
        self.slabs.iter().map(|(number, slab)| (slab.inode(), *number)).collect()
    }

    /// Finds out which pages are those of slabs: what it counts is exact after that. Returns which pages of each slab that is known are
    /// in use.
    pub fn count(&mut self, counters: &mut Counters) -> io::Result<HashMap<u32, Live>> {
        let numbers = self.numbers();
        let mut live: HashMap<u32, Live> = HashMap::new();
        self.shared.fill(0);
        for Mapped { inode, slab_page, page, pages } in self.slabbed.mapped()? {
            (page..page + pages).for_each(|page| bits::put(&mut self.shared, page, true));
            if let Some(slab) = numbers.get(&inode) {
                let live = live.entry(*slab).or_insert([0; DRAFT_PAGES / 64]);
                (slab_page..slab_page + pages).for_each(|page| bits::put(live, page, true));
            }
        }
        counters.shared_now = bits::count(&self.shared);
        counters.mappings_now = self.slabbed.slab_mappings();
        Ok(live)
    }

    /// Tries again what has waited for mappings, where there are enough by now.
    pub fn retry(&mut self, counters: &mut Counters) {
        let shortest = self.shortest();
        let (now, later) =
            std::mem::take(&mut self.later).into_iter().partition(|run| u64::from(run.pages) >= shortest);
        self.later = later;
        for run in now {
            counters.over_budget_pages -= u64::from(run.pages).min(counters.over_budget_pages);
            self.carry_out(Work::Merge(run), counters);
        }
    }
}

fn refused(refusal: &Refusal, pages: u64, counters: &mut Counters) {
    let counter = match refusal {
        Refusal::Differs => &mut counters.differed_pages,
        Refusal::InFlight => &mut counters.pinned_pages,
        Refusal::Mappings => &mut counters.over_budget_pages,
        Refusal::Run | Refusal::Freeze(_) | Refusal::Map(_) => {
            tracing::debug!("merging: {refusal}");
            &mut counters.refused_pages
        }
    };
    *counter += pages;
}

#[cfg(test)]
mod tests;
