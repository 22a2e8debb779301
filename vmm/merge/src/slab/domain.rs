//! One trust domain in the host: its key, its index, its slabs, and which pages of them are in use.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::compaction::{Allowance, MOST_DRAFTS, Sparse, Usage, Verdict, together};
use super::credit::Credit;
use super::matchmaker::{DRAFT_PAGES, GuestId, Matchmaker, Orders, PageHash, SlabPlace};
use super::pins::Pins;
use super::wire::{Live, MAX_OPEN_SLABS};
use memory::slab::{Draft, Slab};

/// A trust domain. Nothing of it is known to another.
pub struct Domain {
    /// Its name.
    pub name: String,
    /// The key of its hashes: another one in each domain and at each start.
    pub key: u64,
    /// Its index.
    pub matchmaker: Matchmaker,
    /// How much merging is worth here.
    pub credit: Credit,
    drafts: HashMap<u32, Arc<File>>,
    slabs: HashMap<u32, OpenSlab>,
    /// How many no image has, and their pages.
    held: (usize, u64),
    /// What images have, and which edition of that `held_pages` knows of.
    pins: Pins,
    seen_pins: u64,
    /// The files of all of them, for the daemon.
    files: SlabFiles,
    looked: Option<Instant>,
    /// Slabs by the number of their file.
    by_inode: HashMap<u64, u32>,
    /// The slabs into which others are put together, while they are being filled; and which those
    /// are.
    compacting: HashMap<u32, HashSet<u32>>,
    /// Pages that may be moved.
    allowance: Allowance,
    /// Some slabs are to be looked at again in a while, even without news.
    unsettled: bool,
    /// Pages of slabs that were in use when all agents had last reported.
    live_pages: u64,
    pages: u64,
}

#[derive(Clone)]
struct OpenSlab {
    file: Arc<File>,
    pages: u64,
    inode: u64,
    usage: Usage,
}

/// The slabs of a domain by the number of their file, with their pages, for another thread to look
/// up.
pub type SlabFiles = Arc<Mutex<HashMap<u64, (Arc<File>, u64)>>>;

/// One domain.
#[derive(Clone, Debug, Default)]
pub struct DomainNow {
    /// The domain's name.
    pub domain: String,
    /// How many there are, now.
    pub slabs: usize,
    /// Their pages, now.
    pub pages: u64,
    /// Of these, how many were in use when that was looked at, and how many were not.
    pub live_and_dead_pages: (u64, u64),
    /// When it was; None: not yet.
    pub looked: Option<Instant>,
    /// See [`super::credit::Credit::watch_pages`].
    pub watch_pages: u64,
    /// Their files.
    pub files: SlabFiles,
}

/// What is to be done about slabs that are used little or not at all.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tidy {
    /// No guest uses these.
    pub unused: Vec<u32>,
    /// For each new slab pages that are all that is used of the slabs that they are in.
    pub together: Vec<Vec<SlabPlace>>,
}

impl Domain {
    /// One of which nothing is known yet.
    pub fn new(name: &str, pins: Pins) -> Self {
        Self {
            name: name.into(),
            // Random, from the kernel.
            key: RandomState::new().build_hasher().finish(),
            matchmaker: Matchmaker::default(),
            credit: Credit::default(),
            drafts: HashMap::new(),
            slabs: HashMap::new(),
            held: (0, 0),
            seen_pins: 0,
            pins,
            files: SlabFiles::default(),
            looked: None,
            by_inode: HashMap::new(),
            compacting: HashMap::new(),
            allowance: Allowance::default(),
            unsettled: false,
            live_pages: 0,
            pages: 0,
        }
    }

    /// A file for a slab of `pages` pages, charged to the host. None if there can be no more.
    /// `between` is called now and then meanwhile.
    pub fn draft(&mut self, slab: u32, pages: u64, between: &mut dyn FnMut()) -> Option<Arc<File>> {
        if self.slabs.len() + self.drafts.len() >= MAX_OPEN_SLABS {
            return None;
        }
        match Draft::reserved(pages, between) {
            Ok(draft) => {
                let file = Arc::new(draft.into_file());
                self.drafts.insert(slab, file.clone());
                Some(file)
            }
            Err(error) => {
                tracing::warn!("merging: {error}");
                None
            }
        }
    }

