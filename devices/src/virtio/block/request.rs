//! One request: a header that the device reads, data in either direction, and a status byte that it
//! writes last (5.2.6).
//!
//! How the parts are divided into descriptors is the driver's business: the header is the first 16
//! bytes of the device-readable part, the status is the last byte of the device-writable part, and
//! what is between them is data.

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestMemoryError;

use super::disk::{
    DISCARD_RANGES, DISCARD_SECTORS, Disk, ID_BYTES, MAX_REQUEST_BYTES, SECTOR_BYTES, ZERO_RANGES,
    ZERO_SECTORS,
};
use crate::in_flight::InFlight;
use crate::virtio::Chain;
use crate::virtio::worker::Server;
use crate::warn::Limited;

const HEADER_BYTES: usize = 16;
/// Bytes of a range that is discarded or zeroed (5.2.6.1): its sector, its length, and flags.
const RANGE_BYTES: usize = 16;

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
    Beyond { sector: u64, bytes: u64, sectors: u64 },
    #[error("{bytes} bytes of ranges, expected 1 to {most} of {RANGE_BYTES}")]
    Ranges { bytes: u32, most: u32 },
    #[error("a range of {sectors} sectors, expected at most {most}")]
    Range { sectors: u32, most: u32 },
    #[error("flags {0:#x} of a range")]
    Flags(u32),
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
            Self::Type(_) | Self::Flags(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }

    fn count(&self, errors: &Errors) {
        let counter = match self {
            Self::Header(_) => &errors.malformed,
            Self::Type(_) => &errors.unknown,
            Self::Length(_) | Self::Beyond { .. } | Self::ReadOnly | Self::Name(_) => &errors.refused,
            Self::Ranges { .. } | Self::Range { .. } | Self::Flags(_) => &errors.refused,
            Self::Memory(_) | Self::File(_) | Self::Short { .. } => &errors.failed,
        };
        counter.hit(format_args!("{self}"));
    }
}

/// What requests are carried out with.
pub(super) struct Service {
    pub(super) disk: Disk,
    /// Hears of pages that the file is read into.
    pub(super) in_flight: Box<dyn InFlight>,
    pub(super) errors: Arc<Errors>,
}

impl Server for Service {
    /// Carries a request out and writes its status. Returns how many bytes of the device-writable part were written without a gap, from its
    /// start.
    fn serve(&mut self, write_through: bool, chain: &mut Chain<'_>) -> u32 {
        let Self { disk, in_flight, errors } = self;
        let in_flight = &**in_flight;
        // All but the status.
        let Some(data_bytes) = chain.writable_bytes().checked_sub(1) else {
            errors.malformed.hit(format_args!("{} readable bytes", chain.readable_bytes()));
            return 0;
        };
        let mut written = 0;
        let status = match carry_out(disk, write_through, in_flight, chain, data_bytes, &mut written) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(refusal) => {
                refusal.count(errors);
                refusal.status()
            }
        };
        let stored = chain.write_last(status as u8);
        // A status behind data that were not written is beyond the gap.
        written + u32::from(stored && written == data_bytes)
    }
}

