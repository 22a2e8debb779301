//! The store: its directory, its key, and its locks.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, ResolveFlags, flock, openat2};

use crate::checkpoint::{Checkpoint, HEAD_BYTES, Head, MAX_FILE_BYTES};
use crate::error::{Flaw, StoreError};
use crate::files::{Dir, Hook};
use crate::key::{DIGEST_BYTES, Key};
use crate::name::Name;
use crate::pack::{self, u32_at};

const MAGIC: &[u8; 8] = b"SPSTOR01";
const FORMAT: u32 = 1;
/// Magic, format, 0, key, BLAKE3 of all before.
const HEAD: usize = 16 + 32 + DIGEST_BYTES;
const HEAD_NAME: &str = "store";
const HEAD_DRAFT: &str = "store.new";
const LOCK_NAME: &str = "lock";
/// The most checkpoints, and the most packs.
pub const MAX_FILES: usize = 1 << 16;
/// How often it is looked whether another process has done.
const POLL: Duration = Duration::from_millis(20);

/// A store of checkpoints.
pub struct Store {
    pub(crate) root: Dir,
    pub(crate) packs: Dir,
    pub(crate) checkpoints: Dir,
    pub(crate) key: Key,
}

impl Store {
    /// The one in the directory `path`, which is made if it is not there; its parent is.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::with_hook(path, None)
    }

    /// The same, if it is there.
    pub fn find(path: &Path) -> Result<Option<Self>, StoreError> {
        match path.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            _ => Self::open(path).map(Some),
        }
    }

    /// The same, of which `hook` sees each step.
    pub fn with_hook(path: &Path, hook: Option<Arc<dyn Hook>>) -> Result<Self, StoreError> {
        let root = Dir::open_root(path, hook)?;
        let (packs, checkpoints) = (root.open_dir("packs")?, root.open_dir("checkpoints")?);
        let key = match read_key(&root)? {
            Some(key) => key,
            None => {
                let _lock = lock(&root, FlockOperation::NonBlockingLockExclusive, Duration::from_secs(10))?;
                match read_key(&root)? {
                    Some(key) => key,
                    None => make_key(&root, &packs, &checkpoints)?,
                }
            }
        };
        Ok(Self { root, packs, checkpoints, key })
    }

    /// Uses it as it is: others may do so meanwhile, and none changes it. Waits for that until `limit`.
    pub fn read(&self, limit: Duration) -> Result<Reading<'_>, StoreError> {
        Ok(Reading { store: self, _lock: lock(&self.root, FlockOperation::NonBlockingLockShared, limit)? })
    }

    /// Changes it: no other process uses it meanwhile. Waits for that until `limit`.
    pub fn write(&self, limit: Duration) -> Result<Writing<'_>, StoreError> {
        let lock = lock(&self.root, FlockOperation::NonBlockingLockExclusive, limit)?;
        Ok(Writing(Reading { store: self, _lock: lock }))
    }
}

fn read_key(root: &Dir) -> Result<Option<Key>, StoreError> {
    let Some(bytes) = root.read(HEAD_NAME, HEAD as u64, HEAD as u64)? else { return Ok(None) };
    let flaw = |why| Err(root.damaged(HEAD_NAME, why));
    let (content, digest) = bytes.split_at(HEAD - DIGEST_BYTES);
    if !content.starts_with(MAGIC) {
        return flaw(Flaw::Magic("a store"));
    }
    if u32_at(content, 8) != FORMAT {
        return flaw(Flaw::Format { found: u32_at(content, 8), known: FORMAT });
    }
    if blake3::hash(content).as_bytes() != digest {
        return flaw(Flaw::Digest("the key"));
    }
    let mut key = [0; 32];
    key.copy_from_slice(&content[16..]);
    Ok(Some(Key::new(key)))
}

/// Makes the key of a new store.
fn make_key(root: &Dir, packs: &Dir, checkpoints: &Dir) -> Result<Key, StoreError> {
    // With another key nothing that is there could be read.
    if !packs.names(MAX_FILES)?.is_empty() || !checkpoints.names(MAX_FILES)?.is_empty() {
        return Err(
            root.damaged(HEAD_NAME, Flaw::Inconsistent("it is not there, though the store has files"))
        );
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| {
        root.failed("get random numbers for", HEAD_NAME)(std::io::Error::other(error.to_string()))
    })?;
    let mut content = MAGIC.to_vec();
    content.extend(FORMAT.to_le_bytes());
    content.extend([0; 4]);
    content.extend(key);
    let digest = blake3::hash(&content);
    content.extend(digest.as_bytes());
    root.remove(HEAD_DRAFT)?;
    let mut draft = root.create(HEAD_DRAFT)?;
    draft.append(&content)?;
    draft.sync()?;
    root.rename(HEAD_DRAFT, HEAD_NAME, true)?;
    root.sync()?;
    Ok(Key::new(key))
}

