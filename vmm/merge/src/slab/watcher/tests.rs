//! What is found and when, with a log and a clock that a test sets.

use std::sync::{Arc, Mutex};

use super::*;
use memory::PageNo;

/// A log that a test writes, and the pages that were cleared.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<PageSet>>);

impl Log {
    fn write(&self, pages: impl IntoIterator<Item = u64>) {
        pages.into_iter().for_each(|page| self.0.lock().unwrap().insert(PageNo(page)));
    }
}

impl WriteLog for Log {
    fn start(&mut self) -> io::Result<()> {
        *self.0.lock().unwrap() = PageSet::all(128);
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn read(&mut self, written: &mut PageSet) -> io::Result<()> {
        written.clone_from(&self.0.lock().unwrap());
        Ok(())
    }

    fn clear_in_parts(&mut self, pages: &PageSet, _: &mut dyn FnMut()) -> io::Result<()> {
        self.0.lock().unwrap().subtract(pages);
        Ok(())
    }
}

fn started() -> (Log, Watcher) {
    let log = Log::default();
    let mut watcher = Watcher::new(Box::new(log.clone()), 128);
    watcher.start().unwrap();
    (log, watcher)
}

impl Watcher {
    /// A look at memory of which nothing is merged.
    fn next(&mut self, more: bool) -> Look {
        self.next_at(Duration::ZERO, &[], more)
    }

