//! The hub: one thread in the host that serves the agents of a fleet. It maps no guest memory and
//! reads none.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, sockopt};
use rustix::time::ClockId;

use super::counters::{Counters, now_ns};
use super::domain::{Domain, Published};
use super::matchmaker::{GuestId, Orders, PageHash, SlabPlace};
use super::refusal::ErrorKind;
use super::shared_state::{Applicant, Member, Session, SharedState, lock_state};
use super::wire::{Link, Live, MERGE_RUNS, Message, Settings};
use super::yielding::Yielding;
use memory::PAGE_BYTES;
use memory::layout::MAX_RAM_BYTES;
use os::Peer as PeerOf;

/// Agents at a time; more are disconnected.
const MAX_AGENTS: usize = 1024;
/// Packets that wait for one agent. It is disconnected if there are more.
const MAX_WAITING: usize = 1 << 13;
/// How soon slabs are looked at again that may lose more pages.
const AGAIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Pages of an offer that are looked up before the hub yields.
const PAGES_BETWEEN_YIELDS: usize = 256;
/// Packets of one agent that are dealt with before the next one's turn.
const TURN: usize = 16;

/// A packet that is on its way to an agent.
type Packet = (Message, Option<Arc<File>>);

struct Peer {
    link: Link,
    /// Its number, which is never used again.
    serial: u64,
    pid: u32,
    /// Its protocol's: see [`VERSION`](super::wire::VERSION).
    version: u32,
    state: State,
    waiting: VecDeque<Packet>,
    /// Slabs that were sent to it, or by it.
    knows: HashSet<u32>,
    /// Orders to merge and to move that it was given.
    ordered: u64,
    /// What it has said so far of which pages it uses, and what it had said when it was done,
    /// unless it was given orders since.
    saying: HashMap<u32, Live>,
    live: Option<HashMap<u32, Live>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It has not said hello.
    New,
    /// It has, with the pages of its guest, and is not yet admitted.
    Waiting(u64),
    /// It is admitted: to which domain, and as which guest.
    Member(usize, GuestId),
    /// It is sent why it is not admitted, then disconnected.
    Refused,
}

/// See the module's description.
pub struct Hub {
    listener: OwnedFd,
    /// Written to when the shared state has changed, closed to end.
    poke: PipeReader,
    shared: Arc<Mutex<SharedState>>,
    peers: Vec<Peer>,
    domains: Vec<Domain>,
    next_serial: u64,
    yielding: Yielding,
    /// When slabs were looked at last that were still losing pages.
    tidied: Duration,
    /// Every hash is cut down to these bits, so that tests can have pages collide.
    pub(super) hash_mask: PageHash,
}

impl Hub {
    /// Serves the agents that connect to `listener`.
    pub fn new(listener: OwnedFd, poke: PipeReader, shared: Arc<Mutex<SharedState>>) -> Self {
        Self {
            listener,
            poke,
            shared,
            peers: Vec::new(),
            domains: Vec::new(),
            next_serial: 0,
            yielding: Yielding::new(),
            tidied: Duration::ZERO,
            hash_mask: PageHash::MAX,
        }
    }

