//! Asks each VM apart: every one has a thread of its own and at most one request on its way, so
//! that one that does not answer (it is stopped, or waits for a slow drive) keeps no other waiting,
//! and is known as silent since when.
//!
//! A request that was sent is not given up while the VM's process lives: it may be carried out at
//! any time, and then that must be known.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::HostError;
use super::client;
use super::vm_handle::{Said, VmHandle};
use machine::balloon::{BalloonSize, BalloonStatus};
use machine::control::{Answer, ErrorKind, Reply, Request};
use machine::working_set::WorkingSet;
use os::lock;
use overcommit::action::Action;
use wire::{LineError, Lines, answer};

/// VMs are asked so often, unless something was asked of them.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// One that has not answered for this time is silent.
pub const SILENT_AFTER: Duration = Duration::from_secs(2);
/// A VM whose socket refuses is asked again after this time, and each time after twice that ...
const RETRY: Duration = Duration::from_millis(250);
/// ... up to this: to be refused costs next to nothing, and a socket that was removed is soon made
/// anew.
const RETRY_MOST: Duration = Duration::from_secs(1);
/// How often a thread that waits for an answer sees whether it is to end.
const POLL: Duration = Duration::from_millis(500);
/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// What a VM has said.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Of itself and its balloon.
    pub said: Said,
    /// The sizes of its balloon; None where it has none.
    pub size: Option<BalloonSize>,
    /// How much of its memory the guest uses; None where no sample is taken, or none has been yet.
    pub working_set: Option<WorkingSet>,
    /// Whether it was held to a limit since it was asked the time before.
    pub was_held: bool,
}

/// What came of an action on a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The guest.
    pub guest: String,
    /// What.
    pub action: Action,
    /// Why not.
    pub error: Option<String>,
}

/// A thread for each VM.
#[derive(Default)]
pub struct Askers {
    askers: HashMap<String, Asker>,
}

/// One VM. Dropped, its thread ends as soon as nothing is awaited any more.
struct Asker {
    handle: VmHandle,
    shared: Arc<Shared>,
    /// It was waited for once: not again until it has answered.
    late: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The requests that it is sent next.
    orders: Vec<(Action, Request)>,
    /// It is to be asked now.
    ask: bool,
    /// With what the host has of its balloon, which costs it a look at its page table.
    whole: bool,
    /// Since when the first answer is due that has not come.
    due: Option<Instant>,
    heard: Option<Heard>,
    outcomes: Vec<Outcome>,
    ending: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.due.is_none() && !self.ask && self.orders.is_empty()
    }
}

impl Askers {
    /// Asks these from now on. A guest that has another process than before is another one.
    pub fn attend(&mut self, handles: &[VmHandle]) {
        self.askers.retain(|_, asker| handles.contains(&asker.handle));
        self.begin(handles);
        for asker in self.askers.values_mut() {
            let is_idle = asker.state().is_idle();
            asker.late &= !is_idle;
        }
    }

    /// Asks these, too.
    pub fn begin(&mut self, handles: &[VmHandle]) {
        for handle in handles {
            if !self.askers.contains_key(&handle.guest)
                && let Some(asker) = Asker::start(handle)
            {
                self.askers.insert(handle.guest.clone(), asker);
            }
        }
    }

    /// Has all that answer be asked now.
    pub fn ask(&self, whole: bool) {
        self.askers.values().for_each(|asker| asker.ask(whole));
    }

    /// Sends a guest's VM one more request, after those that are queued.
    pub fn tell(&self, guest: &str, action: Action, request: Request) {
        if let Some(asker) = self.askers.get(guest) {
            asker.state().orders.push((action, request));
            asker.shared.changed.notify_all();
        }
    }

