//! Manages a fleet's memory: looks at every guest several times a second, decides
//! ([`policy::step`]), carries out.
//!
//! It has a thread of its own and no guest's memory; whatever takes the fleet long, this goes on,
//! and a VM that does not answer keeps it from looking at the others for a tenth of a second, once.
//! What it must not forget is in a file before it is done: a daemon that is started again goes on
//! from there and from what it sees.

use os::lock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::HostError;
use super::action_log::Entry;
use super::asker::{Askers, Outcome};
use super::ledger::{Budget, Look};
use super::management::Management;
use super::observer::{ANSWER_WAIT, Observation, Observer};
use super::policy_state::PolicyState;
use super::runtime::FleetDir;
use super::shutdown;
use super::vm_handle::{Said, VmHandle};
use machine::control::Request;
use overcommit::action::Action;
use overcommit::knobs::Knobs;
use overcommit::policy;
use overcommit::view::{GuestView, HostView};

/// From one look to the next, unless that would take more than this part of one processor's time
/// ...
const INTERVAL: Duration = Duration::from_millis(200);
const LOOK_PART: u32 = 50;
/// ... but no longer than this: memory may be gone faster.
const LONGEST_INTERVAL: Duration = Duration::from_secs(1);
/// How long a client that asks for exact numbers waits for VMs to answer.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// How often the thread sees that it is to end.
const POLL: Duration = Duration::from_millis(20);

/// What carries out what is decided.
pub trait Actuator: Send {
    /// What the fleet may use.
    fn budget(&mut self) -> Budget;
    /// Has the engine merge at urgent priority, or at its normal one.
    fn merge(&mut self, urgent: bool);
    /// Has the fleet let go of images that have no name. False if it was told before and has not
    /// done it yet.
    fn drop_images(&mut self) -> bool;
}

/// The thread that manages a fleet. Dropping it ends the thread; what is throttled or suspended
/// stays so.
pub struct Governor {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    handles: Mutex<Vec<VmHandle>>,
    knobs: Mutex<Knobs>,
    management: Mutex<Management>,
    askers: Arc<Mutex<Askers>>,
    ending: AtomicBool,
}

impl Governor {
    /// Begins to manage the guests at `handles`. With `act` false it only looks.
    pub fn start(
        handles: Vec<VmHandle>,
        dir: &FleetDir,
        knobs: Knobs,
        act: bool,
        actuator: Box<dyn Actuator>,
    ) -> Result<Self, HostError> {
        let shared = Arc::new(Shared {
            handles: Mutex::new(handles),
            knobs: Mutex::new(knobs),
            management: Mutex::default(),
            askers: Arc::default(),
            ending: AtomicBool::new(false),
        });
        let path = dir.policy();
        let failed = |source| HostError::Runtime { what: "start the thread that keeps", path, source };
        let work = Work {
            shared: shared.clone(),
            observer: Observer::new(shared.askers.clone()),
            state: PolicyState::load(dir),
            act,
            actuator,
            began: Instant::now(),
        };
        let thread =
            thread::Builder::new().name("governor".into()).spawn(move || work.run()).map_err(failed)?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Manages these guests from now on.
    pub fn set_handles(&self, handles: Vec<VmHandle>) {
        *lock(&self.shared.handles) = handles;
    }

    /// Decides by these knobs from now on.
    pub fn set_knobs(&self, knobs: Knobs) {
        *lock(&self.shared.knobs) = knobs;
    }

    /// What the VMs at `handles` say now; of one that does not answer soon, what it said last.
    pub fn ask(&self, handles: &[VmHandle]) -> Vec<Option<Said>> {
        {
            let mut askers = lock(&self.shared.askers);
            askers.begin(handles);
            askers.ask(true);
        }
        let begin = Instant::now();
        while begin.elapsed() < ASK_LIMIT && !lock(&self.shared.askers).is_idle() {
            thread::sleep(POLL);
        }
        let askers = lock(&self.shared.askers);
        handles.iter().map(|handle| askers.said(&handle.guest)).collect()
    }

    /// Guests whose VMs do not answer.
    pub fn silent(&self) -> Vec<String> {
        let management = lock(&self.shared.management);
        let silent = management.guests.iter().filter(|guest| guest.silent_seconds.is_some());
        silent.map(|guest| guest.name.clone()).collect()
    }

    /// Ends the thread: nothing is done to a guest from here on.
    pub fn stand_down(&self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }

    /// How the fleet is managed.
    pub fn management(&self) -> Management {
        lock(&self.shared.management).clone()
    }
}

impl Drop for Governor {
    fn drop(&mut self) {
        self.stand_down();
    }
}

struct Work {
    shared: Arc<Shared>,
    observer: Observer,
    state: PolicyState,
    act: bool,
    actuator: Box<dyn Actuator>,
    began: Instant,
}

impl Work {
    fn run(mut self) {
        let mut interval = INTERVAL;
        while !self.wait(interval) {
            // Not by the clock: on a busy host a look waits for others, and must not be the rarer
            // for it.
            let before = self.observer.cpu_time();
            self.look();
            interval = ((self.observer.cpu_time() - before) * LOOK_PART).clamp(INTERVAL, LONGEST_INTERVAL);
        }
    }

