//! The engine in the host: starts the hub and tells it what is wanted, and says how far the agents have come.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io::{self, PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::time::ClockId;
use serde::{Deserialize, Serialize};

use super::counters::{Counters, now_ns};
use super::hub::Hub;
pub use super::image_slabs::ImageSlabs;
use super::matchmaker::PageHash;
use super::refusal::Refusal;
use super::shared_state::{Applicant, Member, SharedState, lock_state};
pub use super::statistics::{DomainStatistics, Statistics};
use super::wire::{self, Settings};
use crate::{Engine, EngineError, Progress, SlabPages};
use measure::Space;
use memory::{PAGE_BYTES, userfault};
use os::SocketFile;
use os::limits;

/// How pages are merged by slabs: the keys of `merge` in a fleet file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "keys such as { cpu_percent = 50 }")]
pub struct Tuning {
    /// Processor time that all agents together may take, in percent of one processor; None: as much as they need.
    pub cpu_percent: Option<u16>,
    /// Pages of the shortest run that is merged: each may cost two mappings.
    pub min_run_pages: u16,
    /// How much of a huge page must be saved for it to be broken up, in percent.
    pub huge_page_percent: u8,
}

impl Default for Tuning {
    fn default() -> Self {
        // One page saved is worth the 700 bytes that two mappings cost; 26 pages of a huge page are worth its fewer TLB misses.
        Self { cpu_percent: None, min_run_pages: 1, huge_page_percent: 5 }
    }
}

/// Merges by slabs.
pub struct SlabEngine {
    socket: PathBuf,
    settings: Settings,
    hash_mask: PageHash,
    running: Option<Running>,
    shared: Arc<Mutex<SharedState>>,
}

struct Running {
    thread: JoinHandle<()>,
    /// Written to when the shared state has changed; closed, it ends the thread.
    poke: PipeWriter,
    file: SocketFile,
}

impl SlabEngine {
    /// Will listen for agents at `socket`. Every process that can connect takes part, all in one domain.
    pub fn new(socket: PathBuf) -> Self {
        let running = None;
        let mut engine = Self {
            socket,
            settings: Settings::default(),
            hash_mask: PageHash::MAX,
            running,
            shared: Arc::default(),
        };
        engine.tune(&Tuning::default());
        engine
    }

    /// Only VMs that are admitted take part.
    pub fn for_members(socket: PathBuf, tuning: &Tuning) -> Self {
        let mut engine = Self::new(socket);
        engine.tune(tuning);
        lock_state(&engine.shared).members = Some(HashMap::new());
        engine
    }

    /// Other VMs may apply, too: [`Engine::applicants`] has them.
    pub fn open_to_others(self) -> Self {
        lock_state(&self.shared).applicants = Some(Vec::new());
        self
    }

    /// Cuts every hash down to the bits of `mask`, so that different pages collide: for tests of what happens then.
    #[doc(hidden)]
    pub fn with_hash_mask(mut self, mask: PageHash) -> Self {
        self.hash_mask = mask;
        self
    }

    fn tune(&mut self, tuning: &Tuning) {
        self.settings = Settings {
            cpu_permille: tuning.cpu_percent.map_or(0, |percent| u64::from(percent.max(1)) * 10),
            min_run_pages: tuning.min_run_pages.into(),
            huge_page_percent: tuning.huge_page_percent.into(),
            ..Settings::default()
        };
    }

    fn poke(&mut self) {
        if let Some(running) = &mut self.running {
            let _ = running.poke.write(&[0]);
        }
    }
}