    /// Waits until all have answered their requests, or `limit` is over. One that is late then is
    /// not waited for again until it has answered.
    pub fn wait(&mut self, limit: Duration) {
        let until = Instant::now() + limit;
        for asker in self.askers.values_mut() {
            let shared = asker.shared.clone();
            let mut state = lock(&shared.state);
            while !state.is_idle() && !asker.late {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    asker.late = true;
                } else {
                    state = os::unpoisoned(shared.changed.wait_timeout(state, left)).0;
                }
            }
            asker.late &= !state.is_idle();
        }
    }

    /// What a guest's VM said last.
    pub fn heard(&self, guest: &str) -> Option<Heard> {
        self.askers.get(guest)?.state().heard.clone()
    }

    /// The same of itself and its balloon, with how long it is silent since.
    pub fn said(&self, guest: &str) -> Option<Said> {
        Some(Said { silent: self.silent(guest), ..self.heard(guest)?.said })
    }

    /// Whether all have answered that are not late.
    pub fn is_idle(&self) -> bool {
        self.askers.values().all(|asker| asker.late || asker.state().is_idle())
    }

    /// Whether a guest can be sent a request: it was not late with the one before.
    pub fn takes(&self, guest: &str) -> bool {
        self.askers.get(guest).is_some_and(|asker| !asker.late)
    }

    /// Whether a request to a guest may yet be carried out.
    pub fn is_late(&self, guest: &str) -> bool {
        self.askers.get(guest).is_some_and(|asker| asker.late)
    }

    /// For how long a guest's VM has not answered, if that is long.
    pub fn silent(&self, guest: &str) -> Option<Duration> {
        let since = self.askers.get(guest)?.state().due?;
        Some(since.elapsed()).filter(|silent| *silent >= SILENT_AFTER)
    }

    /// What was carried out, or failed, since this was last asked.
    pub fn outcomes(&self) -> Vec<Outcome> {
        self.askers.values().flat_map(|asker| std::mem::take(&mut asker.state().outcomes)).collect()
    }
}

impl Asker {
    fn start(handle: &VmHandle) -> Option<Self> {
        let shared = Arc::new(Shared::default());
        lock(&shared.state).ask = true;
        let (its, worker) = (shared.clone(), handle.clone());
        let name = format!("ask {}", handle.guest);
        // Without a thread it is not asked: it is as one that has not answered yet, and another
        // look tries again.
        let started = thread::Builder::new().name(name).spawn(move || its.run(&worker));
        if let Err(error) = started {
            tracing::warn!(%error, guest = handle.guest, "there is no thread to ask this guest's VM");
            return None;
        }
        Some(Self { handle: handle.clone(), shared, late: false })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    fn ask(&self, whole: bool) {
        let mut state = self.state();
        (state.ask, state.whole) = (true, state.whole || whole);
        self.shared.changed.notify_all();
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.state().ending = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// The thread.
    fn run(&self, handle: &VmHandle) {
        let mut pause = RETRY;
        while let Some((orders, whole)) = self.next() {
            let mut outcomes = Vec::with_capacity(orders.len());
            for (action, request) in orders {
                let error = self.control(handle, &request).err().map(|e| os::one_line(&e));
                outcomes.push(Outcome { guest: handle.guest.clone(), action, error });
            }
            let heard = self.hear(handle, whole);
            let mut state = lock(&self.state);
            state.outcomes.extend(outcomes);
            match heard {
                Ok(heard) => {
                    (state.heard, state.due) = (Some(heard), None);
                    pause = RETRY;
                    self.changed.notify_all();
                }
                Err(_) => {
                    // It has a socket that refuses, or has just ended: it is due since it was asked
                    // first.
                    state.ask = true;
                    drop(state);
                    self.sleep(pause);
                    pause = (pause * 2).min(RETRY_MOST);
                }
            }
        }
    }

    /// Waits until there is something to ask or to tell. None when the thread is to end.
    fn next(&self) -> Option<(Vec<(Action, Request)>, bool)> {
        let mut state = lock(&self.state);
        let until = Instant::now() + ASK_INTERVAL;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if state.ending {
                return None;
            } else if state.ask || !state.orders.is_empty() || left.is_zero() {
                state.due.get_or_insert_with(Instant::now);
                state.ask = false;
                return Some((std::mem::take(&mut state.orders), std::mem::take(&mut state.whole)));
            }
            state = os::unpoisoned(self.changed.wait_timeout(state, left)).0;
        }
    }

    fn sleep(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = lock(&self.state);
        while !state.ending && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            state = os::unpoisoned(self.changed.wait_timeout(state, left)).0;
        }
    }