    /// Runs until the other end of `poke` is closed.
    pub fn run(mut self) {
        self.yielding.lower_priority();
        loop {
            let mut ready =
                vec![PollFd::new(&self.poke, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
            ready.extend(self.peers.iter().map(|peer| {
                let out = if peer.waiting.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                PollFd::new(&peer.link, PollFlags::IN | out)
            }));
            let unsettled = self.domains.iter().any(Domain::is_unsettled).then_some(&AGAIN);
            if poll(&mut ready, unsettled).is_err_and(|error| error != rustix::io::Errno::INTR) {
                return;
            }
            self.yielding.woke();
            let ready: Vec<bool> = ready.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                match self.poke.read(&mut [0; 64]) {
                    Ok(0) => return,
                    _ => self.state_changed(),
                }
            }
            let mut gone = Vec::new();
            for at in (0..self.peers.len()).filter(|at| ready.get(at + 2) == Some(&true)) {
                if self.serve(at).is_err() {
                    gone.push(at);
                }
            }
            for at in gone.into_iter().rev() {
                self.disconnect(at);
            }
            for domain in 0..self.domains.len() {
                if self.domains[domain].look_at_pins() {
                    self.tidy(domain);
                }
            }
            self.tidy_again();
            // Serving one agent may have made work for any other.
            let stuck: Vec<usize> =
                (0..self.peers.len()).filter(|at| self.flush(*at).is_err() || self.is_done(*at)).collect();
            for at in stuck.into_iter().rev() {
                self.disconnect(at);
            }
            if ready[1] {
                self.accept();
            }
            let mut shared = lock_state(&self.shared);
            shared.cpu_seconds = now_ns(ClockId::ThreadCPUTime) as f64 / 1e9;
            shared.slab_pages = self.domains.iter().map(Domain::held_pages).sum();
            shared.domains = self.domains.iter().map(Domain::now).collect();
        }
    }

    fn accept(&mut self) {
        let Ok(socket) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) else { return };
        // Its identity comes from the kernel, not from itself.
        let Ok(credentials) = sockopt::socket_peercred(&socket) else { return };
        let link = Link::new(socket);
        if self.peers.len() < MAX_AGENTS && link.set_nonblocking(true).is_ok() {
            self.next_serial += 1;
            self.peers.push(Peer {
                link,
                serial: self.next_serial,
                pid: credentials.pid.as_raw_nonzero().get().cast_unsigned(),
                version: 0,
                state: State::New,
                waiting: VecDeque::new(),
                knows: HashSet::new(),
                ordered: 0,
                saying: HashMap::new(),
                live: None,
            });
        }
    }

    /// There are new members, some were refused, or there are new settings.
    fn state_changed(&mut self) {
        let refused = std::mem::take(&mut lock_state(&self.shared).refused);
        for (serial, mut refusal) in refused {
            let waits = |peer: &Peer| peer.serial == serial && matches!(peer.state, State::Waiting(_));
            if let Some(at) = self.peers.iter().position(waits) {
                self.peers[at].state = State::Refused;
                if self.peers[at].version == 0 {
                    refusal.kind = ErrorKind::Unsaid;
                }
                self.tell(at, Message::Refused(refusal), None);
            }
        }
        (0..self.peers.len()).for_each(|at| self.admit(at));
        self.tell_settings(|_, _| true);
    }

    /// Lets an agent take part, if it may.
    fn admit(&mut self, at: usize) {
        let State::Waiting(pages) = self.peers[at].state else { return };
        let pid = self.peers[at].pid;
        let member = match &lock_state(&self.shared).members {
            None => Some(Member { name: String::new(), domain: String::new(), pages }),
            Some(members) => members.get(&pid).cloned(),
        };
        let Some(member) = member.filter(|member| pages <= member.pages.min(MAX_RAM_BYTES / PAGE_BYTES))
        else {
            return;
        };
        let domain = self.domains.iter().position(|domain| domain.name == member.domain);
        let domain = domain.unwrap_or_else(|| {
            let pins = lock_state(&self.shared).pins.clone();
            self.domains.push(Domain::new(&member.domain, pins));
            self.domains.len() - 1
        });
        let number = |peer: &Peer| match peer.state {
            State::Member(of, guest) if of == domain => Some(guest.0),
            _ => None,
        };
        let taken: HashSet<u16> = self.peers.iter().filter_map(number).collect();
        let Some(guest) = (0..u16::MAX).find(|number| !taken.contains(number)).map(GuestId) else { return };
        self.peers[at].state = State::Member(domain, guest);
        self.domains[domain].matchmaker.join(guest, pages);
        let session = Session { name: member.name, domain: member.domain, counters: Counters::default() };
        lock_state(&self.shared).sessions.insert(self.peers[at].serial, session);
        self.tell(at, Message::Key(self.domains[domain].key), None);
        // Where the processor time is limited, the others have less now.
        let divided = lock_state(&self.shared).settings.is_some_and(|settings| settings.cpu_permille > 0);
        self.tell_settings(|one, _| divided || one == at);
    }

