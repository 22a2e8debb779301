//! What can go wrong while reading another process.

use std::io;

use thiserror::Error;

use crate::Hva;

/// What can go wrong while reading another process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// There is no such process any more.
    #[error("process {pid} has exited")]
    Exited { pid: u32 },
    /// We may not.
    #[error(
        "process {pid} may not be read: that takes its owner's rights (and, with kernel.yama.ptrace_scope above 0, more than those), \
         or root's (CAP_SYS_PTRACE)"
    )]
    Denied { pid: u32 },
    /// Nothing is mapped there any more.
    #[error("address {hva} of process {pid} is not mapped any more")]
    Unmapped {
        pid: u32,
        /// The first byte that could not be read, at most a page off.
        hva: Hva,
    },
    /// The system call failed otherwise.
    #[error("/proc/{pid}/mem cannot be read")]
    Read {
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}
