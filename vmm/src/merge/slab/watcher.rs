//! Finds pages that were written and are quiet now, from the log of writes. What it costs follows what was written, not how much
//! memory there is.

use std::io;

use super::bits;
use crate::memory::written::WriteLog;

/// A page that was written so many times is left alone for 2 to the power of that many looks.
const MAX_LEVEL: u8 = 7;
/// Looks after which pages that have not been written for so long are trusted a bit more again.
const FORGIVE: u64 = 128;
/// Pages of one huge page, which have their turn together, in words of 64.
const BLOCK_WORDS: u64 = 8;
/// Looks over which the first watch of all pages is spread.
const SPREAD: u64 = 4;

/// See the module's description.
///
/// Every page is looked at once. To see writes to it after that, it is *watched*: marked clean in the log, which costs the guest one fault at its
/// next write to it. A watched page that is still clean at the next look is *quiet*. One that was written is watched again later: after it was
/// written n times, 2 to the power of n looks later. As long as it is not watched it costs the guest nothing.
///
/// *Memory:* 1 byte and 5 bits for each page.
pub struct Watcher {
    log: Box<dyn WriteLog>,
    /// What the log says. A page that is not watched counts as written.
    written: Vec<u64>,
    watched: Vec<u64>,
    /// Watched pages that were written since the last look.
    hit: Vec<u64>,
    /// Pages that are watched since the last look.
    new: Vec<u64>,
    quiet: Vec<u64>,
    /// Of each page how often it was written lately.
    levels: Vec<u8>,
    looks: u64,
    /// Looks at which more pages could be watched.
    turns: u64,
}

/// What a look has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Pages that are quiet.
    pub quiet: u64,
    /// Pages that were written before they were quiet.
    pub changed: u64,
}

impl Watcher {
    /// Watches `pages` pages by way of `log`, once it has been started.
    pub fn new(log: Box<dyn WriteLog>, pages: u64) -> Self {
        let set = || bits::none(pages);
        let levels = vec![0; pages as usize];
        let written = Vec::new();
        Self {
            log,
            written,
            watched: set(),
            hit: set(),
            new: set(),
            quiet: set(),
            levels,
            looks: 0,
            turns: 0,
        }
    }

    /// From now on writes are seen. The first look finds every page quiet, and then all are watched bit by bit.
    pub fn start(&mut self) -> io::Result<()> {
        (self.looks, self.turns) = (0, 0);
        self.watched.fill(0);
        self.new.fill(0);
        self.log.stop()?;
        self.log.start()
    }

    /// Sees no more, and costs the guest nothing more.
    pub fn stop(&mut self) -> io::Result<()> {
        self.log.stop()
    }

    /// Looks what was written since the last look. The quiet pages are in [`Self::quiet`] until the next one. With `more`, pages are watched
    /// whose turn it is: not in the middle of merging, when the guest waits for enough other things.
    pub fn look(&mut self, more: bool) -> io::Result<Look> {
        let mut look = Look::default();
        self.log.read(&mut self.written)?;
        if self.looks == 0 {
            self.quiet.clone_from(&self.written);
            look.quiet = bits::count(&self.quiet);
        } else {
            for (n, written) in self.written.iter().enumerate() {
                self.hit[n] = self.watched[n] & written;
                self.quiet[n] = self.new[n] & !written;
                look.quiet += u64::from(self.quiet[n].count_ones());
                look.changed += u64::from((self.new[n] & written).count_ones());
                self.watched[n] &= !written;
            }
        }
        for page in bits::each(&self.hit) {
            let level = &mut self.levels[page as usize];
            *level = (*level + 1).min(MAX_LEVEL);
        }
        self.looks += 1;
        if self.looks.is_multiple_of(FORGIVE) {
            self.forgive();
        }
        self.new.fill(0);
        if more {
            self.watch_more()?;
        }
        Ok(look)
    }

