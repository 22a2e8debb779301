//! Signals that end a program: which are heeded, and which never are.
#![expect(unsafe_code, reason = "asks for and sets what the kernel does with a signal")]

use std::ffi::c_int;

/// The signals by which a user, a service manager or a terminal asks a program to end.
const ENDING: [c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Those signals that ask this process to end. One that was ignored when it was started (by
/// `nohup`, `trap ''`, or a script's `&`) stays ignored, as its starter intended.
pub fn ending() -> impl Iterator<Item = c_int> {
    ENDING.into_iter().filter(|signal| is_heeded(*signal))
}

/// Whether a signal has an effect on this process.
pub fn is_heeded(signal: c_int) -> bool {
    // SAFETY: all zeros are a valid sigaction, which the kernel writes over.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set, and `action` lives as long as the call.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    asked != 0 || action.sa_sigaction != libc::SIG_IGN
}

/// Makes a file that would grow beyond the limit (`ulimit -f`) an error of the write (EFBIG), and
/// not the end of the program.
pub(super) fn ignore_file_size() {
    ignore(libc::SIGXFSZ);
}

/// Touching the terminal from the background is an error (EIO) or done, and never stops this
/// process.
pub fn ignore_job_control() {
    ignore(libc::SIGTTIN);
    ignore(libc::SIGTTOU);
}

/// The end of a terminal or of a parent is nothing to this process. The kernel sends SIGHUP also to processes that are stopped when
/// the last parent of their group ends.
pub fn ignore_hang_up() {
    ignore(libc::SIGHUP);
}

fn ignore(signal: c_int) {
    // SAFETY: ignoring a signal installs no handler. It fails for none of the signals above.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// A signal's name, as in manuals.
pub fn name(signal: c_int) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGTERM => "SIGTERM",
        libc::SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_not_heeded() {
        assert!(is_heeded(libc::SIGUSR2));
        ignore(libc::SIGUSR2);
        assert!(!is_heeded(libc::SIGUSR2));
        ignore_file_size();
        assert!(!is_heeded(libc::SIGXFSZ));
    }
}
