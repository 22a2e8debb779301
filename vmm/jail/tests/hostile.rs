//! A VM's process that a guest has taken over: what it tries against its neighbours, the daemon and
//! the host from inside the walls. Each attempt is refused, and the neighbour is as it was. The
//! neighbour runs as the same user, which without walls may do most of it.
#![expect(unsafe_code, reason = "makes the system calls that an attacker would make")]

mod confined;

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use jail::{EXIT_BAD_SYSCALL, Files, Mode, Thread, landlock, seccomp};

use confined::{CAME_BACK, confined};

/// How an attempt is refused.
#[derive(Clone, Copy, PartialEq)]
enum Wall {
    /// The call ends the process.
    Seccomp,
    /// The call fails, by Landlock of this version or later where it is not 0.
    Fails(u32),
}

/// What it tries: 0, a descriptor or a count if that worked, -1 if it was refused.
type Attempt = Box<dyn Fn() -> i64>;

/// What stands to be harmed: a process of the same user, with a secret in its memory, and files.
struct Neighbour {
    child: libc::pid_t,
    secret: Box<[u8; 16]>,
}

impl Neighbour {
    fn new() -> Self {
        let secret = Box::new(*b"the secret bytes");
        // SAFETY: this process has one thread; the child waits until it is ended.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                // SAFETY: it waits for a signal, and for nothing else.
                unsafe { libc::pause() };
            }
        }
        assert!(child > 0, "no process can be made");
        Self { child, secret }
    }

    /// It lives, and its memory is as it was, as a process without walls sees it.
    fn verify(&self) {
        let mut seen = [0u8; 16];
        let here = libc::iovec { iov_base: seen.as_mut_ptr().cast(), iov_len: 16 };
        let there = libc::iovec { iov_base: self.secret.as_ptr().cast_mut().cast(), iov_len: 16 };
        // SAFETY: `seen` has room for 16 bytes; the other's memory is at the same place, for it was
        // forked.
        let read = unsafe { libc::process_vm_readv(self.child, &raw const here, 1, &raw const there, 1, 0) };
        assert_eq!((read, &seen), (16, &*self.secret), "the neighbour is not as it was");
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // SAFETY: it is this process's own child, which was not waited for.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
        }
    }
}

fn call(number: i64, arguments: [i64; 5]) -> Attempt {
    let [a, b, c, d, e] = arguments;
    // SAFETY: these calls reach no memory of this process but through null pointers.
    Box::new(move || unsafe { libc::syscall(number, a, b, c, d, e, 0) })
}

fn open(path: &str, flags: i32) -> Attempt {
    let path = CString::new(path).expect("a path");
    // SAFETY: the path is a string that ends in a zero.
    Box::new(move || unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, 0o600) }.into())
}

fn unlink(path: &str) -> Attempt {
    let path = CString::new(path).expect("a path");
    // SAFETY: the path is a string that ends in a zero.
    Box::new(move || unsafe { libc::unlink(path.as_ptr()) }.into())
}

