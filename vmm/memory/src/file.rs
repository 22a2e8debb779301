//! A file mapped for reading, of which no byte is believed to stay as it is.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::mmap::MmapRegion;
use vm_memory::volatile_memory::{Error, VolatileMemory};
use vm_memory::{FileOffset, ReadVolatile, VolatileSlice};

use super::page::to_usize;

/// All bytes of a file, mapped privately and for reading only; they are copied out and never
/// referred to, for another process that writes to the file may change them meanwhile. To be used
/// at once and dropped: should the file be truncated, the kernel ends this process (SIGBUS), which
/// is one VM's that was just being started.
#[derive(Debug)]
pub struct MappedFile {
    region: MmapRegion<()>,
    at: u64,
}

impl MappedFile {
    /// Maps all of `file`, which is not empty, with its pages in place.
    pub fn new(file: &File) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is empty"));
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_POPULATE;
        let from = FileOffset::new(file.try_clone()?, 0);
        let region =
            MmapRegion::build(Some(from), bytes, libc::PROT_READ, flags).map_err(io::Error::other)?;
        Ok(Self { region, at: 0 })
    }

    /// The next `most` bytes, or what is left of the file.
    fn next(&mut self, most: usize) -> Result<VolatileSlice<'_>, Error> {
        let bytes = self.region.size();
        let at = to_usize(self.at).min(bytes);
        let count = most.min(bytes - at);
        self.at += count as u64;
        self.region.as_volatile_slice().subslice(at, count)
    }
}

impl ReadVolatile for MappedFile {
    fn read_volatile<B: BitmapSlice>(&mut self, to: &mut VolatileSlice<'_, B>) -> Result<usize, Error> {
        let from = self.next(to.len())?;
        from.copy_to_volatile_slice(to.subslice(0, from.len())?);
        Ok(from.len())
    }
}

impl Read for MappedFile {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        Ok(self.next(to.len()).map_err(io::Error::other)?.copy_to(to))
    }
}

impl Seek for MappedFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => (self.region.size() as u64).checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{Backing, Ram};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_mapped_file_is_its_bytes_and_an_empty_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (mut mapped, mut read) = (MappedFile::new(&File::open(&path).unwrap()).unwrap(), Vec::new());
        mapped.read_to_end(&mut read).unwrap();
        assert_eq!(read, bytes);
        let mut piece = [0; 10];
        for (to, at) in [(SeekFrom::Start(7), 7), (SeekFrom::Current(-2), 15), (SeekFrom::End(-100), 4900)] {
            assert_eq!(mapped.seek(to).unwrap(), at);
            mapped.read_exact(&mut piece).unwrap();
            assert_eq!(piece[..], bytes[at as usize..][..10]);
        }
        assert!(mapped.seek(SeekFrom::Current(i64::MIN)).is_err());
        mapped.seek(SeekFrom::Start(u64::MAX)).unwrap();
        assert_eq!(mapped.read(&mut piece).unwrap(), 0, "behind its end there is nothing");
        std::fs::write(&path, []).unwrap();
        assert!(MappedFile::new(&File::open(&path).unwrap()).is_err());
    }

    #[test]
    fn guest_memory_is_filled_from_a_file_that_another_writes() {
        let (file, ram) = (tempfile::tempfile().unwrap(), Ram::new(16 << 20, Backing::Anonymous).unwrap());
        file.write_all_at(&[7; 100_000], 0).unwrap();
        let mut mapped = MappedFile::new(&file).unwrap();
        // A reference to the old bytes would be wrong now.
        file.write_all_at(&[9; 4096], 8192).unwrap();
        let memory = ram.memory();
        assert_eq!(memory.read_volatile_from(GuestAddress(1 << 20), &mut mapped, 200_000).unwrap(), 100_000);
        let mut read = vec![0; 100_001];
        memory.read_slice(&mut read, GuestAddress(1 << 20)).unwrap();
        assert_eq!(
            (read[..8192] == [7; 8192], &read[8192..8194], read[99_999], read[100_000]),
            (true, &[9, 9][..], 7, 0)
        );
    }
}
