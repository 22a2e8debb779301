//! The agent: a thread in a VM process that hashes, publishes and merges its guest's pages.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::{Bytes, GuestAddress};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::matchmaker::{PageHash, Run};
use super::wire::{Link, MAX_OPEN_SLABS, Message, OFFER_PAGES, Report};
use crate::memory::PAGE_BYTES;
use crate::memory::merge_run::{MAX_RUN_PAGES, Refusal};
use crate::memory::pagemap::{Pagemap, PagemapEntry};
use crate::memory::ram::Ram;
use crate::memory::slab::{Draft, Slab};
use crate::memory::slabbed::Slabbed;

const PAGE: usize = PAGE_BYTES as usize;
/// How long to wait before the matchmaker is looked for again.
const RETRY: Duration = Duration::from_millis(500);
/// The shortest and the longest wait from one pass to the next: twice as long each time that nothing was new.
const PAUSE_MILLIS: (i64, i64) = (20, 2000);

/// Starts the agent of `ram`, which serves whatever matchmaker is at `socket`, now or later, for as long as this process lives.
pub fn start(ram: Ram, socket: PathBuf) -> io::Result<()> {
    let slabbed = Slabbed::new(&ram)?;
    let work = move || {
        let pages = ram.bytes() / PAGE_BYTES;
        let mut agent = Agent {
            ram,
            slabbed,
            slabs: HashMap::new(),
            seen: vec![0; pages as usize],
            report: Report::default(),
        };
        loop {
            // A matchmaker that is gone, or talks rubbish, is replaced or not; what is merged stays so.
            if let Err(error) = agent.serve(&socket) {
                tracing::debug!("merging: {error}");
            }
            thread::sleep(RETRY);
        }
    };
    thread::Builder::new().name("merge".into()).spawn(work)?;
    Ok(())
}

struct Agent {
    ram: Ram,
    slabbed: Slabbed,
    /// Those the matchmaker has spoken of.
    slabs: HashMap<u32, Slab>,
    /// For each page the hash it had when it was last looked at; 0 at first. The lowest bit says that it was offered.
    seen: Vec<u64>,
    report: Report,
}

/// One connection to a matchmaker.
struct Session {
    link: Link,
    key: u64,
}

impl Agent {
    fn serve(&mut self, socket: &Path) -> io::Result<()> {
        let mut link = Link::connect(socket)?;
        link.send(&Message::Hello, None::<&OwnedFd>)?;
        let (Message::Key(key), _) = link.receive()? else { return Err(io::ErrorKind::InvalidData.into()) };
        let mut session = Session { link, key };
        // Another matchmaker has another key, and knows nothing.
        self.seen.fill(0);
        self.slabs.clear();
        let mut pause = PAUSE_MILLIS.0;
        loop {
            let before = self.report;
            self.pass(&mut session)?;
            self.report.passes += 1;
            self.report.shared_now = self.slabbed.pages()?;
            let cpu = clock_gettime(ClockId::ThreadCPUTime);
            self.report.cpu_nanoseconds =
                Duration::new(cpu.tv_sec as u64, cpu.tv_nsec as u32).as_nanos() as u64;
            session.link.send(&Message::Report(self.report), None::<&OwnedFd>)?;
            let news = (self.report.merged, self.report.zeros) != (before.merged, before.zeros);
            pause = if news { PAUSE_MILLIS.0 } else { (pause * 2).min(PAUSE_MILLIS.1) };
            self.wait(&mut session, pause)?;
        }
    }

