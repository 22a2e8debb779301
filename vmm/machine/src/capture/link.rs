//! What a VM that is captured and the keeper of its image say to each other: packets on a Unix socket, some with a descriptor. The VM asks,
//! the keeper answers. The keeper pays for the slabs, and keeps them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::SocketAddrUnix;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use wire::packets;

/// The longest packet.
const MAX_PACKET_BYTES: usize = 4096;

/// What the VM asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// An empty slab of this many pages.
    Draft(u64),
    /// The last one is filled and sealed, and has this many pages.
    Filled(u64),
    /// The slab whose file has the number `inode`, from anywhere, of which the memory has `used` pages.
    Known {
        /// The number.
        inode: u64,
        /// Pages.
        used: u64,
    },
    /// Forget the slabs so far: others come instead. Once at most.
    Restart,
    /// With a sealed file: which blocks of the drive that comes next the guest has written.
    Map,
    /// With the file that has what the guest has written to drive number `drive`, of `bytes` bytes, from byte `start` on: copy it now.
    /// All of it counts, unless a map came before.
    Disk {
        /// Which drive.
        drive: u32,
        /// Where in the file the disk begins.
        start: u64,
        /// Bytes of the disk.
        bytes: u64,
    },
    /// With a sealed file: this is the state, and that was all.
    State,
}

/// What the keeper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// With a descriptor: it is to be filled.
    Draft,
    /// The number of the slab in the image.
    Number(u32),
    /// Its number in the image and its pages; None: it is not known.
    Known(Option<(u32, u64)>),
    /// They are forgotten.
    Restarted,
    /// All is kept.
    Kept,
    /// It is not, for this reason.
    Refused(String),
}

/// One end.
#[derive(Debug)]
pub struct Link(UnixStream);

impl Link {
    /// Connects to the keeper at `path`. No call waits longer than `limit`.
    pub fn connect(path: &Path, limit: Duration) -> io::Result<Self> {
        let socket = socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::new(socket, limit)
    }

    /// The end that `socket` is.
    pub fn new(socket: OwnedFd, limit: Duration) -> io::Result<Self> {
        let stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self(stream))
    }

    /// Sends a packet, whole.
    pub fn send(&self, message: &impl Serialize, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = postcard::to_allocvec(message).map_err(io::Error::other)?;
        packets::send(&self.0, &bytes, file)
    }

    /// The next packet. An end of file is an error, and so is a packet that is none.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<(T, Option<File>)> {
        let mut buffer = [0; MAX_PACKET_BYTES];
        let (packet, file) = packets::receive(&self.0, &mut buffer)?;
        match postcard::take_from_bytes(packet) {
            Ok((message, [])) => Ok((message, file)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

pub use packets::socket;

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::*;

    #[test]
    fn packets_arrive_with_their_descriptors_and_rubbish_does_not() {
        let pair = || {
            let flags = SocketFlags::CLOEXEC;
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
        };
        let (a, b) = pair();
        let limit = Duration::from_secs(5);
        let (a, b) = (Link::new(a, limit).unwrap(), Link::new(b, limit).unwrap());
        let file = tempfile::tempfile().unwrap();
        file.set_len(77).unwrap();
        a.send(&Ask::State, Some(file.as_fd())).unwrap();
        let (message, file) = b.receive::<Ask>().unwrap();
        assert_eq!((message, file.unwrap().metadata().unwrap().len()), (Ask::State, 77));
        b.send(&Answer::Refused("why".into()), None).unwrap();
        assert_eq!(a.receive::<Answer>().unwrap().0, Answer::Refused("why".into()));
        a.send(&[9u8; 30], None).unwrap();
        assert_eq!(b.receive::<Ask>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(b.receive::<Ask>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