    /// True when the thread is to end.
    fn wait(&self, time: Duration) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < time && !self.shared.ending.load(Ordering::Relaxed) {
            thread::sleep(POLL.min(time));
        }
        self.shared.ending.load(Ordering::Relaxed)
    }

    fn look(&mut self) {
        let handles = lock(&self.shared.handles).clone();
        self.observer.budget = self.actuator.budget();
        let Observation { host, guests, reading } =
            self.observer.observe(&handles, self.began.elapsed().as_secs_f64(), &self.state);
        let mut entries = Vec::new();
        if self.act {
            {
                let askers = lock(&self.shared.askers);
                self.state.keep(&guests, |guest| askers.is_late(guest));
            }
            let knobs = *lock(&self.shared.knobs);
            let mut memory = std::mem::take(&mut self.state.memory);
            let actions = policy::step(&mut memory, &host, &guests, &knobs);
            self.state.memory = memory;
            entries = self.carry_out_all(&actions, &handles, host.now_seconds);
        }
        self.tell(host, guests, reading, entries);
    }

    /// Has everything done that can be done now. What was done comes back, also what was asked for
    /// in an earlier look.
    fn carry_out_all(&mut self, actions: &[Action], handles: &[VmHandle], seconds: f64) -> Vec<Entry> {
        let mut entries = Vec::new();
        for action in actions {
            if let Action::SetPriority { urgent } = *action {
                self.actuator.merge(urgent);
                entries.push(Entry::new(action, None, None, seconds));
            }
            if let Action::DropImages { .. } = action
                && self.actuator.drop_images()
            {
                entries.push(Entry::new(action, None, None, seconds));
            }
            // One that is late may yet carry out an earlier request: what it should do is decided
            // again when that is known.
            let handle = action.guest().and_then(|n| handles.get(n));
            let Some(handle) = handle.filter(|handle| lock(&self.shared.askers).takes(&handle.guest)) else {
                continue;
            };
            let Some(request) = request(action) else { continue };
            // What is suspended is written down first: the next daemon must know that it was us.
            match action {
                Action::Suspend { reason, .. } => self.state.suspend(&handle.guest, &reason.to_string()),
                Action::Stop { reason, .. } => self.state.stop(&handle.guest, &reason.to_string()),
                _ => {}
            }
            // Each guest's in order, all guests' at once: when memory is short none waits for the
            // slowest.
            lock(&self.shared.askers).tell(&handle.guest, *action, request);
        }
        let outcomes = {
            let mut askers = lock(&self.shared.askers);
            if !actions.is_empty() {
                askers.wait(ANSWER_WAIT);
            }
            askers.outcomes()
        };
        for Outcome { guest, action, error } in outcomes {
            // One that could not be resumed is still suspended, and still by us.
            if matches!(action, Action::Resume { .. }) && error.is_none() {
                self.state.resume(&guest);
            }
            entries.push(Entry::new(&action, Some(guest), error, seconds));
        }
        entries
    }

    fn tell(&self, host: HostView, guests: Vec<GuestView>, reading: Option<Look>, entries: Vec<Entry>) {
        let mut now = lock(&self.shared.management);
        now.memory_state = self.state.memory.memory_state();
        now.because = self.state.memory.because();
        now.peak_used_pages = now.peak_used_pages.max(host.used_pages);
        now.host = Some(host);
        now.guests = guests;
        now.looks += 1;
        now.acting = self.act;
        (now.suspended, now.stopped) = (self.state.suspended.clone(), self.state.stopped.clone());
        now.cpu_seconds = self.observer.cpu_time().as_secs_f64();
        if let Some(reading) = reading {
            now.ledger_seconds = (reading.seconds, self.observer.ledger_interval_seconds());
            now.ledger = Some(reading.ledger);
            now.ledger_read_seconds = now.host.as_ref().map(|host| host.now_seconds);
        }
        entries.into_iter().for_each(|entry| now.action_log.add(entry));
    }
}

/// The request to a guest's VM by which an action is carried out; None if that is not for a guest.
fn request(action: &Action) -> Option<Request> {
    Some(match *action {
        Action::SetPriority { .. } | Action::DropImages { .. } => return None,
        Action::Balloon { target_pages, .. } => {
            Request::BalloonTarget { pages: u32::try_from(target_pages).unwrap_or(u32::MAX) }
        }
        Action::Throttle { pages_per_second, .. } => Request::Throttle { pages_per_second },
        Action::PageOut { pages, .. } => Request::PageOut { pages },
        Action::Suspend { .. } => Request::Pause,
        Action::Resume { .. } => Request::Resume,
        // Its VM does that by itself: this thread does not wait.
        Action::Stop { .. } => shutdown::request(shutdown::DEFAULT_LIMIT),
    })
}
