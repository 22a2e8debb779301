//! Finds pages that were written and are quiet now, from the log of writes. What it costs follows
//! what was written, not how much memory there is.

use std::io;
use std::time::Duration;

use memory::PageSet;
use memory::page_set::bits;
use memory::written::WriteLog;

/// A page that was written this many times is left alone for 2 to the power of that many rounds.
const MAX_LEVEL: u8 = 7;
/// A page whose merge was broken soon this many times in a row rests for 2 to the power of that
/// many seconds.
const MAX_REST: u8 = 7;
/// Looks without a write after which a page is trusted a bit more again.
const FORGIVE: u64 = 128;
/// Pages of one huge page, which have their turn together, in words of 64.
const BLOCK_WORDS: u64 = 8;
/// Rounds over which the first watch of all pages is spread.
const SPREAD: u64 = 4;

/// See the module's description.
///
/// Every page is looked at once. To see writes to it after that, it is *watched*: marked clean in
/// the log, which costs the guest one fault at its next write to it. A watched page that is still
/// clean at the next look is *quiet*. One that was written is watched again later. As long as it is
/// not watched it costs the guest nothing.
///
/// *How much later.* After a page was written n times, 2 to the power of n rounds later: so one
/// that was read from a disk into two guests is found at once, however long it took to arrive. A
/// page whose merge was broken soon ([`super::breaks`]) *rests* instead, by the clock: after n
/// times in a row until the next second that is a multiple of 2 to the power of n. So within T
/// seconds it is merged again at most log2(T + 2) times, and from the 7th time on once in 128 s;
/// never is it given up. It is trusted a step more for each 5 s for which a merge has lasted.
///
/// *Memory:* 1 byte and 6 bits for each page.
pub struct Watcher {
    log: Box<dyn WriteLog>,
    /// What the log says. A page that is not watched counts as written.
    written: PageSet,
    watched: PageSet,
    /// Watched pages that were written since the last look.
    hit: PageSet,
    /// Pages that are watched since the last look.
    new: PageSet,
    quiet: PageSet,
    /// Pages that rest.
    resting: PageSet,
    /// Of each page how often it was written lately, or, of one that rests, how often its merge was
    /// broken soon.
    levels: Vec<u8>,
    looks: u64,
    /// Rounds that are over, in which every page was watched whose turn it was.
    rounds: u64,
    round: Round,
}

