//! Carries out what is to be merged in one guest, within what it may cost: mappings, and huge pages
//! that would be broken up.

use std::collections::HashMap;
use std::io;

use super::breaks::Breaks;
use super::counters::Counters;
use super::matchmaker::{DRAFT_PAGES, Run, SlabPlace, runs};
use super::wire::{Live, Settings};
use super::yielding::Yielding;
use memory::replace::{MAX_RUN_PAGES, Refusal};
use memory::shared_ram::{Mapped, SharedRam};
use memory::slab::Slab;
use memory::{PageRange, PageSet, SlabPage};

/// Pages of a huge page of 2 MiB.
pub const HUGE_PAGES: u64 = 512;
/// Runs that wait for mappings to be had again; more are dropped.
const MAX_LATER: usize = 1 << 14;

/// See the module's description.
///
/// *Mappings.* A run may cost two mappings, of which a process has vm.max_map_count. While more
/// than half of them are left, every run that is as long as the settings say is merged; then only
/// runs of 4 pages, of 16 below a quarter, of 64 below an eighth: what is left is for the longest.
/// The others wait.
///
/// *Huge pages.* Where the host has put a huge page, what could be saved in it is added up first;
/// it is broken up once that is as much of it as the settings say.
pub struct Merger {
    shared_ram: SharedRam,
    /// Those the matchmaker has spoken of.
    slabs: HashMap<u32, Slab>,
    pub settings: Settings,
    /// Lets others run between two runs.
    pub yielding: Yielding,
    /// What is held back in each huge page, by its number.
    held: HashMap<u64, Vec<Work>>,
    /// What waits for mappings.
    later: Vec<Run>,
    /// Which pages are those of slabs, as far as is known: a page that the guest has written to is
    /// not until the next count.
    shared: PageSet,
    breaks: Breaks,
}

/// Something to merge: pages with those of a slab, or zeros with nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// These pages are those of a slab.
    Merge(Run),
    /// These are zeros.
    Zeros(PageRange),
}

impl Work {
    /// The guest's pages; None where there are none of such numbers.
    fn range(self) -> Option<PageRange> {
        match self {
            Self::Merge(run) => run.range(),
            Self::Zeros(range) => Some(range),
        }
    }

    fn pages(self) -> u64 {
        match self {
            Self::Merge(run) => run.pages.into(),
            Self::Zeros(range) => range.pages(),
        }
    }

    /// Its first `pages` pages, and the rest. Asked for all of it or more, there is no rest.
    fn split(self, pages: u64) -> (Self, Option<Self>) {
        match self {
            Self::Merge(run) => match u32::try_from(pages).ok().filter(|first| *first < run.pages) {
                None => (self, None),
                Some(first) => {
                    let rest = Run {
                        page: run.page + pages,
                        pages: run.pages - first,
                        slab_page: run.slab_page + pages,
                        ..run
                    };
                    (Self::Merge(Run { pages: first, ..run }), Some(Self::Merge(rest)))
                }
            },
            Self::Zeros(range) => {
                let (first, rest) = range.split(pages);
                (Self::Zeros(first), (!rest.is_empty()).then_some(Self::Zeros(rest)))
            }
        }
    }
}

impl Merger {
    /// Merges pages of `shared_ram`, of which there are `pages`.
    pub fn new(shared_ram: SharedRam, pages: u64) -> Self {
        Self {
            shared_ram,
            slabs: HashMap::new(),
            settings: Settings { min_run_pages: 1, ..Settings::default() },
            yielding: Yielding::new(),
            held: HashMap::new(),
            later: Vec::new(),
            shared: PageSet::none(pages),
            breaks: Breaks::new(pages),
        }
    }

    /// These pages were those of slabs before this began: as in a copy of another VM.
    pub fn begin_with(&mut self, shared: PageSet) {
        self.shared = shared;
    }

