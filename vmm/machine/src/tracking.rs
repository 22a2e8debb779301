//! Which pages a snapshot of what has changed since the last one is to have.

use std::io;
use std::sync::{Arc, Mutex};

use memory::PageSet;
use memory::ram::Ram;
use memory::written::WriteLog;

use crate::dirty::{DirtyLog, Reader};

/// Pages that were written, or given back, since the last snapshot, if that is tracked. Clones are
/// the same.
#[derive(Clone, Default)]
pub struct Tracking(Option<Arc<Mutex<Changes>>>);

struct Changes {
    log: DirtyLog,
    ram: Ram,
    /// Whether there is a file that has the rest: the last snapshot's, or the one that was loaded.
    has_base: bool,
}

impl Tracking {
    /// From now on. Of what `is_loaded` nothing has changed yet; otherwise everything counts as
    /// changed.
    pub fn start(log: &DirtyLog, ram: &Ram, is_loaded: bool) -> io::Result<Self> {
        let mut log = log.seen_by(Reader::Snapshots);
        log.start()?;
        ram.discard_log().start(ram.pages().pages());
        let mut changes = Changes { log, ram: ram.clone(), has_base: false };
        if is_loaded {
            changes.forget()?;
        }
        Ok(Self(Some(Arc::new(Mutex::new(changes)))))
    }

    /// Pages that have changed since the last snapshot, and whether there is one; None if that is
    /// not tracked.
    pub fn changed(&self) -> io::Result<Option<(PageSet, bool)>> {
        let Some(changes) = &self.0 else { return Ok(None) };
        let mut changes = os::lock(changes);
        Ok(Some((changes.pages()?, changes.has_base)))
    }

    /// A snapshot has all of them. The VM has stood still since they were read.
    pub fn forget(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |changes| os::lock(changes).forget())
    }
}

impl Changes {
    fn pages(&mut self) -> io::Result<PageSet> {
        let mut pages = PageSet::default();
        self.log.read(&mut pages)?;
        self.ram.discard_log().read_into(&mut pages);
        Ok(pages)
    }

    fn forget(&mut self) -> io::Result<()> {
        let mut pages = PageSet::default();
        // Also takes over what devices have marked until now.
        self.log.read(&mut pages)?;
        self.log.clear(&pages)?;
        self.ram.discard_log().clear();
        self.has_base = true;
        Ok(())
    }
}
