//! A file that takes another's place whole, or not at all: written under a name of its own beside
//! it, and renamed when it is safe on disk. Its directory is held: what is renamed or removed is
//! what was made, whatever becomes of the path.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

/// Names that are tried.
const TRIES: u32 = 64;

/// A file that is to be at some path. Dropped before [`Self::commit`], it is gone.
#[derive(Debug)]
pub struct Replacement {
    directory: OwnedFd,
    name: OsString,
    made: OsString,
    file: File,
    is_committed: bool,
}

impl Replacement {
    /// An empty file, mode 0600, that is to take the place of `path`.
    ///
    /// # Errors
    /// There is something at the path that is not a regular file, or nothing can be made beside it.
    pub fn of(path: &Path) -> io::Result<Self> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let name = path.file_name().ok_or_else(|| invalid("it ends in no file's name"))?;
        // A slash at the end is a directory's, which `file_name` does not say.
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(invalid("it is a directory's: expected a file's"));
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent, flags, Mode::empty())?;
        match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
            Ok(_) => {
                return Err(invalid("there is something else than a regular file: expected one, or none"));
            }
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for number in 0..TRIES {
            let made = beside(name, number);
            match openat(&directory, &made, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => {
                    let file = File::from(file);
                    return Ok(Self { directory, name: name.into(), made, file, is_committed: false });
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "names of files that are to replace it are all in use",
        ))
    }

    /// The file that is written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file at the path now, if there is one, for reading.
    pub fn old(&self) -> io::Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match openat(&self.directory, &self.name, flags, Mode::empty()) {
            Ok(file) => Ok(Some(File::from(file))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether both are to be at one place.
    pub fn is_same_place(&self, other: &Self) -> io::Result<bool> {
        let (a, b) = (fstat(&self.directory)?, fstat(&other.directory)?);
        Ok((a.st_dev, a.st_ino, &self.name) == (b.st_dev, b.st_ino, &other.name))
    }

    /// Writes what is still in memory to the disk.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Puts it at its place; what was there is gone. To be called after [`Self::sync`].
    pub fn commit(mut self) -> io::Result<()> {
        renameat(&self.directory, &self.made, &self.directory, &self.name)?;
        self.is_committed = true;
        // The name, too.
        Ok(rustix::fs::fsync(&self.directory)?)
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.is_committed {
            let _ = unlinkat(&self.directory, &self.made, AtFlags::empty());
        }
    }
}

/// A hidden name: of this process, and short, for names have a limit.
fn beside(name: &OsStr, number: u32) -> OsString {
    let kept: String = name.to_string_lossy().chars().take(32).collect();
    format!(".{kept}.{}-{number}.tmp", std::process::id()).into()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn it_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "old").unwrap();
        let new = Replacement::of(&path).unwrap();
        new.file().write_all(b"new").unwrap();
        drop(new);
        assert_eq!((fs::read(&path).unwrap(), names(dir.path())), (b"old".into(), vec!["a".to_owned()]));
        let (new, twin) = (Replacement::of(&path).unwrap(), Replacement::of(&path).unwrap());
        assert!(new.is_same_place(&twin).unwrap());
        assert!(!new.is_same_place(&Replacement::of(&dir.path().join("b")).unwrap()).unwrap());
        drop(twin);
        new.file().write_all(b"new").unwrap();
        assert_eq!(new.old().unwrap().unwrap().metadata().unwrap().len(), 3);
        new.sync().unwrap();
        new.commit().unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(dir.path())), (b"new".into(), vec!["a".to_owned()]));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("link", &link).unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        rustix::fs::mknodat(CWD, dir.path().join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        for (name, said) in [
            ("link", "something else than a regular file"),
            ("d", "something else than a regular file"),
            ("fifo", "something else than a regular file"),
            ("d/", "directory"),
            ("..", "no file's name"),
            ("none/a", "No such file"),
            ("link/a", "Too many levels of symbolic links"),
        ] {
            let error = Replacement::of(&dir.path().join(name)).unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
        assert_eq!(names(dir.path()).len(), 3);
    }
}
