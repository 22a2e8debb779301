//! Drives: files and block devices that a guest has as disks. Opened, looked at and locked before the guest runs.

mod overlay;

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use devices::virtio::block::{Disk, Handle, ID_BYTES, Medium, OverlayError, SECTOR_BYTES};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use image::format::Format;

/// The most drives of one VM.
pub const MAX_DRIVES: usize = 4;

/// A file or block device that a guest is to have as a disk, `/dev/vda` and so on in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What the guest writes goes elsewhere, and the file is only read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
}

/// Where what a guest writes goes, if not to its drive's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlay {
    /// To a file without a name, beside the drive's, which ends with the VM.
    Temporary,
    /// To this file, which is made if it is not there.
    Kept(PathBuf),
}

/// A drive that a VM has.
pub(super) struct Attached {
    pub id: String,
    /// Its file, or the base of its overlay.
    pub file: File,
    pub read_only: bool,
    /// Where what the guest writes goes, and where in that file the disk begins, if it has an overlay.
    pub top: Option<(File, u64)>,
    /// Bytes of the disk.
    pub bytes: u64,
    pub handle: Handle,
}

/// What a guest had written to a drive with an overlay, for one that goes on from there.
pub(crate) struct Layer {
    /// Which drive.
    pub(crate) drive: u32,
    /// The blocks, at their places. For this VM alone.
    pub(crate) top: File,
    /// Which blocks those are; None: the whole disk.
    pub(crate) map: Option<Vec<u8>>,
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
    /// It is a directory, a character device, a FIFO.
    #[error("the drive {path} is not a regular file or block device: expected a raw image", path = path.display())]
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
    /// It has an overlay that is not needed.
    #[error(
        "the drive {path} is to be read only, and has an overlay for what the guest writes: expected one of `ro` and `overlay` \
         (in a fleet file `read_only` and `overlay`)",
        path = path.display()
    )]
    ReadOnlyOverlay { path: PathBuf },
    /// A temporary overlay has no place.
    #[error(
        "no file for what the guest writes can be made in {dir}: expected a directory one can write to beside the drive, or a \
         place for the overlay: `overlay=FILE`, in a fleet file `overlay = \"FILE\"`",
        dir = dir.display()
    )]
    TemporaryOverlay {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file is no overlay of the drive.
    #[error("{path} cannot be the overlay of {base}", path = path.display(), base = base.display())]
    Overlay {
        path: PathBuf,
        base: PathBuf,
        #[source]
        source: OverlayError,
    },
    /// There is none of that name.
    #[error("there is no drive {id:?}: expected {known}")]
    Unknown {
        id: String,
        /// Those that there are.
        known: String,
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
        self.open_with(None)
    }

    /// The same, with an overlay that begins with what is in `layer`.
    fn open_with(&self, layer: Option<Layer>) -> Result<Disk, DriveError> {
        let (file, bytes) = self.open_file()?;
        let medium = match (&self.overlay, layer) {
            (None, _) => Medium::File(file),
            (Some(_), Some(layer)) => layer.resume(&self.path, file, bytes)?,
            (Some(overlay), None) => overlay.open(&self.path, file, bytes)?,
        };
        Ok(Disk { medium, sectors: bytes / SECTOR_BYTES, read_only: self.read_only, id: self.padded_id() })
    }

    /// The file, open and locked, and its length.
    pub(super) fn open_file(&self) -> Result<(File, u64), DriveError> {
        let (file, bytes) = self.look()?;
        lock(&file, &self.path, self.only_reads())?;
        Ok((file, bytes))
    }

    /// As [`Self::open`], in the place of a drive whose file is `old`, which is locked already: it may be the same one, of another length.
    pub(super) fn open_after(&self, old: &File) -> Result<Disk, DriveError> {
        let failed = |source| DriveError::Open { path: self.path.clone(), access: "reading", source };
        let (file, bytes) = self.look()?;
        let (ours, theirs) = (file.metadata().map_err(failed)?, old.metadata().map_err(failed)?);
        if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
            return self.open();
        }
        let medium = Medium::File(old.try_clone().map_err(failed)?);
        Ok(Disk { medium, sectors: bytes / SECTOR_BYTES, read_only: self.read_only, id: self.padded_id() })
    }

    /// Its name, as the guest sees it.
    fn padded_id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(self.id.bytes()).for_each(|(to, from)| *to = from);
        id
    }

    /// Whether the file could be a drive now; it is not locked.
    ///
    /// # Errors
    /// It could not.
    pub fn check(&self) -> Result<(), DriveError> {
        self.look()?;
        self.overlay.as_ref().map_or(Ok(()), |overlay| overlay.check(&self.path))
    }

    /// The files that it needs, and whether each is only read.
    pub fn files(&self) -> impl Iterator<Item = (&Path, bool)> {
        let kept = match &self.overlay {
            Some(Overlay::Kept(path)) => Some((path.as_path(), false)),
            _ => None,
        };
        std::iter::once((self.path.as_path(), self.only_reads())).chain(kept)
    }

    /// Whether its file is written.
    pub fn is_written(&self) -> bool {
        !self.only_reads()
    }

    /// Whether its file is only read.
    fn only_reads(&self) -> bool {
        self.read_only || self.overlay.is_some()
    }

    /// The file, open, and its length.
    fn look(&self) -> Result<(File, u64), DriveError> {
        let path = || self.path.clone();
        if self.read_only && self.overlay.is_some() {
            return Err(DriveError::ReadOnlyOverlay { path: path() });
        }
        let access = if self.only_reads() { "reading" } else { "reading and writing" };
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::IsADirectory => DriveError::NotAFile { path: path() },
            _ => DriveError::Open { path: path(), access, source },
        };
        let (file, bytes) = open_file(&self.path, self.only_reads()).map_err(failed)?;
        match bytes {
            None => Err(DriveError::NotAFile { path: path() }),
            Some(0) => Err(DriveError::Empty { path: path() }),
            Some(bytes) => {
                self.check_format(&file).map_err(failed)??;
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
        let refused = format.and_then(|format| Some((format, format.refusal_as_drive(self.only_reads())?)));
        Ok(match refused {
            None => Ok(()),
            Some((format, advice)) => Err(DriveError::Format { path: self.path.clone(), format, advice }),
        })
    }

    /// Reads what `samepage run --drive` takes: a path, and behind commas `ro`, or `rw`, which it is otherwise too; `overlay` or
    /// `overlay=FILE`; and `raw`, in this order. `number` is that of the drive, counted from 0, for its name.
    pub fn from_argument(text: &OsStr, number: usize) -> Self {
        let bytes = text.as_bytes();
        let (bytes, is_raw) = bytes.strip_suffix(b",raw").map_or((bytes, false), |rest| (rest, true));
        let (bytes, overlay) = Overlay::from_argument(bytes);
        let (path, read_only) = match (bytes.strip_suffix(b",ro"), bytes.strip_suffix(b",rw")) {
            (Some(path), _) => (path, true),
            (_, Some(path)) => (path, false),
            _ => (bytes, false),
        };
        Self { id: Self::id(number), path: OsStr::from_bytes(path).into(), read_only, is_raw, overlay }
    }

    /// The default name of drive `number`, counted from 0.
    pub fn id(number: usize) -> String {
        format!("drive{number}")
    }
}

