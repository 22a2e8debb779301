//! The system calls the agent makes, and nothing else of Linux.
#![expect(unsafe_code, reason = "system calls without a C library")]

pub(crate) mod interfaces;
pub(crate) mod process;
pub(crate) mod root;

use core::arch::asm;
use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::fmt;
use core::ptr;
use core::slice;

use guest::content::{PAGE_SIZE, Page};

// Numbers and constants: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi of the kernel.
const READ: usize = 0;
const WRITE: usize = 1;
const OPEN: usize = 2;
const CLOSE: usize = 3;
const POLL: usize = 7;
const MMAP: usize = 9;
const IOCTL: usize = 16;
const PREAD64: usize = 17;
const MADVISE: usize = 28;
const DUP2: usize = 33;
const GETPID: usize = 39;
const VFORK: usize = 58;
const EXECVE: usize = 59;
const EXIT: usize = 60;
const WAIT4: usize = 61;
const MKDIR: usize = 83;
const SYNC: usize = 162;
const MOUNT: usize = 165;
const REBOOT: usize = 169;
const SCHED_SETAFFINITY: usize = 203;
const SCHED_GETAFFINITY: usize = 204;
const CLOCK_GETTIME: usize = 228;
const FINIT_MODULE: usize = 313;
const GETRANDOM: usize = 318;

const O_WRONLY: usize = 1;
const O_RDWR: usize = 2;
const O_NOCTTY: usize = 0o400;
const O_CLOEXEC: usize = 0o2_000_000;
const POLLIN: i16 = 1;
const PROT_READ: usize = 1;
const PROT_READ_WRITE: usize = 1 | 2;
const MAP_SHARED: usize = 0x1;
const MAP_PRIVATE_ANONYMOUS_NORESERVE: usize = 0x2 | 0x20 | 0x4000;
const MADV_DONTNEED: usize = 4;
const WNOHANG: usize = 1;
const CLOCK_MONOTONIC: usize = 1;
const TCSETS: usize = 0x5402;
const TCSBRK: usize = 0x5409;
const REBOOT_MAGIC: (usize, usize) = (0xfee1_dead, 672_274_793);

/// Delay before a failed call is retried.
pub(crate) const RETRY_MILLIS: usize = 1000;

/// An error number of the kernel's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) u16);

/// No such file.
pub(crate) const ENOENT: Errno = Errno(2);
/// It cannot be read, or not that far.
pub(crate) const EIO: Errno = Errno(5);
/// It exists already.
pub(crate) const EEXIST: Errno = Errno(17);
/// No such device, or not here.
pub(crate) const ENODEV: Errno = Errno(19);
/// It is mounted already.
pub(crate) const EBUSY: Errno = Errno(16);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            1 => "not permitted",
            2 => "no such file",
            5 => "input/output error",
            8 => "not a module for this kernel",
            9 => "bad descriptor",
            12 => "out of memory",
            13 => "permission denied",
            16 => "busy",
            17 => "exists",
            19 => "no such device",
            22 => "invalid argument",
            _ => return write!(f, "errno {}", self.0),
        };
        write!(f, "{name} (errno {})", self.0)
    }
}

