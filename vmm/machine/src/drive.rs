//! Drives: files that a guest has as disks. Opened, looked at and locked before the guest runs.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use devices::virtio::block::{Disk, ID_BYTES, SECTOR_BYTES};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use image::format::Format;

/// The most drives of one VM.
pub const MAX_DRIVES: usize = 4;

/// A file that a guest is to have as a disk, `/dev/vda` and so on in the order given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// The name that the guest sees; cut to 20 bytes.
    #[serde(default)]
    pub id: String,
    /// The file: raw sectors.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// Raw sectors whatever its first bytes are: a guest may have written any there.
    #[serde(default)]
    pub is_raw: bool,
}

/// Why a file cannot be a drive.
#[derive(Debug, Error)]
pub enum DriveError {
    /// There are too many.
    #[error("{asked} drives are not possible: expected at most {MAX_DRIVES}")]
    TooMany {
        /// What was asked for.
        asked: usize,
    },
    /// It cannot be opened.
    #[error("the drive {path} cannot be opened for {access}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What for.
        access: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a device, a FIFO.
    #[error("the drive {path} is not a regular file: expected a raw image", path = path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// There are no sectors.
    #[error("the drive {path} is empty: expected a raw image of at least {SECTOR_BYTES} bytes", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Its last sector is not whole.
    #[error(
        "the drive {path} has {bytes} bytes: expected a multiple of {SECTOR_BYTES}; is it a raw image? If it is, make a copy and \
         fill that up: `cp {path} COPY && truncate --size=%{SECTOR_BYTES} COPY`",
        path = path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// It is of another format, which a guest would see as it is in the file, and destroy by writing.
    #[error(
        "the drive {path} is {format}, and raw sectors are expected: {advice}. If a guest has written these bytes to a raw disk, say so: \
         `--drive {path},raw`, in a fleet file `format = \"raw\"`",
        path = path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        format: Format,
        /// What to do.
        advice: String,
    },
    /// Another VM has it, and one of the two would write it.
    #[error(
        "the drive {path} is in use: a drive that a guest may write cannot be shared; give every guest a copy of its own, or \
         have all of them read it only",
        path = path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Its file system has no locks.
    #[error("the drive {path} cannot be locked against others", path = path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Drive {
    /// Opens the file and locks it: for this VM alone, or with others that read it only.
    ///
    /// # Errors
    /// It is none that a guest can have.
    pub fn open(&self) -> Result<Disk, DriveError> {
        let (file, bytes) = self.look()?;
        let how = match self.read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        flock(&file, how).map_err(|error| match error {
            Errno::WOULDBLOCK => DriveError::InUse { path: self.path.clone() },
            error => DriveError::Lock { path: self.path.clone(), source: error.into() },
        })?;
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(self.id.bytes()).for_each(|(to, from)| *to = from);
        Ok(Disk { file, sectors: bytes / SECTOR_BYTES, read_only: self.read_only, id })
    }

    /// Whether the file could be a drive now; it is not locked.
    ///
    /// # Errors
    /// It could not.
    pub fn check(&self) -> Result<(), DriveError> {
        self.look().map(drop)
    }

    /// The file, open, and its length.
    fn look(&self) -> Result<(File, u64), DriveError> {
        let path = || self.path.clone();
        let access = if self.read_only { "reading" } else { "reading and writing" };
        // Opening a FIFO does not wait for its other end.
        let opened = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.path);
        let file = opened.map_err(|source| match source.kind() {
            io::ErrorKind::IsADirectory => DriveError::NotAFile { path: path() },
            _ => DriveError::Open { path: path(), access, source },
        })?;
        let meta = file.metadata().map_err(|source| DriveError::Open { path: path(), access, source })?;
        match meta.len() {
            _ if !meta.is_file() => Err(DriveError::NotAFile { path: path() }),
            0 => Err(DriveError::Empty { path: path() }),
            bytes => {
                self.check_format(&file).map_err(|source| DriveError::Open {
                    path: path(),
                    access,
                    source,
                })??;
                match bytes.is_multiple_of(SECTOR_BYTES) {
                    true => Ok((file, bytes)),
                    false => Err(DriveError::Length { path: path(), bytes }),
                }
            }
        }
    }

    /// Whether its first bytes are those of raw sectors.
    fn check_format(&self, file: &File) -> io::Result<Result<(), DriveError>> {
        if self.is_raw {
            return Ok(Ok(()));
        }
        let format = Format::of_file(file)?;
        let refused = format.and_then(|format| Some((format, format.refusal_as_drive(self.read_only)?)));
        Ok(match refused {
            None => Ok(()),
            Some((format, advice)) => Err(DriveError::Format { path: self.path.clone(), format, advice }),
        })
    }

    /// Reads what `samepage run --drive` takes: a path, and behind a comma `ro`, or `rw`, which it is otherwise too; and behind another
    /// `raw`. `number` is that of the drive, counted from 0, for its name.
    pub fn from_argument(text: &OsStr, number: usize) -> Self {
        let bytes = text.as_bytes();
        let (bytes, is_raw) = bytes.strip_suffix(b",raw").map_or((bytes, false), |rest| (rest, true));
        let (path, read_only) = match (bytes.strip_suffix(b",ro"), bytes.strip_suffix(b",rw")) {
            (Some(path), _) => (path, true),
            (_, Some(path)) => (path, false),
            _ => (bytes, false),
        };
        Self { id: Self::id(number), path: OsStr::from_bytes(path).into(), read_only, is_raw }
    }

    /// The default name of drive `number`, counted from 0.
    pub fn id(number: usize) -> String {
        format!("drive{number}")
    }
}

