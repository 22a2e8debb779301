//! Writes a VM that stands still to files.
//!
//! Both files are written under other names beside their places and renamed when they are safe on disk: a snapshot that fails leaves what
//! was there, and of the guest's pages none is forgotten. The two renames are not one: a host that dies between them leaves the new memory
//! beside the old state. Both have a number that no other snapshot has, so that these are not taken for a pair; but the older memory is gone. So a
//! snapshot that is to be kept is not overwritten, but written elsewhere.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use memory::PageSet;
use memory::flat::{self, FlatError, Zeros};
use os::replacement::Replacement;
use thiserror::Error;

use crate::capture::CaptureError;
use crate::generation::{self, GenerationError};
use crate::running::Running;
use crate::state::saved::{Around, PairV1, VmState};
use crate::state::setup::{FileV1, Setup, SetupV1};

/// Which pages the memory file has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// All.
    #[default]
    Full,
    /// Those that have changed since the last snapshot. They are laid over the memory file that is there, if it is as long as RAM.
    Diff,
}

/// Why there is no snapshot. The VM stands as it stood, and has lost nothing.
#[derive(Debug, Error)]
pub enum CreateError {
    /// It runs.
    #[error("Operation not allowed: save/restore unavailable while running: PATCH /vm to Paused first")]
    Runs,
    /// What has changed is not known.
    #[error(
        "Diff snapshots need a log of the pages that are written: set track_dirty_pages in /machine-config, or in /snapshot/load"
    )]
    NotTracked,
    /// The process that fills its memory is gone.
    #[error("the process that fills guest memory has ended, and pages that it had not filled are lost")]
    HandlerGone,
    /// Two files in one place.
    #[error("snapshot_path and mem_file_path are the same file: expected two")]
    SamePath,
    /// The state.
    #[error("Cannot save the microVM state")]
    State(#[from] CaptureError),
    /// It does not fit its form.
    #[error("Cannot serialize the microVM state")]
    Encode(#[source] io::Error),
    /// A drive.
    #[error("Cannot perform {what} on drive {id:?}")]
    Drive {
        /// What was done.
        what: &'static str,
        /// Which.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The log of written pages.
    #[error("Cannot get dirty bitmap")]
    Log(#[source] io::Error),
    /// There is no number for both files.
    #[error("Cannot number the snapshot")]
    Pair(#[source] GenerationError),
    /// The state file.
    #[error("Cannot perform {what} on the snapshot backing file {path}", path = path.display())]
    StateFile {
        /// What was done.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The memory file.
    #[error("Cannot perform {what} on the memory backing file {path}", path = path.display())]
    MemoryFile {
        /// What was done.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("Cannot write memory file {path}", path = path.display())]
    Memory {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: FlatError,
    },
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Created {
    /// Bytes of the state file.
    pub state_bytes: u64,
    /// Pages in the memory file that are not holes.
    pub pages: u64,
}

impl Running {
    /// Writes what it is to two files. It is paused. `setup` says how it is built again; of its drives, which are in the same order, the files'
    /// identities are filled in here.
    pub(crate) fn create_snapshot(
        &self,
        kind: Kind,
        (state_path, memory_path): (&Path, &Path),
        Setup { vm: mut setup, mmds }: Setup,
    ) -> Result<Created, CreateError> {
        if !self.is_paused() {
            return Err(CreateError::Runs);
        }
        if self.handler_is_gone() {
            return Err(CreateError::HandlerGone);
        }
        let changed = self.tracking.changed().map_err(CreateError::Log)?;
        if kind == Kind::Diff && changed.is_none() {
            return Err(CreateError::NotTracked);
        }
        let of_state = |what| move |source| CreateError::StateFile { what, path: state_path.into(), source };
        let of_memory =
            |what| move |source| CreateError::MemoryFile { what, path: memory_path.into(), source };
        // Before the work: most mistakes show here.
        let state_file = Replacement::of(state_path).map_err(of_state("open"))?;
        let memory_file = Replacement::of(memory_path).map_err(of_memory("open"))?;
        if state_file.is_same_place(&memory_file).map_err(of_memory("stat"))? {
            return Err(CreateError::SamePath);
        }
        self.sync_drives(&mut setup)?;
        setup.samepage = env!("CARGO_PKG_VERSION").into();
        setup.is_diff = kind == Kind::Diff;
        setup.track_dirty_pages = changed.is_some();
        setup.realtime_ns = realtime_ns();
        let pair = PairV1 { number: generation::random().map_err(CreateError::Pair)? };
        let still = self.take_still(&self.savable()?)?;
        let state = VmState { pair: Some(pair), mmds, ..still.with(Around::File(setup)) };
        let bytes = state.encode().map_err(|error| CreateError::Encode(io::Error::other(error)))?;
        io::Write::write_all(&mut state_file.file(), &bytes).map_err(of_state("write"))?;

        let file = memory_file.file();
        file.set_len(self.ram.bytes()).map_err(of_memory("set_length"))?;
        let save = |pages: &PageSet, zeros| {
            let saved = self.ram.save_flat(file, pages, zeros);
            saved.map_err(|source| CreateError::Memory { path: memory_path.into(), source })
        };
        let pages = match (kind, changed) {
            (Kind::Diff, Some((mut pages, true))) => {
                // Its number is another one: what is around it is to be there, too.
                pages.insert(generation::PAIR_PAGE);
                if let Some(base) = self.base(&memory_file).map_err(of_memory("open"))? {
                    flat::copy(&base, file, self.ram.bytes()).map_err(of_memory("copy"))?;
                }
                save(&pages, Zeros::Write)?
            }
            // The first one has everything, and there is nothing below it that zeros would have to hide.
            _ => save(&PageSet::all(self.ram.pages().pages()), Zeros::Skip)?,
        };
        file.write_all_at(&pair.number, generation::PAIR).map_err(of_memory("write"))?;
        memory_file.sync().map_err(of_memory("sync"))?;
        state_file.sync().map_err(of_state("sync"))?;
        memory_file.commit().map_err(of_memory("rename"))?;
        state_file.commit().map_err(of_state("rename"))?;
        self.tracking.forget().map_err(CreateError::Log)?;
        Ok(Created { state_bytes: bytes.len() as u64, pages })
    }

    /// The memory file that is there, if what has changed can be laid over it.
    fn base(&self, memory: &Replacement) -> io::Result<Option<File>> {
        let Some(old) = memory.old()? else { return Ok(None) };
        Ok((old.metadata()?.len() == self.ram.bytes()).then_some(old))
    }

    /// What the guest wrote to its drives goes to the disk, and which files they are into `setup`.
    fn sync_drives(&self, setup: &mut SetupV1) -> Result<(), CreateError> {
        for (drive, attached) in setup.drives.iter_mut().zip(&*os::lock(&self.drives)) {
            let failed = |what, source| CreateError::Drive { what, id: drive.id.clone(), source };
            if !drive.read_only {
                attached.file.sync_all().map_err(|source| failed("sync", source))?;
            }
            drive.file = FileV1::of(&attached.file).map_err(|source| failed("stat", source))?;
        }
        Ok(())
    }
}

/// The time of day; 0 before 1970.
pub(super) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
