//! One frame with its header, on its way between a tap and guest memory.

/// Bytes of the header: `virtio_net_hdr_v1`, which every driver of Virtio 1.0 and later uses
/// whatever it accepts.
pub(super) const HEADER_BYTES: usize = 12;
/// Where in the header the number of buffers is, 2 bytes.
pub(super) const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// A header, and one of Ethernet.
pub(super) const MIN_BYTES: usize = HEADER_BYTES + 14;
/// As the least, with a VLAN tag and the longest packet of IPv4. Linux sends and accepts nothing
/// longer without features that are not offered.
pub(super) const MAX_BYTES: usize = MIN_BYTES + 4 + 65535;

/// Bytes of a frame without its header.
pub(super) fn bytes_on_wire(bytes: usize) -> u64 {
    bytes.saturating_sub(HEADER_BYTES) as u64
}

/// Room for one frame. Its memory is there once it has been used.
#[derive(Debug, Default)]
pub(super) struct Frame(Vec<u8>);

impl Frame {
    /// Room for `bytes`, with anything in it. None if that is more than a frame can have.
    pub(super) fn room(&mut self, bytes: usize) -> Option<&mut [u8]> {
        if bytes > MAX_BYTES {
            return None;
        }
        if self.0.len() < bytes {
            self.0.resize(bytes, 0);
        }
        Some(&mut self.0[..bytes])
    }

    /// Room for the longest.
    pub(super) fn whole(&mut self) -> &mut [u8] {
        self.0.resize(MAX_BYTES, 0);
        &mut self.0
    }

    /// Its first bytes, of which there is room for so many.
    pub(super) fn first(&mut self, bytes: usize) -> &mut [u8] {
        let end = bytes.min(self.0.len());
        &mut self.0[..end]
    }
}