    /// Puts an agent that is no member on the list of applicants, if there is one.
    fn apply(&self, at: usize, pages: u64) -> io::Result<()> {
        let peer = &self.peers[at];
        if let (State::Waiting(_), Some(applicants)) = (peer.state, &mut lock_state(&self.shared).applicants)
        {
            let (uid, process) = (PeerOf::of(&peer.link)?.uid, PeerOf::process(&peer.link)?);
            applicants.push(Applicant { serial: peer.serial, uid, process, pages });
        }
        Ok(())
    }

    /// Whether an agent was refused and the refusal is sent.
    fn is_done(&self, at: usize) -> bool {
        let peer = &self.peers[at];
        peer.state == State::Refused && peer.waiting.is_empty()
    }

    /// Tells agents how to merge: those of which, by their place in the list and their domain, `to`
    /// is true.
    fn tell_settings(&mut self, to: impl Fn(usize, usize) -> bool) {
        let Some(settings) = lock_state(&self.shared).settings else { return };
        self.yielding.urgent = settings.urgent;
        let members = |peer: &Peer| matches!(peer.state, State::Member(..));
        let count = self.peers.iter().filter(|peer| members(peer)).count().max(1) as u64;
        // Less than one thousandth is no limit, it would say.
        let cpu_permille = match settings.cpu_permille {
            0 => 0,
            all => (all / count).max(1),
        };
        for at in 0..self.peers.len() {
            if let State::Member(domain, _) = self.peers[at].state
                && to(at, domain)
            {
                // When memory is short even what does not last long is worth it.
                let watch_pages = if settings.urgent { 0 } else { self.domains[domain].credit.watch_pages() };
                self.tell(at, Message::Go(Settings { cpu_permille, watch_pages, ..settings }), None);
            }
        }
    }

