//! The daemon over one fleet: brings it up, answers its socket, takes it down. If it is killed the guests run
//! on, and the next one takes them over.

mod disk;

use os::one_line;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::HostError;
use super::actuator::govern;
use super::checkpoints::{Shelf, Works};
use super::fleet::Fleet;
use super::governor::Governor;
use super::home::Home;
use super::ledger::{self, Reading};
use super::metrics::{self, EngineNow, Format, exposition};
use super::shutdown::{CutOff, DEFAULT_LIMIT, Shutdown};
use super::spec::FleetSpec;
use super::status::{ErrorKind, FleetStatus, Refusal, Reply, Request};
use super::watch::Watch;
use memory::own;
use os::lock;
use wire::{LineError, Lines};

/// How often the daemon looks for an interrupt while it has no request.
const POLL: Duration = Duration::from_millis(100);
/// How long a client may take to ask, or to take its answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// How long a client waits while another has the fleet.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Clients at a time; a further one is disconnected.
const MAX_CLIENTS: usize = 32;
/// How much later the kernel's out-of-memory killer takes the daemon than by its size: what can give memory back goes last.
const OOM_SCORE_ADJ: i16 = -900;
/// Longest request.
const MAX_REQUEST_BYTES: usize = 4096;

/// What a daemon is to bring up.
pub struct Plan {
    /// The fleet.
    pub spec: FleetSpec,
    /// End guests that run and are not as `spec` says, and start them anew.
    pub replace: bool,
    /// Have standard error go to the log in the fleet's directory.
    pub log: bool,
    /// Where guests of the fleet may have been saved: then they go on from there.
    pub shelf: Option<Shelf>,
}

/// A fleet that is up, and the sockets it is asked through.
pub struct Daemon {
    fleet: Arc<Mutex<Fleet>>,
    page: Arc<MetricsPage>,
    /// None: no client is served, or no longer.
    metrics: Mutex<Option<metrics::Server>>,
    governor: Arc<Governor>,
    home: Home,
    interrupted: Arc<AtomicBool>,
    /// Their end.
    shutdown: Shutdown,
    /// Once guests and directory are gone: what was left otherwise than it was found.
    ended: Mutex<Option<Vec<String>>>,
    /// Clients that are being answered.
    clients: AtomicUsize,
    /// What is being saved and read.
    works: Works,
}

impl Daemon {
    /// Starts the fleet's guests, begins to merge and to manage their memory. Guests that an earlier daemon left are taken
    /// over. They are yet to be filled: [`Self::serve`] does that. If it fails, what it started has ended, and nothing else.
    pub fn up(plan: Plan, watch: &Watch, interrupted: Arc<AtomicBool>) -> Result<Self, HostError> {
        let home = Home::make(&plan.spec.name, plan.log)?;
        if let Err(error) = own::set_oom_score_adj(OOM_SCORE_ADJ) {
            // Its guests are taken before it all the same: they ask to be.
            tracing::debug!("the daemon's oom_score_adj stays as it is: {error}");
        }
        let Plan { spec, replace, shelf, .. } = plan;
        let bound = spec.metrics.as_ref().map(metrics::Server::bind).transpose()?;
        let mut fleet = Fleet::take_over(spec, home.dir(), replace, shelf.as_ref(), watch)?;
        fleet.start_merging().inspect_err(|_| fleet.stop_started())?;
        let fleet = Arc::new(Mutex::new(fleet));
        let governor = Arc::new(govern(&fleet, home.dir()).inspect_err(|_| lock(&fleet).stop_started())?);
        let page = Arc::new(MetricsPage::of(&fleet, &governor));
        let shown = page.clone();
        let serve = |bound| metrics::Server::start(bound, Arc::new(move |format| shown.text(format)));
        let metrics = bound.map(serve).transpose().inspect_err(|_| lock(&fleet).stop_started())?;
        Ok(Self {
            fleet,
            page,
            metrics: Mutex::new(metrics),
            governor,
            home,
            interrupted,
            shutdown: Shutdown::default(),
            ended: Mutex::default(),
            clients: AtomicUsize::new(0),
            works: Works::default(),
        })
    }