/// Opens all of a VM's drives, in order.
pub(super) fn open_all(drives: &[Drive]) -> Result<Vec<Disk>, DriveError> {
    match drives.len() {
        asked if asked > MAX_DRIVES => Err(DriveError::TooMany { asked }),
        _ => drives.iter().map(Drive::open).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn drive(path: &Path, read_only: bool) -> Drive {
        Drive { id: "a name that is too long for it".into(), path: path.into(), read_only, is_raw: false }
    }

    #[test]
    fn whole_sectors_make_a_drive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, [7; 1024]).unwrap();
        let disk = drive(&path, true).open().unwrap();
        assert_eq!((disk.sectors, disk.read_only, &disk.id), (2, true, b"a name that is too l"));
        fs::write(&path, []).unwrap();
        assert!(matches!(drive(&path, true).open(), Err(DriveError::Empty { .. })));
        fs::write(&path, [7; 1023]).unwrap();
        assert!(matches!(drive(&path, false).open(), Err(DriveError::Length { bytes: 1023, .. })));
    }

    #[test]
    fn another_format_is_no_drive_unless_it_is_said_to_be_raw() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut bytes = vec![0; 4096];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        fs::write(&path, &bytes).unwrap();
        for read_only in [false, true] {
            let error = drive(&path, read_only).check().unwrap_err().to_string();
            for words in ["a qcow2 disk image", "qemu-img convert -f qcow2 -O raw", ",raw"] {
                assert!(error.contains(words), "{error}");
            }
            Drive { is_raw: true, ..drive(&path, read_only) }.check().unwrap();
        }
        // What cannot be harmed by reading it may be read as it is.
        bytes[..6].copy_from_slice(b"\xfd7zXZ\0");
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(drive(&path, false).check(), Err(DriveError::Format { .. })));
        drive(&path, true).check().unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn only_files_make_a_drive() {
        let dir = tempfile::tempdir().unwrap();
        for read_only in [false, true] {
            assert!(matches!(drive(dir.path(), read_only).open(), Err(DriveError::NotAFile { .. })));
            let missing = drive(&dir.path().join("none"), read_only).open();
            assert!(matches!(missing, Err(DriveError::Open { .. })), "{missing:?}");
            assert!(matches!(
                drive(Path::new("/dev/null"), read_only).open(),
                Err(DriveError::NotAFile { .. })
            ));
        }
    }

    #[test]
    fn many_may_read_a_drive_and_only_one_may_write_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, [7; 512]).unwrap();
        let readers = [drive(&path, true).open().unwrap(), drive(&path, true).open().unwrap()];
        let refused = drive(&path, false).open();
        assert!(matches!(refused, Err(DriveError::InUse { .. })), "{refused:?}");
        drive(&path, false).check().unwrap();
        drop(readers);
        let writer = drive(&path, false).open().unwrap();
        for read_only in [false, true] {
            assert!(matches!(drive(&path, read_only).open(), Err(DriveError::InUse { .. })));
        }
        drop(writer);
        drive(&path, false).open().unwrap();
        let five = vec![drive(&path, true); 5];
        assert!(matches!(open_all(&five), Err(DriveError::TooMany { asked: 5 })));
        assert_eq!(open_all(&five[..4]).unwrap().len(), 4);
    }

    #[test]
    fn what_the_command_line_says() {
        for (text, path, read_only, is_raw) in [
            ("a.img", "a.img", false, false),
            ("a.img,ro", "a.img", true, false),
            ("a.img,rw", "a.img", false, false),
            ("a,ro,rw", "a,ro", false, false),
            ("a,b", "a,b", false, false),
            ("a.img,raw", "a.img", false, true),
            ("a.img,ro,raw", "a.img", true, true),
        ] {
            let parsed = Drive::from_argument(OsStr::new(text), 3);
            assert_eq!(parsed, Drive { id: "drive3".into(), path: path.into(), read_only, is_raw }, "{text}");
        }
    }
}
