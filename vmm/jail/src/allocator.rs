//! The C library's allocator, kept from asking the kernel for more than memory.
#![expect(unsafe_code, reason = "mallopt(3) has no safe form")]

/// Gives all threads one arena. With one each, the allocator opens `/proc/sys/vm/overcommit_memory`
/// in the thread that first shrinks its own, and asks how many processors there are: no thread's
/// filter would do without these. It saves a VM's process some pages for each thread, and its
/// threads allocate little.
pub(super) fn one_arena() {
    // SAFETY: it sets a number of the allocator's, and no other thread is there.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
