//! The tree that a file system is made of, as files of this user, and what the files are to be
//! instead.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use os::named_file;
use tar::{Archive, EntryType};

use crate::error::ImageError;
use crate::progress::{Progress, Watched};

/// The most bytes of a tree.
pub const MAX_BYTES: u64 = 256 << 30;
/// How deep a directory is walked.
const DEPTH_CAP: usize = 128;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// The files, and what differs.
pub(super) struct Tree {
    pub(super) dir: PathBuf,
    /// Bytes of all files.
    pub(super) bytes: u64,
    pub(super) files: u64,
    pub(super) owners: Vec<Owner>,
}

/// What a file is to be.
pub(super) struct Owner {
    /// In the tree.
    pub(super) path: PathBuf,
    /// With its type.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Tree {
    /// A directory as it is; of an ordinary user's, the files are root's.
    pub(super) fn of_dir(dir: &Path, progress: &mut dyn Progress) -> Result<Self, ImageError> {
        if !dir.join("bin").exists() && !dir.join("usr/bin").exists() {
            return Err(ImageError::NoTree(dir.into()));
        }
        progress.stage("looking at the tree", None);
        let mut tree = Self { dir: dir.into(), bytes: 0, files: 0, owners: Vec::new() };
        let me = rustix::process::geteuid().as_raw();
        tree.walk(Path::new(""), me, 0, progress)?;
        Ok(tree)
    }

    fn walk(
        &mut self,
        at: &Path,
        me: u32,
        depth: usize,
        progress: &mut dyn Progress,
    ) -> Result<(), ImageError> {
        if depth > DEPTH_CAP {
            return Err(ImageError::TreeName(at.into()));
        }
        let dir = self.dir.join(at);
        let failed = || ImageError::file("read", &dir);
        for entry in fs::read_dir(&dir).map_err(failed())? {
            if progress.stopped() {
                return Err(ImageError::Stopped);
            }
            let entry = entry.map_err(failed())?;
            let (path, meta) = (at.join(entry.file_name()), entry.metadata().map_err(failed())?);
            self.count(if meta.is_file() { meta.len() } else { 0 })?;
            progress.at(self.bytes);
            if me != 0 && meta.uid() == me {
                self.owners.push(Owner { path: path.clone(), mode: meta.mode(), uid: 0, gid: 0 });
            }
            if meta.is_dir() {
                self.walk(&path, me, depth + 1, progress)?;
            }
        }
        Ok(())
    }

    /// Unpacks an archive to `dir`, which is made.
    pub(super) fn of_tar(path: &Path, dir: &Path, progress: &mut dyn Progress) -> Result<Self, ImageError> {
        let (file, meta) = named_file::regular(path).map_err(ImageError::file("read", path))?;
        progress.stage("unpacking the tree", Some(meta.len()));
        fs::create_dir(dir).map_err(ImageError::file("make the directory", dir))?;
        let mut tree = Self { dir: dir.into(), bytes: 0, files: 0, owners: Vec::new() };
        let mut archive = Archive::new(Watched { inner: std::io::BufReader::new(file), bytes: 0, progress });
        let unpacked = tree.unpack(&mut archive, path);
        match archive.into_inner().progress.stopped() {
            true => Err(ImageError::Stopped),
            false => unpacked.map(|()| tree),
        }
    }

    fn unpack(&mut self, archive: &mut Archive<impl std::io::Read>, path: &Path) -> Result<(), ImageError> {
        let wrong = |source| ImageError::Archive { path: path.into(), source };
        archive.set_preserve_permissions(false);
        for entry in archive.entries().map_err(wrong)? {
            let mut entry = entry.map_err(wrong)?;
            let name = inside(&entry.path().map_err(wrong)?)?;
            let header = entry.header();
            let kind = match header.entry_type() {
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => REGULAR,
                EntryType::Directory => DIRECTORY,
                EntryType::Symlink => LINK,
                // Of the first name it has its owners.
                EntryType::Link => 0,
                // Guests have devtmpfs.
                EntryType::Char | EntryType::Block | EntryType::Fifo => continue,
                _ => continue,
            };
            let (mode, uid, gid) = (header.mode(), header.uid(), header.gid());
            let (mode, uid, gid) = (mode.map_err(wrong)?, uid.map_err(wrong)?, gid.map_err(wrong)?);
            self.count(if kind == REGULAR { entry.size() } else { 0 })?;
            // It follows no link out of the directory, and makes none of another's file.
            if !entry.unpack_in(&self.dir).map_err(wrong)? {
                return Err(ImageError::TreeName(name));
            }
            let at = self.dir.join(&name);
            if kind == REGULAR || kind == DIRECTORY {
                // `mke2fs` must be able to read it as any user, and what follows to be put in it.
                let readable = if kind == DIRECTORY { 0o755 } else { 0o644 };
                let failed = ImageError::file("set the mode of", &at);
                fs::set_permissions(&at, Permissions::from_mode(readable)).map_err(failed)?;
            }
            let is_top = name.as_os_str().is_empty();
            if kind != 0 && !is_top {
                let number =
                    |number: u64| u32::try_from(number).map_err(|_| ImageError::TreeName(name.clone()));
                let (uid, gid) = (number(uid)?, number(gid)?);
                self.owners.push(Owner { path: name.clone(), mode: kind | mode & 0o7777, uid, gid });
            }
        }
        Ok(())
    }

    fn count(&mut self, bytes: u64) -> Result<(), ImageError> {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        match self.bytes <= MAX_BYTES {
            true => Ok(()),
            false => Err(ImageError::TreeTooLarge { bytes: self.bytes, most: MAX_BYTES }),
        }
    }
}

/// The path of a member in the tree.
fn inside(path: &Path) -> Result<PathBuf, ImageError> {
    let mut name = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => name.push(part),
            Component::CurDir | Component::RootDir => {}
            _ => return Err(ImageError::TreeName(path.into())),
        }
    }
    Ok(name)
}
