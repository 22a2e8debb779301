//! Ends guests in good order: all are asked at once to power off, those that have not when their time is up are cut off,
//! and which these were is told.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::HostError;
use super::balloon::Target;
use super::client;
use super::governor::lock;
use super::guest::{self, Guest};
use machine::control::{Reply, Request};
use os::Peer;

/// How long guests may take to power off unless told otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(30);
/// How much later than we a VM stops itself, should this process not live as long.
const GRACE: Duration = Duration::from_secs(10);
/// How long a VM may take to answer, and how often it is seen whether it has ended.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(100);

/// Asks a guest's VM to have it power off within `limit`: by its power button, and by a line that Samepage's guests obey.
pub fn request(limit: Duration) -> Request {
    let timeout_seconds = u32::try_from(limit.as_secs().max(1)).unwrap_or(u32::MAX);
    Request::ShutDown { timeout_seconds, com2: Some("poweroff".into()) }
}

/// Has one VM's guest power off. False if it had to be cut off: after `limit`, or when `watch`, which sees how long it has still,
/// says false. When it returns the VM's process has ended.
pub fn power_off(
    target: &Target,
    limit: Duration,
    watch: &mut dyn FnMut(Duration) -> bool,
) -> Result<bool, HostError> {
    let failed = |source| HostError::socket(format!("the VM of guest {}", target.guest), source);
    let stream = client::connect(target.socket(), ANSWER_LIMIT).map_err(failed)?;
    let vm = Peer::process(&stream).map_err(failed)?;
    let shutdown = Shutdown::within(limit);
    let answer = client::ask(stream, &request(shutdown.vm_limit()), ANSWER_LIMIT).map_err(failed)?;
    if let Reply::Error(answer) = answer {
        return Err(HostError::Control { guest: target.guest.clone(), answer });
    }
    while !vm.ends_within(LOOK) {
        let left = shutdown.time_left();
        if left.is_zero() || !watch(left) {
            guest::end(&vm, || client::control(&target.guest, target.socket(), &Request::Stop).is_ok());
            return Ok(false);
        }
    }
    Ok(true)
}

/// Presses a VM's power button. False if its guest has no driver for it.
pub fn press_power_button(target: &Target) -> Result<bool, HostError> {
    match client::control(&target.guest, target.socket(), &Request::PowerButton)? {
        Reply::PowerButton(pressed) => Ok(pressed.driver),
        other => Err(HostError::Control { guest: target.guest.clone(), answer: format!("{other:?}") }),
    }
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
    /// One that has begun, with so long for every guest.
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

    /// Begins, or shortens what has begun: so long from now on and no longer.
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

    /// How long a VM may take by its own clock.
    pub fn vm_limit(&self) -> Duration {
        self.time_left() + GRACE
    }

    /// Ends `guests` so.
    pub fn end_all(&self, guests: &mut [Guest]) {
        let living = guests.iter_mut().filter_map(|guest| guest.ended().is_none().then_some(guest));
        let living: Vec<_> = living.collect();
        lock(&self.0).left.extend(living.iter().map(|guest| guest.spec.name.clone()));
        thread::scope(|scope| {
            for guest in living {
                scope.spawn(|| self.end(guest));
            }
        });
        // What had ended before has left its files.
        guests.iter_mut().for_each(Guest::stop);
    }

    fn end(&self, guest: &mut Guest) {
        let ended = guest.shut_down(self);
        let mut state = lock(&self.0);
        state.left.remove(&guest.spec.name);
        let limit = state.limit.as_secs();
        let why = match ended {
            Ended::Orderly => return,
            // That was asked for.
            Ended::CutOff if limit == 0 => return,
            Ended::CutOff => format!("it did not power off within {limit} s"),
            Ended::Otherwise(how) => how,
        };
        state.cut_off.push(CutOff { guest: guest.spec.name.clone(), why });
        state.cut_off.sort_by(|a, b| a.guest.cmp(&b.guest));
    }
}

/// How a guest ended that was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It powered off, or had nothing to lose.
    Orderly,
    /// Its time was up.
    CutOff,
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
}
