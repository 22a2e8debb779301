//! The matchmaker among simulated agents, honest and not.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::*;

const A: GuestId = GuestId(0);
const B: GuestId = GuestId(1);
const C: GuestId = GuestId(2);

/// Guests whose pages are numbers, 0 apart: what is in a slab page, and which slab page each guest
/// page was replaced by.
#[derive(Default)]
struct World {
    matchmaker: Matchmaker,
    guests: BTreeMap<GuestId, Vec<u64>>,
    slabs: BTreeMap<u32, Vec<u64>>,
    merged: BTreeMap<(GuestId, u64), (u32, u32)>,
    todo: Vec<(GuestId, Orders)>,
    differed: u64,
}

impl World {
    fn offer(&mut self, guest: GuestId) {
        self.matchmaker.join(guest, self.guests[&guest].len() as u64);
        let pages: Vec<_> =
            (0..).map(PageNo).zip(self.guests[&guest].iter().map(|content| hash(*content))).collect();
        let orders = self.matchmaker.offer(guest, pages);
        self.todo.push((guest, orders));
    }

    fn follow(&mut self, guest: GuestId, orders: Orders) {
        for Publish { slab, pages } in orders.publish {
            assert!(pages.len() <= DRAFT_PAGES && !self.slabs.contains_key(&slab));
            let contents: Vec<u64> = pages.iter().map(|page| self.guests[&guest][page.0 as usize]).collect();
            let hashes: Vec<_> = contents.iter().map(|content| hash(*content)).collect();
            self.slabs.insert(slab, contents);
            let all = self.matchmaker.published(guest, slab, &hashes).expect("it was asked for");
            self.todo.extend(all);
        }
        for Run { page, pages, slab, slab_page } in orders.merge {
            for n in 0..pages {
                let (page, slab_page) = ((page + u64::from(n)).0, (slab_page + n.into()).0);
                // As the agent does, whatever its orders.
                if self.guests[&guest][page as usize] == self.slabs[&slab][slab_page as usize] {
                    self.merged.insert((guest, page), (slab, slab_page));
                } else {
                    self.differed += 1;
                }
            }
        }
    }

    fn settle(&mut self) {
        while let Some((guest, orders)) = self.todo.pop() {
            self.follow(guest, orders);
        }
    }

    /// Every content that stands twice is in one slab page, and all that have it share that one.
    fn assert_all_shared(&self) {
        let mut places: BTreeMap<u64, Vec<(GuestId, u64)>> = BTreeMap::new();
        for (guest, pages) in &self.guests {
            for (page, content) in (0u64..).zip(pages) {
                places.entry(*content).or_default().push((*guest, page));
            }
        }
        for (content, places) in places {
            let shared: Vec<_> = places.iter().map(|place| self.merged.get(place)).collect();
            match places.len() {
                1 => assert_eq!(shared, [None], "{content} is not shared"),
                _ => assert!(
                    shared[0].is_some() && shared.iter().all(|s| *s == shared[0]),
                    "{content}: {shared:?}"
                ),
            }
        }
        assert_eq!(self.differed, 0);
    }
}

fn offer<const N: usize>(to: &mut Matchmaker, guest: GuestId, pages: [(u64, PageHash); N]) -> Orders {
    to.offer(guest, pages.map(|(page, hash)| (PageNo(page), hash)))
}

fn run(page: u64, pages: u32, slab: u32, slab_page: u32) -> Run {
    Run { page: PageNo(page), pages, slab, slab_page: SlabPage(slab_page) }
}

fn pages(numbers: impl IntoIterator<Item = u64>) -> Vec<PageNo> {
    numbers.into_iter().map(PageNo).collect()
}

/// A matchmaker of three guests.
fn joined() -> Matchmaker {
    let mut matchmaker = Matchmaker::default();
    [A, B, C].into_iter().for_each(|guest| matchmaker.join(guest, 64));
    matchmaker
}

