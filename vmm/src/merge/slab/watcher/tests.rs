//! What is found and when, with a log and a clock that a test sets.

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
