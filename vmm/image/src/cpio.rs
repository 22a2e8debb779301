//! Writes cpio archives in the "newc" format, which is what Linux unpacks as its initramfs.
//!
//! The same entries give the same bytes: times and owners are 0 and inode numbers count up.
//! Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive that is being written.
#[derive(Debug)]
pub struct Cpio<W> {
    out: W,
    entries: u32,
    written: u64,
}

impl<W: Write> Cpio<W> {
    pub fn new(out: W) -> Self {
        Self { out, entries: 0, written: 0 }
    }

    /// Adds a directory; its parent must have been added before.
    pub fn directory(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, DIRECTORY | permissions, (0, 0), &[])
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | permissions, (0, 0), contents)
    }

    /// Adds a character device.
    pub fn character(&mut self, path: &str, permissions: u32, device: (u32, u32)) -> io::Result<()> {
        self.entry(path, CHARACTER | permissions, device, &[])
    }

    /// Ends the archive; returns its length in bytes.
    pub fn finish(mut self) -> io::Result<u64> {
        self.entries = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.written)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) -> io::Result<()> {
        let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
        let name_bytes = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_bytes, 0];
        let mut header = b"070701".to_vec();
        for field in fields {
            write!(header, "{field:08X}")?;
        }
        header.extend_from_slice(path.as_bytes());
        header.push(0);
        self.padded(&header)?;
        self.padded(contents)
    }

    /// Writes `bytes` and zeros up to a multiple of four.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.out.write_all(bytes)?;
        self.out.write_all(&[0; 4][..padding])?;
        self.written += (bytes.len() + padding) as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_readable() {
        let mut bytes = Vec::new();
        let mut cpio = Cpio::new(&mut bytes);
        cpio.directory("dev", 0o755).unwrap();
        cpio.character("dev/console", 0o600, (5, 1)).unwrap();
        cpio.file("init", 0o755, b"hello").unwrap();
        let written = cpio.finish().unwrap();
        assert_eq!(written, bytes.len() as u64);
        let text = |at: usize, len: usize| std::str::from_utf8(&bytes[at..at + len]).unwrap().to_string();
        let field = |at: usize, n: usize| u32::from_str_radix(&text(at + 6 + n * 8, 8), 16).unwrap();
        let (mut at, mut seen) = (0, Vec::new());
        loop {
            assert_eq!((text(at, 6).as_str(), at % 4), ("070701", 0));
            let (size, name_bytes) = (field(at, 6) as usize, field(at, 11) as usize);
            let name = text(at + 110, name_bytes - 1);
            let data = (at + 110 + name_bytes).next_multiple_of(4);
            if name == "TRAILER!!!" {
                break;
            }
            seen.push((name, field(at, 1), field(at, 9), field(at, 10), text(data, size)));
            at = (data + size).next_multiple_of(4);
        }
        let entry =
            |name: &str, mode, major, minor, data: &str| (name.into(), mode, major, minor, data.into());
        assert_eq!(
            seen,
            [
                entry("dev", 0o040_755, 0, 0, ""),
                entry("dev/console", 0o020_600, 5, 1, ""),
                entry("init", 0o100_755, 0, 0, "hello"),
            ]
        );
    }
}
