//! What the agents in VM processes and the matchmaker say to each other: packets of 64-bit words on
//! a Unix socket, some with a file descriptor. Either side believes nothing of the other: lengths
//! are checked here, and what is said is checked by bytes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use ::wire::packets;
use rustix::net::SocketAddrUnix;

use super::counters::Counters;
use super::matchmaker::{DRAFT_PAGES, PageHash, Run, SlabPlace};
use super::refusal::{ErrorKind, Refusal};
use memory::{PageNo, PageSet, SlabPage};

/// Pages in one offer.
pub const OFFER_PAGES: usize = 4096;
/// Runs in one order to merge.
pub const MERGE_RUNS: usize = 1024;
/// Slabs of a domain that are open at a time, 32 GiB: each is a descriptor in the host and in every
/// agent that merges with it.
pub const MAX_OPEN_SLABS: usize = 4096;
/// What an agent of this build understands: 1 is a refusal's kind. It stands in `Hello` where other
/// packets have a slab's number and earlier builds have, and read, nothing.
pub const VERSION: u32 = 1;
/// The longest reason for which an agent is refused, in bytes.
const MAX_REASON_BYTES: usize = 1024;
/// Words of the longest packet.
const MAX_WORDS: usize = 1 + 4 * OFFER_PAGES;

/// Pages of slabs in a set of which are in use.
pub type Live = PageSet<SlabPage>;

/// The words of [`Live`].
const LIVE_WORDS: usize = DRAFT_PAGES / 64;

/// How an agent is to merge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Processor time it may take, in thousandths of one processor; 0: unlimited.
    pub cpu_permille: u64,
    /// Pages of the shortest run that is worth a mapping of its own.
    pub min_run_pages: u64,
    /// How much of a huge page must be saved for it to be broken up, in percent.
    pub huge_page_percent: u64,
    /// Pages that may be watched a second, at most, while most merges are broken soon; 0: as many
    /// as there are.
    pub watch_pages: u64,
    /// Memory is short: merge at urgent priority.
    pub urgent: bool,
}

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Agent: its [`VERSION`], 0 in earlier builds, and the pages of its guest.
    Hello(u32, u64),
    /// Host: the key of the domain's hashes.
    Key(u64),
    /// Host: merge from now on, with these settings.
    Go(Settings),
    /// Agent: these pages have these hashes.
    Offer(Vec<(PageNo, PageHash)>),
    /// Host: that was all about your last offer.
    Done,
    /// Host, with a draft: fill it with these pages, seal it, and say so.
    Publish(u32, Vec<PageNo>),
    /// Host, with a draft: fill it with these pages of slabs.
    Compact(u32, Vec<SlabPlace>),
    /// Agent: it is sealed, and has pages of these hashes.
    Published(u32, Vec<PageHash>),
    /// Agent: it could not be done.
    Unpublished(u32),
    /// Agent, with a slab that it has from elsewhere, an earlier host or an image: pages of these
    /// hashes are in it. No hashes: is it known?
    Have(Vec<PageHash>),
    /// Host: what you had is known by this number; [`u32::MAX`]: it is not.
    Named(u32),
    /// Host, with a slab: its number, and its pages.
    Slab(u32, u64),
    /// Host: merge these runs.
    Merge(Vec<Run>),
    /// Host: what you have of these pages of slabs is to come from this slab, in this order.
    Move(u32, Vec<SlabPlace>),
    /// Host: this slab is not in use.
    Drop(u32),
    /// Agent: I use these pages of this slab.
    Live(u32, Live),
    /// Agent: the end of its `Live`, after this number of orders to merge and to move.
    LiveEnd(u64),
    /// Agent: what it has done.
    Report(Box<Counters>),
    /// Host: the guest is not admitted, for this reason. Its kind is only for agents from version 1
    /// on.
    Refused(Refusal),
}

