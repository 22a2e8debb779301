//! The agent: a thread in a VM process that finds quiet pages, and publishes and merges what the matchmaker says.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::ClockId;
use vm_memory::{Bytes, GuestAddress};

use super::counters::{Counters, now_ns};
use super::matchmaker::{PageHash, SlabPlace};
use super::merger::{Merger, Work};
use super::refusal::Refusal;
use super::watcher::Watcher;
use super::wire::{Link, MAX_OPEN_SLABS, Message, OFFER_PAGES, Settings, VERSION};
use measure::tag::TagKey;
use memory::page_buffer::PageBuffer;
use memory::ram::Ram;
use memory::shared_ram::{Private, SharedRam};
use memory::slab::{Draft, Slab};
use memory::written::WriteLog;
use memory::{PAGE, PAGE_BYTES, PageNo, PageRange, PageSet, SlabPage};
use os::limits;

/// Pages copied at a time to be hashed: as much as the nearest caches hold.
const PIECE_PAGES: u64 = 16;
/// How long to wait before the matchmaker is looked for again.
const RETRY: Duration = Duration::from_millis(500);
/// The same after it has refused.
const REFUSED_RETRY: Duration = Duration::from_secs(5);
/// How long a guest's start waits for the matchmaker.
const BIRTH_LIMIT: Duration = Duration::from_secs(2);
/// The shortest and the longest wait from one look to the next: twice as long each time that nothing was merged.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(2));
/// From this pause on there is time to count what is shared.
const IDLE: Duration = Duration::from_millis(150);
/// How long a guest that goes on from an image is left alone: it has everything in common with others, and they all begin at once.
const CLONE_REST: Duration = Duration::from_secs(1);
/// The least time from one such count to the next; and as a multiple of what a count takes.
const COUNT_EVERY: (Duration, u32) = (Duration::from_secs(2), 200);

/// The matchmaker does not admit the guest.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.text.replace(char::is_control, " "))]
struct Refused(Refusal);

/// The agent of one VM.
pub struct Agent {
    ram: Ram,
    pages: u64,
    merger: Merger,
    counters: Counters,
    clock: CpuClock,
    /// Orders to merge and to move that were carried out in this session.
    ordered: u64,
    /// What is shared may have changed since it was counted.
    stale: bool,
    discards: u64,
    /// When it began, and since then pages may be watched that were not.
    began: Instant,
    allowed: Duration,
    newborn: Option<Session>,
    /// The guest goes on from an image, and its pages were not looked at yet.
    is_clone: bool,
    found: FoundSlabs,
}

/// Sealed slabs that the VM process got otherwise than from a matchmaker, those of an image: the agent offers them to its domain.
pub type FoundSlabs = Arc<Mutex<Vec<Slab>>>;

/// One connection to a matchmaker.
struct Session {
    link: Link,
    key: TagKey,
    settings: Option<Settings>,
}

impl Agent {
    /// The agent of `ram`, which must be anonymous memory, and of what comes into `found`, now and later.
    pub fn new(ram: &Ram, found: FoundSlabs) -> io::Result<Self> {
        let pages = ram.bytes() / PAGE_BYTES;
        // Each slab is one.
        limits::allow_descriptors();
        let mut merger = Merger::new(SharedRam::new(ram)?, pages);
        let shared = ram.slab_pages();
        let is_clone = !shared.is_empty();
        merger.begin_with(shared);
        Ok(Self {
            ram: ram.clone(),
            pages,
            merger,
            counters: Counters::default(),
            clock: CpuClock::start(),
            ordered: 0,
            stale: true,
            discards: 0,
            began: Instant::now(),
            allowed: Duration::ZERO,
            newborn: None,
            is_clone,
            found,
        })
    }

    /// To be called when RAM holds what the guest starts from, and no vCPU runs: what other guests have of it is shared from
    /// the first instant. Where there is no matchmaker, or a slow one, nothing is. A guest that goes on from an image shares already.
    pub fn share_at_birth(&mut self, socket: &Path) {
        if self.is_clone {
            return;
        }
        let share = |agent: &mut Self| -> io::Result<Session> {
            let link = Link::connect(socket)?;
            link.set_time_limit(Some(BIRTH_LIMIT))?;
            let mut session = agent.greet(link)?;
            agent.offer_all(&mut session, &PageSet::all(agent.pages))?;
            session.link.set_time_limit(None)?;
            Ok(session)
        };
        // The start waits for it.
        self.merger.yielding.urgent = true;
        let shared = share(self);
        self.merger.yielding.urgent = self.merger.settings.urgent;
        match shared {
            Ok(session) => self.newborn = Some(session),
            Err(error) => tracing::debug!("merging: nothing is shared at birth: {error}"),
        }
    }

