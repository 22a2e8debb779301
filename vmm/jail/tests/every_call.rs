//! Every system call that a kind of thread is not to make is tried under its filter, each in a
//! process of its own: it ends that with the status and the name that are promised, or fails, as
//! the mode says. Those that are let through by their arguments alone are tried with others.
#![expect(unsafe_code, reason = "makes system calls that nothing else would make")]

mod confined;

use jail::{EXIT_BAD_SYSCALL, Files, Mode, Thread, seccomp};
use syscalls::Sysno;

use confined::{CAME_BACK, confined};

/// The last number that is tried; Linux 6.18 has 470.
const LAST: i64 = 600;
/// uretprobe and uprobe, which newer kernels let past every filter: outside of a probe they do
/// nothing.
const PROBES: [i64; 2] = [335, 336];

/// How a process ended that was confined and made one call, and what it printed.
fn tried(thread: Thread, mode: Mode, number: i64, arguments: [i64; 4]) -> (Result<i32, i32>, String) {
    let [a, b, c, d] = arguments;
    confined(thread, mode, &Files::Sockets(Vec::new()), || {
        // SAFETY: the call is refused, or of a kind that harms no other process.
        let returned = unsafe { libc::syscall(number, a, b, c, d, 0, 0) };
        // SAFETY: it is this thread's own.
        if returned == -1 && unsafe { *libc::__errno_location() } == libc::EPERM {
            libc::EPERM
        } else {
            CAME_BACK
        }
    })
}

fn every_call_that_is_not_listed_ends_the_process() -> usize {
    let mut tries = 0;
    for thread in Thread::ALL {
        for number in 0..=LAST {
            let known = usize::try_from(number).ok().and_then(Sysno::new);
            if PROBES.contains(&number) || known.is_some_and(|call| seccomp::is_listed(thread, call)) {
                continue;
            }
            let (ended, said) = tried(thread, Mode::Kill, number, [0; 4]);
            assert_eq!(ended, Ok(EXIT_BAD_SYSCALL.into()), "{thread}: call {number} ({known:?}): {said}");
            let name = known.map_or_else(|| format!("number {number}"), |call| call.name().to_owned());
            assert!(said.contains(&format!("its {thread} thread made the system call {name}(")), "{said}");
            tries += 1;
        }
    }
    tries
}

/// Calls with arguments that no thread's list has.
fn arguments() -> Vec<(Sysno, [i64; 4], &'static str)> {
    let (memory, executable) = (i64::from(libc::PROT_READ | libc::PROT_WRITE), i64::from(libc::PROT_EXEC));
    let anonymous = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let mut all = vec![
        (Sysno::clone, [0; 4], "another process"),
        (Sysno::clone, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0], "a namespace"),
        (Sysno::mmap, [0, 4096, memory | executable, anonymous], "memory that can be executed"),
        (Sysno::mprotect, [0, 4096, executable, 0], "memory that becomes executable"),
        (Sysno::tgkill, [1, 1, 9, 0], "a signal to another process"),
        (Sysno::prctl, [i64::from(libc::PR_SET_DUMPABLE), 1, 0, 0], "prctl"),
        (Sysno::prctl, [i64::from(libc::PR_SET_SECCOMP), 2, 0, 0], "prctl"),
        (Sysno::fcntl, [0, i64::from(libc::F_SETOWN), 1, 0], "signals to another process"),
        (Sysno::fcntl, [0, 10, 9, 0], "signals of another kind (F_SETSIG)"),
        (Sysno::rt_sigaction, [i64::from(libc::SIGSYS), 0x1000, 0, 8], "another handler of SIGSYS"),
        (Sysno::rt_sigaction, [i64::from(libc::SIGSYS), 1 << 40, 0, 8], "another handler of SIGSYS"),
    ];
    let families = [
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
        libc::AF_PACKET,
        libc::AF_VSOCK,
        libc::AF_ALG,
        libc::AF_XDP,
        0,
    ];
    all.extend(families.map(|family| (Sysno::socket, [i64::from(family), 1, 0, 0], "a socket")));
    // TIOCSTI, TIOCLINUX, TUNSETIFF, SIOCSIFFLAGS, BLKDISCARD, KVM_CREATE_DEVICE, UFFDIO_MOVE,
    // UFFDIO_API, FS_IOC_SETFLAGS, and one with something in its upper half.
    let requests = [
        0x5412,
        0x541c,
        0x4004_54ca,
        0x8914,
        0x1277,
        0xc00c_aee0,
        0xc028_aa05,
        0xc018_aa3f,
        0x4008_6602,
        1 << 40,
    ];
    all.extend(requests.map(|request| (Sysno::ioctl, [0, request, 0, 0], "an ioctl")));
    all
}

fn arguments_that_are_not_listed_end_the_process() -> usize {
    for thread in Thread::ALL {
        for (call, arguments, what) in arguments() {
            let (ended, said) = tried(thread, Mode::Kill, call.id().into(), arguments);
            assert_eq!(ended, Ok(EXIT_BAD_SYSCALL.into()), "{thread}: {what}: {call}{arguments:x?}: {said}");
        }
    }
    Thread::ALL.len() * arguments().len()
}

/// Numbers of the ABI with 32-bit pointers, which reach the same calls.
fn another_abi_ends_the_process() {
    for number in [0, 1, 59, 520] {
        let (ended, said) = tried(Thread::Vcpu, Mode::Kill, 0x4000_0000 | number, [0; 4]);
        assert_eq!(ended, Ok(EXIT_BAD_SYSCALL.into()), "x32 call {number}: {said}");
    }
}

fn the_mode_decides() {
    let uname = Sysno::uname.id().into();
    assert_eq!(tried(Thread::Vcpu, Mode::Errno, uname, [0; 4]), (Ok(libc::EPERM), String::new()));
    // Made with a bad pointer: it comes back from the kernel.
    for mode in [Mode::Log, Mode::Off] {
        assert_eq!(tried(Thread::Vcpu, mode, uname, [0; 4]), (Ok(CAME_BACK), String::new()), "{mode:?}");
    }
}

fn what_is_listed_is_made() {
    for thread in Thread::ALL {
        let (ended, said) = tried(thread, Mode::Kill, Sysno::gettid.id().into(), [0; 4]);
        assert_eq!((ended, said.as_str()), (Ok(CAME_BACK), ""), "{thread}");
        for allowed in seccomp::table::of(thread) {
            assert!(!allowed.why.is_empty() && !allowed.why.ends_with('.'), "{thread}: {allowed:?}");
        }
    }
}

fn main() {
    if !seccomp::is_available() {
        println!("SKIPPED every_call: this kernel has no filters of system calls");
        return;
    }
    what_is_listed_is_made();
    the_mode_decides();
    another_abi_ends_the_process();
    let arguments = arguments_that_are_not_listed_end_the_process();
    let calls = every_call_that_is_not_listed_ends_the_process();
    println!("{calls} calls and {arguments} arguments that are on no list: each ended its process");
}
