//! This process's own memory: how soon the kernel ends it when none is left, and the program's
//! code.
#![expect(unsafe_code, reason = "asks the linker where the code lies, and advises the kernel about it")]

use std::io;
use std::ops::RangeInclusive;

use super::PAGE;

/// What [`set_oom_score_adj`] takes.
pub const OOM_SCORE_ADJ: RangeInclusive<i16> = -1000..=1000;

/// Sets how much sooner (up to 1000) or later (down to -1000, which is never) than by its size
/// alone the kernel's out-of-memory killer takes this process. Processes that it starts inherit it.
/// Raising it needs no privilege; lowering it below what it ever was needs CAP_SYS_RESOURCE.
pub fn set_oom_score_adj(score: i16) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
}

unsafe extern "C" {
    /// First byte of the program's image.
    static __executable_start: u8;
    /// First byte after its code.
    static etext: u8;
}

/// Drops the pages of code and constants that are mapped now: most served the start, and what is
/// needed again comes back from the page cache at the price of a minor fault. A VM process so keeps
/// about a megabyte less mapped than it started with.
pub fn release_startup_code() {
    let first = &raw const __executable_start;
    let to_page = first.addr().next_multiple_of(PAGE) - first.addr();
    let code = (&raw const etext).addr().saturating_sub(first.addr() + to_page) / PAGE * PAGE;
    if code > 0 {
        // SAFETY: between these two symbols lie only segments that are never written (relocated
        // data comes after the code), so every page is refilled with the same bytes from the file.
        // Failure changes nothing.
        unsafe { libc::madvise(first.wrapping_add(to_page).cast_mut().cast(), code, libc::MADV_DONTNEED) };
    }
}