    /// `guest` says that it has filled and sealed a draft. What follows from that; an error if it
    /// was not asked.
    pub fn published(&mut self, guest: GuestId, slab: u32, hashes: &[PageHash]) -> io::Result<Published> {
        let draft = self.drafts.remove(&slab).ok_or(io::ErrorKind::InvalidData)?;
        let compacting = self.compacting.remove(&slab).is_some();
        // What it says of a slab that is not sealed is worth nothing.
        if Slab::receive(draft.try_clone()?.into(), hashes.len() as u64).is_err() {
            return Ok(Published::Orders(self.matchmaker.unpublished(guest, slab)));
        }
        let published = match compacting {
            true => Published::Together(
                self.matchmaker.compacted(guest, slab, hashes).ok_or(io::ErrorKind::InvalidData)?,
            ),
            false => Published::Orders(
                self.matchmaker.published(guest, slab, hashes).ok_or(io::ErrorKind::InvalidData)?,
            ),
        };
        self.open(slab, draft, hashes.len() as u64)?;
        Ok(published)
    }

    /// There will be no such slab.
    pub fn unpublished(&mut self, guest: GuestId, slab: u32) -> HashMap<GuestId, Orders> {
        self.drafts.remove(&slab);
        self.compacting.remove(&slab);
        self.matchmaker.unpublished(guest, slab)
    }

    /// The number of a slab that an agent has, if it is known.
    pub fn number_of(&self, file: OwnedFd) -> io::Result<Option<u32>> {
        let file = File::from(file);
        let Some(number) = self.by_inode.get(&file.metadata()?.ino()) else { return Ok(None) };
        let Some(open) = self.slabs.get(number) else { return Ok(None) };
        // Numbers of files of other kinds may be the same.
        Ok(Slab::receive(file.into(), open.pages).is_ok().then_some(*number))
    }

    /// Registers a slab from an earlier host, or of an image. Its number; None if there is no room
    /// for it.
    pub fn known(
        &mut self,
        file: OwnedFd,
        hashes: &[PageHash],
    ) -> io::Result<Option<(u32, HashMap<GuestId, Orders>)>> {
        let file = Arc::new(File::from(file));
        let same = Slab::receive(file.try_clone()?.into(), hashes.len() as u64);
        same.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if let Some(slab) = self.by_inode.get(&file.metadata()?.ino()) {
            return Ok(Some((*slab, HashMap::new())));
        }
        if self.slabs.len() + self.drafts.len() >= MAX_OPEN_SLABS {
            return Ok(None);
        }
        let Some((slab, orders)) = self.matchmaker.known(hashes) else { return Ok(None) };
        self.open(slab, file, hashes.len() as u64)?;
        Ok(Some((slab, orders)))
    }

    fn open(&mut self, slab: u32, file: Arc<File>, pages: u64) -> io::Result<()> {
        let inode = file.metadata()?.ino();
        self.by_inode.insert(inode, slab);
        os::lock(&self.files).insert(inode, (file.clone(), pages));
        let usage = Usage { used: pages, since: Duration::ZERO };
        self.slabs.insert(slab, OpenSlab { file, pages, inode, usage });
        self.count_held();
        Ok(())
    }

    /// The file of a slab, and how many pages it has.
    pub fn slab(&self, slab: u32) -> Option<(Arc<File>, u64)> {
        self.slabs.get(&slab).map(|open| (open.file.clone(), open.pages))
    }

    /// Removes a guest. What it was to fill is not waited for any more.
    pub fn remove(&mut self, guest: GuestId) -> HashMap<GuestId, Orders> {
        // The matchmaker forgets compactions of its; those of others go on.
        let orders = self.matchmaker.remove(guest);
        let Self { drafts, matchmaker, compacting, .. } = self;
        compacting.retain(|slab, _| matchmaker.is_compacting(*slab));
        drafts.retain(|slab, _| matchmaker.is_draft(*slab));
        orders
    }

    /// Drops a slab: when the last guest has unmapped it, its frames are the host's again.
    pub fn forget(&mut self, slab: u32) {
        self.matchmaker.forget(slab);
        if let Some(open) = self.slabs.remove(&slab) {
            self.by_inode.remove(&open.inode);
            os::lock(&self.files).remove(&open.inode);
            self.count_held();
        }
    }

