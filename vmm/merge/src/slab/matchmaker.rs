//! Finds pages of the same hash among the guests of one trust domain, and orders which of them
//! publish and merge what.
//!
//! It knows hashes and places and never sees a page. Whatever it says, right or wrong, the agent in
//! the guest's process compares every byte before it merges, so that a collision or a lie costs a
//! merge and no more.

use std::collections::HashMap;

pub use super::index::{DRAFT_PAGES, GuestId, GuestPage, MAX_GUESTS, MAX_PAGES, MAX_SLABS, PageHash};
use super::index::{Index, Place};
use memory::{PageNo, PageRange, SlabPage};

/// Adjacent pages of a guest, and the adjacent pages of a slab that have the same hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The guest's first page.
    pub page: PageNo,
    /// How many.
    pub pages: u32,
    /// The slab.
    pub slab: u32,
    /// Its first page.
    pub slab_page: SlabPage,
}

impl Run {
    /// The guest's pages; None where there are no such numbers, as a run of another process may
    /// say.
    pub fn range(self) -> Option<PageRange> {
        PageRange::new(self.page, self.pages.into())
    }
}

/// What an agent is to copy into a new slab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// The number that the slab will have.
    pub slab: u32,
    /// Pages of the guest, in the order in which they are to be in the slab.
    pub pages: Vec<PageNo>,
}

/// What the agent of one guest is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// What to publish, and to merge with once it is.
    pub publish: Vec<Publish>,
    /// What to merge.
    pub merge: Vec<Run>,
}

/// A slab that a guest was ordered to publish.
#[derive(Debug)]
struct Draft {
    publisher: GuestId,
    /// What is to be in it: the publisher's page and its hash.
    pages: Vec<(PageNo, PageHash)>,
    /// Guest pages that wait for one of its pages, by number.
    waiting: Vec<(GuestPage, u16)>,
}

/// A slab that a guest was ordered to fill with pages of other slabs.
#[derive(Debug)]
struct Compaction {
    publisher: GuestId,
    /// What is to be in it: pages of slabs.
    pages: Vec<SlabPlace>,
}

/// A page of one of the slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabPlace {
    /// Which slab.
    pub slab: u32,
    /// Which page of it.
    pub page: SlabPage,
}

/// The index of one trust domain.
///
/// *Memory:* 20 to 39 bytes for each different page ([`Index`]), 8 for each page of a guest and 8
/// for each page of a slab.
#[derive(Default)]
pub struct Matchmaker {
    index: Index,
    /// For each page of a guest the hash under which the index says that it is the owner; 0: it is
    /// not.
    owned: HashMap<GuestId, Vec<PageHash>>,
    drafts: HashMap<u32, Draft>,
    compactions: HashMap<u32, Compaction>,
    /// The hashes of the pages of each slab.
    slabs: HashMap<u32, Vec<PageHash>>,
    /// The number of the next one.
    next: u32,
}

impl Matchmaker {
    /// How many different pages it knows of.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether it knows of none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Registers a guest under a number that no other guest has.
    pub fn join(&mut self, guest: GuestId, pages: u64) {
        self.owned.insert(guest, vec![0; pages.min(MAX_PAGES) as usize]);
    }

    /// `guest` has these pages now, with these hashes. Says what its agent is to do. A page that
    /// cannot be is passed over.
    pub fn offer(&mut self, guest: GuestId, pages: impl IntoIterator<Item = (PageNo, PageHash)>) -> Orders {
        let mut orders = Orders::default();
        let mut draft = None;
        let has = self.owned.get(&guest).map_or(0, |owned| owned.len() as u64);
        for (page, hash) in pages.into_iter().filter(|(page, _)| page.0 < has) {
            let here = GuestPage { guest, page };
            match self.index.get(hash) {
                Some(Place::Owner(owner)) if owner == here => {}
                None => {
                    self.disown(here);
                    self.own(here, hash);
                }
                Some(place) => {
                    self.disown(here);
                    match place {
                        Place::Owner(owner) => {
                            let Some(slab) = self.draft(guest, &mut draft, &mut orders) else { continue };
                            let Some(drafted) = self.drafts.get_mut(&slab) else { continue };
                            let number = drafted.pages.len() as u16;
                            drafted.pages.push((page, hash));
                            drafted.waiting.push((owner, number));
                            self.index.put(hash, Place::Drafted(slab, number));
                        }
                        Place::Drafted(slab, number) => {
                            if let Some(drafted) = self.drafts.get_mut(&slab) {
                                drafted.waiting.push((here, number));
                            }
                        }
                        Place::Slab(slab, slab_page) => {
                            orders.merge.push(Run { page, pages: 1, slab, slab_page });
                        }
                    }
                }
            }
        }
        self.order(draft, &mut orders);
        orders.merge = runs(orders.merge);
        orders
    }

