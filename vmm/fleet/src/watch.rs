//! How the progress of a fleet's work is reported, and whether it is to go on.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::HostError;

/// What a fleet is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Guests start.
    Ready,
    /// Guests fill their memory.
    Fill,
    /// Every page is hashed and compared.
    Content,
    /// The engine merges.
    Merge,
    /// Guests check their pages.
    Verify,
    /// A guest that is waited for is suspended, or paused by others.
    Wait,
    /// The host checks them.
    Check,
    /// What was saved of them is read.
    Restore,
}

type Teller = dyn Fn(Stage, usize, u64, u64) + Send + Sync;

/// Where progress goes, and whether the user wants an end.
pub struct Watch {
    tell: Box<Teller>,
    interrupted: Arc<AtomicBool>,
    client: Option<UnixStream>,
}

impl Watch {
    /// `tell` gets (stage, guest number, done, total); `interrupted` ends everything once it is true.
    pub fn new(
        tell: impl Fn(Stage, usize, u64, u64) + Send + Sync + 'static,
        interrupted: Arc<AtomicBool>,
    ) -> Self {
        Self { tell: Box::new(tell), interrupted, client: None }
    }

    /// The same, for a client: what is done for it ends when it has disconnected.
    pub fn for_client(self, client: Option<UnixStream>) -> Self {
        Self { client, ..self }
    }

    /// Progress goes nowhere.
    pub fn none() -> Self {
        Self::new(|_, _, _, _| {}, Arc::default())
    }

    /// Tells how far guest number `guest` is in `stage`.
    pub fn tell(&self, stage: Stage, guest: usize, done: u64, total: u64) {
        (self.tell)(stage, guest, done, total);
    }

    /// An error once the user wants an end.
    pub fn check(&self) -> Result<(), HostError> {
        match self.interrupted.load(Ordering::Relaxed) || self.client.as_ref().is_some_and(has_hung_up) {
            true => Err(HostError::Interrupted),
            false => Ok(()),
        }
    }
}

/// Whether a client takes no answer any more. One that has only closed its sending side does.
fn has_hung_up(client: &UnixStream) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}