impl Message {
    fn words(&self) -> Vec<u64> {
        let of = |tag: u64, slab: u32| tag | u64::from(slab) << 8;
        let places = |pages: &[SlabPlace]| -> Vec<u64> {
            pages.iter().map(|p| u64::from(p.slab) << 32 | u64::from(p.page.0)).collect()
        };
        let with = |first: u64, rest: &[u64]| [&[first], rest].concat();
        match self {
            Self::Hello(version, pages) => vec![of(0, *version), *pages],
            Self::Key(key) => vec![1, *key],
            Self::Offer(pages) => [2].into_iter().chain(pages.iter().flat_map(|(p, h)| [p.0, *h])).collect(),
            Self::Done => vec![3],
            Self::Publish(slab, pages) => {
                let numbers: Vec<u64> = pages.iter().map(|page| page.0).collect();
                with(of(4, *slab), &numbers)
            }
            Self::Published(slab, hashes) => with(of(5, *slab), hashes),
            Self::Unpublished(slab) => vec![of(6, *slab)],
            Self::Slab(slab, pages) => vec![of(7, *slab), *pages],
            Self::Merge(runs) => {
                let words =
                    |r: &Run| [r.page.0, u64::from(r.pages), u64::from(r.slab), u64::from(r.slab_page.0)];
                [8].into_iter().chain(runs.iter().flat_map(words)).collect()
            }
            Self::Report(counters) => with(9, &counters.words()),
            Self::Go(s) => {
                let (most, urgent) = (s.watch_pages, u64::from(s.urgent));
                vec![10, s.cpu_permille, s.min_run_pages, s.huge_page_percent, most, urgent]
            }
            Self::Compact(slab, pages) => with(of(11, *slab), &places(pages)),
            Self::Move(slab, pages) => with(of(12, *slab), &places(pages)),
            Self::Drop(slab) => vec![of(13, *slab)],
            Self::Have(hashes) => with(14, hashes),
            Self::Named(slab) => vec![of(15, *slab)],
            Self::Live(slab, live) => with(of(16, *slab), live.words()),
            Self::LiveEnd(orders) => vec![17, *orders],
            Self::Refused(Refusal { kind, text: why }) => {
                let end = (0..=why.len().min(MAX_REASON_BYTES)).rev().find(|end| why.is_char_boundary(*end));
                let why = &why.as_bytes()[..end.unwrap_or(0)];
                let word =
                    |bytes: &[u8]| bytes.iter().rev().fold(0, |word: u64, byte| word << 8 | u64::from(*byte));
                // The length needs 11 bits of the 32; the kind is above it.
                let head = u32::from(kind.code()) << 16 | why.len() as u32;
                [of(18, head)].into_iter().chain(why.chunks(8).map(word)).collect()
            }
        }
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let (first, rest) = words.split_first()?;
        let slab = u32::try_from(first >> 8).ok()?;
        let places = |words: &[u64]| -> Option<Vec<SlabPlace>> {
            let place = |word: &u64| SlabPlace { slab: (word >> 32) as u32, page: SlabPage(*word as u32) };
            (words.len() <= DRAFT_PAGES).then(|| words.iter().map(place).collect())
        };
        let hashes = |words: &[u64]| (words.len() <= DRAFT_PAGES).then(|| words.to_vec());
        Some(match (first & 0xff, rest) {
            (0, [pages]) => Self::Hello(slab, *pages),
            (1, [key]) => Self::Key(*key),
            (2, pages) if pages.len() <= 2 * OFFER_PAGES => {
                let (pairs, []) = pages.as_chunks::<2>() else { return None };
                Self::Offer(pairs.iter().map(|[page, hash]| (PageNo(*page), *hash)).collect())
            }
            (3, []) => Self::Done,
            (4, pages) => Self::Publish(slab, hashes(pages)?.into_iter().map(PageNo).collect()),
            (5, words) => Self::Published(slab, hashes(words)?),
            (6, []) => Self::Unpublished(slab),
            (7, [pages]) => Self::Slab(slab, *pages),
            (8, runs) if runs.len() <= 4 * MERGE_RUNS => {
                let (runs, []) = runs.as_chunks::<4>() else { return None };
                let run = |[page, pages, slab, slab_page]: &[u64; 4]| {
                    Some(Run {
                        page: PageNo(*page),
                        pages: u32::try_from(*pages).ok().filter(|pages| *pages as usize <= DRAFT_PAGES)?,
                        slab: u32::try_from(*slab).ok()?,
                        slab_page: SlabPage(u32::try_from(*slab_page).ok()?),
                    })
                };
                Self::Merge(runs.iter().map(run).collect::<Option<_>>()?)
            }
            (9, words) => Self::Report(Box::new(Counters::from_words(words.try_into().ok()?))),
            (10, &[cpu_permille, min_run_pages, huge_page_percent, watch_pages, urgent]) => {
                let urgent = urgent != 0;
                Self::Go(Settings { cpu_permille, min_run_pages, huge_page_percent, watch_pages, urgent })
            }
            (11, words) => Self::Compact(slab, places(words)?),
            (12, words) => Self::Move(slab, places(words)?),
            (13, []) => Self::Drop(slab),
            (14, words) => Self::Have(hashes(words)?),
            (15, []) => Self::Named(slab),
            (16, words) if words.len() == LIVE_WORDS => Self::Live(slab, PageSet::from_words(words.to_vec())),
            (17, [orders]) => Self::LiveEnd(*orders),
            (18, words) => {
                let (kind, bytes) = (ErrorKind::of_code((slab >> 16) as u16), (slab & 0xffff) as usize);
                if bytes > MAX_REASON_BYTES || words.len() != bytes.div_ceil(8) {
                    return None;
                }
                let all: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).take(bytes).collect();
                Self::Refused(Refusal::new(kind, String::from_utf8(all).ok()?))
            }
            _ => return None,
        })
    }
}

/// One end of the socket.
#[derive(Debug)]
pub struct Link {
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl Link {
    /// Connects to the matchmaker at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self::new(socket))
    }

