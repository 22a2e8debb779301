//! What fleets have promised to their guests, for each other to read: a file in each fleet's
//! directory.
//!
//! The process that keeps the fleet has a lock on the file for as long as it lives. Without it the
//! promise is as good as the VMs that are still there. Guests are admitted under one more lock, so
//! that no two fleets are given the same memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::HostError;
use super::daemon_client::request;
use super::living::vms;
use super::runtime::{self, FleetDir};
use super::status::{Reply, Request};
use kernel_view::smaps::ProcessPages;
use overcommit::view::GuestState;

/// How long another fleet's admission is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(20);
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// How long another fleet's daemon may take to say what its guests have in their balloons.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// No guest has a file without a dot in its name.
const FILE: &str = "promised";

/// A fleet's promise, for as long as this is kept.
#[derive(Debug)]
pub struct Pledge(File, PathBuf);

impl Pledge {
    /// Takes over the promise of the fleet in `dir`, or makes one of nothing.
    pub fn take(dir: &FleetDir) -> Result<Self, HostError> {
        let path = dir.path().join(FILE);
        let file = open(&path).and_then(|file| lock(&file).map(|()| file));
        match file {
            Ok(file) => Ok(Self(file, path)),
            Err(source) => Err(HostError::Runtime { what: "take over the promise in", path, source }),
        }
    }

    /// Promises this to guests, by name in pages, and nothing else.
    pub fn set<'a>(&self, guests: impl Iterator<Item = (&'a str, u64)>) -> Result<(), HostError> {
        let guests: BTreeMap<&str, u64> = guests.collect();
        let failed = |source| HostError::Runtime { what: "write", path: self.1.clone(), source };
        let text = serde_json::to_vec(&guests).map_err(|error| failed(error.into()))?;
        self.0.write_all_at(&text, 0).and_then(|()| self.0.set_len(text.len() as u64)).map_err(failed)
    }
}

/// What another fleet was promised and has. Pages of 4096 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct OtherFleet {
    /// Its name.
    pub fleet: String,
    /// What was promised to its guests.
    pub promised_pages: u64,
    /// What is in their balloons.
    pub ballooned_pages: u64,
    /// What it holds.
    pub held_pages: u64,
    /// Whether its VMs are in our control group.
    pub in_our_group: bool,
}

impl OtherFleet {
    /// What it may hold, and at least what it holds.
    pub fn committed_pages(&self) -> u64 {
        self.promised_pages.saturating_sub(self.ballooned_pages).max(self.held_pages)
    }

    /// What it may yet take.
    pub fn outstanding_pages(&self) -> u64 {
        self.committed_pages().saturating_sub(self.held_pages)
    }
}

/// No other fleet admits guests while this is kept.
pub fn admitting() -> Result<File, HostError> {
    let path = runtime::root().join("admission.lock");
    open(&path).and_then(|file| lock(&file).map(|()| file)).map_err(|source| HostError::Runtime {
        what: "wait for another fleet's admission by",
        path,
        source,
    })
}

/// This user's other fleets than the one called `own`.
pub fn others(own: &str) -> Vec<OtherFleet> {
    // A directory that is not this user's alone is refused where fleets are made.
    let names = runtime::directories().unwrap_or_default();
    names.into_iter().filter(|name| name != own).filter_map(other).collect()
}

/// What the VMs of the fleet called `name` hold.
pub fn held_pages(name: &str) -> u64 {
    vms(&FleetDir::of(name)).iter().map(|vm| held_by(vm.process.pid())).sum()
}

fn other(fleet: String) -> Option<OtherFleet> {
    let dir = FleetDir::of(&fleet);
    let (promised, is_kept) = promised(&dir.path().join(FILE));
    let vms = vms(&dir);
    if vms.is_empty() && !is_kept {
        return None;
    }
    let lives = |guest: &String| is_kept || vms.iter().any(|vm| vm.guest == *guest);
    let promised_pages = promised.iter().filter(|(guest, _)| lives(guest)).map(|(_, pages)| pages).sum();
    let held: u64 = vms.iter().map(|vm| held_by(vm.process.pid())).sum();
    let ours = fs::read_to_string("/proc/self/cgroup").ok();
    let in_our_group = vms.iter().any(|vm| {
        ours.is_some() && fs::read_to_string(format!("/proc/{}/cgroup", vm.process.pid())).ok() == ours
    });
    let mut other = OtherFleet { fleet, promised_pages, ballooned_pages: 0, held_pages: held, in_our_group };
    // The daemon knows what is in balloons, and what in slabs. One that is busy, or gone, is done
    // without: then more counts as promised.
    if is_kept && let Ok(Reply::Management(now)) = request(&other.fleet, &Request::Management, ANSWER_LIMIT) {
        let living = now.guests.iter().filter(|guest| guest.state != GuestState::Dead);
        other.ballooned_pages = living.filter_map(|guest| Some(guest.balloon?.actual_pages)).sum();
        other.held_pages = now.host.map_or(held, |host| host.used_pages.max(held));
    }
    Some(other)
}

/// What the file at `path` promises, and whether a process keeps it.
fn promised(path: &Path) -> (BTreeMap<String, u64>, bool) {
    let Ok(file) = File::open(path) else { return Default::default() };
    let is_kept = flock(&file, FlockOperation::NonBlockingLockShared).is_err();
    let promised = io::read_to_string(&file).ok().and_then(|text| serde_json::from_str(&text).ok());
    (promised.unwrap_or_default(), is_kept)
}

fn held_by(pid: u32) -> u64 {
    let pages = ProcessPages::of(pid).unwrap_or_default();
    pages.anonymous + pages.page_tables
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Locks `file` for this one alone, as soon as others have released it.
fn lock(file: &File) -> io::Result<()> {
    let until = Instant::now() + LOCK_LIMIT;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(LOCK_PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_kept_while_its_keeper_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        assert_eq!(promised(&path), (BTreeMap::new(), false));
        let file = open(&path).unwrap();
        lock(&file).unwrap();
        let pledge = Pledge(file, path.clone());
        pledge.set([("a", 10), ("b", 20)].into_iter()).unwrap();
        let both = BTreeMap::from([("a".to_owned(), 10), ("b".to_owned(), 20)]);
        assert_eq!(promised(&path), (both, true));
        // A shorter one leaves nothing of the longer.
        pledge.set([("b", 7)].into_iter()).unwrap();
        let one = BTreeMap::from([("b".to_owned(), 7)]);
        assert_eq!(promised(&path), (one.clone(), true));
        drop(pledge);
        assert_eq!(promised(&path), (one, false));
        fs::write(&path, "{").unwrap();
        assert_eq!(promised(&path), (BTreeMap::new(), false));
    }

    #[test]
    fn what_is_in_balloons_is_not_committed_and_what_is_held_is() {
        let other =
            OtherFleet { promised_pages: 100, ballooned_pages: 30, held_pages: 50, ..OtherFleet::default() };
        assert_eq!((other.committed_pages(), other.outstanding_pages()), (70, 20));
        let full = OtherFleet { held_pages: 90, ..other };
        assert_eq!((full.committed_pages(), full.outstanding_pages()), (90, 0));
    }
}