    /// Watches the pages whose turn it is.
    fn watch_more(&mut self) -> io::Result<()> {
        let mut any = false;
        let blocks = self.written.len().max(1) as u64;
        for (n, written) in (0u64..).zip(&self.written) {
            // At first a part of memory at a time.
            if *written == 0 || self.turns < SPREAD && n * SPREAD / blocks != self.turns {
                continue;
            }
            for (bit, level) in (0u64..64).zip(&self.levels[(n * 64) as usize..]) {
                // Turns are spread, so that no look has all of them; but not within a block: what lies together is to be
                // offered together, else guests that do the same at the same time publish every other page each.
                if written >> bit & 1 != 0 && (self.turns + n / BLOCK_WORDS).is_multiple_of(1 << *level) {
                    self.new[n as usize] |= 1 << bit;
                }
            }
            any |= self.new[n as usize] != 0;
            self.watched[n as usize] |= self.new[n as usize];
        }
        self.turns += 1;
        if any { self.log.clear(&self.new) } else { Ok(()) }
    }

    fn forgive(&mut self) {
        for page in bits::each(&self.watched) {
            let level = &mut self.levels[page as usize];
            *level = level.saturating_sub(1);
        }
    }

    /// The pages that were quiet at the last look.
    pub fn quiet(&self) -> &[u64] {
        &self.quiet
    }

    /// Whether every page has had its turn.
    pub fn watches_all(&self) -> bool {
        self.turns >= SPREAD
    }

    /// The watched pages that had been written at the last look.
    pub fn hit(&self) -> &[u64] {
        &self.hit
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A log that a test writes, and the pages it was told to clear.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u64>>>);

    impl Log {
        fn write(&self, pages: impl IntoIterator<Item = u64>) {
            pages.into_iter().for_each(|page| bits::put(&mut self.0.lock().unwrap(), page, true));
        }
    }

    impl WriteLog for Log {
        fn start(&mut self) -> io::Result<()> {
            *self.0.lock().unwrap() = vec![u64::MAX; 2];
            Ok(())
        }

        fn stop(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn read(&mut self, written: &mut Vec<u64>) -> io::Result<()> {
            written.clone_from(&self.0.lock().unwrap());
            Ok(())
        }

        fn clear(&mut self, pages: &[u64]) -> io::Result<()> {
            self.0.lock().unwrap().iter_mut().zip(pages).for_each(|(log, clear)| *log &= !clear);
            Ok(())
        }
    }

    fn started() -> (Log, Watcher) {
        let log = Log::default();
        let mut watcher = Watcher::new(Box::new(log.clone()), 128);
        watcher.start().unwrap();
        (log, watcher)
    }

    /// Looks until all pages are watched.
    fn settled(watcher: &mut Watcher) -> u64 {
        (0..=SPREAD).map(|_| watcher.look(true).unwrap().quiet).sum()
    }

    #[test]
    fn all_pages_are_looked_at_and_then_those_that_were_written() {
        let (log, mut watcher) = started();
        assert_eq!(watcher.look(false).unwrap(), Look { quiet: 128, changed: 0 });
        assert_eq!(
            watcher.look(false).unwrap(),
            Look::default(),
            "nothing is watched in the middle of merging"
        );
        assert_eq!(settled(&mut watcher), 128, "what changed before it was watched is found");
        assert_eq!(watcher.look(true).unwrap(), Look::default());
        log.write([70, 71]);
        let looks: Vec<_> = (0..4).map(|_| watcher.look(true).unwrap()).collect();
        assert_eq!(looks.iter().map(|look| look.quiet).sum::<u64>(), 2);
        assert!(!bits::has(watcher.hit(), 70));
        log.write([70]);
        watcher.look(true).unwrap();
        assert!(bits::has(watcher.hit(), 70) && bits::count(watcher.hit()) == 1);
    }

    #[test]
    fn what_was_written_together_is_found_together() {
        let (log, mut watcher) = started();
        settled(&mut watcher);
        for _ in 0..3 {
            log.write(0..128);
            let quiet: Vec<u64> =
                (0..2 << MAX_LEVEL).map(|_| watcher.look(true).unwrap().quiet).filter(|n| *n > 0).collect();
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
            watcher.look(true).unwrap();
            hits += u32::from(bits::has(watcher.hit(), 9));
        }
        assert!((7..20).contains(&hits), "{hits}");
        // And then it rests, and is found.
        let quiet: u64 = (0..2 << MAX_LEVEL).map(|_| watcher.look(true).unwrap().quiet).sum();
        assert_eq!(quiet, 1);
    }

    #[test]
    fn what_changes_while_it_is_hashed_is_hashed_again() {
        let (log, mut watcher) = started();
        settled(&mut watcher);
        log.write([5]);
        let mut found = 0;
        for _ in 0..100 {
            let look = watcher.look(true).unwrap();
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
}
