//! What is behind a block device, and how much of it a request may name.

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::medium::Medium;

/// Bytes of a sector: what requests count in, and the block size in the configuration space.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a disk's name.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most segments of a request, besides its header and its status.
pub const SEG_MAX: u32 = 64;
/// Most bytes of a segment.
pub const SIZE_MAX: u32 = 16 << 10;
/// Most bytes of a request's data.
pub const MAX_REQUEST_BYTES: u32 = SEG_MAX * SIZE_MAX;

/// Most sectors of a range that is discarded: 1 GiB.
pub const DISCARD_SECTORS: u32 = 1 << 21;
/// Most ranges of a request to discard.
pub const DISCARD_RANGES: u32 = 16;
/// Most sectors of a range that is zeroed: 64 MiB, for some file systems must write them.
pub const ZERO_SECTORS: u32 = 1 << 17;
/// Most ranges of a request to write zeros.
pub const ZERO_RANGES: u32 = 1;

/// What is behind the device.
#[derive(Debug)]
pub struct Disk {
    /// Open for reading, and unless `read_only` for writing.
    pub medium: Medium,
    /// Its size.
    pub sectors: u64,
    /// Whether writing is refused.
    pub read_only: bool,
    /// Its name (VIRTIO_BLK_T_GET_ID), padded with zeros.
    pub id: [u8; ID_BYTES],
}
