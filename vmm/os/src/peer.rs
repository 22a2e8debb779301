//! The process at the other end of a Unix socket, as the kernel recorded it.
#![expect(unsafe_code, reason = "getsockopt(2) of SO_PEERCRED and SO_PEERPIDFD")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::Process;

/// Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// The process that connected, or that listens: as it was at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number; 0 if it is in another PID namespace.
    pub pid: u32,
    pub uid: u32,
}

impl Peer {
    /// The peer of a connected stream.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to `peer`, which has that many and any
        // bits of which are a value.
        let done = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut peer).cast(),
                &raw mut length,
            )
        };
        match done {
            0 => Ok(Self { pid: u32::try_from(peer.pid).unwrap_or(0), uid: peer.uid }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Is it this process's user?
    pub fn is_this_user(self) -> bool {
        self.uid == rustix::process::getuid().as_raw()
    }

    /// The peer itself, held. An error if it has ended.
    pub fn process(socket: impl AsFd) -> io::Result<Process> {
        let peer = Self::of(&socket)?;
        match peer_pidfd(&socket) {
            Ok(fd) => Process::from_pidfd(fd, peer.pid),
            // An older kernel. If the number is another's by now, that one is held: callers
            // compare.
            Err(e) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => Process::open(peer.pid),
            Err(e) => Err(e),
        }
    }
}

fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `fd`, which has that many and any bits of
    // which are a value.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    match done {
        // SAFETY: the kernel has just made this descriptor for us; it is owned nowhere else.
        0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