fn attempts(neighbour: &Neighbour, own: &str, others: &str) -> Vec<(&'static str, Wall, Attempt)> {
    use Wall::{Fails, Seccomp};
    let pid = i64::from(neighbour.child);
    let secret = neighbour.secret.as_ptr() as i64;
    let of_neighbour = |name: &str| format!("/proc/{pid}/{name}");
    let (rw, create) = (libc::O_RDWR, libc::O_CREAT | libc::O_RDWR);
    let name = abstract_name();
    vec![
        // Other guests' memory.
        ("read its memory by /proc", Fails(1), open(&of_neighbour("mem"), libc::O_RDONLY)),
        ("write its memory by /proc", Fails(1), open(&of_neighbour("mem"), rw)),
        ("see its page table", Fails(1), open(&of_neighbour("pagemap"), libc::O_RDONLY)),
        ("reach its files by /proc", Fails(1), open(&of_neighbour("root/etc/passwd"), libc::O_RDONLY)),
        ("read its memory", Seccomp, call(libc::SYS_process_vm_readv, [pid, secret, 1, secret, 1])),
        ("write its memory", Seccomp, call(libc::SYS_process_vm_writev, [pid, secret, 1, secret, 1])),
        ("trace it", Seccomp, call(libc::SYS_ptrace, [i64::from(libc::PTRACE_SEIZE), pid, 0, 0, 0])),
        ("take its descriptors", Seccomp, call(libc::SYS_pidfd_getfd, [0, 0, 0, 0, 0])),
        ("a userfaultfd", Seccomp, call(libc::SYS_userfaultfd, [0; 5])),
        ("the device of userfaultfd", Fails(1), open("/dev/userfaultfd", rw)),
        // Other processes.
        ("kill it", Seccomp, call(libc::SYS_kill, [pid, 9, 0, 0, 0])),
        ("kill it by thread", Seccomp, call(libc::SYS_tgkill, [pid, pid, 9, 0, 0])),
        ("kill all", Seccomp, call(libc::SYS_kill, [-1, 9, 0, 0, 0])),
        ("signal it by a descriptor", Seccomp, call(libc::SYS_pidfd_send_signal, [0, 9, 0, 0, 0])),
        ("its scheduling", Seccomp, call(libc::SYS_sched_setscheduler, [pid, 0, secret, 0, 0])),
        ("its limits", Seccomp, call(libc::SYS_prlimit64, [pid, 7, 0, 0, 0])),
        // Sockets.
        (
            "an abstract socket",
            Fails(6),
            Box::new(move || {
                SocketAddr::from_abstract_name(&name)
                    .and_then(|at| UnixStream::connect_addr(&at))
                    .map_or(-1, |_| 0)
            }),
        ),
        ("a raw socket", Seccomp, call(libc::SYS_socket, [i64::from(libc::AF_PACKET), 3, 0, 0, 0])),
        ("the network", Seccomp, call(libc::SYS_socket, [i64::from(libc::AF_INET), 1, 0, 0, 0])),
        ("netlink", Seccomp, call(libc::SYS_socket, [i64::from(libc::AF_NETLINK), 3, 0, 0, 0])),
        // Files.
        ("read the daemon's file", Fails(1), open(&format!("{others}/file"), libc::O_RDONLY)),
        ("write the daemon's file", Fails(1), open(&format!("{others}/file"), libc::O_WRONLY)),
        (
            "truncate the daemon's file",
            Fails(1),
            open(&format!("{others}/file"), libc::O_WRONLY | libc::O_TRUNC),
        ),
        ("remove the daemon's file", Fails(1), unlink(&format!("{others}/file"))),
        ("fill the disk", Fails(1), open(&format!("{own}/filler"), create)),
        ("fill a temporary directory", Fails(1), open("/tmp/samepage-hostile-filler", create)),
        ("the host's passwords", Fails(1), open("/etc/shadow", libc::O_RDONLY)),
        ("a new device", Seccomp, call(libc::SYS_mknodat, [-100, 0, 0o20600, 0x101, 0])),
        ("/dev/kvm once more", Fails(1), open("/dev/kvm", rw)),
        (
            "its standing with the out-of-memory killer",
            Fails(1),
            open("/proc/self/oom_score_adj", libc::O_WRONLY),
        ),
        ("a setting of the kernel's", Fails(1), open("/proc/sys/kernel/core_pattern", libc::O_WRONLY)),
        // Programs and rights.
        ("fork", Seccomp, call(libc::SYS_fork, [0; 5])),
        ("clone", Seccomp, call(libc::SYS_clone, [0; 5])),
        ("clone3", Fails(0), call(libc::SYS_clone3, [0; 5])),
        ("run a program", Seccomp, call(libc::SYS_execve, [0; 5])),
        ("memory that can be executed", Seccomp, call(libc::SYS_mmap, [0, 4096, 7, 0x22, -1])),
        ("become root", Seccomp, call(libc::SYS_setuid, [0; 5])),
        ("take capabilities", Seccomp, call(libc::SYS_capset, [0; 5])),
        ("another namespace", Seccomp, call(libc::SYS_setns, [0; 5])),
        ("a namespace of its own", Seccomp, call(libc::SYS_unshare, [0x1000_0000, 0, 0, 0, 0])),
        ("mount", Seccomp, call(libc::SYS_mount, [0; 5])),
        ("a new mount", Seccomp, call(libc::SYS_fsopen, [0; 5])),
        ("another root", Seccomp, call(libc::SYS_chroot, [0; 5])),
        ("load a module", Seccomp, call(libc::SYS_finit_module, [0; 5])),
        ("load a module from memory", Seccomp, call(libc::SYS_init_module, [0; 5])),
        ("another kernel", Seccomp, call(libc::SYS_kexec_load, [0; 5])),
        ("bpf", Seccomp, call(libc::SYS_bpf, [0; 5])),
        ("perf", Seccomp, call(libc::SYS_perf_event_open, [0; 5])),
        ("io_uring, which no filter sees into", Seccomp, call(libc::SYS_io_uring_setup, [0; 5])),
        ("keys", Seccomp, call(libc::SYS_keyctl, [0; 5])),
        ("reboot", Seccomp, call(libc::SYS_reboot, [0; 5])),
        ("locked memory", Seccomp, call(libc::SYS_mlockall, [1, 0, 0, 0, 0])),
    ]
}

fn abstract_name() -> String {
    format!("samepage-hostile-{}", std::process::id())
}

fn main() {
    if !seccomp::is_available() {
        println!("SKIPPED hostile: this kernel has no filters of system calls");
        return;
    }
    let version = landlock::version().unwrap_or(0);
    let directory = std::env::temp_dir().join(format!("samepage-hostile-{}", std::process::id()));
    let (own, others) = (directory.join("own"), directory.join("others"));
    [&own, &others].into_iter().for_each(|path| fs::create_dir_all(path).expect("a directory"));
    fs::write(others.join("file"), "the daemon's").expect("a file");
    let address = SocketAddr::from_abstract_name(abstract_name()).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("a socket");
    let neighbour = Neighbour::new();
    neighbour.verify();
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let (mut refused, mut skipped) = (0, 0);
    for (what, wall, attempt) in attempts(&neighbour, &text(&own), &text(&others)) {
        if matches!(wall, Wall::Fails(needed) if version < needed) {
            println!("SKIPPED hostile: {what}: Landlock here is of version {version}");
            skipped += 1;
            continue;
        }
        let files = Files::Sockets(vec![own.clone()]);
        // The event loop may do more than any other thread.
        let (ended, said) = confined(Thread::EventLoop, Mode::Kill, &files, || match attempt() {
            -1 => libc::EACCES,
            _ => CAME_BACK,
        });
        let expected = match wall {
            Wall::Seccomp => EXIT_BAD_SYSCALL.into(),
            Wall::Fails(_) => libc::EACCES,
        };
        assert_eq!(ended, Ok(expected), "{what}: {said}");
        neighbour.verify();
        refused += 1;
    }
    assert_eq!(fs::read_to_string(others.join("file")).expect("it is there"), "the daemon's");
    assert!(!own.join("filler").exists() && listener.as_raw_fd() >= 0);
    drop(neighbour);
    fs::remove_dir_all(&directory).expect("it is ours");
    println!("{refused} attempts, each refused, and the neighbour is as it was; {skipped} skipped");
}
