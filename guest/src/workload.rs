//! Filling, churning, verifying and freeing an array of pages.
//!
//! Every operation goes in steps of a given number of pages, so that the caller can look at its
//! input and its clock between them. [`crate::layout`] determines the content of each page; how
//! often each was written since it was filled is kept here.
//!
//! The pages held of each class are the first ones of its segment: `free` takes from the end.

use core::ops::Range;

use crate::content::{Page, check_page, fill_page};
use crate::in_use::InUse;
use crate::layout::{self, Layout};
use crate::protocol::{Class, Fill, Report, Target};
use crate::tsc;

/// Memory as an array of pages.
pub trait Pages {
    /// How many pages there are.
    fn count(&self) -> u64;

    /// Page `index`, which is below [`Pages::count`]. A page never written or released may hold
    /// anything.
    fn page(&mut self, index: u64) -> &mut Page;

    /// Gives these pages back. They may be asked for again.
    fn release(&mut self, pages: Range<u64>);
}

/// Pages and what they hold.
#[derive(Debug)]
pub struct Workload<'t, P> {
    pages: P,
    /// By page. Meaningful for pages that are held.
    generations: &'t mut [u32],
    filled: Option<Filled>,
    /// By target: the position of churn, in pages of that target.
    cursors: [u64; 5],
    churned: u64,
    verified: u64,
    mismatched: u64,
}

#[derive(Clone, Copy, Debug)]
struct Filled {
    fill: Fill,
    layout: Layout,
    /// By class: how many pages from the start of the segment.
    held: [u64; 4],
    /// While filling: pages written so far.
    done: u64,
    /// Whether the rest is still to be written.
    going_on: bool,
}

/// A `verify` on its way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verify {
    next: u64,
    /// Pages checked so far.
    pub checked: u64,
    /// How many of them were wrong.
    pub mismatched: u64,
    /// The first wrong one.
    pub first: Option<u64>,
}

impl<'t, P: Pages> Workload<'t, P> {
    /// A workload that holds nothing yet. `generations` has room for one entry a page; pages beyond
    /// it are not used.
    pub fn new(pages: P, generations: &'t mut [u32]) -> Self {
        Self { pages, generations, filled: None, cursors: [0; 5], churned: 0, verified: 0, mismatched: 0 }
    }

    /// How many pages a `fill` may ask for.
    pub fn capacity(&self) -> u64 {
        self.pages.count().min(self.generations.len() as u64)
    }

    /// How many pages are held, or will be when the fill that is running is done.
    pub fn total(&self) -> u64 {
        self.filled.map_or(0, |filled| filled.layout.pages())
    }

    /// How many pages of `target` are held.
    pub fn held(&self, target: Target) -> u64 {
        let held = self.filled.map_or([0; 4], |filled| filled.held);
        match target {
            Target::All => held.iter().sum(),
            Target::Only(class) => held[usize::from(class.code())],
        }
    }

    /// The pages held of `class`.
    pub fn held_range(&self, class: Class) -> Range<u64> {
        let start = self.filled.map_or(0, |filled| filled.layout.segment(class).start);
        start..start + self.held(Target::Only(class))
    }

    /// A word of a page that is held. 0 where there is none.
    pub fn read_word(&mut self, page: u64, word: usize) -> u64 {
        match page < self.capacity() {
            true => self.pages.page(page).get(word).copied().unwrap_or(0),
            false => 0,
        }
    }

    /// The memory.
    pub fn pages(&self) -> &P {
        &self.pages
    }

    /// Forgets what is held and begins to fill. False, and nothing done, if there are fewer pages
    /// than asked for.
    pub fn begin_fill(&mut self, fill: Fill) -> bool {
        let pages = fill.pages.unwrap_or(self.capacity());
        if pages > self.capacity() {
            return false;
        }
        let before = self.total();
        if before > pages {
            self.pages.release(pages..before);
        }
        let layout = Layout::new(fill.mix, pages);
        self.filled = Some(Filled { fill, layout, held: [0; 4], done: 0, going_on: true });
        self.cursors = [0; 5];
        true
    }

