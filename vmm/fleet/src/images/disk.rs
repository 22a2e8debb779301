//! What a captured guest had written to a drive with an overlay: a copy that the image keeps, and one of that for each clone.
//!
//! A copy shares its blocks where the file system can do that, and is as sparse as what it was made of. It has no name, and lies beside
//! the drive.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use machine::Drive;

/// What an overlay counts in.
const BLOCK_BYTES: u64 = 4096;
/// Bytes that are copied at once, where the kernel cannot.
const PIECE_BYTES: u64 = 1 << 20;

/// What was written to a drive.
#[derive(Debug)]
pub struct ImageDisk {
    /// Which drive.
    pub drive: u32,
    base: PathBuf,
    /// The drive's own file, as it was.
    was: Stamp,
    top: File,
    bytes: u64,
    /// Which blocks were written, in a sealed memfd; None: the whole disk.
    pub map: Option<File>,
}

/// By which another file, or one that was written since, is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = path.metadata()?;
        let modified = (meta.mtime(), meta.mtime_nsec());
        Ok(Self { device: meta.dev(), inode: meta.ino(), bytes: meta.len(), modified })
    }
}

impl ImageDisk {
    /// Copies what `top`, which a VM has sent, has from byte `start` on: `bytes` bytes, of which those in `map` count.
    pub(super) fn take(
        (drive, described): (u32, &Drive),
        top: &File,
        (start, bytes): (u64, u64),
        map: Option<File>,
    ) -> io::Result<Self> {
        let meta = top.metadata()?;
        if !meta.is_file() || described.overlay.is_none() {
            return Err(io::Error::other("it is none of what a guest writes to an overlay"));
        }
        let was = Stamp::of(&described.path)?;
        // Of a block device the length is not known here.
        let most = if was.bytes > 0 { was.bytes.next_multiple_of(BLOCK_BYTES) } else { u64::MAX };
        if bytes > most {
            return Err(io::Error::other(format!(
                "it says that the drive has {bytes} bytes: expected {most}"
            )));
        }
        // A disk may end in a part of a block that its file has not.
        let bytes = bytes.min(meta.len().saturating_sub(start));
        let copied = copy(top, start, bytes, directory(&described.path))?;
        Ok(Self { drive, base: described.path.clone(), was, top: copied, bytes, map })
    }

    /// A copy for one clone.
    ///
    /// # Errors
    /// The drive was written, or is another file.
    pub(super) fn copy(&self) -> io::Result<File> {
        if Stamp::of(&self.base)? != self.was {
            let base = self.base.display();
            return Err(io::Error::other(format!(
                "the drive {base} was written or replaced since the capture"
            )));
        }
        copy(&self.top, 0, self.bytes, directory(&self.base))
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `bytes` bytes of `from`, beginning at `start`, in a file without a name in `dir`.
fn copy(from: &File, start: u64, bytes: u64, dir: &Path) -> io::Result<File> {
    let to = tempfile::tempfile_in(dir)?;
    if start == 0 && ioctl_ficlone(&to, from).is_ok() {
        return Ok(to);
    }
    to.set_len(bytes)?;
    let (mut at, end) = (start, start + bytes);
    while at < end {
        // Beyond the last data there is a hole to the end.
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            // A file system that does not tell holes has data everywhere.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(from, SeekFrom::Hole(data)).map_or(end, |hole| hole.min(end));
        copy_range(from, data, &to, data - start, hole - data)?;
        at = hole;
    }
    Ok(to)
}

fn copy_range(from: &File, mut read_at: u64, to: &File, mut write_at: u64, bytes: u64) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let asked = usize::try_from(left).unwrap_or(usize::MAX);
        let (mut from_at, mut to_at) = (read_at, write_at);
        let copied =
            match copy_file_range(from.as_fd(), Some(&mut from_at), to.as_fd(), Some(&mut to_at), asked) {
                Ok(copied) => copied as u64,
                // Between file systems, or where there is no such call.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                    let mut piece = vec![0; left.min(PIECE_BYTES) as usize];
                    from.read_exact_at(&mut piece, read_at)?;
                    to.write_all_at(&piece, write_at)?;
                    piece.len() as u64
                }
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (read_at, write_at, left) = (read_at + copied, write_at + copied, left - copied);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use machine::Overlay;

    use super::*;

    #[test]
    fn a_copy_is_as_sparse_and_is_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::write(&base, vec![1; 1 << 20]).unwrap();
        let described = Drive { path: base.clone(), overlay: Some(Overlay::Temporary), ..Drive::default() };
        let top = tempfile::tempfile_in(dir.path()).unwrap();
        top.set_len((1 << 20) + 8192).unwrap();
        top.write_all_at(&[7; 4096], 8192 + 65536).unwrap();
        top.write_all_at(&[8; 4096], 8192 + (1 << 20) - 4096).unwrap();
        let disk = ImageDisk::take((0, &described), &top, (8192, 1 << 20), None).unwrap();
        let copies = [disk.copy().unwrap(), disk.copy().unwrap()];
        copies[0].write_all_at(&[9; 4096], 0).unwrap();
        top.write_all_at(&[6; 4096], 8192).unwrap();
        for (copy, first) in copies.iter().zip([9, 0]) {
            let mut bytes = vec![0; 1 << 20];
            copy.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!([bytes[0], bytes[4096], bytes[65536], bytes[(1 << 20) - 1]], [first, 0, 7, 8]);
            let meta = copy.metadata().unwrap();
            assert!(meta.len() == 1 << 20 && meta.blocks() * 512 < 1 << 18, "{} blocks", meta.blocks());
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "copies have no names");
        assert!(ImageDisk::take((0, &described), &top, (0, 2 << 20), None).is_err());
        let plain = Drive { overlay: None, ..described };
        assert!(ImageDisk::take((0, &plain), &top, (0, 4096), None).is_err());
        fs::write(&base, "other").unwrap();
        assert!(disk.copy().unwrap_err().to_string().contains("was written or replaced"));
    }
}
