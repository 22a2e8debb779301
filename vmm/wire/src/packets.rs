//! Packets on a Unix socket, in order and whole, some with descriptors. What is in them is the
//! caller's.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socket_with, socketpair,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The most descriptors of one packet.
pub const MAX_FILES: usize = 128;
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_FILES));

/// A socket for packets.
pub fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Two that are connected to each other.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
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

/// Sends a packet with at most [`MAX_FILES`] descriptors. More are an error.
pub fn send_all(socket: &UnixStream, packet: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut room = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut room);
    // The room is rounded up.
    if files.len() > MAX_FILES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match sendmsg(socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)? {
        sent if sent == packet.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// The next packet, in `buffer`, and all of its descriptors. An end of file is an error, and so is a
/// packet that does not fit.
pub fn receive_all<'a>(socket: &UnixStream, buffer: &'a mut [u8]) -> io::Result<(&'a [u8], Vec<OwnedFd>)> {
    let mut room = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let received = loop {
        let into = &mut [IoSliceMut::new(buffer)];
        match recvmsg(socket, into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let files: Vec<OwnedFd> = files.flatten().collect();
    match received.bytes {
        _ if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) => {
            Err(io::ErrorKind::InvalidData.into())
        }
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        bytes => Ok((&buffer[..bytes], files)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn packets_arrive_whole_with_all_of_their_descriptors() {
        let (a, b) = pair().unwrap();
        let (a, b) = (UnixStream::from(a), UnixStream::from(b));
        let file = tempfile::tempfile().unwrap();
        file.set_len(77).unwrap();
        let mut buffer = [0; 16];
        for count in [0, 1, MAX_FILES] {
            send_all(&a, b"packet", &vec![file.as_fd(); count]).unwrap();
            let (packet, files) = receive_all(&b, &mut buffer).unwrap();
            assert_eq!((packet, files.len()), (&b"packet"[..], count));
            assert!(files.into_iter().all(|file| File::from(file).metadata().unwrap().len() == 77));
        }
        let most = send_all(&a, b"packet", &[file.as_fd(); MAX_FILES + 1]).unwrap_err();
        assert_eq!(most.kind(), io::ErrorKind::InvalidInput);
        send_all(&a, &[0; 17], &[]).unwrap();
        assert_eq!(receive_all(&b, &mut buffer).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(receive_all(&b, &mut buffer).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