    /// The index says from now on that this page has this hash.
    fn own(&mut self, page: GuestPage, hash: PageHash) {
        if let Some(owned) = self.owned.get_mut(&page.guest).and_then(|o| o.get_mut(page.page.0 as usize)) {
            *owned = hash;
            self.index.put(hash, Place::Owner(page));
        }
    }

    /// The page has changed: what the index said of it is true no more.
    fn disown(&mut self, page: GuestPage) {
        let owned = self.owned.get_mut(&page.guest).and_then(|owned| owned.get_mut(page.page.0 as usize));
        let Some(hash) = owned.map(std::mem::take).filter(|hash| *hash != 0) else { return };
        if self.index.get(hash) == Some(Place::Owner(page)) {
            self.index.remove(hash);
        }
    }

    /// The draft that takes one more page of `guest`: the one at hand, or a new one. None if there
    /// can be no more slabs.
    fn draft(&mut self, guest: GuestId, at_hand: &mut Option<u32>, orders: &mut Orders) -> Option<u32> {
        let full = |slab: &u32| self.drafts.get(slab).is_none_or(|draft| draft.pages.len() >= DRAFT_PAGES);
        if let Some(full) = at_hand.take_if(|slab| full(slab)) {
            self.order(Some(full), orders);
        }
        if at_hand.is_none() {
            let slab = self.number()?;
            self.drafts.insert(slab, Draft { publisher: guest, pages: Vec::new(), waiting: Vec::new() });
            *at_hand = Some(slab);
        }
        *at_hand
    }

