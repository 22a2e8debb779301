//! The table: which system calls each kind of thread may make, and why. What is not here is not
//! made. In particular no thread starts a program or a process, maps memory that can be
//! executed, looks into another process or sends it a signal, or makes a socket that is not of the
//! file system's.

use syscalls::Sysno;

use super::{Thread, request};

/// A system call that a thread may make if all of `checks` hold.
#[derive(Debug)]
pub struct Allowed {
    pub call: Sysno,
    pub checks: &'static [Check],
    /// What for.
    pub why: &'static str,
}

/// What an argument, counted from 0, must be. But for a pointer its upper 32 bits are not looked
/// at: the kernel does not either, in what is checked here.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// One of these values.
    Is(u8, &'static [u64]),
    /// A value with all of these bits.
    With(u8, u64),
    /// A value with none of these bits.
    Without(u8, u64),
    /// No pointer.
    Null(u8),
    /// The number of this process.
    ThisProcess(u8),
}

use Check::{Is, Null, ThisProcess, With, Without};

const fn any(call: Sysno, why: &'static str) -> Allowed {
    Allowed { call, checks: &[], why }
}

const fn only(call: Sysno, checks: &'static [Check], why: &'static str) -> Allowed {
    Allowed { call, checks, why }
}

/// An ioctl(2) with one of these requests.
macro_rules! ioctl {
    ($requests:expr, $why:literal) => {
        only(Sysno::ioctl, &[Is(1, $requests)], $why)
    };
}

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;

/// Every thread.
pub const EVERY: &[Allowed] = &[
    any(Sysno::futex, "locks, condition variables, joins"),
    any(Sysno::sched_yield, "a lock's short wait"),
    any(Sysno::clock_gettime, "time, where the vDSO has none"),
    any(Sysno::clock_nanosleep, "a short sleep"),
    any(Sysno::restart_syscall, "a sleep or wait that a signal stop has interrupted"),
    any(Sysno::getrandom, "seeds of hash maps; the guest's random numbers"),
    any(Sysno::brk, "the allocator"),
    only(Sysno::mmap, &[Without(2, EXECUTABLE)], "the allocator; guest memory, its slabs and logs"),
    only(Sysno::mprotect, &[Without(2, EXECUTABLE)], "the allocator's heaps of threads"),
    any(Sysno::mremap, "the allocator's large blocks; parking"),
    any(Sysno::munmap, "the allocator; a stack at a thread's end"),
    any(Sysno::madvise, "the allocator; guest memory that is given back; a stack at a thread's end"),
    only(
        Sysno::prctl,
        &[Is(0, &[libc::PR_SET_VMA as u64])],
        "the allocator of newer C libraries names its memory",
    ),
    any(Sysno::rt_sigprocmask, "signals are held back while a thread ends or kicks another"),
    any(Sysno::rt_sigreturn, "the end of a signal's handler"),
    any(Sysno::sigaltstack, "a thread's stack for signals, at its end"),
    any(Sysno::getpid, "to signal a thread of this process"),
    any(Sysno::gettid, "to signal a thread of this process"),
    only(Sysno::tgkill, &[ThisProcess(0)], "vCPUs are kicked; a panic ends the process"),
    any(Sysno::read, "eventfds, sockets, files"),
    any(Sysno::write, "eventfds, sockets, files, messages"),
    any(Sysno::pread64, "files at an offset, /proc/self/statm among them"),
    any(Sysno::close, "a descriptor that is done with"),
    any(Sysno::poll, "waiting for a descriptor"),
    any(Sysno::ppoll, "waiting for a descriptor"),
    any(Sysno::exit, "a thread's end"),
    any(Sysno::exit_group, "the end"),
];

const VCPU: &[Allowed] = &[
    ioctl!(request::VCPU, "runs the guest; reads what a vCPU has"),
    ioctl!(request::INTERRUPT, "a driver takes note of the power button"),
    ioctl!(request::TAP, "a driver accepts a network device's features"),
    any(Sysno::sendto, "COM2's output"),
    any(Sysno::fstat, "whether the file of persistent memory is as long as it was"),
    any(Sysno::timer_create, "the slices of a throttled guest"),
    any(Sysno::timer_settime, "the slices of a throttled guest"),
    any(Sysno::timer_delete, "the slices of a throttled guest"),
    any(Sysno::shutdown, "a reset device ends its guest's connections"),
    any(Sysno::epoll_ctl, "a reset device ends its guest's connections"),
];