/// Opens a file or block device, and finds its length; None if it is something else.
fn open_file(path: &Path, read_only: bool) -> io::Result<(File, Option<u64>)> {
    // Opening a FIFO does not wait for its other end.
    let open = |path: &Path, flags| {
        OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | flags).open(path)
    };
    let file = open(path, 0)?;
    let meta = file.metadata()?;
    if meta.is_file() {
        return Ok((file, Some(meta.len())));
    }
    if !meta.file_type().is_block_device() {
        return Ok((file, None));
    }
    // The same device, whatever the path now is: one that is mounted, or that others write, is not for a guest to write.
    let mut device = match read_only {
        true => file,
        false => open(&PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())), libc::O_EXCL)?,
    };
    let bytes = device.seek(SeekFrom::End(0))?;
    Ok((device, Some(bytes)))
}

/// Locks `file`, which is at `path`, with others that read it only, or alone.
fn lock(file: &File, path: &Path, only_reads: bool) -> Result<(), DriveError> {
    let how = match only_reads {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    flock(file, how).map_err(|error| match error {
        Errno::WOULDBLOCK => DriveError::InUse { path: path.into() },
        error => DriveError::Lock { path: path.into(), source: error.into() },
    })
}

/// Opens all of a VM's drives, in order; `layers` are what overlays begin with.
pub(super) fn open_all(drives: &[Drive], mut layers: Vec<Layer>) -> Result<Vec<Disk>, DriveError> {
    let mut layer = |number: usize| {
        let at = layers.iter().position(|layer| layer.drive as usize == number)?;
        Some(layers.swap_remove(at))
    };
    match drives.len() {
        asked if asked > MAX_DRIVES => Err(DriveError::TooMany { asked }),
        _ => drives.iter().enumerate().map(|(number, drive)| drive.open_with(layer(number))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn drive(path: &Path, read_only: bool) -> Drive {
        Drive {
            id: "a name that is too long for it".into(),
            path: path.into(),
            read_only,
            ..Drive::default()
        }
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
        assert!(matches!(open_all(&five, Vec::new()), Err(DriveError::TooMany { asked: 5 })));
        assert_eq!(open_all(&five[..4], Vec::new()).unwrap().len(), 4);
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
            let expected = Drive { id: "drive3".into(), path: path.into(), read_only, is_raw, overlay: None };
            assert_eq!(parsed, expected, "{text}");
        }
        for (text, path, overlay, is_raw) in [
            ("a.img,overlay", "a.img", Overlay::Temporary, false),
            ("a.img,overlay,raw", "a.img", Overlay::Temporary, true),
            ("a,overlay=b,overlay=c,d", "a,overlay=b", Overlay::Kept("c,d".into()), false),
        ] {
            let parsed = Drive::from_argument(OsStr::new(text), 3);
            assert_eq!((parsed.path, parsed.overlay, parsed.is_raw), (path.into(), Some(overlay), is_raw));
        }
    }
}
