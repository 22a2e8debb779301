//! A file mapped for reading.
#![expect(unsafe_code, reason = "maps a file")]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;

/// All bytes of a file, mapped privately and for reading only. To be used at once and dropped: should the file be
/// truncated meanwhile, the kernel ends this process (SIGBUS).
#[derive(Debug)]
pub struct MappedFile {
    start: *mut libc::c_void,
    bytes: usize,
}

impl MappedFile {
    /// Maps all of `file`, which is not empty, with its pages in place.
    pub fn new(file: &File) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        match start {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(Self { start, bytes }),
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has this length and lives as long as self. Another process that writes the file may
        // change the bytes under us: they are only ever copied, never interpreted in place.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes) }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrowed from it is left.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_is_its_bytes_and_an_empty_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [7u8; 5000]).unwrap();
        assert_eq!(&*MappedFile::new(&File::open(&path).unwrap()).unwrap(), &[7u8; 5000]);
        std::fs::write(&path, []).unwrap();
        assert!(MappedFile::new(&File::open(&path).unwrap()).is_err());
    }
}
