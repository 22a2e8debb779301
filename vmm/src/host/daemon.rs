//! The daemon over one fleet: brings it up, answers its socket, takes it down. If it is killed the guests run
//! on, and the next one takes them over.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::Duration;

use super::HostError;
use super::claim::Claim;
use super::client::{self, ask};
use super::fleet::{Fleet, Watch};
use super::governor::{Governor, lock};
use super::hands::govern;
use super::home::Home;
use super::living;
use super::metrics::{self, EngineNow, exposition};
use super::runtime::FleetDir;
use super::shutdown::{CutOff, DEFAULT_LIMIT, Shutdown};
use super::spec::FleetSpec;
use super::status::{FleetStatus, Reply, Request};
use crate::memory::own;
use crate::os::Peer;

/// How often the daemon looks for an interrupt while nobody asks.
const POLL: Duration = Duration::from_millis(100);
/// How long a client may take to ask, or to take its answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// Clients at a time; a further one is hung up on.
const MAX_CLIENTS: usize = 32;
/// How much later the kernel's out-of-memory killer takes the daemon than by its size: who could give memory back is the last to go.
const OOM_SCORE_ADJ: i16 = -900;
/// Longest request.
const MAX_REQUEST_BYTES: u64 = 4096;

/// What a daemon is to bring up.
pub struct Plan {
    /// The fleet.
    pub spec: FleetSpec,
    /// End guests that run and are not as `spec` says, and start them anew.
    pub replace: bool,
    /// Have standard error go to the log in the fleet's directory.
    pub log: bool,
}

/// A fleet that is up, and the sockets it is asked through.
pub struct Daemon {
    fleet: Arc<Mutex<Fleet>>,
    page: Arc<MetricsPage>,
    /// None: nobody is served, or no longer.
    metrics: Mutex<Option<metrics::Server>>,
    governor: Arc<Governor>,
    home: Home,
    interrupted: Arc<AtomicBool>,
    /// Their end.
    shutdown: Shutdown,
    /// Whether guests and directory are gone already.
    is_down: Mutex<bool>,
    /// Clients that are being answered.
    clients: AtomicUsize,
}

impl Daemon {
    /// Starts the fleet's guests, begins to merge and to keep them within their means. Guests that an earlier daemon left are taken
    /// over. They are yet to be filled: [`Self::serve`] does that. If it fails, what it started has ended, and nothing else.
    pub fn up(plan: Plan, watch: &Watch, interrupted: Arc<AtomicBool>) -> Result<Self, HostError> {
        // Before anything is looked at, until this process has ended.
        let claim = Claim::take(&plan.spec.name)?;
        let dir = FleetDir::of(&plan.spec.name);
        dir.create()?;
        let begun = Home::new(claim, dir.clone(), plan.log)
            .and_then(|home| Self::begin(plan, home, watch, interrupted));
        begun.inspect_err(|_| remove_unless_left(&dir))
    }

    fn begin(plan: Plan, home: Home, watch: &Watch, interrupted: Arc<AtomicBool>) -> Result<Self, HostError> {
        if let Err(error) = own::set_oom_score_adj(OOM_SCORE_ADJ) {
            // Its guests are taken before it all the same: they ask to be.
            tracing::debug!("the daemon's oom_score_adj stays as it is: {error}");
        }
        let Plan { spec, replace, .. } = plan;
        let bound = spec.metrics.as_ref().map(metrics::Server::bind).transpose()?;
        let mut fleet = Fleet::take_over(spec, home.dir(), replace, watch)?;
        fleet.start_merging().inspect_err(|_| fleet.stop_started())?;
        let fleet = Arc::new(Mutex::new(fleet));
        let governor = Arc::new(govern(&fleet, home.dir()).inspect_err(|_| lock(&fleet).stop_started())?);
        let page = Arc::new(MetricsPage::of(&fleet, &governor));
        let shown = page.clone();
        let serve = |bound| metrics::Server::start(bound, Arc::new(move || shown.text()));
        let metrics = bound.map(serve).transpose().inspect_err(|_| lock(&fleet).stop_started())?;
        Ok(Self {
            fleet,
            page,
            metrics: Mutex::new(metrics),
            governor,
            home,
            interrupted,
            shutdown: Shutdown::default(),
            is_down: Mutex::new(false),
            clients: AtomicUsize::new(0),
        })
    }

