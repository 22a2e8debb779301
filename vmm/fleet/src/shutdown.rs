//! Ends guests in good order: all are asked at once to power off, those that have not when their
//! time is up are cut off, and which these were is told.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use machine::control::Request;
use os::lock;

/// How long guests may take to power off, by default.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(30);
/// How much later than we a VM stops itself, should this process not live as long.
const GRACE: Duration = Duration::from_secs(10);
/// How long a VM may take to answer, and how often it is seen whether it has ended.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(20);
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// Asks a guest's VM to have it power off within `limit`: by its power button, and by a line that
/// Samepage's guests obey.
pub fn request(limit: Duration) -> Request {
    let timeout_seconds = u32::try_from(limit.as_secs().max(1)).unwrap_or(u32::MAX);
    Request::ShutDown { timeout_seconds, com2: Some("poweroff".into()) }
}

/// A guest that did not end in good order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutOff {
    /// Its name.
    pub guest: String,
    /// What it did instead.
    pub why: String,
}

/// How far a clean end has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Guests that have not ended.
    pub guests: BTreeSet<String>,
    /// How long they have still.
    pub seconds: u64,
}

/// The clean end of many guests, for those too that watch it, or want it shorter.
#[derive(Debug, Default)]
pub struct Shutdown(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// When time is up; None before it has begun.
    until: Option<Instant>,
    limit: Duration,
    left: BTreeSet<String>,
    cut_off: Vec<CutOff>,
}

impl Shutdown {
    /// One that has begun, with this time for every guest.
    pub fn within(limit: Duration) -> Self {
        let shutdown = Self::default();
        shutdown.allow(limit);
        shutdown
    }

    /// Begins, if it has not.
    pub fn begin(&self, limit: Duration) {
        if lock(&self.0).until.is_none() {
            self.allow(limit);
        }
    }

    /// Begins, or shortens what has begun: this time from now on and no longer.
    pub fn allow(&self, limit: Duration) {
        let mut state = lock(&self.0);
        let until = Instant::now() + limit;
        if state.until.is_none_or(|earlier| until < earlier) {
            (state.until, state.limit) = (Some(until), limit);
        }
    }

    /// How far it has come.
    pub fn left(&self) -> Left {
        let seconds = self.time_left().as_secs();
        Left { guests: lock(&self.0).left.clone(), seconds }
    }

    /// The guests that did not end in good order.
    pub fn cut_off(&self) -> Vec<CutOff> {
        lock(&self.0).cut_off.clone()
    }

    /// How long those that are left have still.
    pub fn time_left(&self) -> Duration {
        let until = lock(&self.0).until;
        until.map_or(DEFAULT_LIMIT, |until| until.saturating_duration_since(Instant::now()))
    }

    /// These have not ended.
    pub(super) fn awaits(&self, guests: impl IntoIterator<Item = String>) {
        lock(&self.0).left.extend(guests);
    }

    /// This guest ended so.
    pub(super) fn has_ended(&self, guest: &str, ended: Ended) {
        let mut state = lock(&self.0);
        state.left.remove(guest);
        let limit = state.limit.as_secs();
        let why = match ended {
            Ended::Orderly => return,
            // That was asked for.
            Ended::CutOff | Ended::Unasked(_) if limit == 0 => return,
            Ended::Unasked(why) => format!("it could not be asked to power off: {why}"),
            Ended::CutOff => format!("it did not power off within {limit} s"),
            Ended::Otherwise(how) => how,
        };
        state.cut_off.push(CutOff { guest: guest.into(), why });
        state.cut_off.sort_by(|a, b| a.guest.cmp(&b.guest));
    }

    /// How long a VM may take by its own clock.
    pub fn vm_limit(&self) -> Duration {
        self.time_left() + GRACE
    }
}

/// How a guest ended that was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It powered off, or had nothing to lose.
    Orderly,
    /// Its time was up.
    CutOff,
    /// It was not asked, for this reason, and was ended.
    Unasked(String),
    /// As this says.
    Otherwise(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_begun_is_shortened_and_never_made_longer() {
        let shutdown = Shutdown::default();
        shutdown.allow(Duration::from_secs(100));
        shutdown.begin(Duration::from_secs(5));
        assert!(shutdown.time_left() > Duration::from_secs(50), "begun already");
        assert!(shutdown.left().seconds > 50 && shutdown.left().guests.is_empty());
        shutdown.allow(Duration::from_secs(1000));
        assert!(shutdown.time_left() <= Duration::from_secs(100));
        shutdown.allow(Duration::ZERO);
        assert_eq!((shutdown.time_left(), shutdown.vm_limit()), (Duration::ZERO, GRACE));
    }

    #[test]
    fn why_a_guest_did_not_power_off_is_told_unless_it_was_not_to() {
        let unasked = || Ended::Unasked("its VM does not answer".into());
        let shutdown = Shutdown::within(Duration::from_secs(7));
        shutdown.has_ended("a", Ended::Orderly);
        shutdown.has_ended("b", Ended::CutOff);
        shutdown.has_ended("c", unasked());
        let cut: Vec<_> = shutdown.cut_off().into_iter().map(|cut| (cut.guest, cut.why)).collect();
        let expected = [
            ("b", "it did not power off within 7 s"),
            ("c", "it could not be asked to power off: its VM does not answer"),
        ];
        assert_eq!(cut, expected.map(|(guest, why)| (guest.to_owned(), why.to_owned())));
        let at_once = Shutdown::within(Duration::ZERO);
        at_once.has_ended("b", Ended::CutOff);
        at_once.has_ended("c", unasked());
        assert_eq!(at_once.cut_off(), []);
    }
}