    /// A look so late, at memory of which these pages were merged, and broken soon.
    fn next_at(&mut self, now: Duration, soon: &[u64], more: bool) -> Look {
        let look = self.look().unwrap();
        self.blame((&set(soon), &set(&[])));
        if more {
            self.watch(now, u64::MAX, &mut || {}).unwrap();
        }
        look
    }
}

fn set(pages: &[u64]) -> PageSet {
    let mut set = PageSet::none(128);
    pages.iter().for_each(|page| set.insert(PageNo(*page)));
    set
}

/// Looks until all pages are watched.
fn settled(watcher: &mut Watcher) -> u64 {
    (0..=SPREAD).map(|_| watcher.next(true).quiet).sum()
}

#[test]
fn all_pages_are_looked_at_and_then_those_that_were_written() {
    let (log, mut watcher) = started();
    assert_eq!(watcher.next(false), Look { quiet: 128, changed: 0 });
    assert_eq!(watcher.next(false), Look::default(), "nothing is watched in the middle of merging");
    assert_eq!(settled(&mut watcher), 128, "what changed before it was watched is found");
    assert_eq!(watcher.next(true), Look::default());
    log.write([70, 71]);
    let looks: Vec<_> = (0..4).map(|_| watcher.next(true)).collect();
    assert_eq!(looks.iter().map(|look| look.quiet).sum::<u64>(), 2);
    assert!(!watcher.hit().has(PageNo(70)));
    log.write([70]);
    watcher.next(true);
    assert!(watcher.hit().has(PageNo(70)) && watcher.hit().count() == 1);
}

#[test]
fn what_was_written_together_is_found_together() {
    let (log, mut watcher) = started();
    settled(&mut watcher);
    for _ in 0..3 {
        log.write(0..128);
        let quiet: Vec<u64> =
            (0..2 << MAX_LEVEL).map(|_| watcher.next(true).quiet).filter(|n| *n > 0).collect();
        assert_eq!(quiet, [128]);
    }
}

#[test]
fn a_page_that_keeps_changing_is_watched_less_and_less() {
    let (log, mut watcher) = started();
    settled(&mut watcher);
    let mut hits = 0;
    for _ in 0..1000 {
        log.write([9]);
        watcher.next(true);
        hits += u32::from(watcher.hit().has(PageNo(9)));
    }
    assert!((7..20).contains(&hits), "{hits}");
    // And then it rests, and is found.
    let quiet: u64 = (0..2 << MAX_LEVEL).map(|_| watcher.next(true).quiet).sum();
    assert_eq!(quiet, 1);
}

#[test]
fn what_changes_while_it_is_hashed_is_hashed_again() {
    let (log, mut watcher) = started();
    settled(&mut watcher);
    log.write([5]);
    let mut found = 0;
    for _ in 0..100 {
        let look = watcher.next(true);
        if look.quiet > 0 {
            found += 1;
            // Now, when it is being hashed.
            if found == 1 {
                log.write([5]);
            }
        }
    }
    assert_eq!(found, 2);
}

/// A guest that writes to page 9 every `period` looks, 50 ms apart, for `seconds`; the page is
/// merged once it is quiet. Returns when it was merged, in milliseconds.
fn storm(watcher: &mut Watcher, log: &Log, period: u64, seconds: u64) -> Vec<u64> {
    const LOOK: u64 = 50;
    let (mut merges, mut is_merged) = (Vec::new(), true);
    for n in 0..seconds * 1000 / LOOK {
        let now = Duration::from_millis(n * LOOK);
        if n % period == 0 {
            log.write([9]);
        }
        watcher.look().unwrap();
        let broken = is_merged && watcher.hit().has(PageNo(9));
        let soon = if broken { set(&[9]) } else { set(&[]) };
        watcher.blame((&soon, &set(&[])));
        is_merged &= !broken;
        if watcher.quiet().has(PageNo(9)) {
            is_merged = true;
            merges.push(now.as_millis() as u64);
        }
        watcher.watch(now, u64::MAX, &mut || {}).unwrap();
    }
    merges
}

#[test]
fn a_page_whose_merges_break_soon_is_merged_ever_less_but_never_given_up() {
    for period in [3, 7, 20, 60] {
        let (log, mut watcher) = started();
        settled(&mut watcher);
        let merges = storm(&mut watcher, &log, period, 1000);
        for seconds in [1, 2, 10, 60, 250] {
            let bound = ((seconds + 2) as f64).log2();
            let count = merges.iter().filter(|at| **at <= seconds * 1000).count();
            assert!(count as f64 <= bound, "{count} in {seconds} s: {merges:?}");
        }
        // Once in 128 s after that, for ever; where it is written more often than looked at, it may
        // have bad luck.
        let late = merges.iter().filter(|at| **at > 250_000).count();
        assert!(late <= 6 && (period < 7 || late >= 4), "{merges:?}");
        // The storm is over: it is found.
        for second in 2000..2300 {
            watcher.next_at(Duration::from_secs(second), &[], true);
        }
        assert!(watcher.watched.has(PageNo(9)), "{merges:?}");
    }
}

#[test]
fn a_page_is_trusted_again_once_its_merges_last() {
    let (log, mut watcher) = started();
    settled(&mut watcher);
    storm(&mut watcher, &log, 20, 100);
    assert!(watcher.resting.has(PageNo(9)) && watcher.levels[9] >= 4);
    for _ in 0..MAX_REST {
        watcher.trust(0, 1 << 9 | 1 << 5);
    }
    assert!(!watcher.resting.has(PageNo(9)));
    assert_eq!((watcher.levels[9], watcher.levels[5]), (0, 0));
    // And one that is broken late, after that, is found at once.
    log.write([9]);
    watcher.look().unwrap();
    watcher.blame((&set(&[]), &set(&[9])));
    watcher.watch(Duration::from_secs(500), u64::MAX, &mut || {}).unwrap();
    let quiet: u64 = (0..4).map(|_| watcher.next_at(Duration::from_secs(500), &[], true).quiet).sum();
    assert_eq!(quiet, 1);
}

#[test]
fn what_was_broken_before_it_was_watched_rests_too() {
    let (_log, mut watcher) = started();
    watcher.next(false);
    // It was found private, and so broken, when it was quiet: it is watched now, and rests the next
    // time.
    watcher.next_at(Duration::ZERO, &[7], true);
    assert!(watcher.resting.has(PageNo(7)) && watcher.levels[7] == 1);
}

#[test]
fn with_little_credit_a_round_takes_many_looks_and_every_page_has_its_turn() {
    let (log, mut watcher) = started();
    settled(&mut watcher);
    log.write(0..128);
    let (mut most, mut found) = (0, 0);
    for n in 0..20 {
        watcher.look().unwrap();
        watcher.blame((&set(&[]), &set(&[])));
        found += watcher.quiet().count();
        watcher.watch(Duration::from_millis(n), 10, &mut || {}).unwrap();
        most = most.max(watcher.new.count());
    }
    assert_eq!(found, 128);
    assert!(most <= 64, "a word is not divided: {most}");
    watcher.watch(Duration::from_secs(1), 0, &mut || {}).unwrap();
    assert_eq!(watcher.new.count(), 0, "none is none");
}