    /// Has the guests fill their memory, and tells `up` of it; answers clients until told to end, or interrupted; then ends all guests.
    /// If they cannot be filled, those that were started here end, and no others.
    ///
    /// What does not fit as it is may fit once it is merged, so they fill last.
    pub fn serve(self, watch: &Watch, up: impl FnOnce(Result<FleetStatus, HostError>) + Send) {
        let (is_up, failed) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                let filled = self.fleet().fill(watch);
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
                for stream in self.home.clients(POLL) {
                    // Too many are hung up on.
                    if self.clients.fetch_add(1, Ordering::Relaxed) < MAX_CLIENTS {
                        scope.spawn(|| {
                            self.talk(stream);
                            self.clients.fetch_sub(1, Ordering::Relaxed);
                        });
                    } else {
                        self.clients.fetch_sub(1, Ordering::Relaxed);
                    }
                }
                let is_down = lock(&self.is_down);
                if *is_down {
                    break;
                }
                self.home.look_after(|| self.fleet.try_lock().map(|fleet| fleet.save()).is_ok());
            }
        });
        if failed.into_inner() {
            remove_unless_left(self.home.dir());
        }
    }

    /// Ends all guests in good order and removes what there is of them, once: afterwards their place may be another fleet's.
    fn end_all(&self) {
        self.shutdown.begin(DEFAULT_LIMIT);
        // It would suspend them again.
        self.governor.stand_down();
        let mut fleet = self.fleet();
        if *lock(&self.is_down) {
            return;
        }
        fleet.shut_down(&self.shutdown);
        // Nobody makes the directory anew from here on.
        let mut is_down = lock(&self.is_down);
        *is_down = true;
        self.home.dir().remove();
        for CutOff { guest, why } in self.shutdown.cut_off() {
            tracing::warn!("guest {guest} did not end in good order: {why}");
        }
    }

    fn status(&self) -> Result<FleetStatus, HostError> {
        let mut fleet = self.fleet();
        let reading = fleet.ledger(false)?;
        Ok(FleetStatus::of(&mut fleet, reading, false))
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        lock(&self.fleet)
    }

    /// Answers one client. A client that is slow or talks rubbish is hung up on.
    fn talk(&self, mut stream: UnixStream) {
        let limits = stream.set_nonblocking(false).is_ok()
            && stream.set_read_timeout(Some(CLIENT_LIMIT)).is_ok()
            && stream.set_write_timeout(Some(CLIENT_LIMIT)).is_ok();
        let mut line = String::new();
        let read = BufReader::new(&stream).take(MAX_REQUEST_BYTES).read_line(&mut line);
        if !limits || !matches!(read, Ok(1..)) {
            return;
        }
        let reply = match serde_json::from_str(&line) {
            Ok(request) => self.carry_out(request).unwrap_or_else(|e| Reply::Error(one_line(&e))),
            Err(e) => Reply::Error(format!("not a request: {e}")),
        };
        if let Ok(mut bytes) = serde_json::to_vec(&reply) {
            bytes.push(b'\n');
            let _ = stream.write_all(&bytes);
        }
    }

    fn carry_out(&self, request: Request) -> Result<Reply, HostError> {
        let watch = Watch::new(|_, _, _, _| {}, self.interrupted.clone());
        match request {
            Request::Status { kvm, content, audit, settle_seconds } => {
                let mut fleet = self.fleet();
                if let Some(seconds) = settle_seconds {
                    fleet.settle(0, Duration::from_secs(seconds), &watch)?;
                }
                let content = content.then(|| fleet.content(&watch)).transpose()?;
                let reading = fleet.ledger(audit)?;
                let mut status = FleetStatus::of(&mut fleet, reading, kvm);
                status.content = content;
                status.notes.extend(self.governor.management().notes());
                status.notes.extend(self.home.note());
                status.notes.extend(fleet.spec.metrics.as_ref().filter(|m| m.is_public()).map(|address| {
                    format!("metrics at {address} can be read by everyone who can reach them: there is no authentication")
                }));
                Ok(Reply::Status(Box::new(status)))
            }
            Request::Management => Ok(Reply::Management(Box::new(self.governor.management()))),
            Request::Metrics => Ok(Reply::Metrics(self.page.text())),
            Request::Verify => Ok(Reply::Verified(self.fleet().verify(&watch)?)),
            Request::PageTypes { guest } => Ok(Reply::PageTypes(self.fleet().page_types(&guest, &watch)?)),
            Request::Down { timeout_seconds } => {
                self.shutdown.allow(Duration::from_secs(timeout_seconds));
                // Whatever takes long gives up, and the daemon ends.
                self.interrupted.store(true, Ordering::Relaxed);
                // Before the answer: who asked for it may start the fleet again at once.
                drop(lock(&self.metrics).take());
                self.end_all();
                Ok(Reply::Down(self.shutdown.cut_off()))
            }
            Request::Ending => Ok(Reply::Ending(self.shutdown.left())),
        }
    }
}

/// Removes the directory, unless guests run on: through it they are reached.
fn remove_unless_left(dir: &FleetDir) {
    if living::vms(dir).is_empty() {
        dir.remove();
    }
}

/// What metrics are made of. Never waits for the fleet: while somebody has it, its engine is as it was.
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

    fn text(&self) -> String {
        let now = self.fleet.upgrade().and_then(|fleet| Some(fleet.try_lock().ok()?.engine_now()));
        let engine = {
            let mut last = lock(&self.engine);
            *last = now.unwrap_or_else(|| last.clone());
            last.clone()
        };
        exposition(&self.name, self.governor.management(), engine)
    }
}

/// Connects to the daemon of a fleet. That there is none is an error, and so is one of another user.
pub fn connect(fleet: &str, limit: Duration) -> Result<UnixStream, HostError> {
    let dir = FleetDir::of(fleet);
    dir.check_owners()?;
    let path = dir.host_socket()?;
    let failed = |source| HostError::Socket { who: format!("the daemon of fleet {fleet}"), source };
    let stream = match client::connect(&path, limit) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            // Its directory may have been removed: it has its name all the same.
            return living::daemon(fleet).ok_or_else(|| HostError::NoDaemon { fleet: fleet.into() });
        }
        connected => connected.map_err(failed)?,
    };
    match Peer::of(&stream).map_err(failed)? {
        peer if peer.is_this_user() => Ok(stream),
        peer => Err(HostError::Untrusted {
            path,
            why: format!("process {} of user {} listens there", peer.pid, peer.uid),
            fleets: dir.path().into(),
        }),
    }
}

/// Asks the daemon of a fleet; its refusal is an error, and so is its absence.
pub fn request(fleet: &str, request: &Request, limit: Duration) -> Result<Reply, HostError> {
    match ask(connect(fleet, limit)?, request, limit) {
        Ok(Reply::Error(answer)) => Err(HostError::Daemon(answer)),
        Ok(reply) => Ok(reply),
        Err(source) => Err(HostError::Socket { who: format!("the daemon of fleet {fleet}"), source }),
    }
}

/// An error with its causes on one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", one_line(source)),
        None => error.to_string(),
    }
}