/// `written` counts bytes of the device-writable data, also of a request that fails.
fn carry_out(
    disk: &mut Disk,
    write_through: bool,
    in_flight: &dyn InFlight,
    chain: &mut Chain<'_>,
    writable_bytes: u32,
    written: &mut u32,
) -> Result<(), Refusal> {
    let mut header = [0; HEADER_BYTES];
    let read = chain.read(&mut header);
    if read < HEADER_BYTES {
        return Err(Refusal::Header(read));
    }
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
    // The header was read.
    let readable_bytes = chain.readable_bytes() - HEADER_BYTES as u32;
    match kind {
        VIRTIO_BLK_T_IN => {
            let at = place_of_data(disk, sector, writable_bytes)?;
            disk.medium.seek(at)?;
            *written = chain.write_from(&mut disk.medium, writable_bytes as usize, in_flight)? as u32;
            if *written < writable_bytes {
                return Err(Refusal::Short {
                    at: at + u64::from(*written),
                    expected: disk.sectors * SECTOR_BYTES,
                });
            }
        }
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => {
            return Err(Refusal::ReadOnly);
        }
        VIRTIO_BLK_T_OUT => {
            let at = place_of_data(disk, sector, readable_bytes)?;
            disk.medium.seek(at)?;
            chain.read_into(&mut disk.medium, readable_bytes as usize)?;
            if write_through {
                disk.medium.sync()?;
            }
        }
        VIRTIO_BLK_T_DISCARD => discard(disk, chain, readable_bytes)?,
        VIRTIO_BLK_T_WRITE_ZEROES => {
            zero(disk, chain, readable_bytes)?;
            if write_through {
                disk.medium.sync()?;
            }
        }
        VIRTIO_BLK_T_FLUSH if disk.read_only => {}
        VIRTIO_BLK_T_FLUSH => disk.medium.sync()?,
        VIRTIO_BLK_T_GET_ID => {
            if (writable_bytes as usize) < ID_BYTES {
                return Err(Refusal::Name(writable_bytes));
            }
            *written = chain.write(&disk.id) as u32;
        }
        other => return Err(Refusal::Type(other)),
    }
    Ok(())
}

fn discard(disk: &mut Disk, chain: &mut Chain<'_>, bytes: u32) -> Result<(), Refusal> {
    for _ in 0..ranges(bytes, DISCARD_RANGES)? {
        let (at, bytes, flags) = range(disk, chain, DISCARD_SECTORS)?;
        match flags {
            // 5.2.6.2: also the one to unmap.
            0 => disk.medium.discard(at, bytes)?,
            flags => return Err(Refusal::Flags(flags)),
        }
    }
    Ok(())
}

fn zero(disk: &mut Disk, chain: &mut Chain<'_>, bytes: u32) -> Result<(), Refusal> {
    for _ in 0..ranges(bytes, ZERO_RANGES)? {
        let (at, bytes, flags) = range(disk, chain, ZERO_SECTORS)?;
        match flags {
            0 | VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => disk.medium.zero(at, bytes, flags != 0)?,
            flags => return Err(Refusal::Flags(flags)),
        }
    }
    Ok(())
}

/// How many ranges a request has.
fn ranges(bytes: u32, most: u32) -> Result<u32, Refusal> {
    let ranges = bytes / RANGE_BYTES as u32;
    match bytes.is_multiple_of(RANGE_BYTES as u32) && (1..=most).contains(&ranges) {
        true => Ok(ranges),
        false => Err(Refusal::Ranges { bytes, most }),
    }
}

/// The next range of a request: where in the file it begins, its bytes, its flags. Not empty, for
/// that a file system would refuse.
fn range(disk: &Disk, chain: &mut Chain<'_>, most: u32) -> Result<(u64, u64, u32), Refusal> {
    let mut bytes = [0; RANGE_BYTES];
    // The guest may change its memory, not how much of it there is.
    chain.read(&mut bytes);
    let [sector @ .., a, b, c, d, e, f, g, h] = bytes;
    let (sector, sectors) = (u64::from_le_bytes(sector), u32::from_le_bytes([a, b, c, d]));
    if !(1..=most).contains(&sectors) {
        return Err(Refusal::Range { sectors, most });
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    Ok((place(disk, sector, bytes)?, bytes, u32::from_le_bytes([e, f, g, h])))
}

/// Where in the file `bytes` bytes of data from `sector` on begin, if a request may have as many
/// and the disk has them.
fn place_of_data(disk: &Disk, sector: u64, bytes: u32) -> Result<u64, Refusal> {
    match bytes <= MAX_REQUEST_BYTES && u64::from(bytes).is_multiple_of(SECTOR_BYTES) {
        true => place(disk, sector, bytes.into()),
        false => Err(Refusal::Length(bytes)),
    }
}

/// Where in the file `bytes` bytes from `sector` on begin, if the disk has them.
fn place(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, Refusal> {
    let end = sector.checked_add(bytes / SECTOR_BYTES);
    match end.filter(|end| *end <= disk.sectors) {
        // The whole disk is a file, whose size fits.
        Some(_) => Ok(sector * SECTOR_BYTES),
        None => Err(Refusal::Beyond { sector, bytes, sectors: disk.sectors }),
    }
}