    /// The memory that is merged.
    pub fn shared_ram(&mut self) -> &mut SharedRam {
        &mut self.shared_ram
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
    pub fn written(&mut self, written: &PageSet, counters: &mut Counters) {
        if written.is_empty() {
            return;
        }
        for (n, (shared, written)) in self.shared.words_mut().iter_mut().zip(written.words()).enumerate() {
            counters.broken_soon_pages += u64::from(self.breaks.written(n, *written, *shared).count_ones());
            let broken = u64::from((*shared & written).count_ones());
            counters.broken_pages += broken;
            counters.shared_now -= broken.min(counters.shared_now);
            *shared &= !written;
        }
        for held in self.held.values_mut() {
            held.retain(|work| {
                let stays = !work.range().is_some_and(|range| range.iter().any(|page| written.has(page)));
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
        self.shared.words().iter().enumerate().map(|(n, shared)| self.breaks.lasted(n, *shared))
    }

    /// Whether some of these pages may be those of slabs.
    pub fn any_shared(&self, pages: PageRange) -> bool {
        self.shared.may_have(pages)
    }

    /// These pages are the guest's alone: what was a slab's has been written to while it was not
    /// watched.
    pub fn private(&mut self, pages: PageRange, counters: &mut Counters) {
        for page in pages.iter().filter(|page| self.shared.has(*page)).collect::<Vec<_>>() {
            self.shared.remove(page);
            let soon = self.breaks.written_one(page);
            counters.broken_soon_pages += u64::from(soon);
            counters.broken_pages += 1;
            counters.shared_now = counters.shared_now.saturating_sub(1);
        }
    }

    /// The host has huge pages here.
    pub fn is_huge(&mut self, pages: PageRange) {
        if self.settings.huge_page_percent > 0 {
            for huge in pages.first().0 / HUGE_PAGES..pages.end().0.div_ceil(HUGE_PAGES) {
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
        if self.held.is_empty() || work.range().is_none() {
            return self.carry_out(work, counters);
        }
        let mut rest = Some(work);
        while let Some((work, range)) = rest.and_then(|work| Some((work, work.range()?))) {
            let huge = range.first().0 / HUGE_PAGES;
            let (part, after) = work.split(HUGE_PAGES - range.first().0 % HUGE_PAGES);
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
                Work::Zeros(range) => self.drop_zeros(range, counters),
            }
        }
    }

    /// Pages of the shortest run that is worth what is left of the mappings.
    fn shortest(&self) -> u64 {
        let (left, all) = self.shared_ram.mappings_left();
        let worth = match () {
            () if left >= all / 2 => 1,
            () if left >= all / 4 => 4,
            () if left >= all / 8 => 16,
            () => 64,
        };
        self.settings.min_run_pages.max(worth)
    }

    fn drop_zeros(&mut self, range: PageRange, counters: &mut Counters) {
        self.yielding.yield_if_due();
        match self.shared_ram.drop_zeros(range) {
            Ok(()) => {
                counters.zero_pages += range.pages();
                self.breaks.dropped(range);
            }
            Err(refusal) => refused(&refusal, range.pages(), counters),
        }
    }

    /// Merges a run of at most [`MAX_RUN_PAGES`]; the halves of it, if a page in it has changed.
    fn merge(&mut self, run: Run, counters: &mut Counters) {
        // Before, not after: the pages are frozen at the beginning of a turn of ours, and hardly
        // ever while others have theirs.
        self.yielding.yield_if_due();
        let pages = u64::from(run.pages);
        let (Some(slab), Some(range)) = (self.slabs.get(&run.slab), run.range()) else {
            return refused(&Refusal::Run, pages, counters);
        };
        match self.shared_ram.merge(range, (slab, run.slab_page)) {
            Ok(()) => {
                counters.merged_pages += pages;
                counters.runs += 1;
                // What was a slab's before, and only moves, is no newer for that.
                for page in range.iter() {
                    if !self.shared.has(page) {
                        counters.shared_now += 1;
                        self.breaks.merged(page);
                        self.shared.insert(page);
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
    pub fn put_together(&mut self, new: u32, old: &[SlabPlace], counters: &mut Counters) -> io::Result<()> {
        let places: HashMap<SlabPlace, SlabPage> = old.iter().copied().zip((0..).map(SlabPage)).collect();
        let numbers = self.numbers();
        let mut found: Vec<Run> = Vec::new();
        for Mapped { inode, slab_page, pages } in self.shared_ram.mapped()? {
            let Some(slab) = numbers.get(&inode) else { continue };
            for (n, page) in (0..).zip(pages.iter()) {
                let place = SlabPlace { slab: *slab, page: slab_page + n };
                if let Some(slab_page) = places.get(&place) {
                    found.push(Run { page, pages: 1, slab: new, slab_page: *slab_page });
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

    /// Finds out which pages are those of slabs: what it counts is exact after that. Returns which
    /// pages of each slab that is known are in use.
    pub fn count(&mut self, counters: &mut Counters) -> io::Result<HashMap<u32, Live>> {
        let numbers = self.numbers();
        let mut live: HashMap<u32, Live> = HashMap::new();
        self.shared.clear();
        for Mapped { inode, slab_page, pages } in self.shared_ram.mapped()? {
            self.shared.insert_range(pages);
            if let Some(slab) = numbers.get(&inode) {
                let live = live.entry(*slab).or_insert_with(|| Live::none(DRAFT_PAGES as u64));
                (0..pages.pages()).for_each(|n| live.insert(slab_page + n));
            }
        }
        counters.shared_now = self.shared.count();
        counters.mappings_now = self.shared_ram.slab_mappings();
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
