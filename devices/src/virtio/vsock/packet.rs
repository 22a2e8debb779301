//! The header of a packet (Virtio 1.2, section 5.10.6): 44 bytes, little-endian, before the data.

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;
/// The most data in a packet that a driver sends.
pub(super) const MAX_DATA_BYTES: usize = 64 << 10;
/// The host, as guests address it.
pub(super) const HOST_CID: u64 = 2;
/// The only type that there is without further features.
pub(super) const STREAM: u16 = 1;

/// What a packet is about.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Its sender takes no more data,
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// or sends none.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes that the sender has room for in all,
    pub(super) buf_alloc: u32,
    /// and how many it has taken out so far.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        let kind_and_op = u32::from(self.kind) | u32::from(self.op) << 16;
        let words =
            [self.src_port, self.dst_port, self.len, kind_and_op, self.flags, self.buf_alloc, self.fwd_cnt];
        for (to, word) in bytes[16..].chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_is_written() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|n| n as u8);
        let header = Header::parse(&bytes);
        assert_eq!((header.kind, header.op, header.fwd_cnt), (0x1d1c, 0x1f1e, 0x2b2a_2928));
        assert_eq!(header.bytes(), bytes);
    }
}