impl Engine for SlabEngine {
    fn name(&self) -> &'static str {
        "slab"
    }

    fn open(&mut self) -> Result<(), EngineError> {
        if self.running.is_some() {
            return Ok(());
        }
        // The VMs are of the same user, and need it.
        userfault::can_freeze().map_err(EngineError::NoUserfaultfd)?;
        let failed = |source| EngineError::Matchmaker { socket: self.socket.clone(), source };
        // Each slab is one.
        limits::allow_descriptors();
        let (listener, file) = listen(&self.socket).map_err(failed)?;
        if lock_state(&self.shared).applicants.is_some() {
            // Every process that reaches its directory may connect; its credentials decide whether it takes part.
            let all_users = Permissions::from_mode(0o666);
            fs::set_permissions(&self.socket, all_users).map_err(failed)?;
        }
        let (poked, poke) = io::pipe().map_err(failed)?;
        let mut hub = Hub::new(listener, poked, self.shared.clone());
        hub.hash_mask = self.hash_mask;
        let thread =
            std::thread::Builder::new().name("merge".into()).spawn(move || hub.run()).map_err(failed)?;
        self.running = Some(Running { thread, poke, file });
        Ok(())
    }

    fn admit(&mut self, guest: &str, pid: u32, domain: &str, memory_bytes: u64) {
        let member = Member { name: guest.into(), domain: domain.into(), pages: memory_bytes / PAGE_BYTES };
        lock_state(&self.shared).members.get_or_insert_default().insert(pid, member);
        self.poke();
    }

    fn applicants(&mut self) -> Vec<Applicant> {
        lock_state(&self.shared).applicants.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn refuse(&mut self, applicant: u64, why: Refusal) {
        lock_state(&self.shared).refused.push((applicant, why));
        self.poke();
    }

    fn remove(&mut self, guest: &str) {
        if let Some(members) = &mut lock_state(&self.shared).members {
            members.retain(|_, member| member.name != guest);
        }
    }

    fn start(&mut self, _: &[Space]) -> Result<(), EngineError> {
        self.open()?;
        lock_state(&self.shared).settings = Some(self.settings);
        self.poke();
        Ok(())
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        let shared = lock_state(&self.shared);
        let agents = || shared.sessions.values().map(|session| &session.counters);
        Ok(Progress {
            merged_pages: agents().map(|c| c.shared_now + c.zero_pages).sum(),
            cpu_seconds: Some(agents().map(Counters::cpu_seconds).sum::<f64>() + shared.cpu_seconds),
            full_passes: agents().map(|c| c.passes).min().unwrap_or(0),
        })
    }

    fn statistics(&self) -> Option<Statistics> {
        let shared = lock_state(&self.shared);
        let mut all = Statistics { matchmaker_cpu_seconds: shared.cpu_seconds, ..Statistics::default() };
        let start = Counters { converged_at_ns: u64::MAX, ..Counters::default() };
        all.host = start;
        for session in shared.sessions.values() {
            all.host.add(&session.counters);
            all.guests.insert(session.name.clone(), session.counters);
            let domain = all.domains.entry(session.domain.clone());
            let empty = || DomainStatistics { counters: start, ..DomainStatistics::default() };
            domain.or_insert_with(empty).counters.add(&session.counters);
        }
        for now in &shared.domains {
            if let Some(domain) = all.domains.get_mut(&now.domain) {
                let (live, dead) = now.live_and_dead_pages;
                domain.slabs = now.slabs as u64;
                domain.slab_bytes = now.pages * PAGE_BYTES;
                (domain.slab_live_bytes, domain.slab_dead_bytes) = (live * PAGE_BYTES, dead * PAGE_BYTES);
                domain.slab_use_age_seconds = now.looked.map(|at| at.elapsed().as_secs_f64());
                domain.watch_pages_per_second = now.watch_pages;
            }
        }
        let at = all.host.converged_at_ns;
        if (1..u64::MAX).contains(&at) {
            let since = now_ns(ClockId::Monotonic).saturating_sub(at);
            all.seconds_since_convergence = Some(since as f64 / 1e9);
        }
        Some(all)
    }

    fn slab_pages(&self) -> Option<SlabPages> {
        let shared = self.shared.clone();
        Some(Box::new(move || lock_state(&shared).slab_pages))
    }

    fn images(&self) -> Option<ImageSlabs> {
        Some(ImageSlabs(self.shared.clone()))
    }

    fn set_priority(&mut self, urgent: bool) {
        let cpu_permille = if urgent { 0 } else { self.settings.cpu_permille };
        {
            let mut shared = lock_state(&self.shared);
            let Some(settings) = &mut shared.settings else { return };
            (settings.cpu_permille, settings.urgent) = (cpu_permille, urgent);
        }
        self.poke();
    }

    fn stop(&mut self) {
        if let Some(Running { thread, poke, file }) = self.running.take() {
            drop(poke);
            let _ = thread.join();
            drop(file);
            let mut shared = lock_state(&self.shared);
            shared.settings = None;
            shared.sessions.clear();
        }
    }
}

impl Drop for SlabEngine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn listen(path: &Path) -> io::Result<(OwnedFd, SocketFile)> {
    let listener = wire::socket()?;
    let file = SocketFile::listen(&listener, path)?;
    Ok((listener, file))
}

#[cfg(test)]
mod tests;