/// # Safety
/// The arguments are what call `number` takes; memory they point to stays valid until it returns.
unsafe fn syscall(number: usize, args: [usize; 6]) -> Result<usize, Errno> {
    let [a, b, c, d, e, f] = args;
    let result: isize;
    // SAFETY: the kernel clobbers rcx and r11, and of memory only what the arguments point to.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") d, in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    if (-4095..0).contains(&result) { Err(Errno(result.unsigned_abs() as u16)) } else { Ok(result as usize) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fd(pub(crate) i32);

/// Standard input, output and error.
pub(crate) const STDIN: Fd = Fd(0);
/// See [`STDIN`].
pub(crate) const STDOUT: Fd = Fd(1);
/// See [`STDIN`].
pub(crate) const STDERR: Fd = Fd(2);

/// How a file is opened.
#[derive(Clone, Copy)]
pub(crate) enum Access {
    /// For reading.
    Read,
    /// For writing: some files in sysfs allow no more.
    Write,
    /// For both; a terminal does not become the controlling one.
    ReadWrite,
}

impl Fd {
    pub(crate) fn open(path: &CStr, access: Access) -> Result<Self, Errno> {
        let flags = match access {
            Access::Read => O_CLOEXEC,
            Access::Write => O_CLOEXEC | O_WRONLY | O_NOCTTY,
            Access::ReadWrite => O_CLOEXEC | O_RDWR | O_NOCTTY,
        };
        // SAFETY: a C string.
        unsafe { syscall(OPEN, [path.as_ptr() as usize, flags, 0, 0, 0, 0]) }.map(|fd| Self(fd as i32))
    }

    /// Closes it. Errors of `close` tell nothing that could be acted on.
    pub(crate) fn close(self) {
        // SAFETY: no memory is passed.
        let _ = unsafe { syscall(CLOSE, [self.0 as usize, 0, 0, 0, 0, 0]) };
    }

    /// Makes `other` another name for this file.
    pub(crate) fn dup_to(self, other: Self) {
        // SAFETY: no memory is passed.
        let _ = unsafe { syscall(DUP2, [self.0 as usize, other.0 as usize, 0, 0, 0, 0]) };
    }

    /// Reads once.
    pub(crate) fn read(self, into: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: the slice is writable and as long as said.
        unsafe { syscall(READ, [self.0 as usize, into.as_mut_ptr() as usize, into.len(), 0, 0, 0]) }
    }

    /// Reads once, from `offset` on.
    pub(crate) fn read_at(self, into: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let (address, bytes) = (into.as_mut_ptr() as usize, into.len());
        // SAFETY: the slice is writable and as long as said.
        unsafe { syscall(PREAD64, [self.0 as usize, address, bytes, offset as usize, 0, 0]) }
    }

    /// Reads to the end, or until `into` is full.
    pub(crate) fn read_all(self, into: &mut [u8]) -> Result<usize, Errno> {
        let mut len = 0;
        while len < into.len() {
            match self.read(&mut into[len..])? {
                0 => break,
                count => len += count,
            }
        }
        Ok(len)
    }

    /// Fills `into` with what the file has from byte `offset` on. A file that ends before that is
    /// an error.
    pub(crate) fn read_pages_at<T: Zeroed>(self, into: &mut [T], offset: u64) -> Result<(), Errno> {
        let (to, bytes, mut done) = (into.as_mut_ptr() as usize, size_of_val(into), 0);
        while done < bytes {
            let at = offset as usize + done;
            // SAFETY: the rest of the slice is writable and as long as said, and any bits are a
            // value of integers.
            match unsafe { syscall(PREAD64, [self.0 as usize, to + done, bytes - done, at, 0, 0]) }? {
                0 => return Err(EIO),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Whether it would take output: a serial port that is not there opens all the same.
    pub(crate) fn probe(self) -> Result<(), Errno> {
        // SAFETY: no byte is read.
        unsafe { syscall(WRITE, [self.0 as usize, self.0 as usize, 0, 0, 0, 0]) }.map(|_| ())
    }

    /// Writes all of it.
    pub(crate) fn write(self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            // SAFETY: the slice is readable and as long as said.
            let count =
                unsafe { syscall(WRITE, [self.0 as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0]) }?;
            bytes = &bytes[count.min(bytes.len())..];
        }
        Ok(())
    }

    /// Waits until there is something to read, at most `millis` (for ever if negative).
    pub(crate) fn wait_readable(self, millis: i32) -> bool {
        #[repr(C)]
        struct PollFd {
            fd: i32,
            events: i16,
            revents: i16,
        }
        let mut poll = PollFd { fd: self.0, events: POLLIN, revents: 0 };
        // SAFETY: one `struct pollfd`, which the kernel writes `revents` of.
        let ready =
            unsafe { syscall(POLL, [ptr::from_mut(&mut poll) as usize, 1, millis as usize, 0, 0, 0]) };
        ready.is_ok_and(|count| count > 0) && poll.revents != 0
    }

    /// Makes a serial port pass bytes through as they are.
    pub(crate) fn set_raw(self) -> Result<(), Errno> {
        /// `struct termios` of the kernel (not of a C library).
        #[repr(C)]
        struct Termios {
            iflag: u32,
            oflag: u32,
            cflag: u32,
            lflag: u32,
            line: u8,
            cc: [u8; 19],
        }
        const { assert!(size_of::<Termios>() == 36) };
        const B115200_CS8_CREAD_CLOCAL: u32 = 0x1002 | 0x30 | 0x80 | 0x800;
        const VMIN: usize = 6;
        let mut cc = [0; 19];
        cc[VMIN] = 1;
        let termios = Termios { iflag: 0, oflag: 0, cflag: B115200_CS8_CREAD_CLOCAL, lflag: 0, line: 0, cc };
        // SAFETY: the kernel reads one `struct termios`.
        unsafe { syscall(IOCTL, [self.0 as usize, TCSETS, ptr::from_ref(&termios) as usize, 0, 0, 0]) }
            .map(|_| ())
    }

    /// Waits until a terminal has sent what was written.
    pub(crate) fn drain(self) {
        // SAFETY: no memory is passed. Not every file is a terminal: an error is no matter.
        let _ = unsafe { syscall(IOCTL, [self.0 as usize, TCSBRK, 1, 0, 0, 0]) };
    }

    /// An `ioctl` without an argument.
    pub(crate) fn command(self, number: usize) -> Result<(), Errno> {
        // SAFETY: no memory is passed.
        unsafe { syscall(IOCTL, [self.0 as usize, number, 0, 0, 0, 0]) }.map(|_| ())
    }

    /// Loads the kernel module that this file holds.
    pub(crate) fn load_module(self, parameters: &CStr) -> Result<(), Errno> {
        // SAFETY: a C string.
        unsafe { syscall(FINIT_MODULE, [self.0 as usize, parameters.as_ptr() as usize, 0, 0, 0, 0]) }
            .map(|_| ())
    }
}

/// The number of this process.
pub(crate) fn pid() -> usize {
    // SAFETY: no arguments.
    unsafe { syscall(GETPID, [0; 6]) }.unwrap_or(0)
}

pub(crate) fn exit(status: u8) -> ! {
    loop {
        // SAFETY: no memory is passed.
        let _ = unsafe { syscall(EXIT, [usize::from(status), 0, 0, 0, 0, 0]) };
    }
}

pub(crate) fn sleep_millis(millis: usize) {
    // SAFETY: no descriptors are passed.
    let _ = unsafe { syscall(POLL, [0, 0, millis, 0, 0, 0]) };
}

/// Makes a directory, which may be there already.
pub(crate) fn mkdir(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    match unsafe { syscall(MKDIR, [path.as_ptr() as usize, 0o755, 0, 0, 0, 0]) } {
        Ok(_) | Err(EEXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Mounts a file system that has no device.
pub(crate) fn mount(kind: &CStr, at: &CStr) -> Result<(), Errno> {
    let (kind, at) = (kind.as_ptr() as usize, at.as_ptr() as usize);
    // SAFETY: C strings; no data.
    match unsafe { syscall(MOUNT, [kind, at, kind, 0, 0, 0]) } {
        Ok(_) | Err(EBUSY) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Syncs all file systems.
pub(crate) fn sync() {
    // SAFETY: no arguments.
    let _ = unsafe { syscall(SYNC, [0; 6]) };
}

/// Starts a program without arguments; its output goes to standard error. Returns its process, or
/// why it could not be started.
pub(crate) fn spawn(program: &CStr) -> Result<usize, Errno> {
    let arguments = [program.as_ptr(), ptr::null()];
    let environment = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".as_ptr(), ptr::null()];
    let (result, error): (isize, isize);
    // SAFETY: the child of vfork shares our memory and our stack until it executes another program
    // or exits, and this thread is suspended until then. All it does is in here: system calls, and
    // one register that it can restore only from the stack, below which it writes nothing but the 8
    // bytes that were pushed for it. The strings are C strings, the arrays end with null.
    unsafe {
        asm!(
            "push 0",
            "syscall",
            "test rax, rax",
            "jnz 2f",
            // dup2(stderr, stdout)
            "mov eax, {dup2}", "mov edi, 2", "mov esi, 1", "syscall",
            // execve
            "mov eax, {execve}", "mov rdi, r12", "mov rsi, r13", "mov rdx, r14", "syscall",
            // It returns only with an error.
            "mov [rsp], rax",
            "mov eax, {exit}", "mov edi, 127", "syscall",
            "ud2",
            "2:",
            "pop r15",
            dup2 = const DUP2, execve = const EXECVE, exit = const EXIT,
            inlateout("rax") VFORK as isize => result,
            in("r12") program.as_ptr(), in("r13") arguments.as_ptr(), in("r14") environment.as_ptr(),
            out("r15") error,
            lateout("rcx") _, lateout("r11") _, lateout("rdi") _, lateout("rsi") _, lateout("rdx") _,
        );
    }
    match (result, error) {
        (failed, _) if failed < 0 => Err(Errno(failed.unsigned_abs() as u16)),
        (pid, 0) => Ok(pid as usize),
        (pid, error) => {
            // Only an exit is left.
            // SAFETY: no memory is passed.
            let _ = unsafe { syscall(WAIT4, [pid as usize, 0, 0, 0, 0, 0]) };
            Err(Errno(error.unsigned_abs() as u16))
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy)]
pub(crate) struct Exit(i32);

impl Exit {
    /// Whether it did what it was started for.
    pub(crate) fn is_success(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 & 0x7f {
            0 => write!(f, "exit status {}", self.0 >> 8 & 0xff),
            signal => write!(f, "signal {signal}"),
        }
    }
}

/// How the child `pid` ended; None while it runs.
pub(crate) fn ended(pid: usize) -> Option<Exit> {
    let mut status = 0_i32;
    // SAFETY: the kernel writes one integer.
    let ended = unsafe { syscall(WAIT4, [pid, ptr::from_mut(&mut status) as usize, WNOHANG, 0, 0, 0]) };
    (ended == Ok(pid)).then_some(Exit(status))
}

/// How to end the machine.
#[derive(Clone, Copy)]
pub(crate) enum Reboot {
    /// Power off.
    PowerOff = 0x4321_fedc,
    /// Restart.
    Restart = 0x0123_4567,
}

/// Ends the machine. Returns only if the kernel refuses.
pub(crate) fn reboot(how: Reboot) -> Errno {
    sync();
    // SAFETY: no memory is passed.
    let result = unsafe { syscall(REBOOT, [REBOOT_MAGIC.0, REBOOT_MAGIC.1, how as usize, 0, 0, 0]) };
    result.err().unwrap_or(EBUSY)
}

/// The first 64 processors that this process may run on, a bit each.
pub(crate) fn affinity() -> Result<u64, Errno> {
    let mut mask = [0_u64; 128];
    // SAFETY: the slice is writable and as long as said.
    unsafe { syscall(SCHED_GETAFFINITY, [0, size_of_val(&mask), mask.as_mut_ptr() as usize, 0, 0, 0]) }
        .map(|_| mask[0])
}

/// Has this process run on these processors only.
pub(crate) fn set_affinity(mask: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads one word.
    unsafe { syscall(SCHED_SETAFFINITY, [0, size_of::<u64>(), ptr::from_ref(&mask) as usize, 0, 0, 0]) }
        .map(|_| ())
}

/// A random number.
pub(crate) fn random() -> Result<u64, Errno> {
    let mut number = 0_u64;
    // SAFETY: the kernel writes one word at most.
    match unsafe { syscall(GETRANDOM, [ptr::from_mut(&mut number) as usize, size_of::<u64>(), 0, 0, 0, 0]) }?
    {
        8 => Ok(number),
        _ => Err(EIO),
    }
}

/// A word of memory that changes by itself.
#[repr(transparent)]
pub(crate) struct Word(UnsafeCell<u64>);

impl Word {
    /// What it is now.
    pub(crate) fn get(&self) -> u64 {
        // SAFETY: an aligned word, for a reference to it exists.
        unsafe { self.0.get().read_volatile() }
    }
}

/// Maps physical memory for good: two words at `address`, which is a multiple of 8, within a page.
pub(crate) fn map_physical(address: usize) -> Result<&'static [Word; 2], Errno> {
    let (page, offset) = (address & !(PAGE_SIZE - 1), address & (PAGE_SIZE - 1));
    if !offset.is_multiple_of(8) || offset > PAGE_SIZE - 16 {
        return Err(Errno(22));
    }
    let memory = Fd::open(c"/dev/mem", Access::Read)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let at = unsafe { syscall(MMAP, [0, PAGE_SIZE, PROT_READ, MAP_SHARED, memory.0 as usize, page]) };
    memory.close();
    // SAFETY: aligned, readable, never unmapped; nothing in this process writes there.
    at.map(|at| unsafe { &*((at + offset) as *const [Word; 2]) })
}

/// Microseconds since some fixed moment.
pub(crate) fn now_micros() -> u64 {
    now_nanos() / 1000
}

/// Nanoseconds since the same moment.
pub(crate) fn now_nanos() -> u64 {
    let mut time = [0_u64; 2];
    // SAFETY: the kernel writes one `struct timespec`: seconds, nanoseconds.
    let _ = unsafe { syscall(CLOCK_GETTIME, [CLOCK_MONOTONIC, time.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    time[0] * 1_000_000_000 + time[1]
}

/// Maps `count` zeroed elements of fresh anonymous memory, for good. Nothing is allocated before it
/// is touched.
pub(crate) fn map<T: Zeroed>(count: usize) -> Result<&'static mut [T], Errno> {
    if count == 0 {
        return Ok(&mut []);
    }
    let bytes = count.checked_mul(size_of::<T>()).ok_or(Errno(12))?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let at = unsafe {
        syscall(MMAP, [0, bytes, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_NORESERVE, usize::MAX, 0])
    }?;
    // SAFETY: page-aligned, writable, of the length asked for, zero, never unmapped, and referenced
    // nowhere else.
    Ok(unsafe { slice::from_raw_parts_mut(at as *mut T, count) })
}

/// Gives pages of a mapping back; they read as zeros when touched again. Whole pages only: the
/// kernel rounds a length up to pages, and would drop the bytes behind it.
pub(crate) fn discard(pages: &mut [Page]) {
    // SAFETY: `pages` is borrowed mutably and whole pages long, and zeros, which the kernel puts
    // there, are valid. The kernel refuses what does not begin with a page.
    let _ = unsafe {
        syscall(MADVISE, [pages.as_mut_ptr() as usize, size_of_val(pages), MADV_DONTNEED, 0, 0, 0])
    };
}

const _: () = assert!(size_of::<Page>() == PAGE_SIZE);

/// Types of which all zeros is a value, and so is everything else: integers.
///
/// # Safety
/// Only for such.
pub(crate) unsafe trait Zeroed {}
// SAFETY: an integer.
unsafe impl Zeroed for u32 {}
// SAFETY: an array of integers.
unsafe impl Zeroed for Page {}