    /// Deals with what one agent has sent.
    fn serve(&mut self, at: usize) -> io::Result<()> {
        for _ in 0..TURN {
            self.yielding.yield_if_due();
            let (message, file) = match self.peers[at].link.receive() {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            match self.peers[at].state {
                State::New => match message {
                    Message::Hello(version, pages) => {
                        self.peers[at].version = version;
                        self.peers[at].state = State::Waiting(pages);
                        self.admit(at);
                        self.apply(at, pages)?;
                    }
                    _ => return Err(io::ErrorKind::InvalidData.into()),
                },
                State::Waiting(_) | State::Refused => return Err(io::ErrorKind::InvalidData.into()),
                State::Member(domain, guest) => self.obey(at, (domain, guest), message, file)?,
            }
        }
        Ok(())
    }

    fn obey(
        &mut self,
        at: usize,
        (domain, guest): (usize, GuestId),
        message: Message,
        file: Option<File>,
    ) -> io::Result<()> {
        let here = &mut self.domains[domain];
        match message {
            Message::Offer(pages) => {
                let mask = self.hash_mask;
                let pages = pages.into_iter().enumerate().map(|(n, (page, hash))| {
                    if n.is_multiple_of(PAGES_BETWEEN_YIELDS) {
                        self.yielding.yield_if_due();
                    }
                    (page, hash & mask)
                });
                let orders = here.matchmaker.offer(guest, pages);
                self.order(domain, guest, orders);
                self.tell(at, Message::Done, None);
            }
            Message::Published(slab, mut hashes) => {
                hashes.iter_mut().for_each(|hash| *hash &= self.hash_mask);
                let published = here.published(guest, slab, &hashes)?;
                // It has made it, and has it.
                self.peers[at].knows.insert(slab);
                match published {
                    Published::Orders(all) => self.order_all(domain, all),
                    Published::Together(pages) => self.put_together(domain, slab, &pages),
                }
            }
            Message::Unpublished(slab) => {
                let all = here.unpublished(guest, slab);
                self.order_all(domain, all);
            }
            Message::Have(mut hashes) => {
                hashes.iter_mut().for_each(|hash| *hash &= self.hash_mask);
                let file = file.ok_or(io::ErrorKind::InvalidData)?;
                let (slab, all) = match hashes.is_empty() {
                    true => (here.number_of(file.into())?, HashMap::new()),
                    false => match here.known(file.into(), &hashes)? {
                        Some((slab, all)) => (Some(slab), all),
                        None => (None, HashMap::new()),
                    },
                };
                if let Some(slab) = slab {
                    self.peers[at].knows.insert(slab);
                }
                self.tell(at, Message::Named(slab.unwrap_or(u32::MAX)), None);
                self.order_all(domain, all);
            }
            Message::Live(slab, live) => {
                // Only of slabs that it knows of: that bounds what it can have us keep.
                let peer = &mut self.peers[at];
                if peer.knows.contains(&slab) {
                    peer.saying.insert(slab, live);
                }
            }
            Message::LiveEnd(ordered) => {
                let peer = &mut self.peers[at];
                let said = std::mem::take(&mut peer.saying);
                // What it was ordered since, it may use by now.
                peer.live = (ordered == peer.ordered).then_some(said);
                self.tidy(domain);
            }
            Message::Report(counters) => {
                self.count(self.peers[at].serial, domain, *counters);
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(())
    }

    /// Takes over what the agent of session `serial` has counted; its domain's credit follows from
    /// that.
    fn count(&mut self, serial: u64, domain: usize, counters: Counters) {
        if let Some(session) = lock_state(&self.shared).sessions.get_mut(&serial) {
            let (merged, broken) = (lasting(&counters), counters.broken_soon_pages);
            let (before, broken_before) = (lasting(&session.counters), session.counters.broken_soon_pages);
            // Its first report has what an agent did before it came here.
            if session.counters != Counters::default() {
                let credit = &mut self.domains[domain].credit;
                credit.add(merged.saturating_sub(before), broken.saturating_sub(broken_before));
            }
            session.counters = counters;
        }
        if self.domains[domain].credit.judge(now()) {
            self.tell_settings(|_, of| of == domain);
        }
    }

    fn order_all(&mut self, domain: usize, all: HashMap<GuestId, Orders>) {
        for (guest, orders) in all {
            self.order(domain, guest, orders);
        }
    }

    /// Puts orders on their way.
    fn order(&mut self, domain: usize, guest: GuestId, orders: Orders) {
        let Some(at) = self.peers.iter().position(|peer| peer.state == State::Member(domain, guest)) else {
            return;
        };
        for publish in orders.publish {
            let (pages, between) = (publish.pages.len() as u64, &mut || self.yielding.yield_if_due());
            match self.domains[domain].draft(publish.slab, pages, between) {
                Some(file) => self.tell(at, Message::Publish(publish.slab, publish.pages), Some(file)),
                None => _ = self.domains[domain].matchmaker.abandon(publish.slab),
            }
        }
        for run in &orders.merge {
            self.introduce(domain, at, run.slab);
        }
        for runs in orders.merge.chunks(MERGE_RUNS) {
            self.order_one(at, Message::Merge(runs.to_vec()));
        }
    }

    /// An order after which the agent may use other pages of slabs than before.
    fn order_one(&mut self, at: usize, message: Message) {
        self.peers[at].ordered += 1;
        self.peers[at].live = None;
        self.tell(at, message, None);
    }

    /// Gives an agent a slab that it does not know.
    fn introduce(&mut self, domain: usize, at: usize, slab: u32) {
        if let Some((file, pages)) = self.domains[domain].slab(slab)
            && self.peers[at].knows.insert(slab)
        {
            self.tell(at, Message::Slab(slab, pages), Some(file));
        }
    }

    /// The agents of a domain, by their place in the list.
    fn members(&self, domain: usize) -> Vec<usize> {
        let of = |peer: &Peer| matches!(peer.state, State::Member(of, _) if of == domain);
        (0..self.peers.len()).filter(|at| of(&self.peers[*at])).collect()
    }

    /// Drops unused slabs, and compacts those that are used little; if all agents have said what
    /// they use.
    fn tidy(&mut self, domain: usize) {
        let members = self.members(domain);
        let used: Option<Vec<_>> = members.iter().map(|at| self.peers[*at].live.as_ref()).collect();
        let Some(used) = used else { return };
        let tidy = self.domains[domain].tidy(used.into_iter(), now());
        tidy.unused.into_iter().for_each(|slab| self.forget(domain, slab));
        for together in tidy.together {
            // The agent that has most of them does it; what it has not, waits.
            let known = |at: &&usize| {
                let knows = &self.peers[**at].knows;
                together.iter().filter(|place| knows.contains(&place.slab)).count()
            };
            let Some(at) = members.iter().max_by_key(known).copied() else { continue };
            let State::Member(_, guest) = self.peers[at].state else { continue };
            let knows = &self.peers[at].knows;
            let pages: Vec<SlabPlace> =
                together.into_iter().filter(|place| knows.contains(&place.slab)).collect();
            let between = &mut || self.yielding.yield_if_due();
            if let Some((slab, file)) = self.domains[domain].compact(guest, pages.clone(), between) {
                self.tell(at, Message::Compact(slab, pages), Some(file));
            }
        }
    }

    /// Looks once more, if a second has gone by, at slabs that were still losing pages.
    fn tidy_again(&mut self) {
        let now = now();
        if now.saturating_sub(self.tidied) < Duration::from_secs(1) {
            return;
        }
        self.tidied = now;
        for domain in 0..self.domains.len() {
            if self.domains[domain].is_unsettled() {
                self.tidy(domain);
            }
        }
    }

    /// A slab has been filled with pages of others: their users are to use it instead, and they are
    /// dropped.
    fn put_together(&mut self, domain: usize, new: u32, pages: &[SlabPlace]) {
        let old: HashSet<u32> = pages.iter().map(|page| page.slab).collect();
        for at in self.members(domain) {
            if !self.peers[at].knows.is_disjoint(&old) {
                self.introduce(domain, at, new);
                self.order_one(at, Message::Move(new, pages.to_vec()));
            }
        }
        old.into_iter().for_each(|slab| self.forget(domain, slab));
    }

    fn forget(&mut self, domain: usize, slab: u32) {
        self.domains[domain].forget(slab);
        for at in self.members(domain) {
            if self.peers[at].knows.remove(&slab) {
                self.tell(at, Message::Drop(slab), None);
            }
        }
    }

    fn tell(&mut self, at: usize, message: Message, file: Option<Arc<File>>) {
        self.peers[at].waiting.push_back((message, file));
    }

    /// Sends what an agent takes.
    fn flush(&mut self, at: usize) -> io::Result<()> {
        let Peer { link, waiting, .. } = &mut self.peers[at];
        while let Some((message, file)) = waiting.front() {
            match link.send(message, file.as_ref().map(|file| file.as_fd())) {
                Ok(()) => _ = waiting.pop_front(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if waiting.len() > MAX_WAITING { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }

    fn disconnect(&mut self, at: usize) {
        let peer = self.peers.remove(at);
        lock_state(&self.shared).sessions.remove(&peer.serial);
        if let State::Member(domain, guest) = peer.state {
            let all = self.domains[domain].remove(guest);
            self.order_all(domain, all);
            if lock_state(&self.shared).settings.is_some_and(|settings| settings.cpu_permille > 0) {
                self.tell_settings(|_, _| true);
            }
            // What only it has used is unused now.
            self.tidy(domain);
        }
    }
}

/// What an agent has merged that might last: pages that only moved did before.
fn lasting(counters: &Counters) -> u64 {
    (counters.merged_pages + counters.zero_pages).saturating_sub(counters.moved_pages)
}

/// The time, by a clock that never goes back.
fn now() -> Duration {
    Duration::from_nanos(now_ns(ClockId::Monotonic))
}
