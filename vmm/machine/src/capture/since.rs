//! What a guest has written since its capture began.

use std::io;

use memory::PageSet;
use memory::ram::Ram;
use memory::written::WriteLog;

use crate::dirty::{DirtyLog, Reader};

/// From some instant on. While there is one KVM logs writes; the guest pays for its first to each
/// page.
pub(super) struct Since {
    log: DirtyLog,
    ram: Ram,
    discards: u64,
}

impl Since {
    /// From now on.
    pub(super) fn begin(log: &DirtyLog, ram: &Ram) -> io::Result<Self> {
        let mut since =
            Self { log: log.seen_by(Reader::Capture), ram: ram.clone(), discards: ram.discards() };
        since.log.start()?;
        since.log.clear(&PageSet::all(ram.pages().pages()))?;
        Ok(since)
    }

    /// Pages that may have been written, of a VM that stands still. None where that is not known:
    /// pages were given back, which no write log tells, or the log has failed.
    pub(super) fn written(&mut self) -> Option<PageSet> {
        let mut written = PageSet::default();
        self.log.read(&mut written).ok()?;
        (self.ram.discards() == self.discards).then_some(written)
    }
}

impl Drop for Since {
    fn drop(&mut self) {
        // What fails is a VM that has ended.
        let _ = self.log.stop();
    }
}
