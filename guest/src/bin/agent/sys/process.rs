//! The system calls of commands that are run for the host: sockets, pipes, processes.

use core::ffi::{CStr, c_char};
use core::ptr;

use super::{Errno, Fd, POLL, POLLIN, WAIT4, WNOHANG, WRITE, syscall};

const RT_SIGPROCMASK: usize = 14;
const SOCKET: usize = 41;
const ACCEPT4: usize = 288;
const SENDTO: usize = 44;
const BIND: usize = 49;
const LISTEN: usize = 50;
const EXECVE: usize = 59;
const KILL: usize = 62;
const FCNTL: usize = 72;
const PIPE2: usize = 293;
const PIDFD_OPEN: usize = 434;

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: usize = 1;
const CLOEXEC: usize = 0o2_000_000;
const ANY_CID: u32 = u32::MAX;
const BACKLOG: usize = 16;
const MSG_NOSIGNAL: usize = 0x4000;
const F_SETFL: usize = 4;
const O_NONBLOCK: usize = 0o4000;
const POLLOUT: i16 = 4;
const SIG_BLOCK: usize = 0;
const SIGPIPE_MASK: u64 = 1 << 12;
const EAGAIN: Errno = Errno(11);

/// A socket that waits for streams from the host on `port`.
pub(crate) fn listen_vsock(port: u32) -> Result<Fd, Errno> {
    /// `struct sockaddr_vm`.
    #[repr(C)]
    struct Address {
        family: u16,
        reserved: u16,
        port: u32,
        cid: u32,
        zero: [u8; 4],
    }
    const { assert!(size_of::<Address>() == 16) };
    let address = Address { family: AF_VSOCK, reserved: 0, port, cid: ANY_CID, zero: [0; 4] };
    // SAFETY: no memory is passed.
    let socket = unsafe { syscall(SOCKET, [AF_VSOCK.into(), SOCK_STREAM | CLOEXEC, 0, 0, 0, 0]) }?;
    // SAFETY: the kernel reads one `struct sockaddr_vm`.
    let bound =
        unsafe { syscall(BIND, [socket, ptr::from_ref(&address) as usize, size_of::<Address>(), 0, 0, 0]) };
    // SAFETY: no memory is passed.
    let listens = bound.and_then(|_| unsafe { syscall(LISTEN, [socket, BACKLOG, 0, 0, 0, 0]) });
    let socket = Fd(socket as i32);
    listens.map(|_| socket).inspect_err(|_| socket.close())
}

pub(crate) fn accept(listener: Fd) -> Result<Fd, Errno> {
    // SAFETY: the address is not asked for.
    let accepted = unsafe { syscall(ACCEPT4, [listener.0 as usize, 0, 0, CLOEXEC, 0, 0]) };
    accepted.map(|fd| Fd(fd as i32))
}

/// Sends all of it, without a signal if the other end is closed.
pub(crate) fn send(socket: Fd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let (at, len) = (bytes.as_ptr() as usize, bytes.len());
        // SAFETY: the slice is readable and as long as said; no address.
        let sent = unsafe { syscall(SENDTO, [socket.0 as usize, at, len, MSG_NOSIGNAL, 0, 0]) }?;
        bytes = &bytes[sent.min(bytes.len())..];
    }
    Ok(())
}

/// Writes as much as there is room for: 0 if there is none.
pub(crate) fn write_some(fd: Fd, bytes: &[u8]) -> Result<usize, Errno> {
    // SAFETY: the slice is readable and as long as said.
    match unsafe { syscall(WRITE, [fd.0 as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0]) } {
        Err(EAGAIN) => Ok(0),
        written => written,
    }
}

pub(crate) fn set_nonblocking(fd: Fd) {
    // SAFETY: no memory is passed.
    let _ = unsafe { syscall(FCNTL, [fd.0 as usize, F_SETFL, O_NONBLOCK, 0, 0, 0]) };
}

/// Writing to a pipe that no process reads is an error, and not the end of this one.
pub(crate) fn block_sigpipe() {
    let mask = SIGPIPE_MASK;
    // SAFETY: the kernel reads one set of signals, of 8 bytes.
    let _ = unsafe { syscall(RT_SIGPROCMASK, [SIG_BLOCK, ptr::from_ref(&mask) as usize, 0, 8, 0, 0]) };
}

