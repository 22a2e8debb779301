//! Finds pages of the same hash among the guests of one trust domain, and says who publishes and who merges what.
//!
//! It knows hashes and places and never sees a page. Whatever it says, right or wrong, the agent in the guest's process
//! compares every byte before it merges, so that a collision or a lie costs a merge and no more.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// Pages published at a time: long enough for long runs, short enough that nobody waits long for the first.
pub const DRAFT_PAGES: usize = 2048;
/// Guests in one domain: what [`Place`] has bits for.
pub const MAX_GUESTS: u32 = 1 << 16;
/// Pages in one guest, likewise: 64 TiB.
pub const MAX_PAGES: u64 = 1 << 34;
/// Slabs ever made in one domain, likewise.
pub const MAX_SLABS: u32 = 1 << 31;

/// A page's hash, keyed for the domain: the same contents in another one have another.
pub type PageHash = u64;

/// A guest of the domain, by a number that is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestId(pub u16);

/// A page of a guest, counted through its RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestPage {
    /// Whose.
    pub guest: GuestId,
    /// Which.
    pub page: u64,
}

/// Adjacent pages of a guest, and the adjacent pages of a slab that have the same hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The guest's first page.
    pub page: u64,
    /// How many.
    pub pages: u32,
    /// The slab.
    pub slab: u32,
    /// Its first page.
    pub slab_page: u32,
}

/// What an agent is to copy into a new slab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// The number that the slab will have.
    pub slab: u32,
    /// Pages of the guest, in the order in which they are to be in the slab.
    pub pages: Vec<u64>,
}

/// What the agent of one guest is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// What to publish, and to merge with once it is.
    pub publish: Vec<Publish>,
    /// What to merge.
    pub merge: Vec<Run>,
}