/// How far the round has come that is under way.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// The word that is next.
    next: usize,
    /// The seconds at which the one before it and this one began.
    seconds: (u64, u64),
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
        let set = || PageSet::none(pages);
        Self {
            log,
            written: PageSet::default(),
            watched: set(),
            hit: set(),
            new: set(),
            quiet: set(),
            resting: set(),
            levels: vec![0; pages as usize],
            looks: 0,
            rounds: 0,
            round: Round::default(),
        }
    }

    /// From now on writes are seen. The first look finds every page quiet, and then all are watched
    /// bit by bit.
    pub fn start(&mut self) -> io::Result<()> {
        (self.looks, self.rounds, self.round.next) = (0, 0, 0);
        self.watched.clear();
        self.new.clear();
        self.log.stop()?;
        self.log.start()
    }

    /// Sees no more, and costs the guest nothing more.
    pub fn stop(&mut self) -> io::Result<()> {
        self.log.stop()
    }

    /// Looks what was written since the last look. The quiet pages are in [`Self::quiet`] until the
    /// next one, those that were written in [`Self::hit`]: of these [`Self::blame`] wants to know
    /// which were merged.
    pub fn look(&mut self) -> io::Result<Look> {
        let mut look = Look::default();
        self.log.read(&mut self.written)?;
        if self.looks == 0 {
            self.quiet.clone_from(&self.written);
            self.hit.clear();
            look.quiet = self.quiet.count();
        } else {
            let watched = self.watched.words_mut().iter_mut().zip(self.new.words());
            let found = self.hit.words_mut().iter_mut().zip(self.quiet.words_mut());
            for ((written, (watched, new)), (hit, quiet)) in
                self.written.words().iter().zip(watched).zip(found)
            {
                *hit = *watched & written;
                *quiet = new & !written;
                look.quiet += u64::from(quiet.count_ones());
                look.changed += u64::from((new & written).count_ones());
                *watched &= !written;
            }
        }
        self.looks += 1;
        if self.looks.is_multiple_of(FORGIVE) {
            self.forgive();
        }
        self.new.clear();
        Ok(look)
    }

    /// Has pages wait that were written: of those found at this look or before, these were merged
    /// and broken `soon`, and these `late`.
    pub fn blame(&mut self, (soon, late): (&PageSet, &PageSet)) {
        let resting = self.resting.words_mut();
        for (n, (soon, late)) in soon.words().iter().zip(late.words()).enumerate() {
            let Some(hit) = self.hit.words().get(n).copied().filter(|hit| hit | soon != 0) else { continue };
            // One that rests and was written before it could be merged changes as much as ever.
            let rests = soon | hit & resting[n] & !late;
            for (bit, level) in (0u64..64).zip(&mut self.levels[n * 64..]) {
                match (rests >> bit & 1 != 0, resting[n] >> bit & 1 != 0) {
                    (true, true) => *level = (*level + 1).min(MAX_REST),
                    (true, false) => {
                        resting[n] |= 1 << bit;
                        *level = 1;
                    }
                    (false, false) if hit >> bit & 1 != 0 => *level = (*level + 1).min(MAX_LEVEL),
                    (false, _) => {}
                }
            }
        }
    }

    /// Trusts those pages of word `n` a step more whose merge has `lasted`.
    pub fn trust(&mut self, n: usize, lasted: u64) {
        let Some(resting) = self.resting.words_mut().get_mut(n).filter(|resting| **resting & lasted != 0)
        else {
            return;
        };
        for (bit, level) in (0u64..64).zip(&mut self.levels[n * 64..]) {
            if *resting & lasted & 1 << bit != 0 {
                *level = level.saturating_sub(1);
                if *level == 0 {
                    *resting &= !(1 << bit);
                }
            }
        }
    }

    /// Watches the pages whose turn it is, about `most` at a time: the rest of the round follows
    /// the next time. It is so late by any clock that never goes back. `between` is called between
    /// two parts of the work.
    pub fn watch(&mut self, now: Duration, most: u64, between: &mut dyn FnMut()) -> io::Result<()> {
        if most == 0 {
            return Ok(());
        }
        if self.round.next == 0 {
            self.round.seconds = (self.round.seconds.1, now.as_secs());
        }
        let mut watched = 0;
        let words = self.written.words().len();
        while self.round.next < words && watched < most {
            let due = self.due(self.round.next);
            self.new.words_mut()[self.round.next] = due;
            self.watched.words_mut()[self.round.next] |= due;
            watched += u64::from(due.count_ones());
            self.round.next += 1;
        }
        if self.round.next >= words {
            self.rounds += 1;
            self.round.next = 0;
        }
        if watched > 0 { self.log.clear_in_parts(&self.new, between) } else { Ok(()) }
    }

    /// The pages of word `n` whose turn it is in this round.
    fn due(&self, n: usize) -> u64 {
        let (written, resting) = (self.written.words()[n], self.resting.words()[n]);
        let candidates = (written | resting) & !self.watched.words()[n];
        let (at, words) = (n as u64, self.written.words().len().max(1) as u64);
        // At first a part of memory at a time.
        if candidates == 0 || self.rounds < SPREAD && at * SPREAD / words != self.rounds {
            return 0;
        }
        // Turns are spread, so that no look has all of them; but not within a block: what lies
        // together is to be offered together, else guests that do the same at the same time publish
        // every other page each.
        let block = at / BLOCK_WORDS;
        let (before, now) = (self.round.seconds.0 + block, self.round.seconds.1 + block);
        let mut due = 0;
        for (bit, level) in (0u64..64).zip(&self.levels[n * 64..]) {
            let is_due = match resting >> bit & 1 != 0 {
                true => before >> level != now >> level,
                false => (self.rounds + block).is_multiple_of(1 << level),
            };
            due |= u64::from(is_due) << bit;
        }
        due & candidates
    }

    fn forgive(&mut self) {
        for (n, (watched, resting)) in self.watched.words().iter().zip(self.resting.words()).enumerate() {
            for bit in bits(watched & !resting) {
                let level = &mut self.levels[n * 64 + bit as usize];
                *level = level.saturating_sub(1);
            }
        }
    }

    /// The pages that were quiet at the last look.
    pub fn quiet(&self) -> &PageSet {
        &self.quiet
    }

    /// Whether every page has had its turn.
    pub fn watches_all(&self) -> bool {
        self.rounds >= SPREAD
    }

    /// The watched pages that had been written at the last look.
    pub fn hit(&self) -> &PageSet {
        &self.hit
    }
}

#[cfg(test)]
mod tests;
