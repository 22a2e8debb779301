//! The pages of this process that have frames, by `/proc/self/statm`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Counts the pages of this process that have frames, at a small price that does not depend on
/// their number.
#[derive(Debug)]
pub struct OwnPages(File);

impl OwnPages {
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/statm").map(Self)
    }

    /// All pages that have a frame: not the zero page, nor what is on swap.
    pub fn resident(&self) -> io::Result<u64> {
        self.read().map(|resident| resident.pages)
    }

    /// Pages of anonymous memory that have a frame of this process's, guest RAM and the VMM's own:
    /// not a file's or a slab's, not the zero page, not what is on swap. The kernel counts on each
    /// processor by itself, so it may be some pages off.
    pub fn anonymous(&self) -> io::Result<u64> {
        self.read().map(|resident| resident.pages.saturating_sub(resident.shared))
    }

    fn read(&self) -> io::Result<Resident> {
        let mut text = [0u8; 128];
        let count = self.0.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        // All of it, what is resident, and what of that is a file's.
        let mut fields = text.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
        match (fields.next(), fields.next()) {
            (Some(Ok(resident)), Some(Ok(shared))) => Ok(Resident { pages: resident, shared }),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/self/statm reads {text:?}: expected its second and third field to be numbers"),
            )),
        }
    }
}

/// Pages with a frame, and those of them that are a file's or shared memory's.
struct Resident {
    pages: u64,
    shared: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_BYTES;

    #[test]
    fn pages_that_are_touched_and_given_back_are_seen() {
        const PAGES: u64 = 16 << 10;
        let own = OwnPages::open().unwrap();
        let before = own.anonymous().unwrap();
        let memory = vec![1u8; crate::to_usize(PAGES * PAGE_BYTES)];
        std::hint::black_box(&memory);
        // Other tests of this process have memory, too: far less.
        let touched = own.anonymous().unwrap();
        assert!(touched > before + PAGES / 2, "{before} before, {touched} after");
        assert!(own.resident().unwrap() > PAGES / 2);
        // A piece of this size is a mapping of its own, and goes back to the kernel.
        drop(memory);
        assert!(own.anonymous().unwrap() + PAGES / 2 < touched);
    }
}