/// Where the page of a hash is. In 8 bytes, for there is one for each page that was ever offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// One guest has it, and nobody else has offered it.
    Owner(GuestPage),
    /// It is page number `.1` of a slab that is still to come.
    Drafted(u32, u16),
    /// It is in a slab.
    Slab(u32, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed(u64);

const _: () = assert!(size_of::<(PageHash, Packed)>() == 16 && DRAFT_PAGES <= 1 << 16);

impl Place {
    fn pack(self) -> Packed {
        Packed(match self {
            Self::Owner(GuestPage { guest, page }) => u64::from(guest.0) << 34 | page,
            Self::Drafted(slab, page) => 1 << 62 | u64::from(slab) << 31 | u64::from(page),
            Self::Slab(slab, page) => 2 << 62 | u64::from(slab) << 31 | u64::from(page),
        })
    }
}

impl Packed {
    fn unpack(self) -> Place {
        let (slab, page) = ((self.0 >> 31 & 0x7fff_ffff) as u32, (self.0 & 0x7fff_ffff) as u32);
        match self.0 >> 62 {
            0 => Place::Owner(GuestPage {
                guest: GuestId((self.0 >> 34) as u16),
                page: self.0 & (MAX_PAGES - 1),
            }),
            1 => Place::Drafted(slab, page as u16),
            _ => Place::Slab(slab, page),
        }
    }
}

/// A slab that somebody was told to publish.
#[derive(Debug)]
struct Draft {
    publisher: GuestId,
    /// What is to be in it: the publisher's page and its hash.
    pages: Vec<(u64, PageHash)>,
    /// Who else has one of its pages, by number.
    waiting: Vec<(GuestPage, u16)>,
}

/// The hashes are keyed and as good as random already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    /// Nobody calls this: hashes are u64.
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| hash.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// The index of one trust domain.
///
/// *Memory:* 17 bytes a bucket of a hash table that is between 7/16 and 7/8 full: 20 to 39 bytes for each different page.
#[derive(Default)]
pub struct Matchmaker {
    places: HashMap<PageHash, Packed, BuildHasherDefault<AsItIs>>,
    drafts: HashMap<u32, Draft>,
    gone: HashSet<GuestId>,
    slabs: u32,
}

impl Matchmaker {
    /// How many different pages it knows of.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether it knows of none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// `guest` has these pages now, with these hashes. Says what its agent is to do. A page that cannot be is passed over.
    pub fn offer(&mut self, guest: GuestId, pages: impl IntoIterator<Item = (u64, PageHash)>) -> Orders {
        let mut orders = Orders::default();
        let mut draft = None;
        for (page, hash) in pages.into_iter().filter(|(page, _)| *page < MAX_PAGES) {
            let here = GuestPage { guest, page };
            let place = self.places.get(&hash).map(|packed| packed.unpack());
            match place
                .filter(|place| !matches!(place, Place::Owner(owner) if self.gone.contains(&owner.guest)))
            {
                None => _ = self.places.insert(hash, Place::Owner(here).pack()),
                Some(Place::Owner(owner)) if owner == here => {}
                Some(Place::Owner(owner)) => {
                    let Some(slab) = self.draft(guest, &mut draft, &mut orders) else { continue };
                    let Some(drafted) = self.drafts.get_mut(&slab) else { continue };
                    let number = drafted.pages.len() as u16;
                    drafted.pages.push((page, hash));
                    drafted.waiting.push((owner, number));
                    self.places.insert(hash, Place::Drafted(slab, number).pack());
                }
                Some(Place::Drafted(slab, number)) => {
                    if let Some(drafted) = self.drafts.get_mut(&slab) {
                        drafted.waiting.push((here, number));
                    }
                }
                Some(Place::Slab(slab, slab_page)) => {
                    orders.merge.push(Run { page, pages: 1, slab, slab_page });
                }
            }
        }
        self.order(draft, &mut orders);
        orders.merge = runs(orders.merge);
        orders
    }

    /// The draft that takes one more page of `guest`: the one at hand, or a new one. None if there can be no more slabs.
    fn draft(&mut self, guest: GuestId, at_hand: &mut Option<u32>, orders: &mut Orders) -> Option<u32> {
        let full = |slab: &u32| self.drafts.get(slab).is_none_or(|draft| draft.pages.len() >= DRAFT_PAGES);
        if let Some(full) = at_hand.take_if(|slab| full(slab)) {
            self.order(Some(full), orders);
        }
        if at_hand.is_none() && self.slabs < MAX_SLABS {
            let draft = Draft { publisher: guest, pages: Vec::new(), waiting: Vec::new() };
            self.drafts.insert(self.slabs, draft);
            *at_hand = Some(self.slabs);
            self.slabs += 1;
        }
        *at_hand
    }

    fn order(&self, slab: Option<u32>, orders: &mut Orders) {
        if let Some((slab, draft)) = slab.and_then(|slab| self.drafts.get(&slab).map(|draft| (slab, draft))) {
            orders.publish.push(Publish { slab, pages: draft.pages.iter().map(|(page, _)| *page).collect() });
        }
    }

    /// `guest` has published a slab; `hashes` are those of the pages that are in it, which it took while it copied them.
    /// Says what every agent concerned is to merge. None if it was not asked for that slab: then nothing has happened.
    pub fn published(
        &mut self,
        guest: GuestId,
        slab: u32,
        hashes: &[PageHash],
    ) -> Option<HashMap<GuestId, Orders>> {
        let asked = |draft: &Draft| draft.publisher == guest && draft.pages.len() == hashes.len();
        if !self.drafts.get(&slab).is_some_and(asked) {
            return None;
        }
        let Draft { pages, waiting, .. } = self.drafts.remove(&slab)?;
        let mut found: HashMap<GuestId, Vec<Run>> = HashMap::new();
        let run = |page, number: u16| Run { page, pages: 1, slab, slab_page: number.into() };
        for (number, ((page, asked), hash)) in (0u16..).zip(pages.iter().zip(hashes)) {
            // A page that has changed meanwhile is of no use to those who waited.
            if asked == hash {
                self.places.insert(*hash, Place::Slab(slab, number.into()).pack());
                found.entry(guest).or_default().push(run(*page, number));
            } else {
                self.places.remove(asked);
            }
        }
        let mut again: Vec<(GuestPage, PageHash)> = Vec::new();
        for (waiter, number) in waiting {
            let asked = pages[usize::from(number)].1;
            if hashes[usize::from(number)] == asked {
                found.entry(waiter.guest).or_default().push(run(waiter.page, number));
            } else {
                again.push((waiter, asked));
            }
        }
        let orders = |(guest, found)| (guest, Orders { publish: Vec::new(), merge: runs(found) });
        let mut all: HashMap<GuestId, Orders> = found.into_iter().map(orders).collect();
        self.offer_again(again, &mut all);
        all.retain(|guest, _| !self.gone.contains(guest));
        Some(all)
    }

    /// `guest` could not publish a slab, or is no more to be trusted with it. Those who waited for it are matched anew.
    pub fn unpublished(&mut self, guest: GuestId, slab: u32) -> HashMap<GuestId, Orders> {
        let mut all = HashMap::new();
        if self.drafts.get(&slab).is_some_and(|draft| draft.publisher == guest)
            && let Some(Draft { pages, waiting, .. }) = self.drafts.remove(&slab)
        {
            pages.iter().for_each(|(_, hash)| _ = self.places.remove(hash));
            let again = waiting.into_iter().map(|(waiter, number)| (waiter, pages[usize::from(number)].1));
            self.offer_again(again.collect(), &mut all);
        }
        all
    }

    /// There will be no such slab. Its pages are anybody's to offer again. Whether it was a draft.
    pub fn abandon(&mut self, slab: u32) -> bool {
        let draft = self.drafts.remove(&slab);
        draft.iter().flat_map(|draft| &draft.pages).for_each(|(_, hash)| _ = self.places.remove(hash));
        draft.is_some()
    }

    /// `guest` has ended. What it was to publish, somebody else may.
    pub fn gone(&mut self, guest: GuestId) -> HashMap<GuestId, Orders> {
        self.gone.insert(guest);
        let drafts: Vec<u32> =
            self.drafts.iter().filter(|(_, draft)| draft.publisher == guest).map(|(slab, _)| *slab).collect();
        let mut all: HashMap<GuestId, Orders> = HashMap::new();
        for slab in drafts {
            for (other, orders) in self.unpublished(guest, slab) {
                join(all.entry(other).or_default(), orders);
            }
        }
        all
    }

    /// A slab is not there any more: nothing is to be merged with it.
    pub fn forget(&mut self, slab: u32) {
        self.places.retain(|_, packed| !matches!(packed.unpack(), Place::Slab(it, _) if it == slab));
    }

    fn offer_again(&mut self, mut pages: Vec<(GuestPage, PageHash)>, all: &mut HashMap<GuestId, Orders>) {
        pages.retain(|(page, _)| !self.gone.contains(&page.guest));
        pages.sort_unstable();
        for same in pages.chunk_by(|(a, _), (b, _)| a.guest == b.guest) {
            let guest = same[0].0.guest;
            let orders = self.offer(guest, same.iter().map(|(page, hash)| (page.page, *hash)));
            join(all.entry(guest).or_default(), orders);
        }
    }
}

fn join(to: &mut Orders, more: Orders) {
    to.publish.extend(more.publish);
    to.merge.extend(more.merge);
}

/// Single pages as runs that are as long as can be.
fn runs(mut pages: Vec<Run>) -> Vec<Run> {
    pages.sort_unstable();
    let mut runs: Vec<Run> = Vec::new();
    for next in pages {
        match runs.last_mut() {
            Some(last)
                if last.slab == next.slab
                    && last.page + u64::from(last.pages) == next.page
                    && last.slab_page + last.pages == next.slab_page =>
            {
                last.pages += next.pages;
            }
            _ => runs.push(next),
        }
    }
    runs
}

#[cfg(test)]
mod tests;
