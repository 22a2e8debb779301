//! The agent of memory that belongs to no VM, under a matchmaker that is good, or lies.

use std::fs::File;

use rustix::fs::MemfdFlags;
use rustix::net::{SocketAddrUnix, SocketFlags};
use tempfile::TempDir;

use super::super::matchmaker::Run;
use super::super::wire;
use super::*;
use memory::ram::Backing;
use memory::written::OwnWrites;

const NO_FILE: Option<&File> = None;
/// Where the filled pages begin: what is below would be a kernel's.
const FIRST: u64 = 300;
const PAGES: u64 = 64;

/// An agent of 16 MiB, of which some pages are filled; and the matchmaker's end.
struct World {
    _dir: TempDir,
    ram: Ram,
    listener: OwnedFd,
    link: Link,
}

impl World {
    /// None, said aloud, where userfaultfd is denied.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("merge.sock");
        let listener = wire::socket().unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        for page in FIRST..FIRST + PAGES {
            ram.memory().write_slice(&content(page), GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        match Agent::new(&ram, FoundSlabs::default()) {
            Ok(agent) => agent.start(Box::new(OwnWrites::new(&ram)), path, || {}).unwrap(),
            Err(error) => {
                testing::skipped(module_path!(), format_args!("userfaultfd: {error}"));
                return None;
            }
        }
        let link = accept(&listener);
        let world = Self { _dir: dir, ram, listener, link };
        world.begin(1);
        Some(world)
    }

    /// Lets the agent begin.
    fn begin(&self, key: u64) {
        self.say(&Message::Key(key));
        self.say(&Message::Go(Settings { min_run_pages: 1, ..Settings::default() }));
    }

    fn say(&self, message: &Message) {
        self.link.send(message, NO_FILE).unwrap();
    }

    /// Everything the agent says, until `what`. Other offers are of no interest, and are answered.
    fn hear(&mut self, what: impl Fn(&Message) -> bool) -> Message {
        loop {
            let (message, _) = self.link.receive().unwrap();
            if what(&message) {
                return message;
            }
            if matches!(message, Message::Offer(_)) {
                self.say(&Message::Done);
            }
        }
    }

    /// The filled pages are as they were.
    fn assert_unharmed(&self) {
        let mut bytes = vec![0; PAGE];
        for page in FIRST..FIRST + PAGES {
            self.ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE_BYTES)).unwrap();
            assert!(bytes == content(page), "{page}");
        }
    }

    /// What the agent has done, once it has carried out all orders.
    fn report(&mut self) -> Counters {
        // Orders come between two looks, or while it makes an offer in one.
        let next = |world: &mut Self| match world.hear(|message| matches!(message, Message::Report(_))) {
            Message::Report(counters) => *counters,
            _ => Counters::default(),
        };
        let now = next(self).passes;
        loop {
            let counters = next(self);
            if counters.passes > now + 2 {
                return counters;
            }
        }
    }
}

