//! The engine among agents that are simulated, and some that lie.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tempfile::TempDir;

use super::super::matchmaker::Run;
use super::*;
use crate::memory::PAGE_BYTES;

const NO_FILE: Option<&File> = None;

/// An engine at a socket of its own; None, said aloud, where userfaultfd is denied.
fn engine() -> Option<(TempDir, SlabEngine)> {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = SlabEngine::new(dir.path().join("merge.sock"));
    match engine.start(&[]) {
        Ok(()) => Some((dir, engine)),
        Err(EngineError::NoUserfaultfd(error)) => {
            eprintln!("SKIPPED {}: userfaultfd: {error}", module_path!());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

struct Agent(Link);

impl Agent {
    fn new(engine: &SlabEngine) -> Self {
        let link = Link::connect(&engine.socket).unwrap();
        let socket = UnixStream::from(link.as_fd().try_clone_to_owned().unwrap());
        // The time limit is the socket's, whichever descriptor set it.
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut agent = Self(link);
        agent.say(&Message::Hello);
        assert!(matches!(agent.hear(), (Message::Key(_), None)));
        agent
    }

    fn say(&self, message: &Message) {
        self.0.send(message, NO_FILE).unwrap();
    }

    fn hear(&mut self) -> (Message, Option<File>) {
        self.0.receive().unwrap()
    }

    /// Offers pages, and hears what there is to do.
    fn offer(&mut self, pages: &[(u64, u64)]) -> Vec<(Message, Option<File>)> {
        self.say(&Message::Offer(pages.to_vec()));
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
        for (n, page) in (0..).zip(&pages) {
            draft.write(n, &vec![*page as u8; PAGE_BYTES as usize]).unwrap();
        }
        if seal {
            draft.seal().unwrap();
        }
        slab
    }

    fn assert_hung_up_on(&mut self) {
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

fn merge(page: u64, pages: u32) -> Message {
    Message::Merge(vec![Run { page, pages, slab: 0, slab_page: 0 }])
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
    assert_eq!(received.bytes(1, 1).unwrap()[0], 9);
    assert_eq!(a.hear().0, merge(4, 2));

    let report = Report { passes: 3, shared_now: 2, zeros: 1, cpu_nanoseconds: 1 << 30, ..Report::default() };
    a.say(&Message::Report(report));
    assert!(a.offer(&[(6, 60)]).is_empty(), "after which the report has been seen");
    let progress = engine.progress().unwrap();
    assert_eq!((progress.merged_pages, progress.full_passes), (3, 3));
    assert!(progress.cpu_seconds >= Some(1.0));
    engine.stop();
    a.assert_hung_up_on();
    assert!(!engine.socket.exists());
}

#[test]
fn agents_that_break_the_rules_are_hung_up_on_and_others_served() {
    let Some((_dir, engine)) = engine() else { return };
    let mut good = Agent::new(&engine);
    for lie in [
        Message::Hello,
        Message::Key(1),
        Message::Done,
        Message::Merge(Vec::new()),
        Message::Published(0, vec![1]),
        Message::Published(77, Vec::new()),
    ] {
        let mut bad = Agent::new(&engine);
        bad.say(&lie);
        bad.assert_hung_up_on();
    }
    // Nothing at all, and bytes that are no packet.
    let mute = Link::connect(&engine.socket).unwrap();
    let rubbish = Link::connect(&engine.socket).unwrap();
    rustix::net::send(&rubbish, b"rubbish", rustix::net::SendFlags::empty()).unwrap();
    Agent(rubbish).assert_hung_up_on();
    assert!(good.offer(&[(1, 10)]).is_empty());
    drop(mute);
    assert!(good.offer(&[(2, 20)]).is_empty());
}

#[test]
fn a_slab_that_is_not_sealed_goes_to_nobody() {
    let Some((_dir, engine)) = engine() else { return };
    let (mut a, mut b) = (Agent::new(&engine), Agent::new(&engine));
    a.offer(&[(1, 10)]);
    let mut orders = b.offer(&[(2, 10)]);
    let slab = b.fill(&mut orders, false);
    b.say(&Message::Published(slab, vec![10]));
    // A waited for it, and is matched anew: with nobody, for B's page is offered no more.
    assert!(a.offer(&[(3, 30)]).is_empty());
    let orders = b.offer(&[(4, 10)]);
    assert!(matches!(orders[..], [(Message::Publish(..), Some(_))]), "{orders:?}");
}

#[test]
fn too_much_to_know_is_forgotten_and_offered_again() {
    let Some((_dir, engine)) = engine() else { return };
    let mut agent = Agent::new(&engine);
    let mut offered = 0;
    while offered <= MIN_INDEX {
        let pages: Vec<_> = (0..4096).map(|page| (page, (offered + page) * 2 + 2)).collect();
        agent.say(&Message::Offer(pages));
        offered += 4096;
        match agent.0.receive() {
            Ok((message, _)) => assert_eq!(message, Message::Done),
            Err(_) => break,
        }
    }
    agent.assert_hung_up_on();
    assert!(Agent::new(&engine).offer(&[(1, 10)]).is_empty());
}