    /// Starts the thread, which serves whatever matchmaker is at `socket`, now or later, for as long as this process lives; `log` says
    /// what is written. The thread calls `confine` before it listens to any matchmaker.
    pub fn start(
        mut self,
        log: Box<dyn WriteLog>,
        socket: PathBuf,
        confine: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let work = move || {
            self.merger.yielding.lower_priority();
            confine();
            let mut watcher = Watcher::new(log, self.pages);
            self.clock = CpuClock::start();
            if let Err(error) = watcher.start() {
                tracing::warn!("pages are not merged: {error}");
                return;
            }
            let _ = watcher.stop();
            let mut refused = String::new();
            loop {
                // A matchmaker that is gone, or talks rubbish, is replaced or not; what is merged stays so.
                let Err(error) = self.serve(&mut watcher, &socket) else { continue };
                let _ = watcher.stop();
                let why = error.to_string();
                if error.kind() != io::ErrorKind::PermissionDenied {
                    tracing::debug!("merging: {why}");
                    thread::sleep(RETRY);
                    continue;
                }
                // Its file may be another one later.
                if refused != why {
                    let refusal = error.get_ref().and_then(|error| error.downcast_ref::<Refused>());
                    let kind = refusal.map(|Refused(refusal)| tracing::field::debug(refusal.kind));
                    tracing::warn!(kind, "pages are not merged: {}: {why}", socket.display());
                    refused = why;
                }
                thread::sleep(REFUSED_RETRY);
            }
        };
        thread::Builder::new().name("merge".into()).spawn(work)?;
        Ok(())
    }

    /// Says hello to a matchmaker, and gives it what is left of an earlier one.
    fn greet(&mut self, mut link: Link) -> io::Result<Session> {
        link.send(&Message::Hello(VERSION, self.pages), NO_FILE)?;
        let key = match link.receive()?.0 {
            Message::Key(key) => key,
            Message::Refused(refusal) => {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, Refused(refusal)));
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let mut session = Session { link, key: TagKey::from_seed(key), settings: None };
        self.ordered = 0;
        self.stale = true;
        for slab in self.merger.start_over() {
            self.present(&mut session, slab)?;
        }
        self.clock.lap(&mut self.counters.match_ns);
        Ok(session)
    }

    /// Offers a slab to the domain. What the matchmaker does not take stays mapped, and is not shared further.
    fn present(&mut self, session: &mut Session, slab: Slab) -> io::Result<()> {
        // Without hashes first: of a thousand agents that have it only one is to hash it.
        let mut number = self.name(session, Vec::new(), &slab)?;
        if number.is_none() {
            let whole = slab.bytes(SlabPage(0), slab.pages()).unwrap_or_default();
            let hashes = whole.as_chunks().0.iter().map(|page| {
                self.merger.yielding.yield_if_due();
                session.key.tag(page).short()
            });
            let hashes = hashes.collect();
            number = self.name(session, hashes, &slab)?;
        }
        if let Some(number) = number {
            self.merger.learn(number, slab);
        }
        Ok(())
    }

    /// The number that the matchmaker gives to a slab with pages of these hashes; None if it does not take it.
    fn name(&mut self, session: &mut Session, hashes: Vec<PageHash>, slab: &Slab) -> io::Result<Option<u32>> {
        session.link.send(&Message::Have(hashes), Some(slab))?;
        loop {
            if let Message::Named(number) = self.obey_next(session)? {
                return Ok((number != u32::MAX).then_some(number));
            }
        }
    }

    /// Offers what was found since the last look.
    fn present_found(&mut self, session: &mut Session) -> io::Result<()> {
        loop {
            let Some(slab) = os::lock(&self.found).pop() else { return Ok(()) };
            self.present(session, slab)?;
        }
    }