fn accept(listener: &OwnedFd) -> Link {
    let mut link = Link::new(rustix::net::accept_with(listener, SocketFlags::CLOEXEC).unwrap());
    // A test that waits for ever says nothing.
    link.set_time_limit(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(link.receive().unwrap().0, Message::Hello(VERSION, 4096));
    link
}

fn content(page: u64) -> Vec<u8> {
    vec![page as u8; PAGE]
}

fn slab(pages: std::ops::Range<u64>) -> OwnedFd {
    let draft = Draft::new(pages.end - pages.start).unwrap();
    for (n, page) in (0..).map(SlabPage).zip(pages) {
        draft.write(n, &content(page)).unwrap();
    }
    let file = draft.seal().unwrap();
    std::os::fd::AsFd::as_fd(&file).try_clone_to_owned().unwrap()
}

fn run(page: u64, pages: u32, slab_page: u32) -> Run {
    Run { page: PageNo(page), pages, slab: 7, slab_page: SlabPage(slab_page) }
}

#[test]
fn pages_are_offered_once_published_and_merged() {
    let Some(mut world) = World::new() else { return };
    let Message::Offer(offer) = world.hear(|message| matches!(message, Message::Offer(_))) else { return };
    let pages: Vec<PageNo> = offer.iter().map(|(page, _)| *page).collect();
    assert_eq!(pages, (FIRST..FIRST + PAGES).map(PageNo).collect::<Vec<_>>());
    let draft = Draft::new(PAGES).unwrap();
    world.link.send(&Message::Publish(7, pages), Some(&draft)).unwrap();
    let hashes = offer.iter().map(|(_, hash)| *hash).collect();
    assert_eq!(world.hear(|_| true), Message::Published(7, hashes));
    world.say(&Message::Merge(vec![run(FIRST, PAGES as u32, 0)]));
    world.say(&Message::Done);
    let report = world.report();
    let did = (report.merged_pages, report.shared_now, report.differed_pages);
    assert_eq!(did, (PAGES, PAGES, 0), "{report:?}");
    // What was loaded before watching began is hashed once more, if it is still the guest's alone.
    assert_eq!(report.hashed_pages, PAGES, "what is shared is not looked at again: {report:?}");
    world.assert_unharmed();
}

#[test]
fn a_matchmaker_that_lies_costs_nothing_but_merges() {
    let Some(mut world) = World::new() else { return };
    world.hear(|message| matches!(message, Message::Offer(_)));
    // A slab that is not sealed, one of another size than was said, and no slab at all.
    let unsealed = rustix::fs::memfd_create("lie", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&unsealed, 4 * PAGE_BYTES).unwrap();
    world.link.send(&Message::Slab(1, 4), Some(&unsealed)).unwrap();
    world.link.send(&Message::Slab(2, 9), Some(&slab(FIRST..FIRST + 4))).unwrap();
    world.link.send(&Message::Slab(3, 1), Some(&File::open("/dev/null").unwrap())).unwrap();
    let other = |slab| Run { slab, ..run(FIRST, 4, 0) };
    world.say(&Message::Merge(vec![other(1), other(2), other(3), other(99)]));
    // A real one, at wrong places.
    world.link.send(&Message::Slab(7, 8), Some(&slab(FIRST..FIRST + 8))).unwrap();
    let wrong = [
        run(FIRST + 1, 4, 0),
        run(FIRST, 8, 1),
        run(FIRST, 2, 7),
        run(FIRST, 2, u32::MAX),
        run(0, 4, 0),
        run(4095, 4, 0),
        run(4096, 4, 0),
        run(u64::MAX, 4, 0),
        run(u64::MAX - 2, 8, 0),
        run(FIRST, 0, 0),
    ];
    world.say(&Message::Merge(wrong.to_vec()));
    world.say(&Message::Done);
    let report = world.report();
    assert_eq!((report.merged_pages, report.shared_now), (0, 0), "{report:?}");
    world.assert_unharmed();
    // Pages that are not there to be published, and a draft that is none: it says so, and goes on.
    world.link.send(&Message::Publish(8, vec![PageNo(u64::MAX)]), Some(&Draft::new(1).unwrap())).unwrap();
    world.hear(|message| *message == Message::Unpublished(8));
    world
        .link
        .send(&Message::Publish(9, vec![PageNo(FIRST)]), Some(&File::open("/dev/null").unwrap()))
        .unwrap();
    world.hear(|message| *message == Message::Unpublished(9));
    // What makes no sense ends the connection, and the agent comes again.
    world.say(&Message::Hello(VERSION, 1));
    world.link = accept(&world.listener);
    world.begin(2);
    // It has reported what it had first.
    for _ in 0..1 {
        world.hear(|message| matches!(message, Message::Have(_)));
        world.say(&Message::Named(70));
    }
    world.hear(|message| matches!(message, Message::Offer(_)));
    world.link.send(&Message::Slab(7, 8), Some(&slab(FIRST..FIRST + 8))).unwrap();
    world.say(&Message::Merge(vec![run(FIRST, 8, 0)]));
    world.say(&Message::Done);
    assert_eq!(world.report().merged_pages, 8);
    world.assert_unharmed();
}

#[test]
fn what_is_sparse_is_looked_at_in_pieces() {
    let mut set = PageSet::none(4096);
    let range = |range: std::ops::Range<u64>| PageRange::between(PageNo(range.start), PageNo(range.end));
    for page in [0, 1, 31, 63, 96, 1000, 4095] {
        set.insert(PageNo(page));
    }
    assert_eq!(spans(&set, range(0..4096)), [0..64, 96..97, 1000..1001, 4095..4096].map(range));
    assert_eq!(spans(&set, range(32..100)), [63..64, 96..97].map(range));
}