/// A stand-in for a keyed hash.
fn hash(content: u64) -> PageHash {
    (content + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[test]
fn equal_guests_are_shared_in_one_run() {
    let mut world = World::default();
    for guest in [A, B, C] {
        world.guests.insert(guest, (0..1000).collect());
        world.offer(guest);
    }
    assert_eq!(world.todo[0].1, Orders::default(), "the first has no guest to share with");
    assert_eq!(world.todo[1].1.publish, [Publish { slab: 0, pages: pages(0..1000) }]);
    let (guest, orders) = world.todo.swap_remove(1);
    world.follow(guest, orders);
    let whole = run(0, 1000, 0, 0);
    assert!(world.todo.iter().filter(|(_, o)| o.merge == [whole]).count() == 3, "{:?}", world.todo);
    world.settle();
    world.assert_all_shared();
}

#[test]
fn a_page_offered_again_is_no_news() {
    let mut matchmaker = joined();
    for _ in 0..3 {
        assert_eq!(offer(&mut matchmaker, A, [(7, 70), (8, 80)]), Orders::default());
    }
    assert_eq!(matchmaker.len(), 2);
    assert_eq!(offer(&mut matchmaker, A, [(64, 90), (u64::MAX, 90)]), Orders::default());
    assert_eq!(matchmaker.len(), 2, "there is no such page");
}

#[test]
fn what_changed_before_it_was_published_is_matched_anew() {
    let mut matchmaker = joined();
    offer(&mut matchmaker, A, [(1, 10), (2, 20)]);
    assert_eq!(
        offer(&mut matchmaker, B, [(5, 10), (6, 20)]).publish,
        [Publish { slab: 0, pages: pages([5, 6]) }]
    );
    offer(&mut matchmaker, C, [(9, 10)]);
    // B's page 5 holds something else by now: A and C still have the old one.
    let all = matchmaker.published(B, 0, &[99, 20]).unwrap();
    let one = |page, slab_page| vec![run(page, 1, 0, slab_page)];
    assert_eq!((&all[&A].merge, &all[&B].merge), (&one(2, 1), &one(6, 1)));
    assert_eq!(all[&C].publish, [Publish { slab: 1, pages: pages([9]) }]);
    let all = matchmaker.published(C, 1, &[10]).unwrap();
    assert_eq!(all[&A].merge, [run(1, 1, 1, 0)]);
}

#[test]
fn no_guest_publishes_what_another_was_asked_for() {
    let mut matchmaker = joined();
    offer(&mut matchmaker, A, [(1, 10)]);
    offer(&mut matchmaker, B, [(1, 10)]);
    for (guest, slab, hashes) in [(A, 0, vec![10]), (B, 1, vec![10]), (B, 0, vec![]), (B, 0, vec![10, 10])] {
        assert_eq!(matchmaker.published(guest, slab, &hashes), None, "{guest:?} {slab}");
        assert!(matchmaker.unpublished(A, slab).is_empty());
    }
    assert_eq!(matchmaker.published(B, 0, &[10]).unwrap().len(), 2);
    assert_eq!(matchmaker.published(B, 0, &[10]), None, "once");
}

#[test]
fn those_who_waited_for_a_guest_that_ended_find_each_other() {
    let mut matchmaker = joined();
    offer(&mut matchmaker, A, [(1, 10)]);
    offer(&mut matchmaker, B, [(2, 10)]);
    offer(&mut matchmaker, C, [(3, 10)]);
    let all = matchmaker.remove(B);
    assert_eq!(all.values().map(|orders| orders.publish.len()).sum::<usize>(), 1, "{all:?}");
    // Its own pages match no more.
    let mut matchmaker = joined();
    offer(&mut matchmaker, A, [(1, 10)]);
    assert!(matchmaker.remove(A).is_empty());
    assert_eq!(offer(&mut matchmaker, B, [(2, 10)]), Orders::default());
}

#[test]
fn a_slab_that_is_gone_is_not_merged_with() {
    let mut matchmaker = joined();
    offer(&mut matchmaker, A, [(1, 10)]);
    offer(&mut matchmaker, B, [(1, 10)]);
    matchmaker.published(B, 0, &[10]).unwrap();
    assert_eq!(offer(&mut matchmaker, C, [(1, 10)]).merge.len(), 1);
    matchmaker.forget(0);
    assert_eq!(offer(&mut matchmaker, C, [(1, 10)]), Orders::default());
}

#[test]
fn drafts_are_bounded() {
    let mut world = World::default();
    let pages = DRAFT_PAGES as u64 * 2 + 5;
    for guest in [A, B] {
        world.guests.insert(guest, (0..pages).collect());
        world.offer(guest);
    }
    let lens: Vec<_> = world.todo[1].1.publish.iter().map(|p| p.pages.len()).collect();
    assert_eq!(lens, [DRAFT_PAGES, DRAFT_PAGES, 5]);
    world.settle();
    world.assert_all_shared();
}

proptest! {
    /// Guests with pages in common, offered and published in any order.
    #[test]
    fn all_that_is_equal_is_shared_in_the_end(
        guests in prop::collection::vec(prop::collection::vec(0u64..30, 0..40), 1..6),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
    ) {
        let guests = (0u16..).map(GuestId).zip(guests).collect();
        let mut world = World { guests, ..World::default() };
        let mut waiting: Vec<GuestId> = world.guests.keys().copied().collect();
        for index in order {
            // Either the next guest offers, or a guest carries out an order.
            let at = index.index(waiting.len() + world.todo.len() + 1);
            if at < waiting.len() {
                let guest = waiting.swap_remove(at);
                world.offer(guest);
            } else if at < waiting.len() + world.todo.len() {
                let (guest, orders) = world.todo.swap_remove(at - waiting.len());
                world.follow(guest, orders);
            }
        }
        waiting.into_iter().for_each(|guest| world.offer(guest));
        world.settle();
        world.assert_all_shared();
    }

    /// Nothing that guests say makes it panic, or have a guest merge with a slab that was not
    /// published.
    #[test]
    fn it_survives_whatever_is_said(
        words in prop::collection::vec((0u8..5, 0u16..4, any::<u64>(), 0u64..6, 0u32..4), 0..200),
    ) {
        let mut matchmaker = joined();
        let mut published = HashSet::new();
        for (what, guest, page, hash, slab) in words {
            let guest = GuestId(guest);
            let all: Vec<Orders> = match what {
                0 | 1 => vec![offer(&mut matchmaker, guest, [(page % 64, hash), (page, hash + 1)])],
                2 => match matchmaker.published(guest, slab, &vec![hash; page as usize % 4]) {
                    Some(all) => { published.insert(slab); all.into_values().collect() }
                    None => Vec::new(),
                },
                3 => matchmaker.unpublished(guest, slab).into_values().collect(),
                _ if page % 8 == 0 => matchmaker.remove(guest).into_values().collect(),
                _ => Vec::new(),
            };
            for run in all.iter().flat_map(|orders| &orders.merge) {
                prop_assert!(published.contains(&run.slab), "{run:?}");
            }
        }
    }
}

#[test]
fn what_a_guest_has_no_more_matches_nothing() {
    let mut matchmaker = joined();
    offer(&mut matchmaker, A, [(1, 10)]);
    offer(&mut matchmaker, A, [(1, 11)]);
    assert_eq!(offer(&mut matchmaker, B, [(1, 10)]), Orders::default());
    assert_eq!(matchmaker.len(), 2, "what a page was is forgotten");
    // It joins an offer of what another has, and owns nothing then.
    assert_eq!(offer(&mut matchmaker, A, [(1, 10)]).publish.len(), 1);
    matchmaker.remove(A);
    matchmaker.remove(B);
    assert!(matchmaker.is_empty(), "{}", matchmaker.len());
}

#[test]
fn a_slab_of_an_earlier_host_is_merged_with() {
    let mut matchmaker = joined();
    offer(&mut matchmaker, A, [(1, 10), (2, 30)]);
    let (slab, all) = matchmaker.known(&[10, 20]).unwrap();
    assert_eq!(all[&A].merge, [run(1, 1, slab, 0)]);
    assert_eq!(offer(&mut matchmaker, B, [(5, 20)]).merge, [run(5, 1, slab, 1)]);
    // Another copy of the same changes nothing.
    let (other, all) = matchmaker.known(&[20]).unwrap();
    assert!(other != slab && all.is_empty());
    assert_eq!(offer(&mut matchmaker, C, [(5, 20)]).merge[0].slab, slab);
}

#[test]
fn pages_of_slabs_move_into_another() {
    let mut matchmaker = joined();
    matchmaker.known(&[10, 20, 30]).unwrap();
    matchmaker.known(&[40]).unwrap();
    let place = |slab, page| SlabPlace { slab, page: SlabPage(page) };
    let pages = vec![place(0, 1), place(1, 0), place(0, 2)];
    let new = matchmaker.compact(A, pages.clone()).unwrap();
    assert_eq!(matchmaker.compacted(B, new, &[20, 40, 30]), None, "it was not asked");
    assert_eq!(matchmaker.compacted(A, new, &[20, 40]), None);
    // Of the last one it says another hash than it had.
    assert_eq!(matchmaker.compacted(A, new, &[20, 40, 31]), Some(pages));
    matchmaker.forget(0);
    matchmaker.forget(1);
    let orders = offer(&mut matchmaker, C, [(1, 10), (2, 20), (3, 30), (4, 40)]);
    assert_eq!(orders.merge, [run(2, 1, new, 0), run(4, 1, new, 1)]);
}

/// Numbers are used again: whatever the one before had offered, published, waited for or was to
/// fill, the next has nothing of it.
#[test]
fn nothing_is_left_under_the_number_of_a_guest_that_is_gone() {
    let mut matchmaker = joined();
    // It has pages of its own, waits for B, is to publish, and is to put slabs together.
    offer(&mut matchmaker, A, [(1, 10), (2, 20)]);
    let by_b = offer(&mut matchmaker, B, [(2, 20), (3, 30)]).publish[0].slab;
    let by_a = offer(&mut matchmaker, A, [(3, 30)]).publish[0].slab;
    let (old, _) = matchmaker.known(&[70]).unwrap();
    let filled = matchmaker.compact(A, vec![SlabPlace { slab: old, page: SlabPage(0) }]).unwrap();
    matchmaker.remove(A);
    matchmaker.join(A, 64);
    assert_eq!(matchmaker.published(A, by_a, &[30]), None);
    assert_eq!(matchmaker.compacted(A, filled, &[70]), None);
    let all = matchmaker.published(B, by_b, &[20]).unwrap();
    assert!(all.get(&A).is_none_or(|orders| *orders == Orders::default()), "the next has no page 2: {all:?}");
    assert_eq!(offer(&mut matchmaker, C, [(1, 10)]), Orders::default(), "nor page 1");
    assert_eq!(offer(&mut matchmaker, A, [(9, 20)]).merge, [run(9, 1, by_b, 0)]);
}