    /// Has the guests fill their memory, and reports that to `up`; answers clients until it is asked to end, or interrupted; then ends all guests.
    /// If they cannot be filled, those that were started here end, and no others.
    ///
    /// What does not fit as it is may fit once it is merged, so they fill last.
    pub fn serve(self, watch: &Watch, up: impl FnOnce(Result<FleetStatus, HostError>) + Send) {
        let (is_up, failed) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                let filled = self.fleet().fill(watch);
                let filled = filled.and_then(|()| self.fleet().start_from(watch));
                let filled = filled.inspect(|()| self.fleet().forget_suspended());
                let filled = filled.and_then(|()| self.status());
                // Without all of its guests it is not the fleet that was asked for.
                if filled.is_err() {
                    failed.store(true, Ordering::Relaxed);
                    self.fleet().stop_started();
                    self.interrupted.store(true, Ordering::Relaxed);
                }
                is_up.store(filled.is_ok(), Ordering::Relaxed);
                up(filled);
            });
            let mut ends = false;
            while !failed.load(Ordering::Relaxed) {
                if self.interrupted.load(Ordering::Relaxed) && is_up.load(Ordering::Relaxed) && !ends {
                    ends = true;
                    // Clients are answered meanwhile: how far it is, and that it be shorter.
                    scope.spawn(|| self.end_all());
                }
                self.let_join();
                for stream in self.home.clients(POLL) {
                    // Too many are disconnected.
                    if self.clients.fetch_add(1, Ordering::Relaxed) < MAX_CLIENTS {
                        scope.spawn(|| {
                            self.talk(stream);
                            self.clients.fetch_sub(1, Ordering::Relaxed);
                        });
                    } else {
                        self.clients.fetch_sub(1, Ordering::Relaxed);
                    }
                }
                let ended = lock(&self.ended);
                if ended.is_some() {
                    break;
                }
                self.home.look_after(|| self.fleet.try_lock().map(|fleet| fleet.save()).is_ok());
            }
        });
    }

    /// Ends all guests in good order and removes what there is of them, once: afterwards their place may be another fleet's. Returns what
    /// of the host's settings was left otherwise than it was found.
    fn end_all(&self) -> Vec<String> {
        self.shutdown.begin(DEFAULT_LIMIT);
        // It would suspend them again.
        self.governor.stand_down();
        let mut fleet = self.fleet();
        if let Some(notes) = &*lock(&self.ended) {
            return notes.clone();
        }
        let suspended = self.governor.management().suspended;
        fleet.resume_joined(|guest| suspended.contains_key(guest));
        let notes = fleet.shut_down(&self.shutdown);
        for CutOff { guest, why } in self.shutdown.cut_off() {
            tracing::warn!("guest {guest} did not end in good order: {why}");
        }
        // The directory is not made anew from here on.
        let mut ended = lock(&self.ended);
        self.home.dir().remove();
        ended.insert(notes).clone()
    }

    /// Registers and removes VMs that others started. While a client has the fleet, they wait.
    fn let_join(&self) {
        let handles =
            self.fleet.try_lock().ok().and_then(|mut fleet| fleet.let_join().then(|| fleet.handles()));
        match handles {
            Some(Ok(handles)) => self.governor.set_handles(handles),
            Some(Err(error)) => tracing::warn!("{}", one_line(&error)),
            None => {}
        }
    }

    fn status(&self) -> Result<FleetStatus, HostError> {
        // However long a client has it: it is up only when this is there.
        let reading = self.reading(self.fleet())?;
        Ok(FleetStatus::of(&mut self.fleet(), reading, false))
    }

    /// The ledger as it is now. While it waits for VMs it does not have the fleet, and one that does not answer is counted by what it said last.
    fn reading(&self, mut fleet: MutexGuard<'_, Fleet>) -> Result<Reading, HostError> {
        let (handles, budget) = (fleet.handles()?, fleet.budget());
        drop(fleet);
        ledger::read_heard(&handles, &self.governor.ask(&handles), budget)
    }

    /// The fleet, as soon as it is free; an error if that takes longer than a client waits for an answer. Guests that do not answer
    /// are left out of what needs an answer of each.
    fn free(&self, watch: &Watch) -> Result<MutexGuard<'_, Fleet>, HostError> {
        let until = Instant::now() + BUSY_LIMIT;
        let mut fleet = loop {
            match os::try_lock(&self.fleet) {
                Some(fleet) => break fleet,
                None if Instant::now() >= until => {
                    return Err(HostError::Busy { fleet: self.page.name.clone() });
                }
                None => thread::sleep(POLL),
            }
            watch.check()?;
        };
        fleet.leave_out(self.governor.silent());
        fleet.release_held();
        Ok(fleet)
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        lock(&self.fleet)
    }

    /// Answers one client. A client that is slow, or whose line has no end, is disconnected.
    fn talk(&self, stream: UnixStream) {
        let watched = stream.try_clone().ok();
        let mut client = Lines::new(stream, MAX_REQUEST_BYTES);
        let line = match client.receive(Instant::now() + CLIENT_LIMIT) {
            Ok(line) => line,
            // It has closed its sending side behind its request, which is as good as the end of a line.
            Err(LineError::Cut) => client.take_rest(),
            Err(_) => return,
        };
        let answer = match serde_json::from_slice(&line) {
            Ok(request) => self.carry_out(request, watched).map_err(Refusal::from),
            Err(e) => Err(Refusal::new(ErrorKind::NotARequest, format!("not a request: {e}"))),
        };
        let _ = client.answer(&answer, Instant::now() + CLIENT_LIMIT);
    }

    fn carry_out(&self, request: Request, client: Option<UnixStream>) -> Result<Reply, HostError> {
        let watch = Watch::new(|_, _, _, _| {}, self.interrupted.clone()).for_client(client);
        match request {
            Request::Status { kvm, content, audit, settle_seconds } => {
                if let Some(seconds) = settle_seconds {
                    self.free(&watch)?.settle(0, Duration::from_secs(seconds), &watch)?;
                }
                let content = content.then(|| self.free(&watch)?.content(&watch)).transpose()?;
                let reading =
                    if audit { self.free(&watch)?.ledger(true) } else { self.reading(self.free(&watch)?) }?;
                let mut fleet = self.free(&watch)?;
                let mut status = FleetStatus::of(&mut fleet, reading, kvm);
                status.content = content;
                status.notes.extend(self.governor.management().notes());
                status.notes.extend(self.home.note());
                status.notes.extend(fleet.spec.metrics.as_ref().filter(|m| m.is_public()).map(|address| {
                    format!("metrics at {address} can be read by every process that can reach them: there is no authentication")
                }));
                Ok(Reply::Status(Box::new(status)))
            }
            Request::Management => Ok(Reply::Management(Box::new(self.governor.management()))),
            Request::Metrics { format } => Ok(Reply::Metrics(self.page.text(format))),
            Request::Verify => Ok(Reply::Verified(self.free(&watch)?.verify(&watch)?)),
            Request::PageTypes { guest } => {
                Ok(Reply::PageTypes(self.free(&watch)?.page_types(&guest, &watch)?))
            }
            Request::Snapshot { guest, name, disk: None } => {
                Ok(Reply::Snapshot(Box::new(self.free(&watch)?.snapshot(&guest, &name)?)))
            }
            Request::Snapshot { guest, name, disk: Some(disk) } => {
                Ok(Reply::Checkpoint(Box::new(self.save(&guest, &name, &disk, &watch)?)))
            }
            Request::Restore(wanted) => Ok(Reply::Cloned(Box::new(self.restore(&wanted, &watch)?))),
            Request::Works => Ok(Reply::Works(self.works.all())),
            Request::Snapshots => Ok(Reply::Snapshots(self.free(&watch)?.snapshots())),
            Request::RemoveSnapshot { name } => {
                self.free(&watch)?.remove_snapshot(&name)?;
                Ok(Reply::Done)
            }
            Request::Clone(wanted) => {
                let mut fleet = self.free(&watch)?;
                let cloned = fleet.start_clones(&wanted, &watch);
                // Guests that have joined are managed from now on, those that have ended no more.
                self.governor.set_handles(fleet.handles()?);
                Ok(Reply::Cloned(Box::new(cloned?)))
            }
            Request::Down { timeout_seconds, save } => {
                if let Some(disk) = save {
                    self.suspend(&disk, &watch)?;
                }
                self.shutdown.allow(Duration::from_secs(timeout_seconds));
                // Whatever takes long gives up, and the daemon ends.
                self.interrupted.store(true, Ordering::Relaxed);
                // Before the answer: the client may start the fleet again at once.
                drop(lock(&self.metrics).take());
                let notes = self.end_all();
                Ok(Reply::Down { cut_off: self.shutdown.cut_off(), notes })
            }
            Request::Ending => Ok(Reply::Ending(self.shutdown.left())),
        }
    }
}

/// What metrics are made of. Never waits for the fleet: while a client has it, its engine is as it was.
struct MetricsPage {
    name: String,
    fleet: Weak<Mutex<Fleet>>,
    governor: Arc<Governor>,
    engine: Mutex<EngineNow>,
}

impl MetricsPage {
    fn of(fleet: &Arc<Mutex<Fleet>>, governor: &Arc<Governor>) -> Self {
        let mut now = lock(fleet);
        Self {
            name: now.spec.name.clone(),
            fleet: Arc::downgrade(fleet),
            governor: governor.clone(),
            engine: Mutex::new(now.engine_now()),
        }
    }

    fn text(&self, format: Format) -> String {
        let now = self.fleet.upgrade().and_then(|fleet| Some(fleet.try_lock().ok()?.engine_now()));
        let engine = {
            let mut last = lock(&self.engine);
            *last = now.unwrap_or_else(|| last.clone());
            last.clone()
        };
        exposition(&self.name, &self.governor.management(), &engine, format)
    }
}