const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;

const EVENT_LOOP: &[Allowed] = &[
    only(Sysno::clone, &[With(0, THREAD)], "a thread for a capture, confined as this one is"),
    any(
        Sysno::clone3,
        "fails (see `install`): its flags cannot be checked, and the C library uses clone then",
    ),
    any(Sysno::set_robust_list, "a thread's beginning"),
    any(Sysno::rseq, "a thread's beginning"),
    any(Sysno::sched_getaffinity, "a thread's beginning: where its stack ends"),
    only(Sysno::prctl, &[Is(0, &[libc::PR_SET_NAME as u64])], "a thread's name"),
    any(Sysno::epoll_wait, "the loop"),
    any(Sysno::epoll_pwait, "the loop"),
    any(Sysno::epoll_ctl, "what is watched changes"),
    any(Sysno::epoll_create1, "a device's own set of sockets"),
    any(Sysno::eventfd2, "a wake-up made late"),
    any(Sysno::timerfd_create, "a timer made late"),
    any(Sysno::timerfd_settime, "sweeps, statistics, limits of time, kept sockets"),
    any(Sysno::accept4, "clients of the control socket, of COM2, and of the guest's sockets"),
    only(
        Sysno::socket,
        &[Is(0, &[libc::AF_UNIX as u64])],
        "a guest's connection; a socket made anew; a capture's link",
    ),
    any(Sysno::connect, "a guest's connection to a socket of the host's; a capture's link"),
    any(Sysno::bind, "a socket whose file was removed is made anew"),
    any(Sysno::listen, "a socket whose file was removed is made anew"),
    any(Sysno::getsockopt, "the peer of a socket"),
    any(Sysno::setsockopt, "limits of time"),
    any(Sysno::getsockname, "the kind of a socket"),
    any(Sysno::shutdown, "a guest ends a connection"),
    any(Sysno::recvfrom, "sockets"),
    any(Sysno::recvmsg, "sockets; a capture's slabs"),
    any(Sysno::sendto, "sockets"),
    any(Sysno::sendmsg, "sockets; a capture's slabs"),
    any(Sysno::readv, "drives, network, a guest's sockets"),
    any(Sysno::writev, "drives, network, a guest's sockets, messages"),
    any(Sysno::preadv, "drives"),
    any(Sysno::pwritev, "drives"),
    any(Sysno::pwrite64, "drives; memory files; slabs"),
    any(Sysno::fsync, "drives; snapshots"),
    any(Sysno::fdatasync, "drives"),
    any(Sysno::fallocate, "a memfd's ranges that the balloon gives back; memory files"),
    any(Sysno::ftruncate, "memory files; a capture's state"),
    any(Sysno::lseek, "files"),
    any(Sysno::copy_file_range, "a memory file's base"),
    any(Sysno::sendfile, "a memory file's base"),
    any(Sysno::openat, "snapshots; /proc/self"),
    any(Sysno::open, "a socket's directory"),
    any(Sysno::fstat, "files"),
    any(Sysno::fstatfs, "whether a slab is of huge pages"),
    any(Sysno::newfstatat, "whether a socket's file is still there"),
    any(Sysno::statx, "files"),
    any(Sysno::unlink, "a socket's file at the end"),
    any(Sysno::unlinkat, "a snapshot that fails"),
    any(Sysno::renameat, "a snapshot takes its place"),
    any(Sysno::flock, "a socket's directory, while a file in it is replaced"),
    any(Sysno::fchmod, "a socket made anew is its user's only"),
    only(
        Sysno::fcntl,
        &[Is(
            1,
            &[
                libc::F_DUPFD_CLOEXEC as u64,
                libc::F_GETFD as u64,
                libc::F_SETFD as u64,
                libc::F_GETFL as u64,
                libc::F_SETFL as u64,
                libc::F_ADD_SEALS as u64,
                libc::F_GET_SEALS as u64,
                libc::F_GETLEASE as u64,
                libc::F_SETLEASE as u64,
            ],
        )],
        "descriptors, the seals of slabs and states, and the lease of a memory file",
    ),
    any(Sysno::memfd_create, "a capture's state"),
    any(Sysno::pidfd_open, "this process, whose ranges are given back"),
    any(Sysno::process_madvise, "ranges of guest memory are given back"),
    any(Sysno::mincore, "which pages of a file are in memory"),
    only(Sysno::rt_sigaction, &[Null(1)], "whether the loss of the terminal ends the VM"),
    any(Sysno::getpgrp, "whether the terminal is ours"),
    ioctl!(
        request::PAGES,
        "pages are unparked, and looked at, as they are given back, paged out or captured"
    ),
    ioctl!(request::WRITE_LOG, "snapshots of the pages that were written"),
    ioctl!(request::INTERRUPT, "the power button is pressed"),
    ioctl!(request::CHIPS, "a capture"),
    ioctl!(request::FRESH_VCPU, "the first capture"),
    ioctl!(request::CLONE_FILE, "a memory file's base"),
    ioctl!(request::TAP, "a driver accepts a network device's features"),
    ioctl!(request::SOCKET, "sockets"),
    ioctl!(request::TERMINAL, "a console that is a terminal"),
];

