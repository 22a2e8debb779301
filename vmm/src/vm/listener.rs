//! Unix sockets that are gone from the file system when the VM is.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::error::VmError;

/// A socket that is gone from the file system when the VM is.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes a non-blocking socket at `path`, which must be free; its mode is up to the umask.
    pub fn bind(path: &Path) -> Result<Self, VmError> {
        let failed = |hint, source| VmError::Socket { path: path.into(), hint, source };
        let socket = UnixListener::bind(path).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => {
                failed(": it is there already; another VM uses it, or one was killed (then remove it)", e)
            }
            io::ErrorKind::NotFound => failed(": its directory does not exist", e),
            _ => failed("", e),
        })?;
        socket.set_nonblocking(true).map_err(|e| failed("", e))?;
        Ok(Self { socket, path: path.into() })
    }

    /// Another handle to the socket.
    pub fn socket(&self) -> Result<UnixListener, VmError> {
        self.socket.try_clone().map_err(VmError::host("duplicate a socket"))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