/// A lock goes with the description of an open file: each has its own.
fn lock(root: &Dir, how: FlockOperation, limit: Duration) -> Result<File, StoreError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = openat2(
        root,
        LOCK_NAME,
        flags,
        Mode::RUSR | Mode::WUSR,
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
    .map_err(|error| root.failed("open", LOCK_NAME)(error.into()))?;
    let until = Instant::now() + limit;
    loop {
        match flock(&file, how) {
            Ok(()) => return Ok(file.into()),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(POLL),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(StoreError::Busy { path: root.path(""), limit });
            }
            Err(error) => return Err(root.failed("lock", LOCK_NAME)(error.into())),
        }
    }
}

/// A store that does not change meanwhile.
pub struct Reading<'s> {
    pub(crate) store: &'s Store,
    _lock: File,
}

impl<'s> Reading<'s> {
    /// The checkpoints that there are, by name.
    pub fn names(&self) -> Result<Vec<Name>, StoreError> {
        let files = self.store.checkpoints.names(MAX_FILES)?;
        // Others are what was being written when its writer was killed.
        Ok(files.iter().filter_map(|file| Name::new(file).ok()).collect())
    }

    /// A checkpoint. Its pages are read by [`Self::pages`].
    pub fn load(&self, name: &Name) -> Result<Checkpoint, StoreError> {
        let Store { checkpoints, key, .. } = self.store;
        let bytes = checkpoints.read(name.as_str(), HEAD_BYTES as u64, MAX_FILE_BYTES)?;
        let bytes = bytes.map_or_else(|| Err(self.missing(name)), Ok)?;
        Checkpoint::decode(&bytes, key).map_err(|why| checkpoints.damaged(name.as_str(), why))
    }

    /// What the writer of a checkpoint says of it. Its pages are not looked at.
    pub fn meta(&self, name: &Name) -> Result<Vec<u8>, StoreError> {
        let (head, front) = self.front(name)?;
        head.meta(&front, &self.store.key).map_err(|why| self.store.checkpoints.damaged(name.as_str(), why))
    }

    /// The packs that a checkpoint has pages in.
    pub(crate) fn packs_of(&self, name: &Name) -> Result<Vec<u64>, StoreError> {
        let (head, front) = self.front(name)?;
        head.packs(&front, &self.store.key).map_err(|why| self.store.checkpoints.damaged(name.as_str(), why))
    }

    /// The first part of a checkpoint's file, without the pages.
    fn front(&self, name: &Name) -> Result<(Head, Vec<u8>), StoreError> {
        let Store { checkpoints, key, .. } = self.store;
        let file = checkpoints.file(name.as_str())?.map_or_else(|| Err(self.missing(name)), Ok)?;
        let damaged = |why| checkpoints.damaged(name.as_str(), why);
        let failed = checkpoints.failed("read", name.as_str());
        let bytes = file.metadata().map_err(&failed)?.len();
        let (least, most) = (HEAD_BYTES as u64, MAX_FILE_BYTES);
        if !(least..=most).contains(&bytes) {
            return Err(damaged(Flaw::Length { bytes, least, most }));
        }
        let mut front = vec![0; HEAD_BYTES];
        file.read_exact_at(&mut front, 0).map_err(&failed)?;
        let head = Head::decode(&front, key).map_err(damaged)?;
        let least = head.front_bytes() as u64;
        if bytes < least {
            return Err(damaged(Flaw::Length { bytes, least, most }));
        }
        front.resize(head.front_bytes(), 0);
        file.read_exact_at(&mut front[HEAD_BYTES..], HEAD_BYTES as u64).map_err(&failed)?;
        Ok((head, front))
    }

    pub(crate) fn store(&self) -> &'s Store {
        self.store
    }

    /// The numbers of the packs of which there is a file.
    pub(crate) fn pack_ids(&self) -> Result<BTreeSet<u64>, StoreError> {
        Ok(self.store.packs.names(2 * MAX_FILES)?.iter().filter_map(|name| pack::id_of(name)).collect())
    }

    pub(crate) fn missing(&self, name: &Name) -> StoreError {
        let known = self.names().unwrap_or_default();
        let known = known.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
        StoreError::Missing {
            name: name.as_str().into(),
            path: self.store.root.path(""),
            known: if known.is_empty() { "none".into() } else { known },
        }
    }
}

/// A store that no other process uses meanwhile.
pub struct Writing<'s>(pub(crate) Reading<'s>);

impl<'s> Deref for Writing<'s> {
    type Target = Reading<'s>;

    fn deref(&self) -> &Reading<'s> {
        &self.0
    }
}

impl Writing<'_> {
    /// Removes a checkpoint. The pages that no other one has stay on the disk until [`Self::collect`].
    pub fn remove(&self, name: &Name) -> Result<(), StoreError> {
        let checkpoints = &self.store.checkpoints;
        if checkpoints.file(name.as_str()).is_ok_and(|file| file.is_none()) {
            return Err(self.missing(name));
        }
        checkpoints.remove(name.as_str())?;
        checkpoints.sync()
    }
}
