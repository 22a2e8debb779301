//! The Ethernet segment that a network device is on.

use std::io;
use std::os::fd::BorrowedFd;

/// What the other side of a tap may leave undone in the frames that it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4,
    pub tso4: bool,
    /// over IPv6,
    pub tso6: bool,
    /// and with explicit congestion notification.
    pub ecn: bool,
}

/// An Ethernet segment: frames, each behind a header of [`bits::virtio_net_hdr_v1`]'s 12 bytes.
pub trait Tap: Send {
    /// Hands one frame to the host, without waiting.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;

    /// Takes one frame from the host into `frame`, without waiting: its length. `WouldBlock` if
    /// there is none.
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize>;

    /// From now on, what the guest's side of `offload` says may be left undone in frames for it.
    fn set_offload(&mut self, offload: Offload) -> io::Result<()>;

    /// What is readable when there is a frame.
    fn readable(&self) -> BorrowedFd<'_>;
}
