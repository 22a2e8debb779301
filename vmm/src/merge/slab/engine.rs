//! The engine in the host: one thread that serves the agents of a fleet. It maps no guest memory and reads none.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SocketAddrUnix, SocketFlags};
use rustix::time::{ClockId, clock_gettime};

use super::matchmaker::{GuestId, Matchmaker, Orders, PageHash};
use super::wire::{self, Link, MAX_OPEN_SLABS, MERGE_RUNS, Message, Report};
use crate::measure::Space;
use crate::memory::slab::{Draft, Slab};
use crate::memory::userfault;
use crate::merge::{Engine, EngineError, Progress};

/// Agents at a time; more are hung up on.
const MAX_AGENTS: usize = 1024;
/// Entries of the index for each page of the guests. Pages that change leave entries of what they held.
const INDEX_PER_PAGE: u64 = 2;
/// Entries that there may be in any case.
const MIN_INDEX: u64 = 1 << 16;
/// Packets that wait for one agent. One that takes none of so many is hung up on.
const MAX_WAITING: usize = 1 << 16;
/// Packets of one agent that are dealt with before the next one's turn.
const TURN: usize = 16;

/// Merges by slabs.
pub struct SlabEngine {
    socket: PathBuf,
    hash_mask: PageHash,
    running: Option<Running>,
    reports: Arc<Mutex<Reports>>,
}

struct Running {
    thread: JoinHandle<()>,
    /// Closed, it ends the thread.
    end: PipeWriter,
}

/// What is known of all agents.
#[derive(Default)]
struct Reports {
    /// Of those that are there.
    agents: HashMap<GuestId, Report>,
    /// Processor time of the engine's own thread.
    cpu_seconds: f64,
}

impl SlabEngine {
    /// Will listen for agents at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, hash_mask: PageHash::MAX, running: None, reports: Arc::default() }
    }

    /// With only these bits of every hash, so that tests have pages of equal hashes that differ.
    #[doc(hidden)]
    pub fn with_hash_mask(mut self, hash_mask: PageHash) -> Self {
        self.hash_mask = hash_mask;
        self
    }
}

