//! Unix sockets that are gone from the file system when the VM is.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::error::VmError;

/// A socket that is gone from the file system when the VM is.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes a non-blocking socket at `path`, which must be free; its mode is up to the umask.
    pub fn bind(path: &Path) -> Result<Self, VmError> {
        Self::of(path, UnixListener::bind(path))
    }

    /// As [`Self::bind`], but nobody else than this user can connect, whatever the umask is, at any moment.
    pub fn bind_private(path: &Path) -> Result<Self, VmError> {
        Self::of(path, listen_private(path))
    }

    fn of(path: &Path, socket: io::Result<UnixListener>) -> Result<Self, VmError> {
        let failed = |hint, source| VmError::Socket { path: path.into(), hint, source };
        let socket = socket.map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => {
                failed(": it is there already; another VM uses it, or one was killed (then remove it)", e)
            }
            io::ErrorKind::NotFound => failed(": its directory does not exist", e),
            _ => failed("", e),
        })?;
        let listener = Self { socket, path: path.into() };
        listener.socket.set_nonblocking(true).map_err(|e| failed("", e))?;
        Ok(listener)
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

/// Clients that may wait to be let in.
const BACKLOG: i32 = 128;

/// A listening socket of mode 0600 less the umask: bind gives the file the mode that the socket itself has.
fn listen_private(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG).inspect_err(|_| _ = std::fs::remove_file(path))?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_private_socket_is_its_users_only_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind_private(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o177, 0);
        UnixStream::connect(&path).unwrap();
        assert!(listener.socket().unwrap().accept().is_ok());
        let again = Listener::bind_private(&path).err().unwrap();
        assert!(again.to_string().contains("it is there already"), "{again}");
        assert!(path.exists(), "a socket that is another's was removed");
        drop(listener);
        assert!(!path.exists());
        let nowhere = Listener::bind_private(&dir.path().join("a/b")).err().unwrap();
        assert!(nowhere.to_string().contains("directory does not exist"), "{nowhere}");
    }
}
