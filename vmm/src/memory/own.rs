//! This program's own memory.
#![expect(unsafe_code, reason = "asks the linker where the code lies, and advises the kernel about it")]

use super::PAGE_BYTES;

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
    let (start, end) = (&raw const __executable_start as u64, &raw const etext as u64);
    let start = start.next_multiple_of(PAGE_BYTES);
    let end = end & !(PAGE_BYTES - 1);
    if start < end {
        // SAFETY: between these two symbols lie only segments that are never written (relocated data comes after
        // the code), so every page is refilled with the same bytes from the file. Failure changes nothing.
        unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
    }
}
