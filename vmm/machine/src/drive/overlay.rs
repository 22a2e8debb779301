//! Where what a guest writes to a drive goes, if not to its file: a copy that shares its blocks where the file system can make one, and an
//! [`Overlay`](block::Overlay) otherwise.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::virtio::block::{self, Medium, OverlayError};
use rustix::fs::ioctl_ficlone;

use super::{DriveError, Layer, Overlay, lock};

impl Overlay {
    /// Opens the overlay of `base`, which is at `base_path` and has `bytes` bytes.
    pub(super) fn open(&self, base_path: &Path, base: File, bytes: u64) -> Result<Medium, DriveError> {
        let (path, overlay) = match self {
            Self::Temporary => {
                let dir = directory(base_path);
                let failed = |source| DriveError::TemporaryOverlay { dir: dir.clone(), source };
                let top = tempfile::tempfile_in(&dir).map_err(failed)?;
                if ioctl_ficlone(&top, &base).is_ok() {
                    return Ok(Medium::File(top));
                }
                return match block::Overlay::temporary(base, bytes, top) {
                    Ok(overlay) => Ok(Medium::Overlay(overlay.into())),
                    Err(source) => Err(failed(source)),
                };
            }
            Self::Kept(path) => (path, kept(path, base, base_path, bytes)?),
        };
        let failed = |source| DriveError::Overlay { path: path.clone(), base: base_path.into(), source };
        Ok(Medium::Overlay(overlay.map_err(failed)?.into()))
    }

    /// Whether it could be one now, of the drive at `base_path`.
    pub(super) fn check(&self, base_path: &Path) -> Result<(), DriveError> {
        let Self::Kept(path) = self else { return Ok(()) };
        let failed = |source: io::Error| DriveError::Overlay {
            path: path.clone(),
            base: base_path.into(),
            source: source.into(),
        };
        match path.metadata() {
            Ok(meta) if meta.is_file() => Ok(()),
            Ok(_) => Err(DriveError::NotAFile { path: path.clone() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                directory(path).metadata().map(drop).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Takes `,overlay` or `,overlay=FILE` from the end of a drive's argument.
    pub(super) fn from_argument(text: &[u8]) -> (&[u8], Option<Self>) {
        const OVERLAY: &[u8] = b",overlay";
        if let Some(rest) = text.strip_suffix(OVERLAY) {
            return (rest, Some(Self::Temporary));
        }
        let with_value = [OVERLAY, b"="].concat();
        match text.windows(with_value.len()).rposition(|window| window == with_value) {
            None => (text, None),
            Some(at) => {
                let file = OsStr::from_bytes(&text[at + with_value.len()..]);
                (&text[..at], Some(Self::Kept(file.into())))
            }
        }
    }
}

impl Layer {
    /// The overlay of `base`, which is at `base_path` and has `bytes` bytes, that goes on from it.
    pub(super) fn resume(self, base_path: &Path, base: File, bytes: u64) -> Result<Medium, DriveError> {
        let Some(map) = self.map else { return Ok(Medium::File(self.top)) };
        match block::Overlay::resumed(base, bytes, self.top, map) {
            Ok(overlay) => Ok(Medium::Overlay(overlay.into())),
            Err(source) => {
                Err(DriveError::Overlay { path: "what was captured".into(), base: base_path.into(), source })
            }
        }
    }
}

/// The overlay in the file at `path`, which is made if it is not there.
fn kept(
    path: &Path,
    base: File,
    base_path: &Path,
    bytes: u64,
) -> Result<Result<block::Overlay, OverlayError>, DriveError> {
    let flags = libc::O_NONBLOCK;
    let opened =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            let source = error.into();
            return Err(DriveError::Overlay { path: path.into(), base: base_path.into(), source });
        }
    };
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err(DriveError::NotAFile { path: path.into() });
    }
    lock(&file, path, false)?;
    Ok(block::Overlay::kept(base, bytes, file))
}

fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.into(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Drive;
    use super::*;

    fn drive(path: &Path, overlay: Overlay) -> Drive {
        Drive { path: path.into(), overlay: Some(overlay), ..Drive::default() }
    }

    #[test]
    fn many_have_overlays_of_one_drive_and_each_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base"), dir.path().join("top"));
        fs::write(&base, [7; 8192]).unwrap();
        let kept = drive(&base, Overlay::Kept(top.clone()));
        kept.check().unwrap();
        assert!(!top.exists(), "it was only looked at");
        let temporary = [(); 2].map(|()| drive(&base, Overlay::Temporary).open().unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "what ends with the VM has no name");
        let first = kept.open().unwrap();
        assert_eq!((first.sectors, first.read_only), (16, false));
        assert!(matches!(kept.open(), Err(DriveError::InUse { path }) if path == top));
        let writer = Drive { overlay: None, ..kept.clone() };
        assert!(matches!(writer.open(), Err(DriveError::InUse { path }) if path == base));
        drop((temporary, first));
        kept.open().unwrap();
        writer.open().unwrap();
        assert_eq!(fs::read(&base).unwrap(), [7; 8192]);
    }

    #[test]
    fn what_is_no_overlay_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (base, other) = (dir.path().join("base"), dir.path().join("other"));
        fs::write(&base, [7; 8192]).unwrap();
        fs::write(&other, [8; 8192]).unwrap();
        let refused = drive(&base, Overlay::Kept(other.clone())).open();
        assert!(
            matches!(refused, Err(DriveError::Overlay { source: OverlayError::Form, .. })),
            "{refused:?}"
        );
        assert_eq!(fs::read(&other).unwrap(), [8; 8192]);
        let nowhere = drive(&base, Overlay::Kept(dir.path().join("none/top")));
        assert!(matches!(nowhere.check(), Err(DriveError::Overlay { .. })));
        assert!(matches!(nowhere.open(), Err(DriveError::Overlay { .. })));
        let at_a_directory = drive(&base, Overlay::Kept(dir.path().into()));
        assert!(matches!(at_a_directory.check(), Err(DriveError::NotAFile { .. })));
        let both = Drive { read_only: true, ..drive(&base, Overlay::Temporary) };
        assert!(matches!(both.check(), Err(DriveError::ReadOnlyOverlay { .. })));
    }
}
