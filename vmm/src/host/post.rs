//! A guest as whoever manages its memory sees it: its control socket, its process, and what the fleet file promised it.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use super::HostError;
use super::client::control_within;
use super::spec::Standing;
use crate::measure::Space;
use crate::memory::PAGE_BYTES;
use crate::vm::balloon::{BalloonSize, BalloonStatus};
use crate::vm::control::{Reply, Request, Status};
use crate::vm::working_set::WorkingSet;

/// How many VMs are asked at once.
const AT_ONCE: usize = 32;
/// How long a VM process may take to answer. Many wait for the slowest.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A guest's post. Cheap to copy, and for any thread: its fleet need not stand still meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Post {
    /// Its name.
    pub guest: String,
    /// Its process.
    pub pid: u32,
    /// Its control socket.
    pub socket: PathBuf,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// How it stands against the others.
    pub standing: Standing,
}

/// Asks many VMs at once: one that is busy does not keep the others waiting. The results are in the order of `posts`.
pub fn each<T: Send>(posts: &[Post], work: impl Fn(usize, &Post) -> T + Sync) -> Vec<T> {
    let mut all = Vec::with_capacity(posts.len());
    for (n, some) in posts.chunks(AT_ONCE).enumerate() {
        let work = &work;
        thread::scope(|scope| {
            let begin = n * AT_ONCE;
            let threads: Vec<_> =
                some.iter().enumerate().map(|(m, post)| scope.spawn(move || work(begin + m, post))).collect();
            // A thread that panicked has said so; its guest is as one that does not answer.
            all.extend(threads.into_iter().filter_map(|thread| thread.join().ok()));
        });
    }
    all
}

/// What a guest's VM says of itself.
#[derive(Clone, Debug)]
pub struct Said {
    /// Of the VM.
    pub status: Status,
    /// Of its balloon; None without one.
    pub balloon: Option<BalloonStatus>,
}

impl Post {
    /// Asks the VM process.
    pub fn control(&self, request: &Request) -> Result<Reply, HostError> {
        control_within(&self.guest, &self.socket, Some(self.pid), request, ANSWER_LIMIT)
    }

    /// Has the VM process do something.
    pub fn command(&self, request: &Request) -> Result<(), HostError> {
        self.control(request).map(drop)
    }

    /// What the VM says of itself.
    pub fn status(&self) -> Result<Status, HostError> {
        match self.control(&Request::Status)? {
            Reply::Status(status) => Ok(status),
            other => Err(self.nonsense(&other)),
        }
    }

    /// The sizes of its balloon; None where it has none, or the VM does not answer.
    pub fn balloon_size(&self) -> Option<BalloonSize> {
        match self.control(&Request::BalloonSize) {
            Ok(Reply::BalloonSize(size)) => Some(size),
            _ => None,
        }
    }

    /// How much of its memory the guest uses; None where no sample is taken, or none has been yet.
    pub fn working_set(&self) -> Option<WorkingSet> {
        match self.control(&Request::WorkingSet) {
            Ok(Reply::WorkingSet(known)) if known.periods > 0 => Some(known),
            _ => None,
        }
    }

    /// What it says of itself.
    pub fn ask(&self) -> Result<Said, HostError> {
        let status = self.status()?;
        let balloon = match self.control(&Request::Balloon) {
            Ok(Reply::Balloon(balloon)) => Some(*balloon),
            _ => None,
        };
        Ok(Said { status, balloon })
    }

    /// RAM in pages.
    pub fn promised_pages(&self) -> u64 {
        self.memory_bytes / PAGE_BYTES
    }

    fn nonsense(&self, reply: &Reply) -> HostError {
        HostError::Control { guest: self.guest.clone(), answer: format!("something else: {reply:?}") }
    }
}

impl Said {
    /// What the guest could do without, by its own word.
    pub fn spare_pages(&self) -> Option<u64> {
        Some(self.balloon.as_ref()?.spare_bytes()? / PAGE_BYTES)
    }

    /// Where the guest's memory lies, for measuring.
    pub fn space(&self) -> Space {
        Space { name: self.status.name.clone(), pid: self.status.pid, extents: self.status.extents.clone() }
    }
}