    /// Does what the matchmaker says until a while is over.
    fn wait(&mut self, session: &mut Session, millis: i64) -> io::Result<()> {
        let mut timeout = Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 };
        loop {
            let ready = poll(&mut [PollFd::new(&session.link, PollFlags::IN)], Some(&timeout))?;
            if ready == 0 {
                return Ok(());
            }
            self.obey_next(session)?;
            timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
        }
    }

    /// Looks at all pages that are this guest's alone.
    fn pass(&mut self, session: &mut Session) -> io::Result<()> {
        let mut pagemap = Pagemap::open_self().map_err(io::Error::other)?;
        let (mut entries, mut buffer) = (Vec::new(), vec![0; MAX_RUN_PAGES as usize * PAGE]);
        let mut offer = Vec::new();
        let mut first = 0;
        for extent in self.ram.extents() {
            let pages = extent.bytes / PAGE_BYTES;
            let mut at = 0;
            while at < pages {
                let count = MAX_RUN_PAGES.min(pages - at);
                pagemap
                    .read(extent.hva + at * PAGE_BYTES, count as usize, &mut entries)
                    .map_err(io::Error::other)?;
                // Not a slab's, nor the kernel's one frame of zeros.
                let alone = |e: &PagemapEntry| e.present() && !e.file_or_shared() && e.exclusive();
                let mut begin = at;
                for run in entries.chunk_by(|a, b| alone(a) == alone(b)) {
                    if alone(&run[0]) {
                        let bytes = &mut buffer[..run.len() * PAGE];
                        let gpa = GuestAddress(extent.gpa + begin * PAGE_BYTES);
                        self.ram.memory().read_slice(bytes, gpa).map_err(io::Error::other)?;
                        self.look_at(session.key, first + begin, bytes, &mut offer);
                    }
                    begin += run.len() as u64;
                }
                at += count;
                if offer.len() + MAX_RUN_PAGES as usize > OFFER_PAGES {
                    self.exchange(session, std::mem::take(&mut offer))?;
                }
            }
            first += pages;
        }
        self.exchange(session, offer)
    }

    /// Hashes the pages in `bytes`, the first of which is number `page`.
    fn look_at(&mut self, key: u64, page: u64, bytes: &[u8], offer: &mut Vec<(u64, PageHash)>) {
        let mut zeros: Vec<(u64, u64)> = Vec::new();
        for (page, bytes) in (page..).zip(bytes.chunks_exact(PAGE)) {
            if bytes.iter().all(|byte| *byte == 0) {
                match zeros.last_mut() {
                    Some((start, count)) if *start + *count == page => *count += 1,
                    _ => zeros.push((page, 1)),
                }
                continue;
            }
            self.report.hashed += 1;
            let hash = hash(key, bytes);
            let Some(seen) = self.seen.get_mut(page as usize) else { continue };
            // New to us, or the same as the last time. One that keeps changing is not worth an offer.
            if *seen == 0 || *seen == hash & !1 {
                offer.push((page, hash));
                *seen = hash | 1;
            } else if *seen != hash | 1 {
                *seen = (hash & !1).max(2);
            }
        }
        for (page, count) in zeros {
            match self.slabbed.drop_zeros(page, count) {
                Ok(()) => self.report.zeros += count,
                Err(refusal) => self.refused(&refusal),
            }
        }
    }

    /// Offers pages and does what comes of it.
    fn exchange(&mut self, session: &mut Session, offer: Vec<(u64, PageHash)>) -> io::Result<()> {
        if offer.is_empty() {
            return Ok(());
        }
        session.link.send(&Message::Offer(offer), None::<&OwnedFd>)?;
        while self.obey_next(session)? != Message::Done {}
        Ok(())
    }

    fn obey_next(&mut self, session: &mut Session) -> io::Result<Message> {
        let (message, file) = session.link.receive()?;
        match (&message, file) {
            (Message::Done, _) => {}
            // A matchmaker that keeps the rules has started over by then.
            (Message::Publish(..) | Message::Slab(..), _) if self.slabs.len() > 2 * MAX_OPEN_SLABS => {
                return Err(io::ErrorKind::InvalidData.into());
            }
            (Message::Publish(slab, pages), Some(file)) => {
                let answer = match self.publish(session.key, pages, file.into()) {
                    Ok((sealed, hashes)) => {
                        self.slabs.insert(*slab, sealed);
                        Message::Published(*slab, hashes)
                    }
                    Err(error) => {
                        tracing::debug!("merging: {error}");
                        Message::Unpublished(*slab)
                    }
                };
                session.link.send(&answer, None::<&OwnedFd>)?;
            }
            (Message::Slab(slab, pages), Some(file)) => {
                // One that is not what it should be is as good as none.
                if let Ok(sealed) = Slab::receive(file.into(), *pages) {
                    self.slabs.insert(*slab, sealed);
                }
            }
            (Message::Merge(runs), _) => runs.iter().for_each(|run| self.merge(*run)),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(message)
    }

    /// Copies pages into a draft and seals it. Returns the hashes of what was copied.
    fn publish(&self, key: u64, pages: &[u64], draft: OwnedFd) -> anyhow::Result<(Slab, Vec<PageHash>)> {
        let draft = Draft::receive(draft, pages.len() as u64)?;
        let (mut hashes, mut page_bytes) = (Vec::with_capacity(pages.len()), vec![0; PAGE]);
        for (n, page) in (0..).zip(pages) {
            let gpa = self.slabbed.gpa(*page).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            self.ram.memory().read_slice(&mut page_bytes, GuestAddress(gpa))?;
            hashes.push(hash(key, &page_bytes));
            draft.write(n, &page_bytes)?;
        }
        Ok((draft.seal()?, hashes))
    }

    fn merge(&mut self, run: Run) {
        let mut done = 0;
        while done < run.pages {
            let pages = (run.pages - done).min(MAX_RUN_PAGES as u32);
            self.merge_some(Run {
                page: run.page + u64::from(done),
                pages,
                slab_page: run.slab_page + done,
                ..run
            });
            done += pages;
        }
    }

    /// Merges a run of at most [`MAX_RUN_PAGES`]; the halves of it, if a page in it has changed.
    fn merge_some(&mut self, run: Run) {
        let Some(slab) = self.slabs.get(&run.slab) else { return self.refused(&Refusal::Run) };
        match self.slabbed.merge((run.page, run.pages.into()), (slab, run.slab_page.into())) {
            Ok(()) => self.report.merged += u64::from(run.pages),
            Err(Refusal::Differs) if run.pages > 1 => {
                let half = run.pages / 2;
                self.merge_some(Run { pages: half, ..run });
                self.merge_some(Run {
                    page: run.page + u64::from(half),
                    pages: run.pages - half,
                    slab_page: run.slab_page + half,
                    ..run
                });
            }
            Err(refusal) => self.refused(&refusal),
        }
    }

    fn refused(&mut self, refusal: &Refusal) {
        match refusal {
            Refusal::Differs => self.report.differed += 1,
            _ => {
                self.report.refused += 1;
                tracing::debug!("merging: {refusal}");
            }
        }
    }
}

fn hash(key: u64, page: &[u8]) -> PageHash {
    xxh3_64_with_seed(page, key)
}

#[cfg(test)]
mod tests;
