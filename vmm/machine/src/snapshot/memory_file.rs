//! A file with a guest's memory, as long as RAM.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use memory::flat::FlatError;
use memory::ram::Ram;
use os::named_file;
use vm_memory::{Bytes, GuestAddress};

use super::lease::FileLease;
use super::load_error::LoadError;
use crate::generation;
use crate::state::saved::PairV1;

/// What shows that a file was written to meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(meta: &Metadata) -> Self {
        Self {
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// A memory file, open, and as long as RAM.
pub(crate) struct MemoryFile {
    file: File,
    path: PathBuf,
    stamp: Stamp,
}

impl MemoryFile {
    pub(super) fn open(path: &Path, expected: u64, pair: Option<PairV1>) -> Result<Self, LoadError> {
        let failed = |source| LoadError::MemoryFile { path: path.into(), source };
        let (file, meta) = named_file::regular(path).map_err(failed)?;
        let found = meta.len();
        if found != expected {
            return Err(LoadError::Memory {
                path: path.into(),
                source: FlatError::Length { found, expected },
            });
        }
        if let Some(pair) = pair {
            let mut number = pair.number;
            file.read_exact_at(&mut number, generation::PAIR).map_err(failed)?;
            if number != pair.number {
                return Err(LoadError::Pair { path: path.into() });
            }
        }
        Ok(Self { file, path: path.into(), stamp: Stamp::of(&meta) })
    }

    /// Fills `ram` with it: maps it, if it `may_be_mapped` and a lease reports every other writer;
    /// else copies it.
    pub(crate) fn fill(&self, ram: &Ram, may_be_mapped: bool) -> Result<Option<FileLease>, LoadError> {
        let lease = may_be_mapped.then(|| FileLease::take(&self.file));
        let lease = lease.and_then(|taken| {
            taken.inspect_err(|error| tracing::debug!("the memory file is copied: no lease: {error}")).ok()
        });
        let filled = match &lease {
            Some(_) => ram.map_flat(&self.file),
            None => ram.load_flat(&self.file),
        };
        let now = self.file.metadata().map(|meta| Stamp::of(&meta));
        if now.is_ok_and(|now| now != self.stamp) {
            return Err(LoadError::Changed { path: self.path.clone() });
        }
        let filled = filled.map_err(|source| LoadError::Memory { path: self.path.clone(), source })?;
        // The guest has no part in it.
        let zeros = [0; size_of::<PairV1>()];
        ram.memory().write_slice(&zeros, GuestAddress(generation::PAIR)).map_err(|error| {
            let source = FlatError::Io { what: "fill guest memory", source: io::Error::other(error) };
            LoadError::Memory { path: self.path.clone(), source }
        })?;
        tracing::debug!(
            pages = filled,
            of = ram.pages().pages(),
            mapped = lease.is_some(),
            "memory is loaded"
        );
        Ok(lease)
    }
}