    fn serve(&mut self, watcher: &mut Watcher, socket: &Path) -> io::Result<()> {
        let mut session = match self.newborn.take() {
            Some(session) => session,
            None => {
                let link = Link::connect(socket)?;
                self.greet(link)?
            }
        };
        while session.settings.is_none() {
            self.obey_next(&mut session)?;
            self.report(&session)?;
        }
        if std::mem::take(&mut self.is_clone) {
            self.wait(&mut session, CLONE_REST)?;
        }
        watcher.start()?;
        let (mut pause, mut next_count) = (PAUSE.0, Instant::now());
        loop {
            let before = self.counters;
            let began = (Instant::now(), self.counters.cpu_seconds());
            self.present_found(&mut session)?;
            self.look(&mut session, watcher, pause > PAUSE.0)?;
            self.counters.passes += u64::from(watcher.watches_all());
            if self.ram.discards() != self.discards {
                self.discards = self.ram.discards();
                self.stale = true;
            }
            if self.stale && pause >= IDLE && Instant::now() >= next_count {
                let begin = Instant::now();
                self.count(&session)?;
                next_count = Instant::now() + COUNT_EVERY.0.max(begin.elapsed() * COUNT_EVERY.1);
            }
            self.report(&session)?;
            let did = |c: &Counters| (c.merged_pages - c.moved_pages, c.zero_pages);
            pause = if did(&self.counters) != did(&before) { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
            let rest = self.rest(&session, began);
            self.wait(&mut session, pause.max(rest))?;
        }
    }

    /// How long to do nothing for the time since `began` to be within the budget.
    fn rest(&self, session: &Session, (began, cpu_seconds): (Instant, f64)) -> Duration {
        match session.settings {
            Some(Settings { cpu_permille: permille @ 1.., .. }) => {
                let due = (self.counters.cpu_seconds() - cpu_seconds) * 1000.0 / permille as f64;
                Duration::from_secs_f64(due.max(0.0)).saturating_sub(began.elapsed())
            }
            _ => Duration::ZERO,
        }
    }

    /// Does what the matchmaker says until a while is over.
    fn wait(&mut self, session: &mut Session, pause: Duration) -> io::Result<()> {
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let said = poll(&mut [PollFd::new(&session.link, PollFlags::IN)], Some(&timeout))?;
            self.merger.yielding.woke();
            if said == 0 {
                return Ok(());
            }
            let before = self.counters.merged_pages;
            self.obey_next(session)?;
            if self.counters.merged_pages != before {
                self.report(session)?;
            }
        }
    }

    /// Looks what is quiet, and offers that.
    fn look(&mut self, session: &mut Session, watcher: &mut Watcher, more: bool) -> io::Result<()> {
        let now = self.began.elapsed();
        if self.merger.breaks().tick(now) {
            self.merger.lasted().enumerate().for_each(|(n, lasted)| watcher.trust(n, lasted));
        }
        let look = watcher.look()?;
        self.counters.candidate_pages += look.quiet;
        self.counters.changed_pages += look.changed;
        let broken = self.counters.broken_pages;
        self.merger.written(watcher.hit(), &mut self.counters);
        self.stale |= self.counters.broken_pages != broken;
        watcher.blame(self.merger.breaks().broken());
        self.merger.breaks().forget();
        // Not in the middle of merging, when the guest waits for enough other things.
        if more {
            let most = self.may_watch(session, now);
            watcher.watch(now, most, &mut || self.merger.yielding.yield_if_due())?;
        }
        self.clock.lap(&mut self.counters.scan_ns);
        if look.quiet > 0 {
            self.offer_all(session, watcher.quiet())?;
        }
        self.merger.retry(&mut self.counters);
        self.clock.lap(&mut self.counters.merge_ns);
        self.counters.converged_at_ns = now_ns(ClockId::Monotonic);
        Ok(())
    }

    /// How many pages may be watched now.
    fn may_watch(&mut self, session: &Session, now: Duration) -> u64 {
        // Of what was allowed long ago a second is left.
        let since = now.saturating_sub(self.allowed).min(Duration::from_secs(1));
        match session.settings {
            Some(Settings { watch_pages: most @ 1.., .. }) => {
                let pages = (since.as_secs_f64() * most as f64) as u64;
                self.allowed = if pages > 0 { now } else { self.allowed };
                pages
            }
            _ => u64::MAX,
        }
    }