impl Engine for SlabEngine {
    fn name(&self) -> &'static str {
        "slab"
    }

    fn start(&mut self, guests: &[Space]) -> Result<(), EngineError> {
        // The VMs are of the same user, and need it.
        userfault::probe().map_err(EngineError::NoUserfaultfd)?;
        let failed = |source| EngineError::Matchmaker { socket: self.socket.clone(), source };
        let _ = std::fs::remove_file(&self.socket);
        let listener = listen(&self.socket).map_err(failed)?;
        let (ended, end) = io::pipe().map_err(failed)?;
        let hash_mask = self.hash_mask;
        let hub = Hub { hash_mask, ..Hub::new(listener, ended, self.reports.clone(), guests) };
        let thread =
            std::thread::Builder::new().name("merge".into()).spawn(move || hub.run()).map_err(failed)?;
        self.running = Some(Running { thread, end });
        Ok(())
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let agents = || reports.agents.values();
        let cpu = agents().map(|r| r.cpu_nanoseconds as f64 / 1e9).sum::<f64>() + reports.cpu_seconds;
        Ok(Progress {
            merged_pages: agents().map(|r| r.shared_now + r.zeros).sum(),
            cpu_seconds: Some(cpu),
            full_passes: agents().map(|r| r.passes).min().unwrap_or(0),
        })
    }

    fn stop(&mut self) {
        if let Some(Running { thread, end }) = self.running.take() {
            drop(end);
            let _ = thread.join();
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

impl Drop for SlabEngine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn listen(path: &std::path::Path) -> io::Result<OwnedFd> {
    let listener = wire::socket()?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&listener, 128)?;
    Ok(listener)
}

/// A packet that is on its way to an agent.
type Packet = (Message, Option<Arc<File>>);

struct Peer {
    link: Link,
    /// Not before it has said hello.
    guest: Option<GuestId>,
    waiting: VecDeque<Packet>,
    /// Slabs it has been told of.
    knows: HashSet<u32>,
}

struct Hub {
    listener: OwnedFd,
    ended: PipeReader,
    key: u64,
    /// What counts of a hash.
    hash_mask: PageHash,
    peers: Vec<Peer>,
    matchmaker: Matchmaker,
    /// Those that are being filled, and those that are sealed with how many pages they have.
    drafts: HashMap<u32, Arc<File>>,
    slabs: HashMap<u32, (Arc<File>, u64)>,
    guests: u16,
    /// Entries of the index that are too many.
    index_limit: usize,
    reports: Arc<Mutex<Reports>>,
}

impl Hub {
    fn new(listener: OwnedFd, ended: PipeReader, reports: Arc<Mutex<Reports>>, guests: &[Space]) -> Self {
        Self {
            listener,
            ended,
            // Random for each start, from the kernel.
            key: RandomState::new().build_hasher().finish(),
            hash_mask: PageHash::MAX,
            peers: Vec::new(),
            matchmaker: Matchmaker::default(),
            drafts: HashMap::new(),
            slabs: HashMap::new(),
            guests: 0,
            index_limit: (guests.iter().map(Space::pages).sum::<u64>() * INDEX_PER_PAGE).max(MIN_INDEX)
                as usize,
            reports,
        }
    }

    fn run(mut self) {
        loop {
            let mut ready =
                vec![PollFd::new(&self.ended, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
            ready.extend(self.peers.iter().map(|peer| {
                let out = if peer.waiting.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                PollFd::new(&peer.link, PollFlags::IN | out)
            }));
            if poll(&mut ready, None).is_err_and(|error| error != rustix::io::Errno::INTR) {
                return;
            }
            let ready: Vec<bool> = ready.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return;
            }
            let mut gone = Vec::new();
            for at in (0..self.peers.len()).filter(|at| ready[at + 2]) {
                if self.serve(at).and_then(|()| self.flush(at)).is_err() {
                    gone.push(at);
                }
            }
            for at in gone.into_iter().rev() {
                self.hang_up(at);
            }
            if self.matchmaker.len() > self.index_limit
                || self.slabs.len() + self.drafts.len() > MAX_OPEN_SLABS
            {
                self.start_over();
            }
            if ready[1] {
                self.accept();
            }
            let cpu = clock_gettime(ClockId::ThreadCPUTime);
            self.reports().cpu_seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        }
    }

    fn reports(&self) -> std::sync::MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&mut self) {
        let Ok(socket) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) else { return };
        let link = Link::new(socket);
        if self.peers.len() < MAX_AGENTS && self.guests < u16::MAX && link.set_nonblocking(true).is_ok() {
            self.peers.push(Peer { link, guest: None, waiting: VecDeque::new(), knows: HashSet::new() });
        }
    }

    /// Deals with what one agent has sent.
    fn serve(&mut self, at: usize) -> io::Result<()> {
        for _ in 0..TURN {
            let message = match self.peers[at].link.receive() {
                Ok((message, _)) => message,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            match (message, self.peers[at].guest) {
                (Message::Hello, None) => {
                    self.peers[at].guest = Some(GuestId(self.guests));
                    self.guests += 1;
                    self.tell(at, Message::Key(self.key), None);
                }
                (Message::Offer(mut pages), Some(guest)) => {
                    pages.iter_mut().for_each(|(_, hash)| *hash &= self.hash_mask);
                    let orders = self.matchmaker.offer(guest, pages);
                    self.order(guest, orders);
                    self.tell(at, Message::Done, None);
                }
                (Message::Published(slab, mut hashes), Some(guest)) => {
                    hashes.iter_mut().for_each(|hash| *hash &= self.hash_mask);
                    self.published(guest, slab, &hashes)?;
                }
                (Message::Unpublished(slab), Some(guest)) => {
                    let all = self.matchmaker.unpublished(guest, slab);
                    self.drafts.remove(&slab);
                    self.order_all(all);
                }
                (Message::Report(report), Some(guest)) => _ = self.reports().agents.insert(guest, report),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Ok(())
    }

    fn published(&mut self, guest: GuestId, slab: u32, hashes: &[u64]) -> io::Result<()> {
        let draft = self.drafts.remove(&slab).ok_or(io::ErrorKind::InvalidData)?;
        // What it says of a slab that is not sealed is worth nothing.
        let sealed = Slab::receive(draft.try_clone()?.into(), hashes.len() as u64);
        let all = match sealed {
            Ok(_) => {
                let all = self.matchmaker.published(guest, slab, hashes).ok_or(io::ErrorKind::InvalidData)?;
                self.slabs.insert(slab, (draft, hashes.len() as u64));
                all
            }
            Err(_) => self.matchmaker.unpublished(guest, slab),
        };
        // It has made it, and has it.
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.guest == Some(guest)) {
            peer.knows.insert(slab);
        }
        self.order_all(all);
        Ok(())
    }

    fn order_all(&mut self, all: HashMap<GuestId, Orders>) {
        for (guest, orders) in all {
            self.order(guest, orders);
        }
    }

    /// Puts orders on their way.
    fn order(&mut self, guest: GuestId, orders: Orders) {
        let Some(at) = self.peers.iter().position(|peer| peer.guest == Some(guest)) else { return };
        for publish in orders.publish {
            match Draft::new(publish.pages.len() as u64) {
                Ok(draft) => {
                    let file = Arc::new(draft.into_file());
                    self.drafts.insert(publish.slab, file.clone());
                    self.tell(at, Message::Publish(publish.slab, publish.pages), Some(file));
                }
                Err(error) => {
                    tracing::warn!("merging: {error}");
                    self.matchmaker.abandon(publish.slab);
                }
            }
        }
        for run in &orders.merge {
            if let Some((file, pages)) = self.slabs.get(&run.slab)
                && self.peers[at].knows.insert(run.slab)
            {
                let packet = (Message::Slab(run.slab, *pages), Some(file.clone()));
                self.peers[at].waiting.push_back(packet);
            }
        }
        for runs in orders.merge.chunks(MERGE_RUNS) {
            self.tell(at, Message::Merge(runs.to_vec()), None);
        }
    }

    fn tell(&mut self, at: usize, message: Message, file: Option<Arc<File>>) {
        self.peers[at].waiting.push_back((message, file));
    }

    /// Sends what an agent takes.
    fn flush(&mut self, at: usize) -> io::Result<()> {
        let Peer { link, waiting, .. } = &mut self.peers[at];
        while let Some((message, file)) = waiting.front() {
            match link.send(message, file.as_deref()) {
                Ok(()) => _ = waiting.pop_front(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if waiting.len() > MAX_WAITING { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }

    /// Forgets everything, and has the agents come again and offer what they have. What is merged stays so, and slabs that nobody
    /// maps go.
    fn start_over(&mut self) {
        tracing::debug!(
            "merging: starts over, with {} pages known, {} slabs",
            self.matchmaker.len(),
            self.slabs.len()
        );
        self.peers.clear();
        self.reports().agents.clear();
        self.matchmaker = Matchmaker::default();
        self.drafts.clear();
        self.slabs.clear();
    }

    fn hang_up(&mut self, at: usize) {
        if let Some(guest) = self.peers.remove(at).guest {
            self.reports().agents.remove(&guest);
            let all = self.matchmaker.gone(guest);
            self.order_all(all);
        }
    }
}

#[cfg(test)]
mod tests;
