//! Puts a finished image in its place, whole or not at all.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::error::ImageError;
use super::files::{DESCRIPTION_FILE, INITRD_FILE, KERNEL_FILE, PACKED_KERNEL_FILE};

/// Name of the link to the image made last.
const LATEST: &str = "latest";

/// Refuses a destination that is anything but absent, empty, or an image of ours.
pub(super) fn check(dir: &Path) -> Result<(), ImageError> {
    let occupied = |found: String| ImageError::Occupied { path: dir.into(), found };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(ImageError::file("use as the output directory", dir)(e)),
    };
    let ours = [KERNEL_FILE, PACKED_KERNEL_FILE, INITRD_FILE, DESCRIPTION_FILE];
    for entry in entries {
        let name = entry.map_err(ImageError::file("read the directory", dir))?.file_name();
        if !ours.iter().any(|o| *o == name) {
            return Err(occupied(name.to_string_lossy().into_owned()));
        }
    }
    Ok(())
}

/// Moves the directory `staged` to `dir`, exchanging it for an image that is there.
pub(super) fn publish(staged: &Path, dir: &Path) -> Result<(), ImageError> {
    check(dir)?;
    let put = || ImageError::file("put the image at", dir);
    // A link to a directory is followed: the directory is replaced, not the link.
    let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.into());
    // One step each. Not every file system has these; plain renames serve there.
    for flags in [RenameFlags::NOREPLACE, RenameFlags::EXCHANGE] {
        if renameat_with(CWD, staged, CWD, &dir, flags).is_ok() {
            // An old image is now where the new one was, in the temporary directory.
            return Ok(());
        }
    }
    if fs::rename(staged, &dir).is_ok() {
        return Ok(());
    }
    let old = staged.with_extension("old");
    fs::rename(&dir, &old).map_err(put())?;
    fs::rename(staged, &dir).map_err(|e| {
        // If the old one cannot be put back either, nothing better is left to do.
        let _ = fs::rename(&old, &dir);
        put()(e)
    })
}

/// Points `root/latest` to `name`; `work` is a directory on the same file system.
pub(super) fn link_latest(root: &Path, work: &Path, name: &str) -> Result<(), ImageError> {
    let (temporary, link) = (work.join(LATEST), root.join(LATEST));
    symlink(name, &temporary).map_err(ImageError::file("make the link", &temporary))?;
    fs::rename(&temporary, &link).map_err(ImageError::file("make the link", &link))
}

/// Makes `dir` and its missing parents; returns those that it made, outermost first.
pub(super) fn make_dirs(dir: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let missing = dir.ancestors().take_while(|d| !d.as_os_str().is_empty() && !d.exists());
    let mut made: Vec<_> = missing.map(Path::to_path_buf).collect();
    made.reverse();
    fs::create_dir_all(dir).map_err(|e| {
        remove_dirs(&made);
        ImageError::file("make the directory", dir)(e)
    })?;
    Ok(made)
}

/// Removes what [`make_dirs`] made, as far as it is empty.
pub(super) fn remove_dirs(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        // Another process may use it by now; then it stays.
        let _ = fs::remove_dir(dir);
    }
}
