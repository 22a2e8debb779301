//! What the agents in VM processes and the matchmaker say to each other: packets of 64-bit words on a Unix socket, some with a
//! file descriptor. Either side believes nothing of the other: lengths are checked here, and what is said is checked by bytes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::matchmaker::{DRAFT_PAGES, PageHash, Run};

/// Pages in one offer.
pub const OFFER_PAGES: usize = 4096;
/// Runs in one order to merge.
pub const MERGE_RUNS: usize = 1024;
/// Slabs that are open at a time: each is a descriptor in the host and in every agent that merges with it, of which a process
/// has 1024 unless it was given more.
pub const MAX_OPEN_SLABS: usize = 512;
/// Words of the longest packet.
const MAX_WORDS: usize = 1 + 4 * OFFER_PAGES;

/// What an agent has done since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Complete passes over guest RAM.
    pub passes: u64,
    /// Pages hashed.
    pub hashed: u64,
    /// Pages replaced by pages of slabs.
    pub merged: u64,
    /// Pages of zeros given back.
    pub zeros: u64,
    /// Runs refused because they held something else by then.
    pub differed: u64,
    /// Runs refused for any other reason.
    pub refused: u64,
    /// Pages of slabs that guest RAM is made of now.
    pub shared_now: u64,
    /// Processor time of the agent, in nanoseconds.
    pub cpu_nanoseconds: u64,
}

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Agent: here I am.
    Hello,
    /// Host: the key of the domain's hashes.
    Key(u64),
    /// Agent: these pages have these hashes.
    Offer(Vec<(u64, PageHash)>),
    /// Host: that was all about your last offer.
    Done,
    /// Host, with a draft: fill it with these pages, seal it, and say so.
    Publish(u32, Vec<u64>),
    /// Agent: it is sealed, and has pages of these hashes.
    Published(u32, Vec<PageHash>),
    /// Agent: it could not be done.
    Unpublished(u32),
    /// Host, with a slab of so many pages.
    Slab(u32, u64),
    /// Host: merge these runs.
    Merge(Vec<Run>),
    /// Agent: what it has done.
    Report(Report),
}

impl Message {
    fn words(&self) -> Vec<u64> {
        let of = |tag: u64, slab: u32| tag | u64::from(slab) << 8;
        match self {
            Self::Hello => vec![0],
            Self::Key(key) => vec![1, *key],
            Self::Offer(pages) => [2].into_iter().chain(pages.iter().flat_map(|(p, h)| [*p, *h])).collect(),
            Self::Done => vec![3],
            Self::Publish(slab, pages) => [of(4, *slab)].into_iter().chain(pages.iter().copied()).collect(),
            Self::Published(slab, hashes) => {
                [of(5, *slab)].into_iter().chain(hashes.iter().copied()).collect()
            }
            Self::Unpublished(slab) => vec![of(6, *slab)],
            Self::Slab(slab, pages) => vec![of(7, *slab), *pages],
            Self::Merge(runs) => {
                let words = |r: &Run| [r.page, u64::from(r.pages), u64::from(r.slab), u64::from(r.slab_page)];
                [8].into_iter().chain(runs.iter().flat_map(words)).collect()
            }
            Self::Report(r) => {
                vec![
                    9,
                    r.passes,
                    r.hashed,
                    r.merged,
                    r.zeros,
                    r.differed,
                    r.refused,
                    r.shared_now,
                    r.cpu_nanoseconds,
                ]
            }
        }
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let (first, rest) = words.split_first()?;
        let slab = u32::try_from(first >> 8).ok()?;
        Some(match (first & 0xff, rest) {
            (0, []) => Self::Hello,
            (1, [key]) => Self::Key(*key),
            (2, pages) if pages.len() <= 2 * OFFER_PAGES => {
                let (pairs, []) = pages.as_chunks::<2>() else { return None };
                Self::Offer(pairs.iter().map(|[page, hash]| (*page, *hash)).collect())
            }
            (3, []) => Self::Done,
            (4, pages) if pages.len() <= DRAFT_PAGES => Self::Publish(slab, pages.to_vec()),
            (5, hashes) if hashes.len() <= DRAFT_PAGES => Self::Published(slab, hashes.to_vec()),
            (6, []) => Self::Unpublished(slab),
            (7, [pages]) => Self::Slab(slab, *pages),
            (8, runs) if runs.len() <= 4 * MERGE_RUNS => {
                let (runs, []) = runs.as_chunks::<4>() else { return None };
                let run = |[page, pages, slab, slab_page]: &[u64; 4]| {
                    Some(Run {
                        page: *page,
                        pages: u32::try_from(*pages).ok().filter(|pages| *pages as usize <= DRAFT_PAGES)?,
                        slab: u32::try_from(*slab).ok()?,
                        slab_page: u32::try_from(*slab_page).ok()?,
                    })
                };
                Self::Merge(runs.iter().map(run).collect::<Option<_>>()?)
            }
            (9, &[passes, hashed, merged, zeros, differed, refused, shared_now, cpu_nanoseconds]) => {
                Self::Report(Report {
                    passes,
                    hashed,
                    merged,
                    zeros,
                    differed,
                    refused,
                    shared_now,
                    cpu_nanoseconds,
                })
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

    /// Sends a packet, whole.
    pub fn send(&self, message: &Message, file: Option<&impl AsFd>) -> io::Result<()> {
        let bytes: Vec<u8> = message.words().into_iter().flat_map(u64::to_le_bytes).collect();
        let sent = match file {
            Some(file) => self.socket.send_with_fd(bytes.as_slice(), file.as_fd().as_raw_fd()),
            None => self.socket.send_with_fds(&[bytes.as_slice()], &[]),
        };
        match sent {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
        }
    }

    /// The next packet. An end of file is an error, and so is a packet that is none.
    pub fn receive(&mut self) -> io::Result<(Message, Option<File>)> {
        let received = self.socket.recv_with_fd(&mut self.buffer);
        let (bytes, file) = received.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (words, rest) = self.buffer[..bytes].as_chunks::<8>();
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

/// A socket of the kind that is used here: packets in order.
pub fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::slab::Draft;

    fn pair() -> (Link, Link) {
        let flags = SocketFlags::CLOEXEC;
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Link::new(a), Link::new(b))
    }

    fn run(page: u64) -> Run {
        Run { page, pages: 3, slab: 5, slab_page: u32::MAX }
    }

    #[test]
    fn packets_arrive_as_they_were_sent() {
        let (a, mut b) = pair();
        for message in [
            Message::Hello,
            Message::Key(u64::MAX),
            Message::Offer(vec![(1, u64::MAX); OFFER_PAGES]),
            Message::Offer(Vec::new()),
            Message::Done,
            Message::Publish(u32::MAX, (0..DRAFT_PAGES as u64).collect()),
            Message::Published(7, vec![9; DRAFT_PAGES]),
            Message::Unpublished(0),
            Message::Slab(3, 1 << 40),
            Message::Merge((0..MERGE_RUNS as u64).map(run).collect()),
            Message::Report(Report { passes: 1, cpu_nanoseconds: 8, ..Report::default() }),
        ] {
            a.send(&message, None::<&File>).unwrap();
            let (received, file) = b.receive().unwrap();
            assert!(received == message && file.is_none(), "{message:?}");
        }
        drop(a);
        assert_eq!(b.receive().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
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
        fn rubbish_is_no_packet_or_a_short_one(words in prop::collection::vec(0u64..20, 0..20)) {
            if let Some(message) = Message::from_words(&words) {
                prop_assert!(message.words().len() == words.len());
            }
        }
    }
}