/// Both ends of a pipe, which programs that are started do not have.
#[derive(Clone, Copy)]
pub(crate) struct Pipe {
    pub(crate) read: Fd,
    pub(crate) write: Fd,
}

impl Pipe {
    pub(crate) fn new() -> Result<Self, Errno> {
        let mut ends = [0_i32; 2];
        // SAFETY: the kernel writes two integers.
        unsafe { syscall(PIPE2, [ends.as_mut_ptr() as usize, CLOEXEC, 0, 0, 0, 0]) }?;
        Ok(Self { read: Fd(ends[0]), write: Fd(ends[1]) })
    }
}

/// `struct pollfd`.
#[repr(C)]
pub(crate) struct Poll {
    fd: i32,
    events: i16,
    ready: i16,
}

/// What was found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ready {
    None,
    Some,
}

impl Poll {
    /// Whether there is something to read, if that is `wanted`.
    pub(crate) fn reading(fd: Fd, wanted: bool) -> Self {
        Self { fd: if wanted { fd.0 } else { -1 }, events: POLLIN, ready: 0 }
    }

    /// Whether there is room to write.
    pub(crate) fn writing(fd: Fd, wanted: bool) -> Self {
        Self { fd: if wanted { fd.0 } else { -1 }, events: POLLOUT, ready: 0 }
    }

    /// Also at an end, or on an error.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready != 0
    }
}

/// Waits until one is ready, at most `millis` (for ever if negative).
pub(crate) fn poll(polls: &mut [Poll], millis: i32) -> Ready {
    // SAFETY: `struct pollfd`s, as many as said, of which the kernel writes the last field.
    match unsafe { syscall(POLL, [polls.as_mut_ptr() as usize, polls.len(), millis as usize, 0, 0, 0]) } {
        Ok(1..) => Ready::Some,
        _ => Ready::None,
    }
}

/// A process that was forked, and leads its group.
#[derive(Clone, Copy)]
pub(crate) struct Child(pub(crate) usize);

impl Child {
    /// What is readable when it has ended; it need not be closed by a process that ends soon after.
    pub(crate) fn descriptor(self) -> Fd {
        // SAFETY: no memory is passed.
        unsafe { syscall(PIDFD_OPEN, [self.0, 0, 0, 0, 0, 0]) }.map_or(Fd(-1), |fd| Fd(fd as i32))
    }

    /// Signals it and its group. The number is its own until it has been waited for.
    pub(crate) fn signal(self, signal: i32) {
        // SAFETY: no memory is passed.
        let _ = unsafe { syscall(KILL, [self.0.wrapping_neg(), signal as usize, 0, 0, 0, 0]) };
    }

    /// How it ended, if it has.
    pub(crate) fn wait(self) -> Option<i32> {
        let mut status = 0_i32;
        // SAFETY: the kernel writes one integer.
        let ended =
            unsafe { syscall(WAIT4, [self.0, ptr::from_mut(&mut status) as usize, WNOHANG, 0, 0, 0]) };
        (ended == Ok(self.0)).then_some(status)
    }
}

/// Forgets one child that has ended; whether there was one.
pub(crate) fn reap() -> bool {
    // SAFETY: the status is not asked for.
    unsafe { syscall(WAIT4, [usize::MAX, 0, WNOHANG, 0, 0, 0]) }.is_ok_and(|pid| pid > 0)
}

/// Becomes `program`. Returns only if that fails. `arguments` are C strings and end with null.
pub(crate) fn execute(program: &CStr, arguments: &[*const c_char]) -> Errno {
    let environment = [
        c"HOME=/root".as_ptr(),
        c"TERM=dumb".as_ptr(),
        c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".as_ptr(),
        ptr::null(),
    ];
    let (program, environment) = (program.as_ptr() as usize, environment.as_ptr() as usize);
    // SAFETY: C strings, in arrays that end with null: the caller's as it says.
    let failed = unsafe { syscall(EXECVE, [program, arguments.as_ptr() as usize, environment, 0, 0, 0]) };
    failed.err().unwrap_or(Errno(0))
}