    /// Asks everything there is to know.
    fn hear(&self, handle: &VmHandle, whole: bool) -> Result<Heard, HostError> {
        let status = match self.control(handle, &Request::Status)? {
            Reply::Status(status) => status,
            other => return Err(HostError::unexpected_of_vm(&handle.guest, &other)),
        };
        let before = lock(&self.state).heard.clone();
        let (size_before, sample_before) =
            before.as_ref().map_or((None, None), |heard| (heard.size, heard.working_set));
        let before = before.map(|heard| heard.said);
        let mut said = Said { status, balloon: None, at: Instant::now(), silent: None, trouble: Vec::new() };
        let size = match self.control(handle, &Request::BalloonSize) {
            Ok(Reply::BalloonSize(size)) => Some(size),
            Ok(other) => return Err(HostError::unexpected_of_vm(&handle.guest, &other)),
            Err(error) if error.is_refusal(ErrorKind::NoBalloon) => None,
            // That it cannot say does not mean that there is none.
            Err(error) => {
                said.tolerates(error)?;
                size_before
            }
        };
        if let Some(size) = size {
            let known = before.as_ref().and_then(|said| Some((said.balloon.clone()?, said.at)));
            let asked = whole || known.is_none();
            match if asked { self.balloon(handle, &mut said)? } else { None } {
                Some(balloon) => said.balloon = Some(balloon),
                None => {
                    if let Some((balloon, at)) = known {
                        (said.balloon, said.at) = (Some(BalloonStatus { size, ..balloon }), at);
                    }
                }
            }
        }
        // Asked now, the guest's own statistics are there the next time.
        if size.is_some() && !said.status.paused {
            match self.control(handle, &Request::BalloonStatistics) {
                Ok(_) => {}
                Err(error) if error.is_refusal(ErrorKind::NoStatistics) => {}
                // What it said before holds: one that does not answer any more is met by the next
                // question.
                Err(error) => _ = said.tolerates(error),
            }
        }
        let working_set = match self.control(handle, &Request::WorkingSet) {
            Ok(Reply::WorkingSet(known)) => Some(known).filter(|known| known.periods > 0),
            Ok(other) => return Err(HostError::unexpected_of_vm(&handle.guest, &other)),
            Err(error)
                if error.is_refusal(ErrorKind::NotSampled) || error.is_refusal(ErrorKind::NoSampleYet) =>
            {
                None
            }
            Err(error) => said.tolerates(error).map_or_else(|_| sample_before, |()| None),
        };
        let held_ms = |said: &Said| said.status.throttle.held_ms;
        let was_held = before.is_some_and(|before| held_ms(&said) > held_ms(&before));
        Ok(Heard { said, size, working_set, was_held })
    }

    /// Its balloon; None where it has none, or cannot see it, which `said` notes.
    fn balloon(&self, handle: &VmHandle, said: &mut Said) -> Result<Option<BalloonStatus>, HostError> {
        said.balloon_of(&handle.guest, self.control(handle, &Request::Balloon))
    }

    /// Asks one thing, and waits as long as it takes: see the module.
    fn control(&self, handle: &VmHandle, request: &Request) -> Result<Reply, HostError> {
        client::vm_answer(&handle.guest, self.ask(handle, request))
    }