    /// Fills at most `budget` pages more. Returns how many are filled by now; [`Workload::total`]
    /// says of how many.
    pub fn fill_step(&mut self, budget: u64) -> u64 {
        let Some(filled) = &mut self.filled else { return 0 };
        let end = filled.layout.pages().min(filled.done.saturating_add(budget));
        for page in filled.done..end {
            if let Some(key) = layout::key(&filled.fill, &filled.layout, page, 0) {
                self.generations[page as usize] = 0;
                fill_page(self.pages.page(page), key);
            }
        }
        filled.done = end;
        filled.going_on &= end < filled.layout.pages();
        for class in Class::ALL {
            let segment = filled.layout.segment(class);
            filled.held[usize::from(class.code())] = end.clamp(segment.start, segment.end) - segment.start;
        }
        end
    }

    /// Ends a fill with the pages written so far.
    pub fn stop_fill(&mut self) {
        if let Some(filled) = &mut self.filled {
            filled.going_on = false;
        }
    }

    /// The pages held, or all those to be filled while a fill goes on. The others may be given
    /// away.
    pub fn in_use(&self) -> InUse {
        let Some(filled) = &self.filled else { return InUse::default() };
        if filled.going_on {
            let none = || filled.layout.pages()..filled.layout.pages();
            return InUse::new([0..filled.layout.pages(), none(), none(), none()]);
        }
        InUse::new(Class::ALL.map(|class| {
            let start = filled.layout.segment(class).start;
            start..start + filled.held[usize::from(class.code())]
        }))
    }

    /// A page that is not held, to look at or to write to. None if it is held or there is no such
    /// page.
    pub fn idle_page(&mut self, page: u64) -> Option<&mut Page> {
        let is_idle = page < self.capacity() && self.in_use().range_of(page).is_none();
        is_idle.then(|| self.pages.page(page))
    }

    /// Rewrites `budget` pages of `target`, round-robin, each with its next generation. Each is
    /// checked first: a page that lost a write since the last time counts as mismatched.
    pub fn churn_step(&mut self, target: Target, budget: u64) {
        let held = self.held(target);
        let slot = match target {
            Target::All => 4,
            Target::Only(class) => usize::from(class.code()),
        };
        for _ in 0..budget {
            if self.cursors[slot] >= held {
                self.cursors[slot] = 0;
            }
            let Some(page) = self.held_page(target, self.cursors[slot]) else {
                return;
            };
            self.cursors[slot] += 1;
            if !self.check(page) {
                self.mismatched += 1;
            }
            self.rewrite(page);
        }
    }

    /// Rewrites page number `ordinal` of those held of `target` with its next generation. Returns
    /// how many ticks of the time stamp counter its first store took; None if there is no such
    /// page.
    pub fn timed_rewrite(&mut self, target: Target, ordinal: u64) -> Option<u64> {
        let page = self.held_page(target, ordinal)?;
        let ticks = tsc::time_store(&mut self.pages.page(page)[0]);
        self.rewrite(page);
        Some(ticks)
    }

    /// Checks at most `budget` pages more. True when all are checked.
    pub fn verify_step(&mut self, verify: &mut Verify, budget: u64) -> bool {
        for _ in 0..budget {
            let Some(page) = self.held_page(Target::All, verify.next) else {
                self.verified += 1;
                return true;
            };
            verify.next += 1;
            verify.checked += 1;
            if !self.check(page) {
                verify.mismatched += 1;
                verify.first.get_or_insert(page);
                self.mismatched += 1;
            }
        }
        false
    }

    /// Forgets `percent` of the pages held of each class, rounded down, and gives them back.
    /// Returns how many.
    pub fn free(&mut self, percent: u8) -> u64 {
        let Some(filled) = &mut self.filled else { return 0 };
        let mut freed = 0;
        for class in Class::ALL {
            let start = filled.layout.segment(class).start;
            let held = &mut filled.held[usize::from(class.code())];
            let less = (u128::from(*held) * u128::from(percent.min(100)) / 100) as u64;
            if less > 0 {
                self.pages.release(start + *held - less..start + *held);
            }
            *held -= less;
            freed += less;
        }
        freed
    }

