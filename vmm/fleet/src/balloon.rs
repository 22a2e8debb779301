//! Setting a guest's balloon from outside and waiting for it: what was reached, and why it stopped
//! there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::HostError;
use super::client::control;
use super::daemon_client::{request, unexpected};
use super::status::{Reply as Answer, Request as Question};
use super::target::Target;
use machine::balloon::{BalloonSize, BalloonStatus};
use machine::control::{ErrorKind, Reply, Request};
use memory::PAGE_BYTES;

/// How often fresh statistics are looked for.
const POLL: Duration = Duration::from_millis(20);
/// A balloon that has not moved for this long will not: Linux's driver tries again every 200 ms.
const STALL: Duration = Duration::from_secs(5);
/// How long a guest that is starting may take to bring its driver up.
const NO_DRIVER: Duration = Duration::from_secs(3);
/// How long a daemon may take to say whether it has a policy.
const POLICY_LIMIT: Duration = Duration::from_secs(5);
/// A guest that has less than this beyond what is still asked of it keeps it for itself: kernels
/// hold reserves.
const RESERVE_BYTES: u64 = 16 << 20;

/// Where a balloon stopped, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// It has the size that was asked for.
    Reached,
    /// Another size was asked of it meanwhile.
    Overruled,
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
            Self::Overruled => "another size was asked of the guest meanwhile",
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
    /// Whether its fleet has a policy that sets balloons, too. What the policy sets holds: it is
    /// asked for again.
    ///
    /// # Errors
    /// Its daemon is there and does not say.
    pub fn has_policy(&self) -> Result<bool, HostError> {
        let Some(fleet) = &self.fleet else { return Ok(false) };
        match request(fleet, &Question::Management, POLICY_LIMIT) {
            Ok(Answer::Management(now)) => Ok(now.acting),
            Ok(other) => Err(unexpected(&other)),
            // Where no daemon is, no policy acts.
            Err(HostError::NoDaemon { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Its balloon as it is now.
    pub fn status(&self) -> Result<BalloonStatus, HostError> {
        match control(&self.guest, &self.socket, &Request::Balloon)? {
            Reply::Balloon(status) => Ok(*status),
            other => Err(HostError::unexpected_of_vm(&self.guest, &other)),
        }
    }

    /// Its sizes alone.
    pub fn size(&self) -> Result<BalloonSize, HostError> {
        match control(&self.guest, &self.socket, &Request::BalloonSize)? {
            Reply::BalloonSize(size) => Ok(size),
            other => Err(HostError::unexpected_of_vm(&self.guest, &other)),
        }
    }

    /// Its balloon with statistics from after now, if the guest gives some within `limit`; else
    /// with those at hand.
    pub fn fresh(&self, limit: Duration, interrupted: &AtomicBool) -> Result<BalloonStatus, HostError> {
        let first = self.status()?;
        match control(&self.guest, &self.socket, &Request::BalloonStatistics) {
            Ok(_) => {}
            Err(error) if error.is_refusal(ErrorKind::NoStatistics) => return Ok(first),
            Err(error) => return Err(error),
        }
        let until = Instant::now() + limit;
        loop {
            thread::sleep(POLL);
            let status = self.status()?;
            let over = Instant::now() > until || interrupted.load(Ordering::Relaxed);
            if status.updates != first.updates || over {
                return Ok(status);
            }
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
            other => Err(HostError::unexpected_of_vm(&self.guest, &other)),
        }
    }
}

/// Decides, from one look at a balloon after another, when it has stopped.
#[derive(Clone, Copy, Debug)]
pub struct Judge {
    asked_pages: u32,
    limit: Duration,
    actual_pages: Option<u32>,
    moved: Duration,
}

impl Judge {
    /// A judge that gives a balloon `limit` in all to have the size that was asked for.
    pub fn new(asked_pages: u32, limit: Duration) -> Self {
        Self { asked_pages, limit, actual_pages: None, moved: Duration::ZERO }
    }

    /// Looks at the balloon, `now` after the beginning. None while it may still move. A guest that
    /// does not follow is [`Stop::Refused`], until [`why`] knows better.
    pub fn look(&mut self, now: Duration, size: BalloonSize, paused: bool) -> Option<Stop> {
        if self.actual_pages != Some(size.actual_pages) {
            (self.actual_pages, self.moved) = (Some(size.actual_pages), now);
        }
        let still = now.saturating_sub(self.moved);
        if size.target_pages != self.asked_pages {
            Some(Stop::Overruled)
        } else if size.driver && size.actual_pages == self.asked_pages {
            Some(Stop::Reached)
        } else if paused {
            Some(Stop::Paused)
        } else if !size.driver && still >= NO_DRIVER {
            Some(Stop::NoDriver)
        } else if size.driver && still >= STALL {
            Some(Stop::Refused)
        } else if now >= self.limit {
            Some(Stop::TimedOut)
        } else {
            None
        }
    }
}

/// A better reason than `stop`, if the guest's statistics give one: by its own word, it may not be
/// able to spare what is still asked of it.
pub fn why(stop: Stop, status: &BalloonStatus) -> Stop {
    let asked = u64::from(status.size.target_pages.saturating_sub(status.size.actual_pages)) * PAGE_BYTES;
    let short =
        asked > 0 && status.spare_bytes().is_some_and(|spare| spare < asked.saturating_add(RESERVE_BYTES));
    if stop == Stop::Refused && short { Stop::OutOfMemory } else { stop }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_vm::vm;

    fn size(driver: bool, target_pages: u32, actual_pages: u32) -> BalloonSize {
        BalloonSize { driver, target_pages, actual_pages }
    }

    #[test]
    fn statistics_that_cannot_be_had_now_are_done_without_and_other_errors_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = |guest: &str, answer: &'static str| {
            let balloon = serde_json::json!({"balloon": BalloonStatus::default()}).to_string();
            let answers = move |op: &str| if op == "balloon" { balloon.clone() } else { answer.to_owned() };
            let target = Target::of(&vm(dir.path(), guest, answers));
            target.fresh(Duration::from_secs(60), &AtomicBool::new(true))
        };
        for answer in
            [r#"{"error":"no driver","kind":"no-statistics"}"#, r#"{"error":"no driver"}"#, "\"done\""]
        {
            assert_eq!(fresh(&format!("{}", answer.len()), answer).unwrap(), BalloonStatus::default());
        }
        let error = fresh("b", r#"{"error":"it is on fire","kind":"on-fire"}"#).unwrap_err().to_string();
        assert_eq!(error, "the VM of guest b refused: it is on fire");
    }

    /// Looks once a second at a balloon that stays as it is.
    fn stuck(size: BalloonSize, paused: bool) -> (u64, Stop) {
        let mut judge = Judge::new(size.target_pages, Duration::from_secs(60));
        let look = |s| judge.look(Duration::from_secs(s), size, paused).map(|stop| (s, stop));
        (0..100).find_map(look).unwrap()
    }

    #[test]
    fn each_end_has_its_time() {
        assert_eq!(stuck(size(true, 5, 5), false), (0, Stop::Reached));
        assert_eq!(stuck(size(true, 5, 4), true), (0, Stop::Paused));
        assert_eq!(stuck(size(false, 5, 0), false), (3, Stop::NoDriver));
        assert_eq!(stuck(size(true, 5, 4), false), (5, Stop::Refused));
        assert_eq!(stuck(size(true, 4, 5), false), (5, Stop::Refused));
    }

    #[test]
    fn only_what_was_asked_for_is_reached() {
        let look = |target, actual| {
            Judge::new(64, Duration::from_secs(60)).look(Duration::ZERO, size(true, target, actual), false)
        };
        assert_eq!(look(64, 64), Some(Stop::Reached));
        assert_eq!(look(64, 10), None);
        assert_eq!(look(0, 0), Some(Stop::Overruled), "another's size is reached");
        assert_eq!(look(23, 10), Some(Stop::Overruled));
    }

    #[test]
    fn a_guest_that_does_not_follow_may_have_nothing_to_spare() {
        let status = |target, actual, available: Option<u64>| BalloonStatus {
            size: size(true, target, actual),
            guest: available.into_iter().map(|bytes| ("available_memory".to_owned(), bytes)).collect(),
            ..BalloonStatus::default()
        };
        assert_eq!(why(Stop::Refused, &status(5, 4, Some(1 << 20))), Stop::OutOfMemory);
        assert_eq!(why(Stop::Refused, &status(5, 4, Some(1 << 30))), Stop::Refused);
        assert_eq!(why(Stop::Refused, &status(5, 4, None)), Stop::Refused);
        // Nothing is asked of a guest that should take pages back.
        assert_eq!(why(Stop::Refused, &status(4, 5, Some(0))), Stop::Refused);
        assert_eq!(why(Stop::NoDriver, &status(5, 4, Some(0))), Stop::NoDriver);
    }

    #[test]
    fn a_balloon_that_moves_has_all_the_time_it_was_given() {
        let mut judge = Judge::new(1000, Duration::from_secs(60));
        for second in 0..60 {
            assert_eq!(judge.look(Duration::from_secs(second.into()), size(true, 1000, second), false), None);
        }
        assert_eq!(judge.look(Duration::from_secs(60), size(true, 1000, 60), false), Some(Stop::TimedOut));
    }
}
