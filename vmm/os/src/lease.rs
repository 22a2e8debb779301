//! A lease on a file (fcntl(2), F_SETLEASE): before another process may write to it or cut it
//! short, this one gets SIGIO, and the other waits in open(2) or truncate(2) until the lease is
//! given up, or for `/proc/sys/fs/lease-break-time`, 45 s.
#![expect(unsafe_code, reason = "rustix has no call for leases")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// One that only readers have. Dropping it lets writers go on.
#[derive(Debug)]
pub struct Lease(File);

impl Lease {
    /// Takes one on `file`, which is open for reading. From here on SIGIO may come, by default the
    /// end of the process.
    ///
    /// # Errors
    /// Another process has it open for writing (EAGAIN), it is another user's (EACCES), or its file
    /// system has no leases (EINVAL).
    pub fn take(file: &File) -> io::Result<Self> {
        // A lease belongs to what open(2) made: also that of a copy of the descriptor.
        let file = file.try_clone()?;
        set(&file, libc::F_RDLCK)?;
        Ok(Self(file))
    }

    /// Whether a writer waits for its end, or it has ended.
    pub fn is_broken(&self) -> bool {
        // SAFETY: it takes no argument, of a descriptor that is open.
        let state = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) };
        state != libc::F_RDLCK
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // What fails is one that has ended.
        let _ = set(&self.0, libc::F_UNLCK);
    }
}

fn set(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: the argument is a number, of a descriptor that is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn a_writer_is_held_back_until_it_is_given_up() {
        // Else the signal would end the test.
        let seen = std::sync::Arc::default();
        signal_hook::flag::register(libc::SIGIO, seen).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(Lease::take(file.as_file()).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        let (_, path) = file.keep().unwrap();
        let readable = File::open(&path).unwrap();
        let lease = Lease::take(&readable).unwrap();
        assert!(!lease.is_broken() && File::open(&path).is_ok(), "readers do no harm");
        let write = || OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        assert_eq!(write().unwrap_err().raw_os_error(), Some(libc::EWOULDBLOCK));
        assert!(lease.is_broken());
        drop(lease);
        assert!(write().is_ok());
        std::fs::remove_file(path).unwrap();
    }
}