    /// The end that `socket` is.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket: socket.into(), buffer: vec![0; MAX_WORDS * 8] }
    }

    /// Whether calls fail with WouldBlock instead of waiting.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        self.socket.set_nonblocking(on)
    }

    /// How long calls wait before they fail with WouldBlock; None: as long as it takes.
    pub fn set_time_limit(&self, limit: Option<std::time::Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(limit)?;
        self.socket.set_write_timeout(limit)
    }

    /// Sends a packet, whole.
    pub fn send(&self, message: &Message, file: Option<impl AsFd>) -> io::Result<()> {
        let bytes: Vec<u8> = message.words().into_iter().flat_map(u64::to_le_bytes).collect();
        packets::send(&self.socket, &bytes, file.as_ref().map(AsFd::as_fd))
    }

    /// The next packet. An end of file is an error, and so is a packet that is none.
    pub fn receive(&mut self) -> io::Result<(Message, Option<File>)> {
        let (packet, file) = packets::receive(&self.socket, &mut self.buffer)?;
        let (words, rest) = packet.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let message = if rest.is_empty() { Message::from_words(&words) } else { None };
        message.map(|message| (message, file)).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

pub use packets::socket;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::*;
    use memory::slab::Draft;

    fn pair() -> (Link, Link) {
        let flags = SocketFlags::CLOEXEC;
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Link::new(a), Link::new(b))
    }

    const PLACE: SlabPlace = SlabPlace { slab: u32::MAX, page: SlabPage(77) };

    fn run(page: u64) -> Run {
        Run { page: PageNo(page), pages: 3, slab: 5, slab_page: SlabPage(u32::MAX) }
    }

    #[test]
    fn packets_arrive_as_they_were_sent() {
        let (a, mut b) = pair();
        for message in [
            Message::Hello(u32::MAX, u64::MAX),
            Message::Key(u64::MAX),
            Message::Go(Settings {
                cpu_permille: 1,
                min_run_pages: 2,
                huge_page_percent: 3,
                watch_pages: 4,
                urgent: true,
            }),
            Message::Offer(vec![(PageNo(1), u64::MAX); OFFER_PAGES]),
            Message::Offer(Vec::new()),
            Message::Done,
            Message::Publish(u32::MAX, (0..DRAFT_PAGES as u64).map(PageNo).collect()),
            Message::Published(7, vec![9; DRAFT_PAGES]),
            Message::Unpublished(0),
            Message::Slab(3, 1 << 40),
            Message::Merge((0..MERGE_RUNS as u64).map(run).collect()),
            Message::Compact(5, vec![PLACE; DRAFT_PAGES]),
            Message::Move(6, vec![PLACE; 3]),
            Message::Drop(7),
            Message::Have(vec![9; DRAFT_PAGES]),
            Message::Named(8),
            Message::Live(9, PageSet::all(DRAFT_PAGES as u64)),
            Message::LiveEnd(10),
            Message::Refused(Refusal::new(ErrorKind::NoDomain, "no domain of user 7: \u{e4}")),
            Message::Refused(Refusal::new(ErrorKind::Unsaid, "")),
            Message::Report(Box::new(Counters { passes: 1, converged_at_ns: 8, ..Counters::default() })),
        ] {
            a.send(&message, None::<&File>).unwrap();
            let (received, file) = b.receive().unwrap();
            assert!(received == message && file.is_none(), "{message:?}");
        }
        drop(a);
        assert_eq!(b.receive().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_long_reason_is_cut() {
        let (a, mut b) = pair();
        let refused = |count| Message::Refused(Refusal::new(ErrorKind::Ended, "\u{20ac}".repeat(count)));
        a.send(&refused(1000), None::<&File>).unwrap();
        assert_eq!(b.receive().unwrap().0, refused(341));
    }

    #[test]
    fn hosts_and_agents_of_earlier_builds_are_understood() {
        assert_eq!(Message::from_words(&[0, 64]), Some(Message::Hello(0, 64)));
        // An earlier host finds the tag and the pages where they were.
        let hello = Message::Hello(VERSION, 64).words();
        assert_eq!((hello[0] & 0xff, &hello[1..]), (0, [64].as_slice()));
        // Without a kind a refusal is what it was: its length in bytes above the tag.
        let unsaid = Message::Refused(Refusal::new(ErrorKind::Unsaid, "no"));
        let words = [18 | 2 << 8, u64::from(u16::from_le_bytes(*b"no"))];
        assert_eq!((unsaid.words(), Message::from_words(&words)), (words.to_vec(), Some(unsaid)));
    }

    #[test]
    fn a_descriptor_comes_along() {
        let (a, mut b) = pair();
        a.send(&Message::Slab(1, 2), Some(&Draft::new(2).unwrap())).unwrap();
        let (message, file) = b.receive().unwrap();
        assert_eq!((message, file.unwrap().metadata().unwrap().len()), (Message::Slab(1, 2), 8192));
    }

    proptest! {
        #[test]
        fn rubbish_is_no_packet_or_a_short_one(words in prop::collection::vec(0u64..40, 0..40)) {
            if let Some(message) = Message::from_words(&words) {
                prop_assert!(message.words().len() == words.len());
            }
        }
    }
}
