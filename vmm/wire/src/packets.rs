//! Packets on a Unix socket, in order and whole, some with a descriptor. What is in them is the
//! caller's.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A socket for packets.
pub fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends a packet.
pub fn send(socket: &UnixStream, packet: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let sent = match file {
        Some(file) => socket.send_with_fd(packet, file.as_raw_fd()),
        None => socket.send_with_fds(&[packet], &[]),
    };
    match sent {
        Ok(sent) if sent == packet.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
    }
}

/// The next packet, in `buffer`; what does not fit there is cut off. An end of file is an error.
pub fn receive<'a>(socket: &UnixStream, buffer: &'a mut [u8]) -> io::Result<(&'a [u8], Option<File>)> {
    let received = socket.recv_with_fd(buffer);
    match received.map_err(|error| io::Error::from_raw_os_error(error.errno()))? {
        (0, _) => Err(io::ErrorKind::UnexpectedEof.into()),
        (bytes, file) => Ok((&buffer[..bytes], file)),
    }
}