    /// The counts.
    pub fn report(&self) -> Report {
        let mut report = Report {
            filled: self.held(Target::All),
            churned: self.churned,
            verified: self.verified,
            mismatched: self.mismatched,
            ..Report::default()
        };
        let Some(filled) = &self.filled else { return report };
        report.classes = filled.held;
        for class in Class::ALL {
            let start = filled.layout.segment(class).start as usize;
            let end = start + filled.held[usize::from(class.code())] as usize;
            report.generations += self.generations[start..end].iter().copied().map(u64::from).sum::<u64>();
        }
        report
    }

    /// Page number `ordinal` of those held of `target`.
    fn held_page(&self, target: Target, mut ordinal: u64) -> Option<u64> {
        let filled = self.filled.as_ref()?;
        for class in Class::ALL {
            if target != Target::All && target != Target::Only(class) {
                continue;
            }
            let held = filled.held[usize::from(class.code())];
            if ordinal < held {
                return Some(filled.layout.segment(class).start + ordinal);
            }
            ordinal -= held;
        }
        None
    }

    fn check(&mut self, page: u64) -> bool {
        let Some(filled) = &self.filled else { return true };
        let generation = self.generations[page as usize];
        layout::key(&filled.fill, &filled.layout, page, generation)
            .is_none_or(|key| check_page(self.pages.page(page), key))
    }