    /// Now that every agent has said which pages it uses: what is not used, or so little that it is
    /// worth being put together. It is so late by any clock that never goes back.
    pub fn tidy<'a>(&mut self, used: impl Iterator<Item = &'a HashMap<u32, Live>>, now: Duration) -> Tidy {
        let mut live: HashMap<u32, Live> = HashMap::new();
        for one in used {
            for (slab, set) in one {
                live.entry(*slab).or_insert_with(|| Live::none(DRAFT_PAGES as u64)).union_with(set);
            }
        }
        let mut tidy = Tidy::default();
        (self.live_pages, self.pages, self.unsettled) = (0, 0, false);
        self.looked = Some(Instant::now());
        let mut sparse: Vec<Sparse> = Vec::new();
        let is_moving = |slab: &u32| self.compacting.values().any(|moving| moving.contains(slab));
        let pins = self.pins.lock();
        for (slab, open) in &mut self.slabs {
            // It stays as it is, whatever of it is used: clones to come use all of it.
            if pins.contains(&open.inode) {
                open.usage = Usage { used: open.pages, since: now };
                continue;
            }
            let used = live.get(slab).map_or(0, Live::count).min(open.pages);
            open.usage.count(used, now);
            if used == 0 {
                tidy.unused.push(*slab);
                continue;
            }
            match open.usage.judge(open.pages, now) {
                Verdict::Clean if !is_moving(slab) => {
                    sparse.push(Sparse { slab: *slab, used, pages: open.pages });
                }
                Verdict::Wait => self.unsettled = true,
                Verdict::Leave | Verdict::Clean => {}
            }
            self.live_pages += used;
            self.pages += open.pages;
        }
        let (drafts, allowed) =
            (MOST_DRAFTS - self.compacting.len().min(MOST_DRAFTS), self.allowance.pages(now));
        self.unsettled |= sparse.iter().map(|sparse| sparse.used).sum::<u64>() > allowed;
        tidy.together = together(sparse, &live, (drafts, allowed));
        tidy
    }

    /// Whether [`Self::tidy`] is to be called again in a while, even without news.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// `guest` is to put these pages together. The number of the slab, and its file. `between`: as
    /// in [`Self::draft`].
    pub fn compact(
        &mut self,
        guest: GuestId,
        pages: Vec<SlabPlace>,
        between: &mut dyn FnMut(),
    ) -> Option<(u32, Arc<File>)> {
        let count = pages.len() as u64;
        let old = pages.iter().map(|page| page.slab).collect();
        let slab = self.matchmaker.compact(guest, pages)?;
        let file = self.draft(slab, count, between);
        match file {
            Some(_) => {
                self.compacting.insert(slab, old);
                self.allowance.take(count);
            }
            None => _ = self.matchmaker.abandon(slab),
        }
        file.map(|file| (slab, file))
    }

    /// Its slabs, as they are, and what of them was in use when that was looked at.
    pub fn now(&self) -> DomainNow {
        DomainNow {
            domain: self.name.clone(),
            slabs: self.held.0,
            pages: self.held.1,
            live_and_dead_pages: (self.live_pages, self.pages.saturating_sub(self.live_pages)),
            looked: self.looked,
            watch_pages: self.credit.watch_pages(),
            files: self.files.clone(),
        }
    }

    /// Pages of all slabs that no image has, in use or not.
    pub fn held_pages(&self) -> u64 {
        self.held.1
    }

    /// Looks whether images have others now. True if so: what no image has any more may be unused.
    pub fn look_at_pins(&mut self) -> bool {
        let edition = self.pins.edition();
        if edition == self.seen_pins {
            return false;
        }
        self.seen_pins = edition;
        self.count_held();
        true
    }

    fn count_held(&mut self) {
        let pins = self.pins.lock();
        let held = self.slabs.values().filter(|open| !pins.contains(&open.inode));
        self.held = held.fold((0, 0), |(slabs, pages), open| (slabs + 1, pages + open.pages));
    }
}

/// What follows from a slab that has been published.
pub enum Published {
    /// These agents have something to do.
    Orders(HashMap<GuestId, Orders>),
    /// Users of these pages are to use those of the new slab instead, in this order.
    Together(Vec<SlabPlace>),
}
