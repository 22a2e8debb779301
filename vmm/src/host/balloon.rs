//! Setting a guest's balloon from outside and waiting for it: what was reached, and why it stopped there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::HostError;
use super::client::control;
use super::runtime::{FleetDir, choose};
use crate::memory::PAGE_BYTES;
use crate::vm::balloon::BalloonStatus;
use crate::vm::control::{Reply, Request};

/// A balloon that has not moved for this long will not: Linux's driver tries again every 200 ms.
const STALL: Duration = Duration::from_secs(5);
/// How long a guest that is starting may take to bring its driver up.
const NO_DRIVER: Duration = Duration::from_secs(3);
/// A guest that has less than this beyond what is still asked of it keeps it for itself: kernels hold reserves.
const RESERVE_BYTES: u64 = 16 << 20;

/// A VM with a control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name, for people.
    pub guest: String,
    socket: PathBuf,
}

/// Where a balloon stopped, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// It has the size that was asked for.
    Reached,
    /// No driver runs it.
    NoDriver,
    /// The VM is paused.
    Paused,
    /// The guest has no more memory to give.
    OutOfMemory,
    /// The guest has memory, as far as it says, and does not give it.
    Refused,
    /// It was still moving.
    TimedOut,
}

impl Stop {
    /// For people.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::NoDriver => {
                "no driver: the guest has not started its balloon driver (in Linux, the module virtio_balloon)"
            }
            Self::Paused => "the VM is paused",
            Self::OutOfMemory => "the guest has no more memory to spare",
            Self::Refused => "the guest does not follow, though it says that it has memory to spare",
            Self::TimedOut => "out of time, and still moving: ask again, or give it longer with --timeout",
        }
    }
}

impl Target {
    /// The guest called `guest` of a fleet; or, with a `/` in it, the VM whose control socket that is.
    pub fn find(guest: &str, fleet: Option<String>) -> Result<Self, HostError> {
        let path = Path::new(guest);
        if guest.contains('/') {
            return Ok(Self { guest: guest.into(), socket: path.into() });
        }
        let fleet = choose(fleet)?;
        let dir = FleetDir::of(&fleet);
        let socket = dir.control(guest)?;
        let sockets = dir.control_sockets();
        if sockets.contains(&socket) {
            return Ok(Self { guest: guest.into(), socket });
        }
        let mut known: Vec<_> =
            sockets.iter().filter_map(|s| Some(s.file_stem()?.to_string_lossy().into_owned())).collect();
        known.sort();
        Err(HostError::NoGuest { guest: guest.into(), fleet, known: known.join(", ") })
    }

    /// Its balloon as it is now.
    pub fn status(&self) -> Result<BalloonStatus, HostError> {
        match control(&self.guest, &self.socket, &Request::Balloon)? {
            Reply::Balloon(status) => Ok(*status),
            other => Err(self.nonsense(&other)),
        }
    }

    /// Asks for another size, in pages.
    pub fn set(&self, pages: u32) -> Result<(), HostError> {
        control(&self.guest, &self.socket, &Request::BalloonTarget { pages }).map(|_| ())
    }

    /// Is the VM paused?
    pub fn is_paused(&self) -> Result<bool, HostError> {
        match control(&self.guest, &self.socket, &Request::Status)? {
            Reply::Status(status) => Ok(status.paused),
            other => Err(self.nonsense(&other)),
        }
    }

    fn nonsense(&self, reply: &Reply) -> HostError {
        HostError::Control { guest: self.guest.clone(), answer: format!("something else: {reply:?}") }
    }
}

/// Decides, from one look at a balloon after another, when it has stopped and why.
#[derive(Clone, Copy, Debug)]
pub struct Judge {
    limit: Duration,
    actual_pages: Option<u32>,
    moved: Duration,
}

impl Judge {
    /// A judge that gives a balloon `limit` in all.
    pub fn new(limit: Duration) -> Self {
        Self { limit, actual_pages: None, moved: Duration::ZERO }
    }

    /// Looks at the balloon, `now` after the beginning. None while it may still move.
    pub fn look(&mut self, now: Duration, status: &BalloonStatus, paused: bool) -> Option<Stop> {
        if self.actual_pages != Some(status.actual_pages) {
            (self.actual_pages, self.moved) = (Some(status.actual_pages), now);
        }
        let still = now.saturating_sub(self.moved);
        if status.driver && status.actual_pages == status.target_pages {
            Some(Stop::Reached)
        } else if paused {
            Some(Stop::Paused)
        } else if !status.driver && still >= NO_DRIVER {
            Some(Stop::NoDriver)
        } else if status.driver && still >= STALL {
            Some(if out_of_memory(status) { Stop::OutOfMemory } else { Stop::Refused })
        } else if now >= self.limit {
            Some(Stop::TimedOut)
        } else {
            None
        }
    }
}

/// Whether, by its own word, the guest cannot spare what is still asked of it.
fn out_of_memory(status: &BalloonStatus) -> bool {
    let asked = u64::from(status.target_pages.saturating_sub(status.actual_pages)) * PAGE_BYTES;
    let spare = ["available_memory", "free_memory"].iter().find_map(|name| status.guest.get(*name));
    asked > 0 && spare.is_some_and(|spare| *spare < asked.saturating_add(RESERVE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(driver: bool, target: u32, actual: u32, available: Option<u64>) -> BalloonStatus {
        let guest = available.map(|bytes| ("available_memory".to_owned(), bytes));
        BalloonStatus {
            driver,
            target_pages: target,
            actual_pages: actual,
            guest: guest.into_iter().collect(),
            ..BalloonStatus::default()
        }
    }

    /// Looks once a second at a balloon that stays as it is.
    fn stuck(status: &BalloonStatus, paused: bool) -> (u64, Stop) {
        let mut judge = Judge::new(Duration::from_secs(60));
        let look = |s| judge.look(Duration::from_secs(s), status, paused).map(|stop| (s, stop));
        (0..100).find_map(look).unwrap()
    }

    #[test]
    fn each_end_has_its_reason() {
        assert_eq!(stuck(&status(true, 5, 5, None), false), (0, Stop::Reached));
        assert_eq!(stuck(&status(true, 5, 4, None), true), (0, Stop::Paused));
        assert_eq!(stuck(&status(false, 5, 0, None), false), (3, Stop::NoDriver));
        assert_eq!(stuck(&status(true, 5, 4, Some(1 << 20)), false), (5, Stop::OutOfMemory));
        assert_eq!(stuck(&status(true, 5, 4, Some(1 << 30)), false), (5, Stop::Refused));
        assert_eq!(stuck(&status(true, 5, 4, None), false), (5, Stop::Refused));
        // Nothing is asked of a guest that should take pages back.
        assert_eq!(stuck(&status(true, 4, 5, Some(0)), false), (5, Stop::Refused));
    }

    #[test]
    fn a_balloon_that_moves_has_all_the_time_it_was_given() {
        let mut judge = Judge::new(Duration::from_secs(60));
        for second in 0..60 {
            let moving = status(true, 1000, second, None);
            assert_eq!(judge.look(Duration::from_secs(second.into()), &moving, false), None);
        }
        assert_eq!(
            judge.look(Duration::from_secs(60), &status(true, 1000, 60, None), false),
            Some(Stop::TimedOut)
        );
    }
}
