//! One request: a header that the device reads, data in either direction, and a status byte that it writes last (5.2.6).
//!
//! How the parts are divided into descriptors is the driver's business: the header is the first 16 bytes of the device-readable part,
//! the status is the last byte of the device-writable part, and what is between them is data.

use std::io::{self, Seek, SeekFrom};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::GuestMemoryError;

use super::{Disk, ID_BYTES, MAX_REQUEST_BYTES, SECTOR_BYTES};
use crate::in_flight::InFlight;
use crate::virtio::Chain;
use crate::warn::Limited;

const HEADER_BYTES: usize = 16;

/// What drivers and files do wrong.
pub(super) struct Errors {
    malformed: Limited,
    refused: Limited,
    unknown: Limited,
    failed: Limited,
}

impl Errors {
    pub(super) fn new() -> Self {
        Self {
            malformed: Limited::new(
                "virtio-block: request without a place for its status, or without a header",
            ),
            refused: Limited::new("virtio-block: request that the disk cannot carry out"),
            unknown: Limited::new("virtio-block: request of an unknown type"),
            failed: Limited::new("virtio-block: the disk's file failed"),
        }
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> [u64; 4] {
        [&self.malformed, &self.refused, &self.unknown, &self.failed].map(Limited::count)
    }
}

/// What became of a request.
pub(super) struct Served {
    /// Bytes of the device-writable part that were written without a gap, from its start.
    pub(super) written: u32,
    /// Bytes that were to go between the file and guest memory.
    pub(super) moved_bytes: u32,
    /// It waited for stable storage.
    pub(super) slow: bool,
}

/// Why a request's status is not OK.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("a header of {0} bytes, expected {HEADER_BYTES}")]
    Header(usize),
    #[error("type {0:#x}")]
    Type(u32),
    #[error("{0} bytes of data, expected whole sectors of {SECTOR_BYTES} and at most {MAX_REQUEST_BYTES}")]
    Length(u32),
    #[error("{bytes} bytes from sector {sector} on, of {sectors} sectors")]
    Beyond { sector: u64, bytes: u32, sectors: u64 },
    #[error("a write to a read-only disk")]
    ReadOnly,
    #[error("{0} bytes for a name, expected {ID_BYTES}")]
    Name(u32),
    #[error("{0}")]
    Memory(#[from] GuestMemoryError),
    #[error("{0}")]
    File(#[from] io::Error),
    #[error("the file ends at byte {at} of {expected}: it is shorter than it was")]
    Short { at: u64, expected: u64 },
}

impl Refusal {
    fn status(&self) -> u32 {
        match self {
            Self::Type(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }

    fn count(&self, errors: &Errors) {
        let counter = match self {
            Self::Header(_) => &errors.malformed,
            Self::Type(_) => &errors.unknown,
            Self::Length(_) | Self::Beyond { .. } | Self::ReadOnly | Self::Name(_) => &errors.refused,
            Self::Memory(_) | Self::File(_) | Self::Short { .. } => &errors.failed,
        };
        counter.hit(format_args!("{self}"));
    }
}

/// What a request has done by its end, or by its failure.
#[derive(Default)]
struct Done {
    /// Bytes of the device-writable data.
    written: u32,
    moved_bytes: u32,
    slow: bool,
}

/// Carries a request out and writes its status.
pub(super) fn serve(
    disk: &Disk,
    write_through: bool,
    in_flight: &dyn InFlight,
    chain: &mut Chain<'_>,
    errors: &Errors,
) -> Served {
    // All but the status.
    let Some(data_bytes) = chain.writable_bytes().checked_sub(1) else {
        errors.malformed.hit(format_args!("{} readable bytes", chain.readable_bytes()));
        return Served { written: 0, moved_bytes: 0, slow: false };
    };
    let mut done = Done::default();
    let status = match carry_out(disk, write_through, in_flight, chain, data_bytes, &mut done) {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(refusal) => {
            refusal.count(errors);
            refusal.status()
        }
    };
    let stored = chain.write_last(status as u8);
    // A status behind data that were not written is beyond the gap.
    let whole = stored && done.written == data_bytes;
    Served { written: done.written + u32::from(whole), moved_bytes: done.moved_bytes, slow: done.slow }
}

fn carry_out(
    disk: &Disk,
    write_through: bool,
    in_flight: &dyn InFlight,
    chain: &mut Chain<'_>,
    writable_bytes: u32,
    done: &mut Done,
) -> Result<(), Refusal> {
    let mut header = [0; HEADER_BYTES];
    let read = chain.read(&mut header);
    if read < HEADER_BYTES {
        return Err(Refusal::Header(read));
    }
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
    match kind {
        VIRTIO_BLK_T_IN => {
            let at = place(disk, sector, writable_bytes)?;
            let mut file = &disk.file;
            file.seek(SeekFrom::Start(at))?;
            done.moved_bytes = writable_bytes;
            let read = chain.write_from(&mut file, writable_bytes as usize, in_flight)? as u32;
            done.written = read;
            if read < writable_bytes {
                return Err(Refusal::Short {
                    at: at + u64::from(read),
                    expected: disk.sectors * SECTOR_BYTES,
                });
            }
        }
        VIRTIO_BLK_T_OUT => {
            // The header was read.
            let bytes = chain.readable_bytes() - HEADER_BYTES as u32;
            if disk.read_only {
                return Err(Refusal::ReadOnly);
            }
            let at = place(disk, sector, bytes)?;
            let mut file = &disk.file;
            file.seek(SeekFrom::Start(at))?;
            done.moved_bytes = bytes;
            chain.read_into(&mut file, bytes as usize)?;
            if write_through {
                done.slow = true;
                disk.file.sync_data()?;
            }
        }
        VIRTIO_BLK_T_FLUSH if disk.read_only => {}
        VIRTIO_BLK_T_FLUSH => {
            done.slow = true;
            disk.file.sync_data()?;
        }
        VIRTIO_BLK_T_GET_ID => {
            if (writable_bytes as usize) < ID_BYTES {
                return Err(Refusal::Name(writable_bytes));
            }
            done.written = chain.write(&disk.id) as u32;
        }
        other => return Err(Refusal::Type(other)),
    }
    Ok(())
}

/// Where in the file `bytes` bytes from `sector` on begin, if the disk has them.
fn place(disk: &Disk, sector: u64, bytes: u32) -> Result<u64, Refusal> {
    if bytes > MAX_REQUEST_BYTES || !u64::from(bytes).is_multiple_of(SECTOR_BYTES) {
        return Err(Refusal::Length(bytes));
    }
    let end = sector.checked_add(u64::from(bytes) / SECTOR_BYTES);
    match end.filter(|end| *end <= disk.sectors) {
        // The whole disk is a file, whose size fits.
        Some(_) => Ok(sector * SECTOR_BYTES),
        None => Err(Refusal::Beyond { sector, bytes, sectors: disk.sectors }),
    }
}
