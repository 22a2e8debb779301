//! Why a VM is not loaded from files.

use std::io;
use std::path::PathBuf;

use memory::flat::FlatError;
use thiserror::Error;

use crate::state::container::ContainerError;
use crate::state::setup::FileV1;

/// Why a VM is not loaded. Nothing was started.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The state file.
    #[error("Failed to get snapshot state from file: Failed to open snapshot file {path}", path = path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is none.
    #[error("Failed to get snapshot state from file: {path} cannot be used", path = path.display())]
    State {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: ContainerError,
    },
    /// Another process writes to it.
    #[error("{path} was changed while it was read: load it when no process writes to it", path = path.display())]
    Changed {
        /// Which.
        path: PathBuf,
    },
    /// What a daemon keeps.
    #[error("{path} is the state of an image that a daemon keeps: expected one that PUT /snapshot/create wrote", path = path.display())]
    Image {
        /// Which.
        path: PathBuf,
    },
    /// It says what no VM is.
    #[error("the state file says that the VM has {what} {found}: expected {expected}")]
    Machine {
        /// What.
        what: &'static str,
        /// What it says.
        found: String,
        /// What is possible.
        expected: String,
    },
    /// The memory file.
    #[error(
        "Failed to load guest memory: Error creating guest memory from file: Failed to load guest memory {path}",
        path = path.display()
    )]
    MemoryFile {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("Failed to load guest memory: Error creating guest memory from file {path}", path = path.display())]
    Memory {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: FlatError,
    },
    /// It belongs to another state file.
    #[error(
        "{path} is the memory of another snapshot than the state file: expected the file that was written with that. A host that died while \
         both were replaced leaves them so, and then neither is of use",
        path = path.display()
    )]
    Pair {
        /// Which.
        path: PathBuf,
    },
    /// The process that is to fill it.
    #[error("Failed to load guest memory: Error creating guest memory from uffd")]
    Handler(#[from] HandlerError),
    /// It is to be used with what replaces or moves pages.
    #[error(
        "memory that a process fills cannot be used with {0}: each page can have one userfaultfd, and it is that process's; leave {0} out, or \
         load it from a file"
    )]
    HandlerWith(&'static str),
    /// A drive is another file.
    #[error(
        "drive {id:?}: {path} is another file than when the snapshot was taken: it has {} bytes, device {}, inode {}, and had {} bytes, \
         device {}, inode {}; put that file there again",
        found.bytes, found.device, found.inode, expected.bytes, expected.device, expected.inode, path = path.display()
    )]
    Drive {
        /// Which.
        id: String,
        /// Where it is.
        path: PathBuf,
        /// What is there.
        found: Box<FileV1>,
        /// What was.
        expected: Box<FileV1>,
    },
    /// A drive cannot be looked at.
    #[error("drive {id:?} cannot be looked at")]
    DriveFile {
        /// Which.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Why there is no handler.
#[derive(Debug, Error)]
pub enum HandlerError {
    /// No process listens there.
    #[error("Failed to connect to UDS Unix stream")]
    Connect(#[source] io::Error),
    /// It is not told from others.
    #[error(
        "the process that listens there has ended, or cannot be held: a process that fills memory listens itself"
    )]
    Process(#[source] io::Error),
    /// This process may not have its memory filled.
    #[error(
        "Failed to create userfaultfd: check that /dev/userfaultfd may be opened, or that vm.unprivileged_userfaultfd is 1"
    )]
    Userfaultfd(#[source] io::Error),
    /// Its end would not be seen.
    #[error("Failed to watch the handler")]
    Watch(#[source] io::Error),
    /// It did not take the message.
    #[error("Failed to send the memory's regions to the handler")]
    Send(#[source] io::Error),
}
