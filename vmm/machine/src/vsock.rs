//! The host's side of a guest's sockets, as Firecracker has it: a Unix socket on which the host's programs ask for a port of the guest's, and
//! one for each port of the host's, `PATH_PORT`, which a program of the host's may have made.

use std::ffi::OsString;
use std::io;
use std::num::ParseIntError;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use devices::virtio::vsock::{self, MIN_CID};
use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::listener::{Listener, ListenerError};

/// A guest's sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's number, at least 3. It is known to the guest only, so any number of guests may have the same.
    pub cid: u32,
    /// Where the socket is made.
    pub path: PathBuf,
}

/// Why a guest cannot have sockets so.
#[derive(Debug, Error)]
pub enum VsockError {
    /// It is not said how.
    #[error("{0:?} does not describe a guest's sockets: expected cid=N,path=SOCKET")]
    Form(String),
    /// Its number is none.
    #[error("the CID {text:?} is not possible: expected a number from {MIN_CID} to {max}", max = u32::MAX - 1)]
    Cid {
        text: String,
        #[source]
        source: Option<ParseIntError>,
    },
    #[error(transparent)]
    Socket(#[from] ListenerError),
    #[error("cannot watch a guest's sockets")]
    Watch(#[source] io::Error),
}

impl Vsock {
    /// Whether the number can be a guest's.
    pub fn check(&self) -> Result<(), VsockError> {
        match (MIN_CID..u32::MAX).contains(&self.cid) {
            true => Ok(()),
            false => Err(VsockError::Cid { text: self.cid.to_string(), source: None }),
        }
    }

    /// The device, and what keeps its socket in the file system.
    pub(super) fn open(&self) -> Result<(vsock::Vsock, Held), VsockError> {
        self.check()?;
        let listener = Listener::bind(&self.path)?;
        let socket: UnixListener = listener.socket()?;
        let path = self.path.clone();
        let device = vsock::Vsock::new(self.cid, socket, Box::new(move |port| dial(&path, port)));
        Ok((device.map_err(VsockError::Watch)?, Held(listener)))
    }
}

/// Connects to the program that serves `port`, without waiting: one whose queue is full is as good as none.
fn dial(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(Path::new(&name))?)?;
    Ok(socket.into())
}

/// The socket's file, which goes with the VM.
pub(super) struct Held(#[expect(dead_code, reason = "dropped")] Listener);

impl MutEventSubscriber for Held {
    fn init(&mut self, _: &mut EventOps) {}

    fn process(&mut self, _: Events, _: &mut EventOps) {}
}

/// Reads what `samepage run --vsock` takes: `cid=N,path=SOCKET`, in either order.
impl FromStr for Vsock {
    type Err = VsockError;

    fn from_str(text: &str) -> Result<Self, VsockError> {
        let form = || VsockError::Form(text.to_owned());
        // A path may have commas in it, but then it is the last.
        let (cid, path) = match text.strip_prefix("cid=") {
            Some(rest) => rest.split_once(",path=").ok_or_else(form)?,
            None => {
                let (path, cid) = text.rsplit_once(",cid=").ok_or_else(form)?;
                (cid, path.strip_prefix("path=").ok_or_else(form)?)
            }
        };
        let number = cid.parse().map_err(|source| VsockError::Cid { text: cid.into(), source: Some(source) });
        let vsock = Self { cid: number?, path: path.into() };
        match path.is_empty() {
            true => Err(form()),
            false => vsock.check().map(|()| vsock),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_command_line_says() {
        let expected = Vsock { cid: 3, path: "a,b".into() };
        assert_eq!("cid=3,path=a,b".parse::<Vsock>().unwrap(), expected);
        assert_eq!("path=a,b,cid=3".parse::<Vsock>().unwrap(), expected);
        for text in [
            "",
            "3",
            "cid=3",
            "path=a",
            "cid=3,path=",
            "cid=2,path=a",
            "cid=4294967295,path=a",
            "cid=x,path=a",
        ] {
            let error = text.parse::<Vsock>().unwrap_err().to_string();
            assert!(error.contains("expected"), "{text}: {error}");
        }
    }
}
