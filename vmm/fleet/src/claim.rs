//! The name of a fleet, claimed by the one process that may start, adopt and end its guests.
//!
//! The claim is a socket in the abstract namespace, which goes with its process and not with a directory. So two daemons never have one
//! fleet, and one whose directory was removed can still be asked.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use twox_hash::XxHash3_128;

use super::HostError;
use super::runtime::{resolved, root};
use os::Peer;

/// How long a process that was just starting another when it was killed is given to be gone.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A claimed name. It is free again when this is dropped, or the process ends.
#[derive(Debug)]
pub struct Claim(UnixListener);

impl Claim {
    /// Claims the name of a fleet.
    ///
    /// # Errors
    /// Another process has it: which one is said.
    pub fn take(fleet: &str) -> Result<Self, HostError> {
        let failed = |source| HostError::Claim { fleet: fleet.into(), source };
        let name = name_in(&root(), fleet);
        let address = SocketAddr::from_abstract_name(&name).map_err(failed)?;
        let until = Instant::now() + PATIENCE;
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(socket) => {
                    socket.set_nonblocking(true).map_err(failed)?;
                    return Ok(Self(socket));
                }
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                Err(e) => return Err(failed(e)),
            }
            match connect_to(&name).and_then(|stream| Ok((Peer::of(&stream)?, stream))) {
                Ok((peer, _)) if !peer.is_this_user() => {
                    return Err(HostError::ClaimOfOther {
                        fleet: fleet.into(),
                        pid: peer.pid,
                        uid: peer.uid,
                    });
                }
                Ok((peer, stream))
                    if Peer::process(&stream).is_ok_and(|process| !process.is_ending())
                        || Instant::now() > until =>
                {
                    return Err(HostError::UpAlready { fleet: fleet.into(), pid: peer.pid });
                }
                Err(_) if Instant::now() > until => {
                    return Err(HostError::UpAlready { fleet: fleet.into(), pid: 0 });
                }
                _ => thread::sleep(POLL),
            }
        }
    }

    /// Where clients connect that find no socket in the file system. They must be of this user: it has no permissions of its own.
    pub fn listener(&self) -> &UnixListener {
        &self.0
    }
}

/// Connects to the process that has claimed the name of a fleet. `WouldBlock`: it has, but accepts no connection, as a demo that was asked often.
pub fn connect(fleet: &str) -> io::Result<UnixStream> {
    let stream = connect_to(&name_in(&root(), fleet))?;
    match Peer::of(&stream)?.is_this_user() {
        true => Ok(stream),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Does not wait.
fn connect_to(name: &str) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// One for each user, runtime directory, and fleet.
fn name_in(root: &Path, fleet: &str) -> String {
    let root = resolved(root);
    let place = XxHash3_128::oneshot(root.as_os_str().as_encoded_bytes());
    let user = rustix::process::getuid().as_raw();
    format!("samepage/{user}/{place:032x}/{fleet}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_holder_at_a_time() {
        let name = format!("claim-test-{}", std::process::id());
        let claim = Claim::take(&name).unwrap();
        let refused = Claim::take(&name).unwrap_err().to_string();
        assert!(refused.contains(&std::process::id().to_string()), "{refused}");
        Claim::take(&format!("{name}-2")).unwrap();
        let stream = connect(&name).unwrap();
        assert_eq!(Peer::process(&stream).unwrap().pid(), std::process::id());
        drop((claim, stream));
        assert!(connect(&name).is_err());
        drop(Claim::take(&name).unwrap());
    }

    #[test]
    fn a_holder_that_accepts_no_connection_holds_no_client_up() {
        let name = format!("claim-test-full-{}", std::process::id());
        let _claim = Claim::take(&name).unwrap();
        let full = (0..100_000).find_map(|_| connect(&name).err());
        assert_eq!(full.map(|e| e.kind()), Some(io::ErrorKind::WouldBlock));
        assert!(matches!(Claim::take(&name), Err(HostError::UpAlready { .. })));
    }

    #[test]
    fn the_longest_names_fit() {
        let name = name_in(Path::new("/a/very/long/directory".repeat(50).as_str()), &"n".repeat(32));
        SocketAddr::from_abstract_name(name).unwrap();
    }
}
