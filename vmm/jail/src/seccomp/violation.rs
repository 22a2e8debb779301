//! A system call that is on no list: its name is printed, and the process ends.
#![expect(unsafe_code, reason = "a signal handler reads what the kernel gives it, and ends the process")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt::{self, Write as _};
use std::io;
use std::sync::OnceLock;

use syscalls::Sysno;

use super::Thread;

/// The exit status of a VM whose process made a system call that is on no list; Firecracker's.
pub const EXIT_BAD_SYSCALL: u8 = 148;

/// The VM's name, for the message.
static NAME: OnceLock<String> = OnceLock::new();

thread_local! {
    /// What this thread is. It needs no destructor, so that a signal handler may read it.
    static THREAD: Cell<Option<Thread>> = const { Cell::new(None) };
}

/// Catches SIGSYS, which a filter sends to the thread that made the call.
pub(super) fn catch(name: &str) -> io::Result<()> {
    let _ = NAME.set(name.to_owned());
    // SAFETY: all zeros are a valid sigaction; the handler calls nothing that must not be called in
    // one.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = tell as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The calling thread is one of this kind.
pub(super) fn this_is(thread: Thread) {
    THREAD.set(Some(thread));
}

/// The beginning of what the kernel tells of a SIGSYS (`siginfo_t`, the member `_sigsys`).
#[repr(C)]
struct Told {
    _signal: [c_int; 4],
    _at: *const c_void,
    call: c_int,
}

extern "C" fn tell(_: c_int, told: *const Told, context: *const libc::ucontext_t) {
    // SAFETY: the kernel gives both, as the handler was installed with SA_SIGINFO.
    let (call, registers) = unsafe { ((*told).call, &(*context).uc_mcontext.gregs) };
    let argument = |register: c_int| registers.get(register as usize).copied().unwrap_or(0);
    let mut line = Line { bytes: [0; 512], used: 0 };
    // A line that is cut off says enough.
    let _ = write!(line, "error: {}: its ", NAME.get().map_or("a VM", String::as_str));
    let _ = match THREAD.get() {
        Some(thread) => write!(line, "{thread} thread"),
        None => line.write_str("program"),
    };
    let _ = line.write_str(" made the system call ");
    let _ = match usize::try_from(call).ok().and_then(Sysno::new) {
        Some(known) => write!(line, "{known}"),
        None => write!(line, "number {call}"),
    };
    let _ = writeln!(
        line,
        "({:#x}, {:#x}, {:#x}), which its list does not have: the VM ends here",
        argument(libc::REG_RDI),
        argument(libc::REG_RSI),
        argument(libc::REG_RDX)
    );
    // SAFETY: both may be called in a signal handler; what is written lives as long as the call.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.used);
        libc::_exit(EXIT_BAD_SYSCALL.into());
    }
}

/// Text in a buffer on the stack: a signal handler must not allocate.
struct Line {
    bytes: [u8; 512],
    used: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.used..).unwrap_or_default();
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.used += taken;
        if taken < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}
