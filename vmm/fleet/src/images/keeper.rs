//! Keeps what a VM gives of itself while it is captured: makes the slabs, which are charged here, and holds on to what comes back sealed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, accept_with};

use super::disk::ImageDisk;
use super::slab::ImageSlab;
use crate::HostError;
use crate::client::control_within;
use crate::runtime::FleetDir;
use crate::vm_handle::VmHandle;
use machine::Drive;
use machine::capture::Captured;
use machine::capture::link::{Answer, Ask, Link, socket};
use machine::control::{Reply, Request};
use memory::PAGE_BYTES;
use memory::image::{SLAB_PAGES, most_pages};
use memory::slab::{Draft, Slab};
use merge::slab::Pins;
use os::{Peer, SocketFile};

/// How long a VM may take to be captured.
const CAPTURE_LIMIT: Duration = Duration::from_secs(120);
/// How long it may take from one question to the next: it reads zeros meanwhile, or what is on swap.
const ASK_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked whether it has answered without asking.
const POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// What was kept.
pub struct Kept {
    /// The state, in a sealed memfd.
    pub state: OwnedFd,
    /// The slabs, by number.
    pub slabs: Vec<ImageSlab>,
    /// What the guest had written to drives with overlays.
    pub disks: Vec<ImageDisk>,
    /// What the VM says of it.
    pub captured: Captured,
}

/// Has the VM at `handle` captured, which has `drives`. `known` finds slabs that its memory may have pages of, by the number of their file and how many pages;
/// `pins` are told of each that is kept, before the VM's agent may speak of it. If it fails nothing is kept, and the VM runs on.
pub fn keep(
    handle: &VmHandle,
    drives: &[Drive],
    dir: &FleetDir,
    known: &dyn Fn(u64, u64) -> Option<ImageSlab>,
    pins: &Pins,
) -> Result<Kept, HostError> {
    let failed = |source| HostError::Keeper { guest: handle.guest.clone(), source };
    let path = dir.capture_socket(&handle.guest)?;
    let listener = socket().map_err(failed)?;
    let file = SocketFile::listen(&listener, &path).map_err(|error| failed(io::Error::other(error)))?;
    let request = Request::Capture { socket: path };
    thread::scope(|scope| {
        let asked = scope.spawn(|| {
            control_within(&handle.guest, &handle.socket, Some(handle.pid), &request, CAPTURE_LIMIT)
        });
        let mut keeper = None;
        while !asked.is_finished() && keeper.is_none() {
            if poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&POLL)).is_ok_and(|n| n > 0) {
                keeper = accept(&listener, handle.pid).map_err(failed)?;
            }
        }
        drop(file);
        let mut kept = Keeper::new(handle.memory_bytes, drives, known, pins);
        let served = keeper.map_or(Ok(()), |link| kept.serve(&link));
        // Its word first: it says why it did not go on.
        let captured = match asked.join() {
            Ok(Ok(Reply::Captured(captured))) => captured,
            Ok(Ok(other)) => {
                return Err(HostError::unexpected_of_vm(&handle.guest, &other));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(HostError::Interrupted),
        };
        served.map_err(failed)?;
        let state = kept.state.ok_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))?;
        Ok(Kept { state, slabs: kept.slabs, disks: kept.disks, captured })
    })
}

/// The client, if it is the VM's process.
fn accept(listener: impl AsFd, pid: u32) -> io::Result<Option<Link>> {
    let socket = accept_with(&listener, SocketFlags::CLOEXEC)?;
    match Peer::of(&socket)?.pid == pid {
        true => Link::new(socket, ASK_LIMIT).map(Some),
        false => Ok(None),
    }
}

struct Keeper<'a> {
    known: &'a dyn Fn(u64, u64) -> Option<ImageSlab>,
    pins: &'a Pins,
    /// The draft that was handed out last.
    draft: Option<File>,
    slabs: Vec<ImageSlab>,
    drives: &'a [Drive],
    disks: Vec<ImageDisk>,
    /// For the disk that comes next.
    map: Option<File>,
    state: Option<OwnedFd>,
    /// Pages that may yet be asked for.
    left: u64,
    /// And once it has begun again; None if it has.
    again: Option<u64>,
}

