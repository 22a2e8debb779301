//! The daemon over one fleet: brings it up, answers its socket, takes it down. If it is killed the guests run
//! on, and the next one takes them over.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::HostError;
use super::client::{self, ask};
use super::fleet::{Fleet, Watch};
use super::governor::{Governor, lock};
use super::guest::{Lifetime, is_running, kill};
use super::hands::govern;
use super::ledger::{self, Reading};
use super::metrics::{self, EngineNow, exposition};
use super::runtime::FleetDir;
use super::spec::FleetSpec;
use super::status::{FleetStatus, Reply, Request};
use crate::memory::own;
use crate::vm::control as vm;

/// How often the daemon looks for an interrupt while nobody asks.
const POLL: Duration = Duration::from_millis(100);
/// How long a client may take to ask, or to take its answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// How long a client waits while somebody else has the fleet.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Clients at a time; a further one is hung up on.
const MAX_CLIENTS: usize = 32;
/// How much later the kernel's out-of-memory killer takes the daemon than by its size: who could give memory back is the last to go.
const OOM_SCORE_ADJ: i16 = -900;
/// How often, and how far apart, a daemon that hangs up is asked whether it is one.
const UP_TRIES: u32 = 25;
const UP_PAUSE: Duration = Duration::from_millis(20);
/// Longest request.
const MAX_REQUEST_BYTES: u64 = 4096;
/// How long an orphaned VM may take to end.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

/// A fleet that is up, and the socket it is asked through.
pub struct Daemon {
    fleet: Arc<Mutex<Fleet>>,
    page: Arc<MetricsPage>,
    /// None: nobody is served, or no longer.
    metrics: Mutex<Option<metrics::Server>>,
    governor: Arc<Governor>,
    dir: FleetDir,
    socket: UnixListener,
    interrupted: Arc<AtomicBool>,
    /// Clients that are being answered.
    clients: AtomicUsize,
}

impl Daemon {
    /// Starts the fleet's guests, begins to merge and to keep them within their means. Guests that an earlier daemon left are taken
    /// over. They are yet to be filled: [`Self::serve`] does that.
    pub fn up(spec: FleetSpec, watch: &Watch, interrupted: Arc<AtomicBool>) -> Result<Self, HostError> {
        let dir = FleetDir::of(&spec.name);
        dir.create()?;
        let path = dir.host_socket()?;
        if is_up(&path) {
            return Err(HostError::UpAlready { fleet: spec.name });
        }
        if let Err(error) = own::set_oom_score_adj(OOM_SCORE_ADJ) {
            // Its guests are taken before it all the same: they ask to be.
            tracing::debug!("the daemon's oom_score_adj stays as it is: {error}");
        }
        let _ = fs::remove_file(&path);
        let failed = |source| HostError::Runtime { what: "make the socket", path: path.clone(), source };
        let socket = UnixListener::bind(&path).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let bound = spec.metrics.as_ref().map(metrics::Server::bind).transpose();
        let bound = bound.inspect_err(|_| {
            let _ = fs::remove_file(&path);
            // What an earlier daemon left is not forgotten for this.
            if dir.control_sockets().is_empty() {
                dir.remove();
            }
        })?;
        let managed = Fleet::ready(spec, &dir, Lifetime::TheirOwn, watch).and_then(|mut fleet| {
            fleet.start_merging().inspect_err(|_| fleet.stop())?;
            let fleet = Arc::new(Mutex::new(fleet));
            let governor = Arc::new(govern(&fleet, &dir).inspect_err(|_| lock(&fleet).stop())?);
            let page = Arc::new(MetricsPage::of(&fleet, &governor));
            let shown = page.clone();
            let serve = |bound| metrics::Server::start(bound, Arc::new(move || shown.text()));
            let metrics = bound.map(serve).transpose().inspect_err(|_| lock(&fleet).stop())?;
            Ok((fleet, page, metrics, governor))
        });
        match managed {
            Ok((fleet, page, metrics, governor)) => Ok(Self {
                fleet,
                page,
                metrics: Mutex::new(metrics),
                governor,
                dir,
                socket,
                interrupted,
                clients: AtomicUsize::new(0),
            }),
            Err(e) => {
                dir.remove();
                Err(e)
            }
        }
    }

    /// Has the guests fill their memory, and tells `up` of it; answers clients until told to end, or interrupted; then ends all guests.
    ///
    /// What does not fit as it is may fit once it is merged, so they fill last.
    pub fn serve(self, watch: &Watch, up: impl FnOnce(Result<FleetStatus, HostError>) + Send) {
        thread::scope(|scope| {
            scope.spawn(|| {
                let filled = self.fleet().fill(watch);
                let filled = filled.and_then(|()| self.status());
                // Without all of its guests it is not the fleet that was asked for.
                let failed = filled.is_err();
                if failed {
                    self.fleet().stop();
                }
                up(filled);
                if failed {
                    self.interrupted.store(true, Ordering::Relaxed);
                }
            });
            while !self.interrupted.load(Ordering::Relaxed) {
                match self.socket.accept() {
                    Ok((stream, _)) if self.clients.fetch_add(1, Ordering::Relaxed) < MAX_CLIENTS => {
                        scope.spawn(|| {
                            self.talk(stream);
                            self.clients.fetch_sub(1, Ordering::Relaxed);
                        });
                    }
                    // Hung up on.
                    Ok(_) => _ = self.clients.fetch_sub(1, Ordering::Relaxed),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => thread::sleep(POLL),
                }
            }
        });
        self.fleet().stop();
        self.dir.remove();
    }

