//! Runs something in a process of its own that is confined as a thread of a VM's is.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;

use jail::{Files, Mode, Thread};

/// A process's status when its call came back, whatever it returned.
pub const CAME_BACK: i32 = 3;

/// How a forked process ended that was confined and then did `what`: the status that this returned, or
/// what ended it; and what it printed. The caller has one thread.
pub fn confined(
    thread: Thread,
    mode: Mode,
    files: &Files,
    what: impl FnOnce() -> i32,
) -> (Result<i32, i32>, String) {
    let mut ends = [0; 2];
    // SAFETY: the array has room for two descriptors; this process has one thread, so that a forked one
    // may do all that it may.
    let child = unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        libc::fork()
    };
    if child == 0 {
        // SAFETY: standard error is replaced by the pipe, and the process ends without unwinding.
        unsafe {
            libc::dup2(ends[1], 2);
            if jail::prepare("child", mode).is_err() {
                libc::_exit(4);
            }
            jail::enter_with(thread, files);
            libc::_exit(what());
        }
    }
    assert!(child > 0, "no process can be made");
    let (mut said, mut status) = (String::new(), 0);
    // SAFETY: both ends are this process's own, and each is closed once; the child is waited for once.
    unsafe {
        libc::close(ends[1]);
        File::from_raw_fd(ends[0]).read_to_string(&mut said).expect("what a child prints is text");
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
    }
    let ended =
        if libc::WIFEXITED(status) { Ok(libc::WEXITSTATUS(status)) } else { Err(libc::WTERMSIG(status)) };
    (ended, said)
}
