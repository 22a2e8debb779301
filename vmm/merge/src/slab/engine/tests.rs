//! The engine among agents that are simulated, and some that lie.

use std::fs::File;
use std::time::Duration;

use tempfile::TempDir;

use super::super::matchmaker::{Run, SlabPlace};
use super::super::wire::{Link, Message, VERSION};
use super::super::{ErrorKind, Refusal};
use super::*;
use memory::slab::{Draft, Slab};
use memory::{PAGE_BYTES, PageNo, PageSet, SlabPage};

const NO_FILE: Option<&File> = None;
const PAGES: u64 = 1 << 20;

/// An engine at a socket of its own; None, said aloud, where userfaultfd is denied.
fn engine() -> Option<(TempDir, SlabEngine)> {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = SlabEngine::new(dir.path().join("merge.sock"));
    match engine.start(&[]) {
        Ok(()) => Some((dir, engine)),
        Err(EngineError::NoUserfaultfd(error)) => {
            testing::skipped(module_path!(), format_args!("userfaultfd: {error}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

struct Agent(Link);

impl Agent {
    /// One that has been admitted.
    fn new(engine: &SlabEngine) -> Self {
        let mut agent = Self::connect(engine);
        agent.say(&Message::Hello(0, PAGES));
        assert!(matches!(agent.hear(), (Message::Key(_), None)));
        agent
    }

    fn connect(engine: &SlabEngine) -> Self {
        let link = Link::connect(&engine.socket).unwrap();
        link.set_time_limit(Some(Duration::from_secs(20))).unwrap();
        Self(link)
    }

    fn say(&self, message: &Message) {
        self.0.send(message, NO_FILE).unwrap();
    }

    /// The next message to it, settings left out: another test has those.
    fn hear(&mut self) -> (Message, Option<File>) {
        loop {
            match self.0.receive().unwrap() {
                (Message::Go(_), _) => {}
                other => return other,
            }
        }
    }

    /// Offers pages, and hears what there is to do.
    fn offer(&mut self, pages: &[(u64, u64)]) -> Vec<(Message, Option<File>)> {
        self.say(&Message::Offer(numbered(pages)));
        let mut orders = Vec::new();
        loop {
            match self.hear() {
                (Message::Done, _) => return orders,
                order => orders.push(order),
            }
        }
    }

    /// Fills the draft it was given with one byte for each page.
    fn fill(&self, order: &mut Vec<(Message, Option<File>)>, seal: bool) -> u32 {
        let Some((Message::Publish(slab, pages), Some(file))) = order.pop() else { panic!("{order:?}") };
        let draft = Draft::receive(file.into(), pages.len() as u64).unwrap();
        for (n, page) in (0..).map(SlabPage).zip(&pages) {
            draft.write(n, &vec![page.0 as u8; PAGE_BYTES as usize]).unwrap();
        }
        if seal {
            draft.seal().unwrap();
        }
        slab
    }

    fn assert_disconnected(&mut self) {
        let error = loop {
            match self.0.receive() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        let kinds = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset];
        assert!(kinds.contains(&error.kind()), "{error}");
    }
}

fn numbered(pages: &[(u64, u64)]) -> Vec<(PageNo, u64)> {
    pages.iter().map(|(page, hash)| (PageNo(*page), *hash)).collect()
}

fn merge(page: u64, pages: u32) -> Message {
    Message::Merge(vec![Run { page: PageNo(page), pages, slab: 0, slab_page: SlabPage(0) }])
}

#[test]
fn one_publishes_and_both_merge() {
    let Some((_dir, mut engine)) = engine() else { return };
    let (mut a, mut b) = (Agent::new(&engine), Agent::new(&engine));
    assert!(a.offer(&[(4, 40), (5, 50)]).is_empty());
    let mut orders = b.offer(&[(8, 40), (9, 50)]);
    let slab = b.fill(&mut orders, true);
    b.say(&Message::Published(slab, vec![40, 50]));
    assert_eq!(b.hear().0, merge(8, 2), "it has the slab");
    let (told, file) = a.hear();
    assert_eq!(told, Message::Slab(slab, 2));
    let received = Slab::receive(file.unwrap().into(), 2).unwrap();
    assert_eq!(received.bytes(SlabPage(1), 1).unwrap()[0], 9);
    assert_eq!(a.hear().0, merge(4, 2));

    let did = Counters { passes: 3, shared_now: 2, zero_pages: 1, hash_ns: 1 << 30, ..Counters::default() };
    a.say(&Message::Report(Box::new(did)));
    assert!(a.offer(&[(6, 60)]).is_empty(), "after which the report has been seen");
    let progress = engine.progress().unwrap();
    assert_eq!((progress.merged_pages, progress.full_passes), (3, 0), "the other one has done nothing");
    assert!(progress.cpu_seconds >= Some(1.0));
    engine.stop();
    a.assert_disconnected();
    assert!(!engine.socket.exists());
}

#[test]
fn agents_that_break_the_rules_are_hung_up_on_and_others_served() {
    let Some((_dir, engine)) = engine() else { return };
    let mut good = Agent::new(&engine);
    for lie in [
        Message::Hello(0, PAGES),
        Message::Key(1),
        Message::Done,
        Message::Merge(Vec::new()),
        Message::Published(0, vec![1]),
        Message::Published(77, Vec::new()),
        Message::Have(vec![1]),
        Message::Named(1),
        Message::Drop(1),
    ] {
        let mut bad = Agent::new(&engine);
        bad.say(&lie);
        bad.assert_disconnected();
    }
    // Nothing at all, and bytes that are no packet.
    let mute = Link::connect(&engine.socket).unwrap();
    let rubbish = Link::connect(&engine.socket).unwrap();
    rustix::net::send(&rubbish, b"rubbish", rustix::net::SendFlags::empty()).unwrap();
    Agent(rubbish).assert_disconnected();
    assert!(good.offer(&[(1, 10)]).is_empty());
    drop(mute);
    assert!(good.offer(&[(2, 20)]).is_empty());
}

#[test]
fn a_slab_that_is_not_sealed_goes_to_no_agent() {
    let Some((_dir, engine)) = engine() else { return };
    let (mut a, mut b) = (Agent::new(&engine), Agent::new(&engine));
    a.offer(&[(1, 10)]);
    let mut orders = b.offer(&[(2, 10)]);
    let slab = b.fill(&mut orders, false);
    b.say(&Message::Published(slab, vec![10]));
    // A waited for it, and is matched anew: with no guest, for B's page is offered no more.
    assert!(a.offer(&[(3, 30)]).is_empty());
    let orders = b.offer(&[(4, 10)]);
    assert!(matches!(orders[..], [(Message::Publish(..), Some(_))]), "{orders:?}");
}

#[test]
fn pages_that_a_guest_has_not_are_not_known() {
    let Some((_dir, engine)) = engine() else { return };
    let (mut a, mut b) = (Agent::new(&engine), Agent::new(&engine));
    assert!(a.offer(&[(PAGES, 10), (u64::MAX, 20)]).is_empty());
    assert!(b.offer(&[(1, 10), (2, 20)]).is_empty());
    // Nor is it one that says it has more than any can have.
    let mut vast = Agent::connect(&engine);
    vast.say(&Message::Hello(0, u64::MAX));
    vast.say(&Message::Offer(numbered(&[(1, 10)])));
    vast.assert_disconnected();
}

#[test]
fn only_members_take_part_and_know_their_own_domain_only() {
    let Some((dir, _)) = engine() else { return };
    let mut engine = SlabEngine::for_members(dir.path().join("members.sock"), &Tuning::default());
    engine.open().unwrap();
    let mut agent = Agent::connect(&engine);
    agent.say(&Message::Hello(0, 64));
    agent.0.set_time_limit(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(agent.0.receive().unwrap_err().kind(), io::ErrorKind::WouldBlock, "it is no member yet");
    agent.0.set_time_limit(Some(Duration::from_secs(20))).unwrap();
    let pid = std::process::id();
    engine.admit("a", pid, "red", 63 * PAGE_BYTES);
    engine.admit("a", pid, "red", 64 * PAGE_BYTES);
    let (Message::Key(red), _) = agent.hear() else { panic!("expected a key") };
    assert!(agent.offer(&[(1, 10)]).is_empty());
    // The same process, of another domain from now on.
    engine.admit("b", pid, "blue", 64 * PAGE_BYTES);
    let mut other = Agent::connect(&engine);
    other.say(&Message::Hello(0, 64));
    let (Message::Key(blue), _) = other.hear() else { panic!("expected a key") };
    assert_ne!(red, blue);
    assert!(other.offer(&[(1, 10)]).is_empty(), "nothing is known of the other domain");
    assert_eq!(engine.statistics().unwrap().domains.len(), 2);
    engine.start(&[]).unwrap();
    let tuning = Tuning::default();
    let (go, _) = agent.0.receive().unwrap();
    let min_run_pages = tuning.min_run_pages.into();
    let huge_page_percent = tuning.huge_page_percent.into();
    assert_eq!(go, Message::Go(Settings { min_run_pages, huge_page_percent, ..Settings::default() }));
}

#[test]
fn the_processor_time_is_divided_among_the_agents() {
    let Some((dir, _)) = engine() else { return };
    let mut engine = SlabEngine::new(dir.path().join("divided.sock"));
    engine.tune(&Tuning { cpu_percent: Some(30), ..Tuning::default() });
    engine.start(&[]).unwrap();
    let mut agents = vec![Agent::new(&engine), Agent::new(&engine)];
    let part = |agent: &mut Agent| match agent.0.receive() {
        Ok((Message::Go(settings), _)) => settings.cpu_permille,
        other => panic!("{other:?}"),
    };
    assert_eq!((part(&mut agents[0]), part(&mut agents[0]), part(&mut agents[1])), (300, 150, 150));
    agents.pop();
    assert_eq!(part(&mut agents[0]), 300);
}

/// Two agents that share one slab of `pages` pages.
fn sharing(engine: &SlabEngine, pages: u64) -> (Agent, Agent, u32) {
    let (mut a, mut b) = (Agent::new(engine), Agent::new(engine));
    let offer: Vec<_> = (0..pages).map(|page| (page, page * 7 + 1)).collect();
    a.offer(&offer);
    let mut orders = b.offer(&offer);
    let slab = b.fill(&mut orders, true);
    b.say(&Message::Published(slab, offer.iter().map(|(_, hash)| *hash).collect()));
    assert!(matches!(b.hear().0, Message::Merge(_)));
    assert!(matches!((a.hear().0, a.hear().0), (Message::Slab(..), Message::Merge(_))));
    (a, b, slab)
}

fn live(pages: std::ops::Range<u64>) -> super::super::wire::Live {
    let mut set = PageSet::none(super::super::matchmaker::DRAFT_PAGES as u64);
    pages.for_each(|page| set.insert(SlabPage(page as u32)));
    set
}

#[test]
fn an_unused_slab_is_dropped_once_all_have_said_so() {
    let Some((_dir, engine)) = engine() else { return };
    let (mut a, mut b, slab) = sharing(&engine, 300);
    // One says that it uses none, before it has seen the order: that counts for nothing.
    b.say(&Message::Live(slab, live(0..200)));
    b.say(&Message::LiveEnd(1));
    assert!(b.offer(&[(1000, 4000)]).is_empty());
    a.say(&Message::LiveEnd(0));
    assert!(a.offer(&[(1000, 1)]).len() == 1, "it is merged with");
    a.say(&Message::LiveEnd(2));
    let orders = b.offer(&[(1000, 5000)]);
    assert!(orders.is_empty(), "it is still in use: {orders:?}");
    b.say(&Message::LiveEnd(1));
    assert_eq!(b.hear().0, Message::Drop(slab));
    assert_eq!(a.hear().0, Message::Drop(slab));
    assert!(a.offer(&[(1001, 8)]).is_empty(), "its contents are known no more");
}

#[test]
fn what_is_left_of_slabs_is_put_together() {
    let Some((_dir, engine)) = engine() else { return };
    let (mut a, mut b, slab) = sharing(&engine, 1000);
    a.say(&Message::Live(slab, live(10..20)));
    a.say(&Message::LiveEnd(1));
    b.say(&Message::Live(slab, live(15..40)));
    b.say(&Message::LiveEnd(1));
    let mut told = b.0.receive().map(|told| (told, false));
    if !matches!(told, Ok(((Message::Compact(..), _), _))) {
        told = a.0.receive().map(|told| (told, true));
    }
    let Ok(((Message::Compact(new, places), Some(file)), by_a)) = told else { panic!("{told:?}") };
    let expected: Vec<_> = (10..40).map(|page| SlabPlace { slab, page: SlabPage(page) }).collect();
    assert_eq!(places, expected);
    let draft = Draft::receive(file.into(), 30).unwrap();
    draft.seal().unwrap();
    let hashes = (10..40).map(|page| page * 7 + 1).collect();
    let (by, other) = if by_a { (&mut a, &mut b) } else { (&mut b, &mut a) };
    by.say(&Message::Published(new, hashes));
    assert_eq!(by.hear().0, Message::Move(new, expected.clone()));
    assert_eq!(by.hear().0, Message::Drop(slab));
    assert!(matches!(other.hear(), (Message::Slab(it, 30), Some(_)) if it == new));
    assert_eq!(other.hear().0, Message::Move(new, expected));
    assert_eq!(other.hear().0, Message::Drop(slab));
    let orders = other.offer(&[(2000, 10 * 7 + 1), (2001, 7 + 1)]);
    let merge = Message::Merge(vec![Run { page: PageNo(2000), pages: 1, slab: new, slab_page: SlabPage(0) }]);
    assert!(orders.len() == 1 && orders[0].0 == merge, "{orders:?}");
}

#[test]
fn when_the_last_user_has_gone_the_slab_is_dropped() {
    let Some((_dir, engine)) = engine() else { return };
    let (mut a, b, slab) = sharing(&engine, 300);
    a.say(&Message::LiveEnd(1));
    b.say(&Message::Live(slab, live(0..300)));
    b.say(&Message::LiveEnd(1));
    assert!(a.offer(&[(1000, 5000)]).is_empty());
    drop(b);
    assert_eq!(a.hear().0, Message::Drop(slab));
}

#[test]
fn a_slab_of_an_earlier_host_goes_on_being_merged_with() {
    let Some((_dir, engine)) = engine() else { return };
    let (mut a, mut b) = (Agent::new(&engine), Agent::new(&engine));
    let sealed = || {
        let draft = Draft::new(2).unwrap();
        draft.write(SlabPage(0), &[7; 2 * PAGE_BYTES as usize]).unwrap();
        draft.seal().unwrap()
    };
    let slab = sealed();
    let named = |agent: &mut Agent| {
        agent.0.send(&Message::Have(vec![40, 50]), Some(&slab)).unwrap();
        match agent.hear().0 {
            Message::Named(slab) => slab,
            other => panic!("{other:?}"),
        }
    };
    let number = named(&mut a);
    assert_eq!(named(&mut b), number, "it is the same file");
    let merge = Message::Merge(vec![Run { page: PageNo(8), pages: 2, slab: number, slab_page: SlabPage(0) }]);
    let orders = b.offer(&[(8, 40), (9, 50)]);
    assert!(orders.len() == 1 && orders[0].0 == merge, "{orders:?}");
    // One of another size than was said.
    a.0.send(&Message::Have(vec![1, 2, 3]), Some(&sealed())).unwrap();
    a.assert_disconnected();
}

#[test]
fn an_applicant_is_refused_by_a_kind_if_its_build_knows_kinds() {
    let Some((dir, _)) = engine() else { return };
    let path = dir.path().join("open.sock");
    let mut engine = SlabEngine::for_members(path, &Tuning::default()).open_to_others();
    engine.open().unwrap();
    for (version, kind) in [(VERSION, ErrorKind::FleetFull), (0, ErrorKind::Unsaid)] {
        let mut agent = Agent::connect(&engine);
        agent.say(&Message::Hello(version, 64));
        let applicant = (0..2000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            engine.applicants().pop()
        });
        let applicant = applicant.expect("it applies");
        assert_eq!((applicant.pages, applicant.process.pid()), (64, std::process::id()));
        engine.refuse(applicant.serial, Refusal::new(ErrorKind::FleetFull, "it is full"));
        assert_eq!(agent.hear().0, Message::Refused(Refusal::new(kind, "it is full")));
        agent.assert_disconnected();
    }
}