    fn rewrite(&mut self, page: u64) {
        let Some(filled) = &self.filled else { return };
        let generation = &mut self.generations[page as usize];
        *generation = generation.wrapping_add(1);
        if let Some(key) = layout::key(&filled.fill, &filled.layout, page, *generation) {
            fill_page(self.pages.page(page), key);
            self.churned += 1;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::content::{PAGE_WORDS, identify};
    use crate::protocol::Mix;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::vec;
    use std::vec::Vec;

    /// Pages in a vector, which remembers what was released.
    #[derive(Debug)]
    pub(crate) struct TestPages {
        pages: Vec<Page>,
        released: HashSet<u64>,
    }

    impl TestPages {
        pub(crate) fn new(count: usize) -> Self {
            Self { pages: vec![[0x55; PAGE_WORDS]; count], released: HashSet::new() }
        }
    }

    impl Pages for TestPages {
        fn count(&self) -> u64 {
            self.pages.len() as u64
        }

        fn page(&mut self, index: u64) -> &mut Page {
            self.released.remove(&index);
            &mut self.pages[index as usize]
        }

        fn release(&mut self, pages: Range<u64>) {
            self.released.extend(pages);
        }
    }

    fn fill(pages: Option<u64>) -> Fill {
        Fill { seed: 1, common: 2, mix: Mix::new(30, 30, 20, 20).unwrap(), pages }
    }

    fn verify<P: Pages>(workload: &mut Workload<'_, P>) -> Verify {
        let mut verify = Verify::default();
        while !workload.verify_step(&mut verify, 3) {}
        verify
    }

    proptest! {
        #[test]
        fn whatever_is_done_every_page_held_verifies(
            steps in proptest::collection::vec((0_u8..6, 0_u64..60), 0..20),
            pages in 0_u64..100,
        ) {
            let mut generations = [0; 100];
            let mut workload = Workload::new(TestPages::new(100), &mut generations);
            prop_assert!(workload.begin_fill(fill(Some(pages))));
            while workload.fill_step(7) < pages {}
            let mut churned = 0;
            for (step, amount) in steps {
                let target = Class::from_code(step).map_or(Target::All, Target::Only);
                if step == 5 {
                    let before = workload.held(Target::All);
                    let freed = workload.free(amount as u8);
                    prop_assert_eq!(workload.held(Target::All) + freed, before);
                } else {
                    churned += if workload.held(target) > 0 { amount } else { 0 };
                    workload.churn_step(target, amount);
                }
            }
            let held = workload.held(Target::All);
            let verify = verify(&mut workload);
            prop_assert_eq!((verify.checked, verify.mismatched, verify.first), (held, 0, None));
            let report = workload.report();
            prop_assert_eq!((report.filled, report.mismatched, report.churned), (held, 0, churned));
            prop_assert_eq!(report.classes.iter().sum::<u64>(), held);
            prop_assert!(workload.pages.released.len() as u64 <= pages - held);
        }
    }

    #[test]
    fn a_damaged_page_is_found() {
        let mut generations = [0; 100];
        let mut workload = Workload::new(TestPages::new(100), &mut generations);
        assert!(workload.begin_fill(fill(None)));
        assert_eq!(workload.fill_step(1000), 100);
        workload.pages.pages[40][500] ^= 1;
        workload.pages.pages[70][0] = 0;
        let verify = verify(&mut workload);
        assert_eq!((verify.checked, verify.mismatched, verify.first), (100, 2, Some(40)));
        assert_eq!(workload.report().mismatched, 2);
        // Churn rewrites and so mends them, and counts them as wrong.
        workload.churn_step(Target::All, 100);
        assert_eq!(workload.report().mismatched, 4);
        assert_eq!(workload.report().generations, 100);
    }

    #[test]
    fn pages_identify_themselves() {
        let mut generations = [0; 100];
        let mut workload = Workload::new(TestPages::new(100), &mut generations);
        workload.begin_fill(fill(None));
        workload.fill_step(100);
        workload.churn_step(Target::Only(Class::Zero), 1);
        for (page, content) in workload.pages.pages.iter().enumerate() {
            let key = identify(content).unwrap();
            assert!(check_page(content, key));
            assert_eq!(key.class, Layout::new(fill(None).mix, 100).place(page as u64).unwrap().0);
        }
    }

    #[test]
    fn a_smaller_fill_gives_the_rest_back_and_a_larger_one_is_refused() {
        let mut generations = [0; 90];
        let mut workload = Workload::new(TestPages::new(100), &mut generations);
        assert!(!workload.begin_fill(fill(Some(91))));
        assert!(workload.begin_fill(fill(None)));
        assert_eq!(workload.fill_step(u64::MAX), 90);
        assert!(workload.begin_fill(fill(Some(10))));
        assert_eq!(workload.fill_step(u64::MAX), 10);
        assert_eq!(workload.pages.released.len(), 80);
    }

    #[test]
    fn pages_are_in_use_from_the_begin_of_a_fill_until_they_are_freed() {
        let mut generations = [0; 100];
        let mut workload = Workload::new(TestPages::new(100), &mut generations);
        assert_eq!(workload.in_use().pages(), 0);
        workload.begin_fill(fill(Some(80)));
        assert_eq!((workload.in_use().pages(), workload.in_use().range_of(79)), (80, Some(&(0..80))));
        workload.fill_step(1000);
        assert_eq!(workload.in_use().pages(), 80);
        workload.free(50);
        assert_eq!(workload.in_use().ranges(), [0..12, 24..36, 48..56, 64..72]);
        assert!(workload.idle_page(11).is_none() && workload.idle_page(100).is_none());
        assert!(workload.idle_page(12).is_some());
        workload.begin_fill(fill(Some(80)));
        workload.fill_step(30);
        workload.stop_fill();
        assert_eq!((workload.in_use().pages(), workload.in_use().next_start(0)), (30, 24));
    }

    #[test]
    fn a_fill_cut_short_holds_what_was_written() {
        let mut generations = [0; 100];
        let mut workload = Workload::new(TestPages::new(100), &mut generations);
        workload.begin_fill(fill(None));
        workload.fill_step(45);
        assert_eq!(verify(&mut workload).checked, 45);
        assert_eq!(workload.report().classes, [30, 15, 0, 0]);
    }
}
