//! This process's own memory: how much of it is there, whom the kernel ends first when there is none left, and the program's code.
#![expect(unsafe_code, reason = "asks the linker where the code lies, and advises the kernel about it")]

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;

use super::PAGE;

/// What [`set_oom_score_adj`] takes.
pub const OOM_SCORE_ADJ: RangeInclusive<i16> = -1000..=1000;

/// Sets how much sooner (up to 1000) or later (down to -1000, which is never) than by its size alone the kernel's out-of-memory
/// killer takes this process. Processes that it starts begin with the same. Up is for everybody; further down than it ever was set needs
/// CAP_SYS_RESOURCE.
pub fn set_oom_score_adj(score: i16) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
}

/// Counts the pages of this process that have frames, at the same small price however many there are.
#[derive(Debug)]
pub struct OwnPages(File);

impl OwnPages {
    /// Opens `/proc/self/statm`.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/statm").map(Self)
    }

    /// Pages of anonymous memory that have a frame of this process's, guest RAM and the VMM's own: neither a file's or a slab's, nor the
    /// kernel's one of zeros, nor what is on swap. The kernel counts on each processor by itself, so it may be some pages off.
    pub fn anonymous(&self) -> io::Result<u64> {
        let mut text = [0u8; 128];
        let count = self.0.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        // All of it, what is resident, and what of that is a file's.
        let mut fields = text.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
        match (fields.next(), fields.next()) {
            (Some(Ok(resident)), Some(Ok(shared))) => Ok(resident.saturating_sub(shared)),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/self/statm reads {text:?}: expected its second and third field to be numbers"),
            )),
        }
    }
}

unsafe extern "C" {
    /// First byte of the program's image.
    static __executable_start: u8;
    /// First byte after its code.
    static etext: u8;
}

/// Lets go of the pages of code and constants that are mapped now: most served the start, and what is needed
/// again comes back from the page cache at the price of a minor fault. A VM process so keeps about a megabyte
/// less mapped than it started with.
pub fn release_startup_code() {
    let first = &raw const __executable_start;
    let to_page = first.addr().next_multiple_of(PAGE) - first.addr();
    let code = (&raw const etext).addr().saturating_sub(first.addr() + to_page) / PAGE * PAGE;
    if code > 0 {
        // SAFETY: between these two symbols lie only segments that are never written (relocated data comes after
        // the code), so every page is refilled with the same bytes from the file. Failure changes nothing.
        unsafe { libc::madvise(first.wrapping_add(to_page).cast_mut().cast(), code, libc::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{Backing, Ram};
    use crate::{Gpa, PAGE_BYTES};
    use devices::reclaim::Reclaim;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn pages_that_are_touched_and_given_back_are_seen() {
        const PAGES: u64 = 16 << 10;
        let (ram, own) =
            (Ram::new(PAGES * PAGE_BYTES, Backing::Anonymous).unwrap(), OwnPages::open().unwrap());
        let before = own.anonymous().unwrap();
        for page in 0..PAGES {
            ram.memory().write_obj(1u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        // Other tests of this process have memory, too: far less.
        let touched = own.anonymous().unwrap();
        assert!(touched > before + PAGES / 2, "{before} before, {touched} after");
        ram.discard(Gpa(0)..Gpa(PAGES * PAGE_BYTES)).unwrap();
        assert!(own.anonymous().unwrap() + PAGES / 2 < touched);
    }
}
