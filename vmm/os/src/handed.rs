//! Descriptors that a process passes to one that it starts, besides the three standard streams.
#![expect(
    unsafe_code,
    reason = "clears a flag between fork and exec, and takes a descriptor that came by its number"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};

/// Passes `fd` to the process that `command` starts, and to no other that is started meanwhile.
/// Returns its number there. It is closed here with `command`.
pub fn give(command: &mut Command, fd: OwnedFd) -> RawFd {
    let number = fd.as_raw_fd();
    let keep = move || Ok(fcntl_setfd(&fd, FdFlags::empty())?);
    // SAFETY: between fork and exec it makes one system call on a descriptor that it owns, and
    // neither allocates nor locks.
    unsafe { command.pre_exec(keep) };
    number
}

/// Takes descriptor `number`, with which this process was started.
///
/// # Errors
/// There is none of this number, or it is a standard stream, or one of this process's own: each of
/// those has FD_CLOEXEC, as one that was taken has.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it only reads and writes the flags of a descriptor, if there is one of this number.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    match flags {
        -1 => return Err(io::Error::last_os_error()),
        flags if flags & libc::FD_CLOEXEC != 0 => return Err(io::ErrorKind::InvalidInput.into()),
        _ => {}
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and without FD_CLOEXEC it was there when this program began: nothing in
    // here owns it, and nothing will, for now it has the flag.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn one_process_gets_it_and_others_do_not() {
        let (read, mut write) = io::pipe().unwrap();
        write.write_all(b"handed").unwrap();
        drop(write);
        let shell = |script: String| {
            let mut command = Command::new("sh");
            command.args(["-c".to_owned(), script]).stderr(Stdio::null());
            command
        };
        let fd = OwnedFd::from(read);
        let number = fd.as_raw_fd();
        let script = format!("cat /proc/self/fd/{number}");
        assert!(!shell(script.clone()).output().unwrap().status.success());
        let mut command = shell(script);
        assert_eq!(give(&mut command, fd), number);
        assert_eq!(command.output().unwrap().stdout, b"handed");
    }

    #[test]
    fn what_is_ours_already_is_not_taken() {
        let file = File::open("/dev/null").unwrap();
        for number in [file.as_raw_fd(), 0, 2, -1, 99_999] {
            assert!(take(number).is_err(), "{number}");
        }
        // SAFETY: nothing else owns the copy, and it has no FD_CLOEXEC, as a descriptor that was
        // passed.
        let copy = unsafe { libc::dup(file.as_raw_fd()) };
        let taken = take(copy).unwrap();
        assert!(taken.as_raw_fd() == copy && take(copy).is_err());
    }
}