    /// Hashes and offers those pages of the set that are this guest's alone.
    fn offer_all(&mut self, session: &mut Session, set: &PageSet) -> io::Result<()> {
        let (mut private, mut buffer) = (Vec::new(), PageBuffer::new(PIECE_PAGES as usize));
        let chunk_words = OFFER_PAGES / 64;
        for (n, words) in (0u64..).zip(set.words().chunks(chunk_words)) {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let began = (Instant::now(), self.counters.cpu_seconds());
            let first = PageNo(n * OFFER_PAGES as u64);
            let end = (first + words.len() as u64 * 64).min(PageNo(self.pages));
            private.clear();
            for span in spans(set, PageRange::between(first, end)) {
                self.merger.yielding.yield_if_due();
                let mixed = self.merger.any_shared(span);
                self.merger.shared_ram().private(span, mixed, &mut private)?;
            }
            self.clock.lap(&mut self.counters.scan_ns);
            let (mut offer, mut zeros) = (Vec::new(), Vec::new());
            for Private { pages, huge } in &private {
                if *huge {
                    self.merger.is_huge(*pages);
                }
                for piece in set.runs_of(*pages, PIECE_PAGES) {
                    self.merger.yielding.yield_if_due();
                    let bytes = &mut buffer[..piece.pages() as usize * PAGE];
                    self.merger.private(piece, &mut self.counters);
                    let Some(gpa) = self.merger.shared_ram().gpa(piece.first()) else { continue };
                    self.ram.memory().read_slice(bytes, GuestAddress(gpa.0)).map_err(io::Error::other)?;
                    self.counters.hashed_pages +=
                        look_at(&session.key, piece.first(), bytes, &mut offer, &mut zeros);
                }
            }
            zeros.into_iter().for_each(|work| self.merger.take(work, &mut self.counters));
            self.clock.lap(&mut self.counters.hash_ns);
            self.exchange(session, offer)?;
            self.report(session)?;
            thread::sleep(self.rest(session, began));
        }
        Ok(())
    }

    /// Offers pages and does what comes of it.
    fn exchange(&mut self, session: &mut Session, offer: Vec<(PageNo, PageHash)>) -> io::Result<()> {
        if !offer.is_empty() {
            session.link.send(&Message::Offer(offer), NO_FILE)?;
            while self.obey_next(session)? != Message::Done {}
        }
        Ok(())
    }