const API: &[Allowed] = &[
    any(Sysno::accept4, "clients"),
    any(Sysno::recvfrom, "requests"),
    any(Sysno::sendto, "answers"),
    any(Sysno::shutdown, "the end of an answer"),
    ioctl!(request::SOCKET, "a client that is not waited for"),
];

const MERGE: &[Allowed] = &[
    only(Sysno::socket, &[Is(0, &[libc::AF_UNIX as u64])], "the matchmaker"),
    any(Sysno::connect, "the matchmaker, and the next one"),
    any(Sysno::sendmsg, "the matchmaker"),
    any(Sysno::recvmsg, "the matchmaker"),
    any(Sysno::setsockopt, "limits of time"),
    any(Sysno::pwrite64, "a slab is filled"),
    any(Sysno::fstat, "a slab's size"),
    any(Sysno::statx, "a slab's size"),
    any(Sysno::fstatfs, "whether a slab is of huge pages"),
    only(
        Sysno::fcntl,
        &[Is(1, &[libc::F_ADD_SEALS as u64, libc::F_GET_SEALS as u64, libc::F_DUPFD_CLOEXEC as u64])],
        "a slab's seals",
    ),
    any(Sysno::openat, "/proc/self/maps: which slabs are mapped where"),
    any(Sysno::process_madvise, "pages of zeros are given back"),
    any(Sysno::pidfd_open, "this process, whose ranges are given back"),
    ioctl!(request::WRITE_LOG, "which pages are quiet"),
    ioctl!(request::PAGES, "pages are frozen, and looked at"),
];

const DISK: &[Allowed] = &[
    any(Sysno::preadv, "a guest reads"),
    any(Sysno::readv, "a guest reads"),
    any(Sysno::pwritev, "a guest writes"),
    any(Sysno::writev, "a guest writes"),
    any(Sysno::pwrite64, "a guest writes; an overlay's map"),
    any(Sysno::lseek, "a guest reads or writes"),
    any(Sysno::fsync, "a guest flushes"),
    any(Sysno::fdatasync, "a guest flushes"),
    any(Sysno::fallocate, "a guest discards"),
    any(Sysno::ftruncate, "an overlay grows"),
    any(Sysno::fstat, "a file's size"),
    any(Sysno::statx, "a file's size"),
];

const SAMPLE: &[Allowed] = &[ioctl!(request::PAGES, "pages are parked, and looked at")];

/// What threads of this kind may do.
pub fn of(thread: Thread) -> impl Iterator<Item = &'static Allowed> {
    let own = match thread {
        Thread::Vcpu => VCPU,
        Thread::EventLoop => EVENT_LOOP,
        Thread::Api => API,
        Thread::Merge => MERGE,
        Thread::Sample => SAMPLE,
        Thread::Disk => DISK,
        Thread::Console | Thread::Handler => &[],
    };
    EVERY.iter().chain(own)
}
