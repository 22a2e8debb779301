//! Finds pages that were written and are quiet now, from the log of writes. What it costs follows what was written, not how much
//! memory there is.

use std::io;

use crate::memory::written::WriteLog;

/// A page that was written in each of so many looks is left alone for 2 to the power of that many.
const MAX_LEVEL: u8 = 7;

/// See the module's description.
///
/// A page that was written is marked clean in the log, which costs the guest one fault at its next write; if it is still clean at the next
/// look, it is quiet. One that is not is marked clean less and less often. As long as it is not marked it costs the guest nothing.
///
/// *Memory:* 1 byte and 4 bits for each page.
pub struct Watcher {
    log: Box<dyn WriteLog>,
    written: Vec<u64>,
    /// Pages that were marked clean at the last look.
    pending: Vec<u64>,
    /// Pages that have been quiet since.
    quiet: Vec<u64>,
    /// Of each page how often in a row it was not.
    levels: Vec<u8>,
    looks: u64,
}

/// What a look has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Pages that are quiet.
    pub quiet: u64,
    /// Pages that were written again.
    pub changed: u64,
}

impl Watcher {
    /// Watches `pages` pages by way of `log`, once it has been started.
    pub fn new(log: Box<dyn WriteLog>, pages: u64) -> Self {
        let set = || vec![0; pages.div_ceil(64) as usize];
        let levels = vec![0; pages as usize];
        Self { log, written: Vec::new(), pending: set(), quiet: set(), levels, looks: 0 }
    }

    /// From now on writes are seen. Every page counts as written.
    pub fn start(&mut self) -> io::Result<()> {
        self.pending.fill(0);
        self.log.stop()?;
        self.log.start()
    }

    /// Sees no more, and costs the guest nothing more.
    pub fn stop(&mut self) -> io::Result<()> {
        self.log.stop()
    }

    /// Looks what was written since the last look. The quiet pages are in [`Self::quiet`] until the next one.
    pub fn look(&mut self) -> io::Result<Look> {
        let mut look = Look::default();
        self.looks += 1;
        self.log.read(&mut self.written)?;
        let sets = self.pending.iter_mut().zip(&mut self.quiet);
        for (n, (written, (pending, quiet))) in (0u64..).zip(self.written.iter().zip(sets)) {
            *quiet = *pending & !written;
            let again = *pending & written;
            look.quiet += u64::from(quiet.count_ones());
            look.changed += u64::from(again.count_ones());
            *pending = 0;
            if *written | *quiet == 0 {
                continue;
            }
            let Some(levels) = self.levels.get_mut((n * 64) as usize..) else { continue };
            for (bit, level) in (0u64..64).zip(levels) {
                if in_set(again, bit) {
                    *level = (*level + 1).min(MAX_LEVEL);
                } else if in_set(*quiet, bit) {
                    *level = level.saturating_sub(1);
                }
                // Their turns are spread, so that no look has all of them.
                let turn = (self.looks + bit).is_multiple_of(1 << *level);
                if turn && in_set(*written, bit) {
                    *pending |= 1 << bit;
                }
            }
        }
        if self.pending.iter().any(|word| *word != 0) {
            self.log.clear(&self.pending)?;
        }
        Ok(look)
    }

    /// The pages that were quiet at the last look.
    pub fn quiet(&self) -> &[u64] {
        &self.quiet
    }

    /// The pages that had been written at the last look.
    pub fn written(&self) -> &[u64] {
        &self.written
    }
}

fn in_set(set: u64, bit: u64) -> bool {
    set >> bit & 1 != 0
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::bits;
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

    #[test]
    fn all_pages_are_quiet_once_and_then_those_that_were_written() {
        let (log, mut watcher) = started();
        assert_eq!(watcher.look().unwrap(), Look::default());
        log.write([3]);
        assert_eq!(watcher.look().unwrap(), Look { quiet: 127, changed: 1 });
        assert!(!bits::has(watcher.quiet(), 3) && bits::has(watcher.quiet(), 127));
        let quiet: u64 = (0..4).map(|_| watcher.look().unwrap().quiet).sum();
        assert_eq!(quiet, 1, "the one that was written");
        log.write([70, 71]);
        assert_eq!(watcher.look().unwrap(), Look::default());
        assert_eq!(watcher.look().unwrap(), Look { quiet: 2, changed: 0 });
    }

    #[test]
    fn a_page_that_keeps_changing_is_looked_at_less_and_less() {
        let (log, mut watcher) = started();
        let mut marked = 0;
        for _ in 0..1000 {
            log.write([9]);
            watcher.look().unwrap();
            marked += u32::from(bits::has(&watcher.pending, 9));
        }
        assert!((8..30).contains(&marked), "{marked}");
        // And then it rests.
        let rest = (0..2 * (1 << MAX_LEVEL)).any(|_| watcher.look().unwrap().quiet > 0);
        assert!(rest);
    }
}
