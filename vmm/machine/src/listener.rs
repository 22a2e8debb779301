//! Unix sockets that are gone from the file system when the VM is.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use rustix::fs::Mode;
use thiserror::Error;

use super::timer::Timer;
use os::socket_file::State;
use os::{BindError, SocketFile};

/// How often a socket is checked to be where clients look for it.
const KEEP_INTERVAL: Duration = Duration::from_secs(1);

/// A socket that is gone from the file system when the VM is.
pub struct Listener {
    socket: UnixListener,
    file: SocketFile,
    /// Set if the socket is made again when its file has gone.
    keeper: Option<Timer>,
}

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum ListenerError {
    /// Its path cannot be had.
    #[error("the socket {path} cannot be made{hint}", path = path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What to do, where that is known; begins with a separator.
        hint: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    #[error("cannot make a timer")]
    Timer(#[source] io::Error),
    #[error("cannot duplicate a socket")]
    Duplicate(#[source] io::Error),
}

impl Listener {
    /// Makes a non-blocking socket at `path`, which must be free, or a socket without a listener;
    /// its mode is up to the umask.
    pub fn bind(path: &Path) -> Result<Self, ListenerError> {
        Self::of(path, Mode::RWXU | Mode::RWXG | Mode::RWXO)
    }

    /// As [`Self::bind`], but only this user can connect, whatever the umask is, at any moment.
    pub fn bind_private(path: &Path) -> Result<Self, ListenerError> {
        Self::of(path, Mode::RUSR | Mode::WUSR)
    }

    fn of(path: &Path, mode: Mode) -> Result<Self, ListenerError> {
        let failed = |hint, source| ListenerError::Socket { path: path.into(), hint, source };
        let (socket, file) = SocketFile::stream(path, mode).map_err(|e| match e {
            BindError::Living => {
                failed(": it is there already, and another VM uses it", io::ErrorKind::AddrInUse.into())
            }
            BindError::File => failed(
                ": it is there already, a file that is no socket, and is left as it is",
                io::ErrorKind::AddrInUse.into(),
            ),
            BindError::Link => failed(
                ": it is there already, a symbolic link, which is not followed",
                io::ErrorKind::AddrInUse.into(),
            ),
            BindError::Other(e) if e.kind() == io::ErrorKind::NotFound => {
                failed(": its directory does not exist", e)
            }
            BindError::Other(e) => failed("", e),
        })?;
        Ok(Self { socket, file, keeper: None })
    }

    /// Has the socket made again when its file is removed, also with its directory made anew.
    pub fn keep(mut self) -> Result<Self, ListenerError> {
        let timer = Timer::new().and_then(|timer| timer.every(KEEP_INTERVAL).map(|()| timer));
        self.keeper = Some(timer.map_err(ListenerError::Timer)?);
        Ok(self)
    }

    /// Another handle to the socket.
    pub fn socket(&self) -> Result<UnixListener, ListenerError> {
        self.socket.try_clone().map_err(ListenerError::Duplicate)
    }

    /// A client that has come.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        self.socket.accept().ok().map(|(stream, _)| stream)
    }

    /// Watches for clients as `clients`, and for the time to look after the file as `keeper`.
    pub(super) fn watch(&self, ops: &mut EventOps, clients: u32, keeper: u32) {
        let _ = ops.add(Events::with_data(&self.socket, clients, EventSet::IN));
        if let Some(timer) = &self.keeper {
            let _ = ops.add(Events::with_data(timer, keeper, EventSet::IN));
        }
    }

    /// Looks after the file: if it was removed, the socket is made again. What has come to its
    /// place stays.
    pub(super) fn look_after(&mut self, ops: &mut EventOps, clients: u32) {
        self.keeper.iter().for_each(Timer::clear);
        if self.file.state() != State::Gone {
            return;
        }
        // While its directory is not there, this fails, and is tried again.
        if let Ok((socket, file)) = SocketFile::stream(self.file.path(), Mode::RUSR | Mode::WUSR)
            && ops.add(Events::with_data(&socket, clients, EventSet::IN)).is_ok()
        {
            let _ = ops.remove(Events::empty_raw(self.socket.as_raw_fd()));
            (self.socket, self.file) = (socket, file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_private_socket_is_its_users_only_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind_private(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o177, 0);
        UnixStream::connect(&path).unwrap();
        assert!(listener.socket().unwrap().accept().is_ok());
        let again = Listener::bind_private(&path).err().unwrap();
        assert!(again.to_string().contains("it is there already, and another VM"), "{again}");
        assert!(path.exists(), "a socket that is another's was removed");
        drop(listener);
        assert!(!path.exists());
        let nowhere = Listener::bind_private(&dir.path().join("a/b")).err().unwrap();
        assert!(nowhere.to_string().contains("directory does not exist"), "{nowhere}");
    }
}
