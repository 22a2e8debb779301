//! Persistent memory: files that a guest has as memory beside its RAM. Opened, locked and mapped before the guest runs.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::pmem;
use event_manager::MutEventSubscriber;
use memory::Gpa;
use memory::file_region::{FileRegion, region_bytes};
use memory::layout::file_starts;
use memory::page_scan::PageScan;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::drive::{Drive, DriveError};
use super::status::PmemPages;
use super::timer::Timer;

/// The most files that one VM has as memory.
pub const MAX_PMEM: usize = 4;

/// A file that a guest is to have as memory, `/dev/pmem0` and so on in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Its name, for the API.
    #[serde(default)]
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
}

/// Why a file cannot be a guest's memory.
#[derive(Debug, Error)]
pub enum PmemError {
    /// There are too many.
    #[error("{asked} files as memory are not possible: expected at most {MAX_PMEM}")]
    TooMany { asked: usize },
    /// It cannot be had, as a drive could not.
    #[error("{path} cannot be the guest's persistent memory", path = path.display())]
    File {
        path: PathBuf,
        #[source]
        source: Box<DriveError>,
    },
    /// The kernel does not map it.
    #[error("{path} cannot be mapped as the guest's persistent memory", path = path.display())]
    Map {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Pmem {
    /// Reads what `samepage run --pmem` takes: a path, and `,ro` behind it. `number` is that of the file, counted from 0, for its name.
    pub fn from_argument(text: &OsStr, number: usize) -> Self {
        let (bytes, read_only) = match text.as_bytes().strip_suffix(b",ro") {
            Some(path) => (path, true),
            None => (text.as_bytes(), false),
        };
        Self { id: format!("pmem{number}"), path: OsStr::from_bytes(bytes).into(), read_only }
    }

    /// Whether the file could be a guest's memory now; it is not locked.
    ///
    /// # Errors
    /// It could not.
    pub fn check(&self) -> Result<(), PmemError> {
        self.drive().check().map_err(|source| self.refused(source))
    }

    /// What is asked of the file is what is asked of a drive's.
    fn drive(&self) -> Drive {
        let (id, path, read_only) = (self.id.clone(), self.path.clone(), self.read_only);
        Drive { id, path, read_only, ..Drive::default() }
    }

    fn refused(&self, source: DriveError) -> PmemError {
        PmemError::File { path: self.path.clone(), source: Box::new(source) }
    }

    /// The file, locked for this VM alone or with others that read it only, and its length.
    fn open(&self) -> Result<(File, u64), PmemError> {
        self.drive().open_file().map_err(|source| self.refused(source))
    }
}

/// How often it is looked whether a file was cut short.
const LOOK: Duration = Duration::from_secs(1);

/// The files that a VM has as memory, in order.
#[derive(Debug, Default)]
pub struct Regions(Vec<FileRegion>);

impl Regions {
    /// Opens all and maps them, for a guest with so much RAM.
    pub(super) fn open(all: &[Pmem], ram_bytes: u64) -> Result<Self, PmemError> {
        if all.len() > MAX_PMEM {
            return Err(PmemError::TooMany { asked: all.len() });
        }
        let files = all.iter().map(Pmem::open).collect::<Result<Vec<_>, _>>()?;
        let starts = file_starts(ram_bytes, files.iter().map(|(_, bytes)| region_bytes(*bytes)));
        let map = |((pmem, (file, bytes)), start): ((&Pmem, (File, u64)), u64)| {
            let mapped = FileRegion::map(file, bytes, Gpa(start), pmem.read_only);
            mapped.map_err(|source| PmemError::Map { path: pmem.path.clone(), source })
        };
        all.iter().zip(files).zip(starts).map(map).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &FileRegion> {
        self.0.iter()
    }

    /// The devices through which the guest finds them.
    pub(super) fn devices(&self) -> io::Result<Vec<pmem::Pmem>> {
        let device = |region: &FileRegion| {
            let file = (!region.is_read_only()).then(|| region.file().try_clone()).transpose()?;
            pmem::Pmem::new(region.gpa().0, region.bytes(), file, || jail::enter(jail::Thread::Disk))
        };
        self.iter().map(device).collect()
    }

    /// What the guest has touched of them.
    pub(super) fn pages(&self) -> io::Result<Vec<PmemPages>> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let mut scan = PageScan::open_self()?;
        let mut pages = |region: &FileRegion| {
            let mut mapped_pages = 0;
            scan.files(region.hva().span(region.bytes()), |pages| mapped_pages += pages.pages)?;
            let (gpa, bytes, read_only) = (region.gpa().0, region.bytes(), region.is_read_only());
            Ok(PmemPages { gpa, bytes, read_only, mapped_pages })
        };
        self.iter().map(&mut pages).collect()
    }

    /// What looks now and then whether a file was cut short: KVM may try for ever to have a page that is no longer there, and the guest with
    /// it. None without files.
    pub(super) fn watch(self: &Arc<Self>) -> io::Result<Option<Box<dyn MutEventSubscriber>>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let (timer, regions) = (Timer::new()?, self.clone());
        timer.every(LOOK)?;
        Ok(Some(timer.subscriber(move || _ = regions.replace_lost())))
    }

    /// If a file was cut short, the guest sees zeros there from now on, and true is returned.
    pub(super) fn replace_lost(&self) -> bool {
        let replaced = |region: &FileRegion| match region.replace_lost() {
            Ok(0) => false,
            Ok(bytes) => {
                tracing::warn!(
                    "the file of the persistent memory at {:#x} was cut short: the guest sees zeros in the place of {bytes} bytes",
                    region.gpa().0
                );
                true
            }
            Err(error) => {
                tracing::warn!("the file of the persistent memory at {:#x} is gone: {error}", region.gpa().0);
                false
            }
        };
        self.iter().filter(|region| replaced(region)).count() > 0
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn what_the_command_line_says() {
        for (text, path, read_only) in
            [("a.img", "a.img", false), ("a.img,ro", "a.img", true), ("a,b", "a,b", false)]
        {
            let parsed = Pmem::from_argument(OsStr::new(text), 2);
            assert_eq!(parsed, Pmem { id: "pmem2".into(), path: path.into(), read_only }, "{text}");
        }
    }

    #[test]
    fn files_that_make_no_drive_make_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let pmem = |path: &Path, read_only| Pmem { id: String::new(), path: path.into(), read_only };
        let path = dir.path().join("a");
        fs::write(&path, [7; 1000]).unwrap();
        let said = |pmem: Pmem| {
            let error = Regions::open(&[pmem], 64 << 20).unwrap_err();
            format!("{error}: {}", std::error::Error::source(&error).unwrap())
        };
        assert!(said(pmem(&path, true)).contains("cannot be the guest's persistent memory: the drive"));
        assert!(said(pmem(dir.path(), true)).contains("is not a regular file"));
        fs::write(&path, [7; 1024]).unwrap();
        let readers = [(); 2].map(|()| Regions::open(&[pmem(&path, true)], 64 << 20).unwrap());
        assert!(said(pmem(&path, false)).contains("is in use"));
        drop(readers);
        let five = [(); MAX_PMEM + 1].map(|()| pmem(&path, true));
        assert!(matches!(Regions::open(&five, 64 << 20), Err(PmemError::TooMany { asked: 5 })));
        let regions = Regions::open(&five[..2], 64 << 20).unwrap();
        let places: Vec<_> = regions.iter().map(|region| (region.gpa().0, region.bytes())).collect();
        assert_eq!(places, [(4 << 30, 2 << 20), ((4 << 30) + (128 << 20), 2 << 20)]);
    }
}
