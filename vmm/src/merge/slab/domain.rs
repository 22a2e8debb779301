//! One trust domain in the host: its key, its index, its slabs, and which pages of them are in use.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bits;
use super::hub::SlabUse;
use super::matchmaker::{DRAFT_PAGES, GuestId, Matchmaker, Orders, PageHash, SlabPage};
use super::wire::{Live, MAX_OPEN_SLABS};
use crate::memory::slab::{Draft, Slab};

/// A slab of so few pages is put together with others.
const SMALL_PAGES: u64 = 256;
/// Pages that putting slabs together must give back, or slabs that it must save: what it costs the guests is worth no less.
const WORTH_PAGES: u64 = 256;
const WORTH_SLABS: usize = 16;
/// From one time that slabs are put together to the next.
const COMPACT_EVERY: Duration = Duration::from_secs(5);

/// A trust domain. Nothing of it is known to another.
pub struct Domain {
    /// Its name.
    pub name: String,
    /// The key of its hashes: another one in each domain and at each start.
    pub key: u64,
    /// Its index.
    pub matchmaker: Matchmaker,
    drafts: HashMap<u32, Arc<File>>,
    slabs: HashMap<u32, OpenSlab>,
    /// Pages of all of them.
    held_pages: u64,
    looked: Option<Instant>,
    /// Slabs by the number of their file.
    by_inode: HashMap<u64, u32>,
    /// The slab into which others are put together, while it is being filled.
    compacting: Option<u32>,
    /// When slabs were put together last.
    compacted: Option<Instant>,
    /// Pages of slabs that somebody used when all agents had last said what they use.
    live_pages: u64,
    pages: u64,
}

#[derive(Clone)]
struct OpenSlab {
    file: Arc<File>,
    pages: u64,
    inode: u64,
}

/// What is to be done about slabs that are used little or not at all.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tidy {
    /// Nobody uses these.
    pub unused: Vec<u32>,
    /// These pages are all that is used of the slabs that they are in.
    pub together: Vec<SlabPage>,
}

impl Domain {
    /// One of which nothing is known yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            // Random, from the kernel.
            key: RandomState::new().build_hasher().finish(),
            matchmaker: Matchmaker::default(),
            drafts: HashMap::new(),
            slabs: HashMap::new(),
            held_pages: 0,
            looked: None,
            by_inode: HashMap::new(),
            compacting: None,
            compacted: None,
            live_pages: 0,
            pages: 0,
        }
    }

    /// A file for a slab of so many pages; the host pays for it. None if there can be no more.
    pub fn draft(&mut self, slab: u32, pages: u64) -> Option<Arc<File>> {
        if self.slabs.len() + self.drafts.len() >= MAX_OPEN_SLABS {
            return None;
        }
        match Draft::new(pages) {
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

    /// `guest` says that it has filled and sealed a draft. What follows from that; an error if it was not asked.
    pub fn published(&mut self, guest: GuestId, slab: u32, hashes: &[PageHash]) -> io::Result<Published> {
        let draft = self.drafts.remove(&slab).ok_or(io::ErrorKind::InvalidData)?;
        let compacting = self.compacting == Some(slab);
        if compacting {
            self.compacting = None;
        }
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
        self.compacting.take_if(|it| *it == slab);
        self.matchmaker.unpublished(guest, slab)
    }

    /// Somebody has a slab from an earlier host. Its number; None if it cannot be taken in.
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
        self.held_pages += pages;
        self.slabs.insert(slab, OpenSlab { file, pages, inode });
        Ok(())
    }

    /// The file of a slab, and how many pages it has.
    pub fn slab(&self, slab: u32) -> Option<(Arc<File>, u64)> {
        self.slabs.get(&slab).map(|open| (open.file.clone(), open.pages))
    }

    /// A guest has gone. Nobody waits for what it was to fill.
    pub fn gone(&mut self, guest: GuestId) -> HashMap<GuestId, Orders> {
        // The matchmaker forgets a compaction of its; one of another's goes on.
        let orders = self.matchmaker.gone(guest);
        self.compacting.take_if(|slab| !self.matchmaker.is_compacting(*slab));
        let Self { drafts, matchmaker, .. } = self;
        drafts.retain(|slab, _| matchmaker.is_draft(*slab));
        orders
    }

    /// Lets go of a slab: when the last guest has unmapped it, its frames are the host's again.
    pub fn forget(&mut self, slab: u32) {
        self.matchmaker.forget(slab);
        if let Some(open) = self.slabs.remove(&slab) {
            self.held_pages -= open.pages;
            self.by_inode.remove(&open.inode);
        }
    }

    /// Now that every agent has said which pages it uses: what is not used, or so little that it is worth being put together.
    pub fn tidy<'a>(&mut self, used: impl Iterator<Item = &'a HashMap<u32, Live>>) -> Tidy {
        let mut live: HashMap<u32, Live> = HashMap::new();
        for one in used {
            for (slab, set) in one {
                let all = live.entry(*slab).or_insert([0; DRAFT_PAGES / 64]);
                all.iter_mut().zip(set).for_each(|(all, more)| *all |= more);
            }
        }
        let mut tidy = Tidy::default();
        (self.live_pages, self.pages) = (0, 0);
        self.looked = Some(Instant::now());
        let mut sparse: Vec<(u64, u64, u32)> = Vec::new();
        for (slab, open) in &self.slabs {
            let used = live.get(slab).map_or(0, |set| bits::count(set)).min(open.pages);
            match used {
                0 => {
                    tidy.unused.push(*slab);
                    continue;
                }
                _ if used * 2 <= open.pages || open.pages <= SMALL_PAGES => {
                    sparse.push((used, open.pages, *slab));
                }
                _ => {}
            }
            self.live_pages += used;
            self.pages += open.pages;
        }
        let rested = self.compacted.is_none_or(|at| at.elapsed() >= COMPACT_EVERY);
        if self.compacting.is_none() && rested {
            tidy.together = together(sparse, &live);
        }
        tidy
    }

    /// `guest` is to put these pages together. The number of the slab, and its file.
    pub fn compact(&mut self, guest: GuestId, pages: Vec<SlabPage>) -> Option<(u32, Arc<File>)> {
        let count = pages.len() as u64;
        let slab = self.matchmaker.compact(guest, pages)?;
        let file = self.draft(slab, count);
        match file {
            Some(_) => (self.compacting, self.compacted) = (Some(slab), Some(Instant::now())),
            None => _ = self.matchmaker.abandon(slab),
        }
        file.map(|file| (slab, file))
    }

    /// Its slabs, as they are, and what of them was in use when that was looked at.
    pub fn slab_use(&self) -> SlabUse {
        SlabUse {
            domain: self.name.clone(),
            slabs: self.slabs.len(),
            pages: self.held_pages,
            live_and_dead_pages: (self.live_pages, self.pages.saturating_sub(self.live_pages)),
            looked: self.looked,
        }
    }

    /// Pages of all slabs, in use or not.
    pub fn held_pages(&self) -> u64 {
        self.held_pages
    }
}