    fn ask(&self, handle: &VmHandle, request: &Request) -> Result<Answer, LineError> {
        let mut lines = Lines::new(join(&handle.socket, handle.pid)?, MAX_ANSWER_BYTES);
        lines.send_json(request, Instant::now() + POLL)?;
        loop {
            match lines.receive(Instant::now() + POLL) {
                Ok(line) => return answer::read(&line).map_err(LineError::NotUnderstood),
                Err(LineError::Late) if !lock(&self.state).ending => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Connects to a socket that the process `pid` serves, and waits for room there no longer than
/// [`POLL`].
fn join(path: &Path, pid: u32) -> io::Result<UnixStream> {
    let stream = client::connect(path, POLL)?;
    client::check_peer(&stream, Some(pid))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::fake_vm::{STATUS, handle, serve, vm};

    /// Answers as a VM without a balloon does.
    fn answer(listener: UnixListener) {
        serve(listener, |op| {
            let answer = match op {
                "status" => STATUS,
                "pause" => "\"done\"",
                "balloon_size" => r#"{"error":"no","kind":"no-balloon"}"#,
                _ => r#"{"error":"no","kind":"not-sampled"}"#,
            };
            answer.into()
        });
    }

    /// What is heard of one that answers so.
    fn heard(answer: impl Fn(&str) -> String + Send + 'static) -> Heard {
        let dir = tempfile::tempdir().unwrap();
        let handles = [vm(dir.path(), "a", answer)];
        let (mut askers, until) = (Askers::default(), Instant::now() + Duration::from_secs(60));
        askers.attend(&handles);
        loop {
            askers.wait(Duration::from_millis(10));
            askers.attend(&handles);
            if let Some(heard) = askers.heard("a") {
                return heard;
            }
            assert!(Instant::now() < until, "it was never heard");
        }
    }

    const SIZE: &str = r#"{"balloon_size":{"driver":true,"target_pages":5,"actual_pages":4}}"#;

    #[test]
    fn only_one_that_says_so_has_no_balloon() {
        for (said, trouble) in [
            (r#"{"error":"this VM has no balloon","kind":"no-balloon"}"#, None),
            // Of a build that names no reasons.
            (r#"{"error":"this VM has no balloon"}"#, None),
            (r#"{"error":"it is being moved","kind":"moving"}"#, Some("it is being moved")),
            (
                r#"{"error":"not a request: balloon_size","kind":"not-a-request"}"#,
                Some("not a request: balloon_size"),
            ),
        ] {
            let heard = heard(move |op| if op == "balloon_size" { said } else { plain(op) }.into());
            assert_eq!(
                (heard.size, heard.said.trouble.first().map(String::as_str)),
                (None, trouble),
                "{said}"
            );
        }
    }

    #[test]
    fn a_balloon_that_cannot_be_seen_is_there_and_noted() {
        let heard = heard(|op| {
            let answer = match op {
                "balloon_size" => SIZE,
                "balloon" => r#"{"error":"cannot see what the host has of the balloon","kind":"host"}"#,
                op => plain(op),
            };
            answer.into()
        });
        assert_eq!(heard.size.map(|size| size.actual_pages), Some(4));
        assert!(heard.said.balloon.is_none());
        assert_eq!(heard.said.trouble, ["cannot see what the host has of the balloon"]);
    }

    #[test]
    fn a_sample_that_fails_is_not_one_that_was_not_wanted() {
        let answer = |sample: &'static str| {
            heard(move |op| if op == "working_set" { sample } else { plain(op) }.into()).said.trouble
        };
        assert!(answer(r#"{"error":"ask again","kind":"no-sample-yet"}"#).is_empty());
        assert_eq!(answer(r#"{"error":"no userfaultfd","kind":"host"}"#), ["no userfaultfd"]);
    }

    /// What one without anything says to all that a test is not about.
    fn plain(op: &str) -> &'static str {
        match op {
            "status" => STATUS,
            "balloon_size" | "balloon" => r#"{"error":"no","kind":"no-balloon"}"#,
            _ => r#"{"error":"no","kind":"not-sampled"}"#,
        }
    }

    #[test]
    fn one_that_does_not_answer_is_silent_and_keeps_no_other_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let own = std::process::id();
        let handles = [
            handle(dir.path(), "talks", own),
            handle(dir.path(), "silent", own),
            handle(dir.path(), "other", 1),
        ];
        let [talks, silent, other] = handles.clone().map(|handle| UnixListener::bind(handle.socket).unwrap());
        answer(talks);
        answer(other);
        let mut askers = Askers::default();
        askers.attend(&handles);
        let until = Instant::now() + Duration::from_secs(60);
        while askers.heard("talks").is_none()
            || askers.silent("silent").is_none()
            || askers.silent("other").is_none()
        {
            assert!(Instant::now() < until, "it was never heard, or never silent");
            askers.wait(Duration::from_millis(10));
            askers.attend(&handles);
        }
        assert!(askers.said("talks").is_some_and(|said| said.status.paused && said.silent.is_none()));
        assert!(askers.is_late("silent") && !askers.takes("silent") && askers.heard("silent").is_none());
        // What answers there is not the guest's process.
        assert!(askers.heard("other").is_none());
        let action =
            Action::Suspend { guest: 0, reason: overcommit::action::Reason::Turn { waited_seconds: 1 } };
        askers.tell("talks", action, Request::Pause);
        askers.tell("talks", Action::Resume { guest: 0 }, Request::Resume);
        let mut outcomes = Vec::new();
        while outcomes.len() < 2 {
            assert!(Instant::now() < until, "{outcomes:?}");
            askers.wait(Duration::from_millis(10));
            askers.attend(&handles);
            outcomes.extend(askers.outcomes());
        }
        let outcomes: Vec<_> =
            outcomes.iter().map(|outcome| (outcome.action, outcome.error.is_some())).collect();
        assert_eq!(outcomes, [(action, false), (Action::Resume { guest: 0 }, true)]);
        // Now it answers, to what it was asked before.
        answer(silent);
        while askers.is_late("silent") {
            assert!(Instant::now() < until, "it was never heard");
            thread::sleep(Duration::from_millis(10));
            askers.attend(&handles);
        }
        assert!(askers.heard("silent").is_some() && askers.silent("silent").is_none());
    }
}
