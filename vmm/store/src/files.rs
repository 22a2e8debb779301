//! Files of one directory: opened beneath it and through no link, written and made durable step by step.
//!
//! A [`Hook`] sees each step that changes the disk before it is made. In the product there is none; tests end the process there, refuse the
//! step, or record it to cut the power at any instant. Both do the same steps.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Dir as Listing, FileType, Mode, OFlags, RenameFlags, ResolveFlags};

use crate::error::{Flaw, StoreError};

/// Bytes that are written in one step.
const WRITE_BYTES: usize = 1 << 16;

/// A change of the disk. Paths are relative to the store.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// A directory is made.
    MakeDir(&'a str),
    /// A file is made.
    Create(&'a str),
    /// Bytes are appended to it.
    Append(&'a str, &'a [u8]),
    /// Its contents are made durable.
    Sync(&'a str),
    /// It gets another name; what had that is gone.
    Rename(&'a str, &'a str),
    /// It is removed.
    Remove(&'a str),
    /// The names in a directory are made durable.
    SyncDir(&'a str),
}

/// Sees each step before it is made.
pub trait Hook: Send + Sync {
    /// An error: it is not made, and fails so.
    fn before(&self, step: Step<'_>) -> io::Result<()>;
}

/// A directory.
pub struct Dir {
    fd: OwnedFd,
    /// For messages.
    path: PathBuf,
    /// Its name in the store, with a slash behind it unless it is the store.
    inside: String,
    hook: Option<Arc<dyn Hook>>,
}

impl Dir {
    /// The directory at `path`, which is this user's alone. It is made if it is not there.
    pub fn open_root(path: &Path, hook: Option<Arc<dyn Hook>>) -> Result<Self, StoreError> {
        let failed = |what| move |source: io::Error| StoreError::File { what, path: path.into(), source };
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(failed("make the directory")(error.into())),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())
            .map_err(|error| failed("open the directory")(error.into()))?;
        let found = rustix::fs::fstat(&fd).map_err(|error| failed("look at")(error.into()))?;
        let own = rustix::process::geteuid().as_raw();
        let why = match (found.st_uid, found.st_mode & 0o777) {
            (uid, _) if uid != own => format!("it is of user {uid}"),
            (_, mode) if mode & 0o077 != 0 => format!("its mode is {mode:o}"),
            _ => return Ok(Self { fd, path: path.into(), inside: String::new(), hook }),
        };
        Err(StoreError::Untrusted { path: path.into(), why })
    }

    /// The directory in it. It is made if it is not there.
    pub fn open_dir(&self, name: &str) -> Result<Self, StoreError> {
        if let Err(error) = self.open(name, OFlags::DIRECTORY | OFlags::RDONLY) {
            if error != rustix::io::Errno::NOENT {
                return Err(self.failed("open the directory", name)(error.into()));
            }
            self.before(Step::MakeDir(&self.inside_of(name)))
                .map_err(self.failed("make the directory", name))?;
            match rustix::fs::mkdirat(&self.fd, name, Mode::RWXU) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(self.failed("make the directory", name)(error.into())),
            }
        }
        let fd = self
            .open(name, OFlags::DIRECTORY | OFlags::RDONLY)
            .map_err(|error| self.failed("open the directory", name)(error.into()))?;
        let (path, inside) = (self.path.join(name), format!("{}/", self.inside_of(name)));
        Ok(Self { fd, path, inside, hook: self.hook.clone() })
    }

    /// A file in it, for reading; None if there is none.
    pub fn file(&self, name: &str) -> Result<Option<File>, StoreError> {
        // A FIFO would wait.
        let file = match self.open(name, OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(fd) => File::from(fd),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.failed("open", name)(error.into())),
        };
        match file.metadata().map_err(self.failed("look at", name))?.is_file() {
            true => Ok(Some(file)),
            false => Err(self.damaged(name, Flaw::Inconsistent("it is no regular file"))),
        }
    }

    /// All that is in a file of `least` to `most` bytes; None if there is none.
    pub fn read(&self, name: &str, least: u64, most: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(file) = self.file(name)? else { return Ok(None) };
        let bytes = file.metadata().map_err(self.failed("look at", name))?.len();
        if !(least..=most).contains(&bytes) {
            return Err(self.damaged(name, Flaw::Length { bytes, least, most }));
        }
        let mut read = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
        // It may grow meanwhile.
        file.take(bytes).read_to_end(&mut read).map_err(self.failed("read", name))?;
        match read.len() as u64 == bytes {
            true => Ok(Some(read)),
            false => Err(self.damaged(name, Flaw::Length { bytes: read.len() as u64, least: bytes, most })),
        }
    }

    /// A file that is not there yet.
    pub fn create(&self, name: &str) -> Result<NewFile, StoreError> {
        let inside = self.inside_of(name);
        self.before(Step::Create(&inside)).map_err(self.failed("make", name))?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| self.failed("make", name)(error.into()))?;
        let (path, hook) = (self.path.join(name), self.hook.clone());
        Ok(NewFile { file: fd.into(), bytes: 0, path, inside, hook })
    }

    /// Has `from` be called `to`, and what was called so be gone; with `is_new` that is an error.
    pub fn rename(&self, from: &str, to: &str, is_new: bool) -> Result<(), StoreError> {
        self.before(Step::Rename(&self.inside_of(from), &self.inside_of(to)))
            .map_err(self.failed("rename", from))?;
        let flags = if is_new { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
        let renamed = match rustix::fs::renameat_with(&self.fd, from, &self.fd, to, flags) {
            // The file system does not know that; its caller has the store for itself, and has looked.
            Err(rustix::io::Errno::INVAL) if is_new => rustix::fs::renameat(&self.fd, from, &self.fd, to),
            renamed => renamed,
        };
        renamed.map_err(|error| self.failed("rename", from)(error.into()))
    }

    /// Removes a file. That there is none is no error.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        self.before(Step::Remove(&self.inside_of(name))).map_err(self.failed("remove", name))?;
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed("remove", name)(error.into())),
        }
    }

    /// Makes its names durable.
    pub fn sync(&self) -> Result<(), StoreError> {
        let failed = |source| StoreError::File { what: "write out", path: self.path.clone(), source };
        self.before(Step::SyncDir(self.inside.trim_end_matches('/'))).map_err(failed)?;
        rustix::fs::fsync(&self.fd).map_err(|error| failed(error.into()))
    }

    /// The names of what is in it, sorted: at most `most`.
    pub fn names(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let failed = |source: rustix::io::Errno| StoreError::File {
            what: "list",
            path: self.path.clone(),
            source: source.into(),
        };
        let mut names = Vec::new();
        for entry in Listing::read_from(&self.fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // What is no text is none of ours.
            let Some(name) = text(entry.file_name()) else { continue };
            if entry.file_type() == FileType::Directory || name == "." || name == ".." {
                continue;
            }
            if names.len() == most {
                let found = most as u64 + 1;
                return Err(StoreError::TooMany {
                    what: "files in a directory of the store",
                    found,
                    most: most as u64,
                });
            }
            names.push(name.to_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Bytes that a file takes on the disk; 0 if it is not there.
    pub fn disk_bytes(&self, name: &str) -> Result<u64, StoreError> {
        let Some(file) = self.file(name)? else { return Ok(0) };
        Ok(file.metadata().map_err(self.failed("look at", name))?.blocks() * 512)
    }

    /// The path of what is in it, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A file in it is not what it should be.
    pub fn damaged(&self, name: &str, why: Flaw) -> StoreError {
        StoreError::Damaged { path: self.path(name), why }
    }

    fn open(&self, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.fd, name, flags, Mode::empty(), resolve)
    }

    fn inside_of(&self, name: &str) -> String {
        format!("{}{name}", self.inside)
    }

    fn before(&self, step: Step<'_>) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook.before(step))
    }

    pub(crate) fn failed(&self, what: &'static str, name: &str) -> impl Fn(io::Error) -> StoreError + use<> {
        let path = self.path(name);
        move |source| StoreError::File { what, path: path.clone(), source }
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn text(name: &CStr) -> Option<&str> {
    name.to_str().ok()
}

/// A file that is being written.
pub struct NewFile {
    file: File,
    bytes: u64,
    path: PathBuf,
    inside: String,
    hook: Option<Arc<dyn Hook>>,
}

impl NewFile {
    /// Appends bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        for part in bytes.chunks(WRITE_BYTES) {
            let failed = |source| StoreError::File { what: "write to", path: self.path.clone(), source };
            if let Some(hook) = &self.hook {
                hook.before(Step::Append(&self.inside, part)).map_err(failed)?;
            }
            self.file.write_all_at(part, self.bytes).map_err(failed)?;
            self.bytes += part.len() as u64;
        }
        Ok(())
    }

    /// How long it is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it durable, but for its name.
    pub fn sync(&self) -> Result<(), StoreError> {
        let failed = |source| StoreError::File { what: "write out", path: self.path.clone(), source };
        if let Some(hook) = &self.hook {
            hook.before(Step::Sync(&self.inside)).map_err(failed)?;
        }
        self.file.sync_all().map_err(failed)
    }

    /// The file, for reading what was written.
    pub fn file(&self) -> &File {
        &self.file
    }
}