    fn status(&self) -> Result<FleetStatus, HostError> {
        // However long somebody else has it: it is up only when this is there.
        let reading = self.reading(self.fleet())?;
        Ok(FleetStatus::of(&mut self.fleet(), reading, false))
    }

    /// The ledger as it is now. While VMs are waited for nobody has the fleet, and one that does not answer is counted by what it said last.
    fn reading(&self, mut fleet: MutexGuard<'_, Fleet>) -> Result<Reading, HostError> {
        let (posts, means) = (fleet.posts()?, fleet.means());
        drop(fleet);
        ledger::read_heard(&posts, &self.governor.ask(&posts), means)
    }

    /// The fleet, as soon as nobody else has it; an error if that takes longer than a client waits for an answer. Guests that do not answer
    /// are left out of what needs an answer of each.
    fn free(&self, watch: &Watch) -> Result<MutexGuard<'_, Fleet>, HostError> {
        let until = Instant::now() + BUSY_LIMIT;
        let mut fleet = loop {
            match self.fleet.try_lock() {
                Ok(fleet) => break fleet,
                Err(TryLockError::Poisoned(fleet)) => break fleet.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                    return Err(HostError::Busy { fleet: self.page.name.clone() });
                }
                Err(TryLockError::WouldBlock) => thread::sleep(POLL),
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
            Ok(request) => self
                .carry_out(request, stream.try_clone().ok())
                .unwrap_or_else(|e| Reply::Error(one_line(&e))),
            Err(e) => Reply::Error(format!("not a request: {e}")),
        };
        if let Ok(mut bytes) = serde_json::to_vec(&reply) {
            bytes.push(b'\n');
            let _ = stream.write_all(&bytes);
        }
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
                status.notes.extend(fleet.spec.metrics.as_ref().filter(|m| m.is_public()).map(|address| {
                    format!("metrics at {address} can be read by everyone who can reach them: there is no authentication")
                }));
                Ok(Reply::Status(Box::new(status)))
            }
            Request::Management => Ok(Reply::Management(Box::new(self.governor.management()))),
            Request::Metrics => Ok(Reply::Metrics(self.page.text())),
            Request::Verify => Ok(Reply::Verified(self.free(&watch)?.verify(&watch)?)),
            Request::PageTypes { guest } => {
                Ok(Reply::PageTypes(self.free(&watch)?.page_types(&guest, &watch)?))
            }
            Request::Down => {
                // Whatever takes long gives up, and the daemon ends.
                self.interrupted.store(true, Ordering::Relaxed);
                // Before the answer: who asked for it may start the fleet again at once.
                drop(lock(&self.metrics).take());
                self.fleet().stop();
                self.dir.remove();
                Ok(Reply::Done)
            }
        }
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

/// Whether a daemon serves the socket at `path`. That somebody accepts does not say so: a process that a daemon was just starting when it
/// was killed has its socket until it is another program, a moment later.
pub fn is_up(path: &Path) -> bool {
    for _ in 0..UP_TRIES {
        match ask::<_, Reply>(path, &Request::Management, CLIENT_LIMIT) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return false;
            }
            // One that is busy may be late.
            Ok(_) => return true,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return true,
            Err(_) => thread::sleep(UP_PAUSE),
        }
    }
    true
}

/// Asks the daemon of a fleet; its refusal is an error, and so is its absence.
pub fn request(fleet: &str, request: &Request, limit: Duration) -> Result<Reply, HostError> {
    let path = FleetDir::of(fleet).host_socket()?;
    match ask(&path, request, limit) {
        Ok(Reply::Error(answer)) => Err(HostError::Daemon(answer)),
        Ok(reply) => Ok(reply),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Err(HostError::NoDaemon { fleet: fleet.into() })
        }
        Err(source) => Err(HostError::Socket { who: format!("the daemon of fleet {fleet}"), source }),
    }
}

/// Takes a fleet down whose daemon is gone: ends the VMs it left and removes their sockets. Returns how many
/// VMs ran.
pub fn take_down_orphans(fleet: &str) -> Result<usize, HostError> {
    let dir = FleetDir::of(fleet);
    let mut pids = Vec::new();
    for path in dir.control_sockets() {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if let Ok(vm::Reply::Status(status)) = client::control(&name, &path, &vm::Request::Status) {
            let _ = client::control(&name, &path, &vm::Request::Stop);
            pids.push(status.pid);
        }
    }
    let begin = std::time::Instant::now();
    while pids.iter().any(|p| is_running(*p)) && begin.elapsed() < ORPHAN_LIMIT {
        std::thread::sleep(Duration::from_millis(10));
    }
    pids.iter().filter(|p| is_running(**p)).for_each(|p| kill(*p));
    dir.remove();
    Ok(pids.len())
}

/// An error with its causes on one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", one_line(source)),
        None => error.to_string(),
    }
}
