//! How making an image reports its progress, and how it is stopped.

use std::io::{self, Read};

/// What the work reports to. Bytes count from 0 in each stage.
pub trait Progress {
    /// A stage begins; `total_bytes` where it is known.
    fn stage(&mut self, what: &str, total_bytes: Option<u64>);
    /// The stage has come this far.
    fn at(&mut self, bytes: u64);
    /// Whether to stop as soon as possible and leave nothing behind.
    fn stopped(&self) -> bool;
}

/// Reports nothing and never stops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn stage(&mut self, _what: &str, _total_bytes: Option<u64>) {}
    fn at(&mut self, _bytes: u64) {}
    fn stopped(&self) -> bool {
        false
    }
}

/// A reader that reports how far it has come, and fails when the work is to stop.
pub(super) struct Watched<'a, R> {
    pub(super) inner: R,
    pub(super) bytes: u64,
    pub(super) progress: &'a mut dyn Progress,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.progress.stopped() {
            return Err(io::Error::other("stopped"));
        }
        let got = self.inner.read(buffer)?;
        self.bytes += got as u64;
        self.progress.at(self.bytes);
        Ok(got)
    }
}