/// What follows from a slab that has been published.
pub enum Published {
    /// These agents have something to do.
    Orders(HashMap<GuestId, Orders>),
    /// Whoever uses these pages is to use those of the new slab instead, in this order.
    Together(Vec<SlabPage>),
}

/// The pages in use of those slabs of (pages in use, pages, number) that are worth being put together; the emptiest first.
fn together(mut sparse: Vec<(u64, u64, u32)>, live: &HashMap<u32, Live>) -> Vec<SlabPage> {
    sparse.sort_unstable();
    let (mut pages, mut freed, mut slabs) = (Vec::new(), 0, 0);
    for (used, of, slab) in sparse {
        if pages.len() as u64 + used > DRAFT_PAGES as u64 {
            break;
        }
        let set = live.get(&slab).map_or(&[][..], |set| set.as_slice());
        pages.extend(bits::each(set).map(|page| SlabPage { slab, page: page as u32 }));
        freed += of - used;
        slabs += 1;
    }
    if freed >= WORTH_PAGES || slabs >= WORTH_SLABS { pages } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(pages: std::ops::Range<u64>) -> Live {
        let mut set = [0; DRAFT_PAGES / 64];
        pages.for_each(|page| bits::put(&mut set, page, true));
        set
    }

    #[test]
    fn only_what_is_worth_it_is_put_together() {
        let sets = HashMap::from([(1, live(0..10)), (2, live(5..100)), (3, live(0..2000))]);
        let both = together(vec![(10, 2048, 1), (95, 300, 2)], &sets);
        assert_eq!(both.len(), 105);
        assert_eq!((both[0], both[104]), (SlabPage { slab: 1, page: 0 }, SlabPage { slab: 2, page: 99 }));
        assert!(together(vec![(10, 200, 1)], &sets).is_empty(), "too little is freed");
        assert_eq!(together(vec![(10, 2048, 1), (2000, 2048, 3)], &sets).len(), 2010);
        assert_eq!(together(vec![(95, 2048, 2), (2000, 2048, 3)], &sets).len(), 95, "as much as fits");
        let small = (0..16).map(|slab| (1, 1, slab)).collect();
        let sets = (0..16).map(|slab| (slab, live(0..1))).collect();
        assert_eq!(together(small, &sets).len(), 16);
    }
}