    fn obey_next(&mut self, session: &mut Session) -> io::Result<Message> {
        let (message, file) = session.link.receive()?;
        self.clock.lap(&mut self.counters.match_ns);
        match (&message, file) {
            (Message::Done | Message::Named(_), _) => {}
            (Message::Go(settings), _) => {
                session.settings = Some(*settings);
                self.merger.settings = *settings;
                self.merger.yielding.urgent = settings.urgent;
            }
            // A matchmaker that keeps the rules has dropped some by then.
            (Message::Publish(..) | Message::Slab(..) | Message::Compact(..), _)
                if self.merger.slab_count() > 2 * MAX_OPEN_SLABS =>
            {
                return Err(io::ErrorKind::InvalidData.into());
            }
            (Message::Publish(slab, pages), Some(file)) => {
                let published = self.publish(&session.key, pages, file.into());
                self.answer(session, *slab, published)?;
            }
            (Message::Compact(slab, pages), Some(file)) => {
                let published = self.compact(&session.key, pages, file.into());
                self.answer(session, *slab, published)?;
            }
            (Message::Slab(slab, pages), Some(file)) => {
                // One that is not what it should be is as good as none.
                if let Ok(sealed) = Slab::receive(file.into(), *pages) {
                    self.merger.learn(*slab, sealed);
                }
            }
            (Message::Drop(slab), _) => self.merger.forget(*slab),
            (Message::Merge(runs), _) => {
                self.merger.merge_all(runs.clone(), &mut self.counters);
                self.reordered();
            }
            (Message::Move(slab, pages), _) => {
                self.merger.put_together(*slab, pages, &mut self.counters)?;
                self.reordered();
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        self.clock.lap(&mut self.counters.match_ns);
        Ok(message)
    }

    fn reordered(&mut self) {
        self.ordered += 1;
        self.stale = true;
        self.clock.lap(&mut self.counters.merge_ns);
    }

    fn answer(
        &mut self,
        session: &Session,
        slab: u32,
        published: anyhow::Result<(Slab, Vec<PageHash>)>,
    ) -> io::Result<()> {
        let answer = match published {
            Ok((sealed, hashes)) => {
                self.merger.learn(slab, sealed);
                Message::Published(slab, hashes)
            }
            Err(error) => {
                tracing::debug!("merging: {error}");
                Message::Unpublished(slab)
            }
        };
        self.clock.lap(&mut self.counters.publish_ns);
        session.link.send(&answer, NO_FILE)
    }

    /// Copies pages of the guest into a draft and seals it. Returns the hashes of what was copied.
    fn publish(
        &mut self,
        key: &TagKey,
        pages: &[PageNo],
        draft: OwnedFd,
    ) -> anyhow::Result<(Slab, Vec<PageHash>)> {
        let draft = Draft::receive(draft, pages.len() as u64)?;
        let (mut hashes, mut buffer) =
            (Vec::with_capacity(pages.len()), PageBuffer::new(PIECE_PAGES as usize));
        let mut at = SlabPage(0);
        for run in pages.chunk_by(|a, b| PageRange::one(*a).end() == *b) {
            for piece in run.chunks(PIECE_PAGES as usize) {
                self.merger.yielding.yield_if_due();
                let bytes = &mut buffer[..piece.len() * PAGE];
                for (page, bytes) in piece.iter().zip(bytes.as_chunks_mut().0) {
                    let gpa = self.merger.shared_ram().gpa(*page);
                    let gpa = gpa.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
                    self.ram.memory().read_slice(bytes, GuestAddress(gpa.0))?;
                    hashes.push(key.tag(bytes).short());
                }
                draft.write(at, bytes)?;
                at = at + piece.len() as u64;
            }
        }
        self.counters.published_pages += u64::from(at.0);
        Ok((draft.seal()?, hashes))
    }

    /// Copies pages of slabs into a draft and seals it.
    fn compact(
        &mut self,
        key: &TagKey,
        pages: &[SlabPlace],
        draft: OwnedFd,
    ) -> anyhow::Result<(Slab, Vec<PageHash>)> {
        let draft = Draft::receive(draft, pages.len() as u64)?;
        let mut hashes = Vec::with_capacity(pages.len());
        for (n, place) in (0..).map(SlabPage).zip(pages) {
            self.merger.yielding.yield_if_due();
            let slab = self.merger.slab(place.slab);
            let bytes = slab.and_then(|slab| slab.bytes(place.page, 1));
            let page = bytes.and_then(|bytes| bytes.as_chunks().0.first());
            let page = page.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            hashes.push(key.tag(page).short());
            draft.write(n, page)?;
        }
        self.counters.published_pages += pages.len() as u64;
        Ok((draft.seal()?, hashes))
    }

    /// Counts what is shared, and tells the host which pages of slabs are in use.
    fn count(&mut self, session: &Session) -> io::Result<()> {
        self.stale = false;
        for (slab, live) in self.merger.count(&mut self.counters)? {
            session.link.send(&Message::Live(slab, live), NO_FILE)?;
        }
        session.link.send(&Message::LiveEnd(self.ordered), NO_FILE)?;
        self.clock.lap(&mut self.counters.live_ns);
        Ok(())
    }

    fn report(&mut self, session: &Session) -> io::Result<()> {
        self.counters.pieces = self.merger.yielding.pieces;
        session.link.send(&Message::Report(Box::new(self.counters)), NO_FILE)?;
        self.clock.lap(&mut self.counters.match_ns);
        Ok(())
    }
}

const NO_FILE: Option<&OwnedFd> = None;

/// Stretches of `range` in which the pages of `set` lie no further than `GAP_PAGES` apart: looking at what is between takes
/// less time than another system call.
fn spans(set: &PageSet, range: PageRange) -> Vec<PageRange> {
    const GAP_PAGES: u64 = 32;
    let mut spans: Vec<PageRange> = Vec::new();
    for (run, _) in set.runs(range).filter(|(_, is)| *is) {
        match spans.last_mut() {
            Some(last) if run.first() < last.end() + GAP_PAGES => {
                *last = PageRange::between(last.first(), run.end());
            }
            _ => spans.push(run),
        }
    }
    spans
}

/// Sorts the pages in `bytes`, the first of which is number `page`, into those to offer and those that are zeros. Returns how many it has
/// hashed.
fn look_at(
    key: &TagKey,
    page: PageNo,
    bytes: &[u8],
    offer: &mut Vec<(PageNo, PageHash)>,
    zeros: &mut Vec<Work>,
) -> u64 {
    let hashed = offer.len();
    for (page, bytes) in (page.0..).map(PageNo).zip(bytes.as_chunks().0) {
        if let Some(tag) = key.tag_unless_zero(bytes) {
            offer.push((page, tag.short()));
            continue;
        }
        match zeros.last_mut() {
            Some(Work::Zeros(last)) if last.end() == page => {
                *last = PageRange::between(last.first(), page + 1);
            }
            _ => zeros.push(Work::Zeros(PageRange::one(page))),
        }
    }
    (offer.len() - hashed) as u64
}

/// This thread's processor time, from one lap to the next.
struct CpuClock(u64);

impl CpuClock {
    fn start() -> Self {
        let mut clock = Self(0);
        clock.lap(&mut 0);
        clock
    }

    /// Adds what was used since the last lap to `stage`.
    fn lap(&mut self, stage: &mut u64) {
        let now = now_ns(ClockId::ThreadCPUTime);
        *stage += now.saturating_sub(self.0);
        self.0 = now;
    }
}

#[cfg(test)]
mod tests;
