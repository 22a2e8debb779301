//! What a VM's process may still do once its guest runs: what its VM needs, and nothing else.
//!
//! It imports `os` alone, and knows no VM: only kinds of threads, and what each may ask of the
//! kernel. Begin with [`prepare`], which a VM's process calls while it has one thread, and
//! [`enter`], which each of its threads calls as the last thing before it serves a guest. The table
//! of system calls is `seccomp/table.rs`.

mod allocator;
pub mod landlock;
mod privileges;
pub mod seccomp;

use std::sync::OnceLock;

use os::print::errln;
use thiserror::Error;

pub use landlock::Files;
pub use seccomp::{EXIT_BAD_SYSCALL, Mode, Thread};

/// What [`prepare`] was told, once for the process.
static PREPARED: OnceLock<Mode> = OnceLock::new();

/// Why a process cannot be confined.
#[derive(Debug, Error)]
pub enum JailError {
    #[error("cannot give up the right to gain privileges (PR_SET_NO_NEW_PRIVS)")]
    NoNewPrivileges(#[source] std::io::Error),
    #[error("cannot give up capabilities")]
    Capabilities(#[source] std::io::Error),
    #[error("cannot restrict which files the {thread} thread may open")]
    Landlock {
        thread: Thread,
        #[source]
        source: ::landlock::RulesetError,
    },
    #[error("cannot catch SIGSYS, which reports a forbidden system call")]
    Handler(#[source] std::io::Error),
    #[error("cannot make the filter of system calls for the {thread} thread")]
    Compile {
        thread: Thread,
        #[source]
        source: seccompiler::BackendError,
    },
    #[error("cannot install the filter of system calls for the {thread} thread")]
    Install {
        thread: Thread,
        #[source]
        source: seccompiler::Error,
    },
}

/// Readies this process, which has one thread, to be confined as `mode` says; `name` is its VM's, for
/// messages. Where the kernel has no filters the VM runs without, and a note says so.
pub fn prepare(name: &str, mode: Mode) -> Result<(), JailError> {
    allocator::one_arena();
    privileges::gain_none()?;
    let mode = match mode {
        Mode::Off => Mode::Off,
        _ if !seccomp::is_available() => {
            errln!(
                "note: {name}: this kernel has no filters of system calls (CONFIG_SECCOMP_FILTER): it runs without"
            );
            Mode::Off
        }
        mode => {
            seccomp::prepare(name)?;
            mode
        }
    };
    // A process is prepared once, by the VM that it is for.
    let _ = PREPARED.set(mode);
    Ok(())
}

/// Confines the calling thread for good, if this process was prepared: it has no capabilities, may open
/// no more files than those of its kind need, and make the system calls of its kind. A thread that cannot
/// be confined ends the process: nothing of a guest's has run then.
pub fn enter(thread: Thread) {
    enter_with(thread, &Files::Sockets(Vec::new()));
}

/// The same, of a thread that may open `files`.
pub fn enter_with(thread: Thread, files: &Files) {
    let Some(mode) = PREPARED.get() else { return };
    let entered = privileges::drop_capabilities()
        .and_then(|()| {
            landlock::restrict(thread, files).map_err(|source| JailError::Landlock { thread, source })
        })
        .and_then(|()| seccomp::install(thread, *mode));
    if let Err(error) = entered {
        errln!("error: {}", os::one_line(&error));
        std::process::exit(1);
    }
}