    fn number(&mut self) -> Option<u32> {
        (self.next < MAX_SLABS).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    fn order(&self, slab: Option<u32>, orders: &mut Orders) {
        if let Some((slab, draft)) = slab.and_then(|slab| self.drafts.get(&slab).map(|draft| (slab, draft))) {
            orders.publish.push(Publish { slab, pages: draft.pages.iter().map(|(page, _)| *page).collect() });
        }
    }

    /// `guest` has published a slab; `hashes` are those of the pages that are in it, which it took
    /// while it copied them. Says what every agent concerned is to merge. None if it was not asked
    /// for that slab: then nothing has happened.
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
        let run = |page, number: u16| Run { page, pages: 1, slab, slab_page: SlabPage(number.into()) };
        for (number, ((page, asked), hash)) in (0u16..).zip(pages.iter().zip(hashes)) {
            // A page that has changed meanwhile is of no use to those that waited.
            if asked == hash {
                self.index.put(*hash, Place::Slab(slab, SlabPage(number.into())));
                found.entry(guest).or_default().push(run(*page, number));
            } else {
                self.index.remove(*asked);
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
        self.slabs.insert(slab, hashes.to_vec());
        let orders = |(guest, found)| (guest, Orders { publish: Vec::new(), merge: runs(found) });
        let mut all: HashMap<GuestId, Orders> = found.into_iter().map(orders).collect();
        self.offer_again(again, &mut all);
        Some(all)
    }

    /// `guest` could not publish a slab, or is no more to be trusted with it. Pages that waited for
    /// it are matched anew.
    pub fn unpublished(&mut self, guest: GuestId, slab: u32) -> HashMap<GuestId, Orders> {
        let mut all = HashMap::new();
        self.compactions.remove(&slab);
        if self.drafts.get(&slab).is_some_and(|draft| draft.publisher == guest)
            && let Some(Draft { pages, waiting, .. }) = self.drafts.remove(&slab)
        {
            pages.iter().for_each(|(_, hash)| self.index.remove(*hash));
            let again = waiting.into_iter().map(|(waiter, number)| (waiter, pages[usize::from(number)].1));
            self.offer_again(again.collect(), &mut all);
        }
        all
    }

    /// There will be no such slab. Its pages may be offered again by any guest. Whether it was a
    /// draft.
    pub fn abandon(&mut self, slab: u32) -> bool {
        self.compactions.remove(&slab);
        let draft = self.drafts.remove(&slab);
        draft.iter().flat_map(|draft| &draft.pages).for_each(|(_, hash)| self.index.remove(*hash));
        draft.is_some()
    }

    /// Removes `guest`, which has ended. What it was to publish, another may. Its number may be
    /// given to another.
    pub fn remove(&mut self, guest: GuestId) -> HashMap<GuestId, Orders> {
        for (page, hash) in (0..).map(PageNo).zip(self.owned.remove(&guest).unwrap_or_default()) {
            if hash != 0 && self.index.get(hash) == Some(Place::Owner(GuestPage { guest, page })) {
                self.index.remove(hash);
            }
        }
        self.drafts.values_mut().for_each(|draft| draft.waiting.retain(|(page, _)| page.guest != guest));
        self.compactions.retain(|_, compaction| compaction.publisher != guest);
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

    /// Whether a guest is filling this one, with pages of guests or of slabs.
    pub fn is_draft(&self, slab: u32) -> bool {
        self.drafts.contains_key(&slab) || self.is_compacting(slab)
    }

    /// Whether a guest is filling this one with pages of slabs.
    pub fn is_compacting(&self, slab: u32) -> bool {
        self.compactions.contains_key(&slab)
    }

    /// A slab that was there before the matchmaker was: pages of these hashes are in it. Its
    /// number, and which guests merge with it now.
    pub fn known(&mut self, hashes: &[PageHash]) -> Option<(u32, HashMap<GuestId, Orders>)> {
        let slab = self.number()?;
        let mut found: HashMap<GuestId, Vec<Run>> = HashMap::new();
        for (slab_page, hash) in (0..).map(SlabPage).zip(hashes) {
            match self.index.get(*hash) {
                None => {}
                Some(Place::Owner(GuestPage { guest, page })) => {
                    found.entry(guest).or_default().push(Run { page, pages: 1, slab, slab_page });
                }
                // In another slab already: that one stays.
                Some(Place::Drafted(..) | Place::Slab(..)) => continue,
            }
            self.index.put(*hash, Place::Slab(slab, slab_page));
        }
        self.slabs.insert(slab, hashes.to_vec());
        let orders = |(guest, found)| (guest, Orders { publish: Vec::new(), merge: runs(found) });
        Some((slab, found.into_iter().map(orders).collect()))
    }

    /// A slab is not there any more: nothing is to be merged with it.
    pub fn forget(&mut self, slab: u32) {
        for (page, hash) in (0..).map(SlabPage).zip(self.slabs.remove(&slab).unwrap_or_default()) {
            if self.index.get(hash) == Some(Place::Slab(slab, page)) {
                self.index.remove(hash);
            }
        }
    }

    /// These pages of slabs are to be together in a new one, which `guest` fills. The number of
    /// that.
    pub fn compact(&mut self, guest: GuestId, pages: Vec<SlabPlace>) -> Option<u32> {
        let slab = self.number().filter(|_| (1..=DRAFT_PAGES).contains(&pages.len()))?;
        self.compactions.insert(slab, Compaction { publisher: guest, pages });
        Some(slab)
    }

    /// `guest` has filled a slab with pages of others. From now on their contents are found there.
    /// Says which pages those were, in the order of the new slab; None if it was not asked for
    /// that.
    pub fn compacted(&mut self, guest: GuestId, slab: u32, hashes: &[PageHash]) -> Option<Vec<SlabPlace>> {
        let asked = |c: &Compaction| c.publisher == guest && c.pages.len() == hashes.len();
        if !self.compactions.get(&slab).is_some_and(asked) {
            return None;
        }
        let Compaction { pages, .. } = self.compactions.remove(&slab)?;
        for (number, (old, hash)) in (0..).map(SlabPage).zip(pages.iter().zip(hashes)) {
            if self.index.get(*hash) == Some(Place::Slab(old.slab, old.page)) {
                self.index.put(*hash, Place::Slab(slab, number));
            }
        }
        self.slabs.insert(slab, hashes.to_vec());
        Some(pages)
    }

    fn offer_again(&mut self, mut pages: Vec<(GuestPage, PageHash)>, all: &mut HashMap<GuestId, Orders>) {
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
pub fn runs(mut pages: Vec<Run>) -> Vec<Run> {
    pages.sort_unstable();
    let mut runs: Vec<Run> = Vec::new();
    for next in pages {
        match runs.last_mut() {
            Some(last)
                if last.slab == next.slab
                    && last.range().is_some_and(|range| range.end() == next.page)
                    && last.slab_page + last.pages.into() == next.slab_page =>
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
