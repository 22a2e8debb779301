//! Where the sectors of a disk are: in a file or block device, or in an overlay of one.
//!
//! A medium has a position, at which it reads and writes straight from and to guest memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use rustix::io::Errno;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::overlay::Overlay;
use super::zeros::{punch, write_zeros, zero_range};

/// Where the sectors are.
#[derive(Debug)]
pub enum Medium {
    /// In this file or block device; its position is the medium's.
    File(File),
    /// In an overlay over a file that is only read.
    Overlay(Box<Overlay>),
}

impl Medium {
    /// The file that it is, or the base of the overlay.
    pub fn file(&self) -> &File {
        match self {
            Self::File(file) => file,
            Self::Overlay(overlay) => overlay.base(),
        }
    }

    /// The file with what the guest has written, and where in it the disk begins; of a file that is the disk, that.
    pub fn top(&self) -> (&File, u64) {
        match self {
            Self::File(file) => (file, 0),
            Self::Overlay(overlay) => overlay.top(),
        }
    }

    /// Which blocks of an overlay the guest has written; None of a file that has the whole disk.
    pub(super) fn map(&self) -> Option<Vec<u8>> {
        match self {
            Self::File(_) => None,
            Self::Overlay(overlay) => Some(overlay.map().to_vec()),
        }
    }

    /// Sets the position.
    pub(super) fn seek(&mut self, at: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.seek(SeekFrom::Start(at)).map(drop),
            Self::Overlay(overlay) => {
                overlay.seek(at);
                Ok(())
            }
        }
    }

    /// Brings what was written to stable storage.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.sync_data(),
            Self::Overlay(overlay) => overlay.sync(),
        }
    }

    /// Gives the storage of `bytes` bytes back, if it can: what they read as afterwards is any bytes of the disk's, or zeros.
    pub(super) fn discard(&mut self, at: u64, bytes: u64) -> io::Result<()> {
        match self {
            Self::File(file) => match punch(file, at, bytes) {
                // It is a hint.
                Err(Errno::OPNOTSUPP) => Ok(()),
                done => Ok(done?),
            },
            Self::Overlay(overlay) => overlay.discard(at, bytes),
        }
    }

    /// Has `bytes` bytes read as zeros; `unmap` allows their storage to be given back.
    pub(super) fn zero(&mut self, at: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        match self {
            Self::File(file) => {
                let done = match unmap {
                    true => punch(file, at, bytes),
                    false => zero_range(file, at, bytes),
                };
                match done {
                    Err(Errno::OPNOTSUPP | Errno::INVAL) => write_zeros(file, at, bytes),
                    done => Ok(done?),
                }
            }
            Self::Overlay(overlay) => overlay.zero(at, bytes),
        }
    }
}

impl ReadVolatile for Medium {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        match self {
            Self::File(file) => file.read_volatile(buf),
            Self::Overlay(overlay) => overlay.read_volatile(buf),
        }
    }
}

impl WriteVolatile for Medium {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        match self {
            Self::File(file) => file.write_volatile(buf),
            Self::Overlay(overlay) => overlay.write_volatile(buf),
        }
    }
}