impl<'a> Keeper<'a> {
    fn new(
        memory_bytes: u64,
        drives: &'a [Drive],
        known: &'a dyn Fn(u64, u64) -> Option<ImageSlab>,
        pins: &'a Pins,
    ) -> Self {
        let most = most_pages(memory_bytes / PAGE_BYTES);
        Self {
            known,
            pins,
            draft: None,
            slabs: Vec::new(),
            drives,
            disks: Vec::new(),
            map: None,
            state: None,
            left: most,
            again: Some(most),
        }
    }

    fn serve(&mut self, link: &Link) -> io::Result<()> {
        while self.state.is_none() {
            let (question, file) = link.receive::<Ask>()?;
            match self.answer(question, file) {
                Ok((answer, Some(file))) => link.send(&answer, Some(file.as_fd()))?,
                Ok((answer, None)) => link.send(&answer, None)?,
                Err(error) => {
                    link.send(&Answer::Refused(error.to_string()), None)?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, question: Ask, file: Option<File>) -> io::Result<(Answer, Option<File>)> {
        match question {
            Ask::Draft(pages) if (1..=SLAB_PAGES).contains(&pages) => {
                let draft = Draft::new(pages).map_err(io::Error::other)?.into_file();
                self.draft = Some(draft.try_clone()?);
                Ok((Answer::Draft, Some(draft)))
            }
            Ask::Filled(pages) => {
                let draft = self.draft.take().ok_or(io::ErrorKind::InvalidData)?;
                self.left = self
                    .left
                    .checked_sub(pages)
                    .ok_or_else(|| io::Error::other("it has given more pages than it has memory"))?;
                // What it says of a slab that is not sealed is worth nothing.
                let slab = Slab::receive(draft.try_clone()?.into(), pages).map_err(io::Error::other)?;
                Ok((Answer::Number(self.add(ImageSlab::new(draft.into(), pages, slab.inode()))?), None))
            }
            Ask::Known { inode, used } => Ok((
                Answer::Known(match (self.known)(inode, used) {
                    Some(slab) => {
                        let pages = slab.pages;
                        Some((self.add(slab)?, pages))
                    }
                    None => None,
                }),
                None,
            )),
            Ask::Restart => {
                self.left = self.again.take().ok_or(io::ErrorKind::InvalidData)?;
                (self.draft, self.slabs) = (None, Vec::new());
                Ok((Answer::Restarted, None))
            }
            Ask::Map => {
                self.map = Some(file.ok_or(io::ErrorKind::InvalidData)?);
                Ok((Answer::Kept, None))
            }
            Ask::Disk { drive, start, bytes } => {
                let top = file.ok_or(io::ErrorKind::InvalidData)?;
                let described = usize::try_from(drive).ok().and_then(|at| self.drives.get(at));
                let is_new = self.disks.iter().all(|disk| disk.drive != drive);
                let described = described.filter(|_| is_new).ok_or(io::ErrorKind::InvalidData)?;
                let map = self.map.take();
                self.disks.push(ImageDisk::take((drive, described), &top, (start, bytes), map)?);
                Ok((Answer::Kept, None))
            }
            Ask::State => {
                let file = file.ok_or(io::ErrorKind::InvalidData)?;
                self.state = Some(file.into());
                Ok((Answer::Kept, None))
            }
            Ask::Draft(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The number of a slab, which may be there already.
    fn add(&mut self, slab: ImageSlab) -> io::Result<u32> {
        self.pins.add(slab.inode);
        let at = self.slabs.iter().position(|other| other.inode == slab.inode).unwrap_or_else(|| {
            self.slabs.push(slab);
            self.slabs.len() - 1
        });
        u32::try_from(at).map_err(io::Error::other)
    }
}
