//! The file of a Unix socket: made by one process, replaced when nothing listens on it any more,
//! removed by its maker alone.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, fchmod, flock, fstat, open, statat};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;

use super::Peer;

/// How long another process may take to replace a socket in the same directory, or to end.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often that is checked.
const POLL: Duration = Duration::from_millis(10);
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a socket cannot be bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// A process listens there.
    #[error("a process listens on it already")]
    Living,
    /// There is something that is no socket.
    #[error("there is a file that is no socket, which is left as it is")]
    File,
    /// There is a symbolic link.
    #[error("there is a symbolic link, which is not followed")]
    Link,
    #[error(transparent)]
    Other(#[from] io::Error),
}

impl From<BindError> for io::Error {
    fn from(error: BindError) -> Self {
        match error {
            BindError::Other(e) => e,
            taken => Self::new(io::ErrorKind::AddrInUse, taken),
        }
    }
}

/// The file of a bound socket. Dropping it removes the file, if it is still this one.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// While it is held, no other file gets its inode number.
    file: OwnedFd,
}

impl SocketFile {
    /// A non-blocking stream socket at `path`. Its file has this mode less the umask from the
    /// beginning: bind gives it the mode of the socket itself.
    pub fn stream(path: &Path, mode: Mode) -> Result<(UnixListener, Self), BindError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(io::Error::from)?;
        fchmod(&socket, mode).map_err(io::Error::from)?;
        let file = Self::listen(&socket, path)?;
        Ok((socket.into(), file))
    }

    /// Binds `socket` (of any type) to `path` and listens. An existing socket on which nothing
    /// listens is replaced.
    pub fn listen(socket: impl AsFd, path: &Path) -> Result<Self, BindError> {
        let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
        let until = Instant::now() + PATIENCE;
        loop {
            // With the lock: until it listens, a socket looks like an abandoned one. In a directory
            // that cannot be locked nothing is replaced.
            let locked = lock_directory(path, until);
            match rustix::net::bind(&socket, &address) {
                Ok(()) => return Self::of(&socket, path),
                Err(rustix::io::Errno::ADDRINUSE) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
            match look(path)? {
                Found::Gone => {}
                Found::Stale => {
                    if let Err(e) = &locked {
                        return Err(
                            io::Error::new(e.kind(), format!("its directory cannot be locked: {e}")).into()
                        );
                    }
                    fs::remove_file(path)?;
                    // A process that does not take the lock may have been faster: then look again.
                    match rustix::net::bind(&socket, &address) {
                        Ok(()) => return Self::of(&socket, path),
                        Err(rustix::io::Errno::ADDRINUSE) => {}
                        Err(e) => return Err(io::Error::from(e).into()),
                    }
                }
                // A process that was killed while it started another: that one has its socket until
                // it runs another program.
                Found::Ending if Instant::now() < until => {}
                Found::Living | Found::Ending => return Err(BindError::Living),
            }
            drop(locked);
            thread::sleep(POLL);
        }
    }

    fn of(socket: &impl AsFd, path: &Path) -> Result<Self, BindError> {
        let file = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let file = Self { path: path.into(), file: file.map_err(io::Error::from)? };
        rustix::net::listen(socket, BACKLOG).map_err(io::Error::from)?;
        Ok(file)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The state of its path.
    pub fn state(&self) -> State {
        match (fstat(&self.file), statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)) {
            (Ok(own), Ok(there)) if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino) => State::There,
            (_, Err(rustix::io::Errno::NOENT)) => State::Gone,
            _ => State::Taken,
        }
    }
}

/// The state of a socket's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The socket.
    There,
    /// Nothing: it was removed.
    Gone,
    /// Something else.
    Taken,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // With the lock, no process that takes it can put another socket there in between.
        let _locked = lock_directory(&self.path, Instant::now() + PATIENCE);
        if self.state() == State::There {
            let _ = fs::remove_file(&self.path);
        }
    }
}

enum Found {
    Gone,
    Stale,
    Living,
    /// Connected to a process that has ended.
    Ending,
}

/// The state of a path where a socket is to be bound.
fn look(path: &Path) -> Result<Found, BindError> {
    let kind = match fs::symlink_metadata(path) {
        Ok(there) => there.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Gone),
        Err(e) => return Err(e.into()),
    };
    if kind.is_symlink() {
        return Err(BindError::Link);
    }
    if !kind.is_socket() {
        return Err(BindError::File);
    }
    Ok(match probe(path) {
        Err(rustix::io::Errno::CONNREFUSED) => Found::Stale,
        Err(rustix::io::Errno::NOENT) => Found::Gone,
        Ok(stream) if Peer::process(&stream).is_err() => Found::Ending,
        // Also one of another type, one whose queue is full, or one that this user may not ask.
        _ => Found::Living,
    })
}

/// Connects without waiting.
fn probe(path: &Path) -> rustix::io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Locks the directory that `path` is in, against other processes that replace sockets in it.
fn lock_directory(path: &Path, until: Instant) -> io::Result<OwnedFd> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fd = open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    loop {
        match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(fd),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(POLL),
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
        SocketFile::stream(path, Mode::RWXU)
    }

    #[test]
    fn only_a_socket_without_a_listener_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        // As after a SIGKILL: its maker has not removed it.
        drop(UnixListener::bind(&path).unwrap());
        let (_socket, file) = listen(&path).unwrap();
        assert!(matches!(listen(&path).unwrap_err(), BindError::Living));
        assert_eq!(file.state(), State::There);
        drop(file);
        assert!(!path.exists());
        fs::write(&path, "a user's").unwrap();
        assert!(matches!(listen(&path).unwrap_err(), BindError::File));
        assert_eq!(fs::read_to_string(&path).unwrap(), "a user's");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        assert!(matches!(listen(&link).unwrap_err(), BindError::Link));
        assert!(fs::symlink_metadata(&link).is_ok());
        assert!(matches!(listen(&dir.path().join("a/b")).unwrap_err(), BindError::Other(_)));
    }

    #[test]
    fn what_has_come_to_its_place_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        for other in ["a file", "a socket", "a link"] {
            let (_socket, file) = listen(&path).unwrap();
            fs::remove_file(&path).unwrap();
            assert_eq!(file.state(), State::Gone);
            match other {
                "a file" => fs::write(&path, other).unwrap(),
                // File systems give the next file the inode number that has just become free.
                "a socket" => drop(UnixListener::bind(&path).unwrap()),
                _ => std::os::unix::fs::symlink("nowhere", &path).unwrap(),
            }
            assert_eq!(file.state(), State::Taken);
            drop(file);
            assert!(fs::symlink_metadata(&path).is_ok(), "{other} was removed");
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn of_many_processes_that_replace_a_stale_socket_one_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = dir.path().join(format!("socket-{round}"));
            drop(UnixListener::bind(&path).unwrap());
            let results: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| listen(&path))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let winners: Vec<_> = results.iter().flatten().collect();
            assert!(winners.len() == 1 && winners[0].1.state() == State::There, "{results:?}");
        }
    }
}
