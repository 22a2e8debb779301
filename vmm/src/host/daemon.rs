//! The daemon over one fleet: brings it up, answers its socket, takes it down. If it is killed the guests run
//! on, and the next one takes them over.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::HostError;
use super::client::{self, ask};
use super::fleet::{Fleet, Watch};
use super::guest::{Lifetime, is_running, kill};
use super::runtime::FleetDir;
use super::spec::FleetSpec;
use super::status::{FleetStatus, Reply, Request, Verified};
use crate::memory::own;
use crate::vm::control as vm;

/// How often the daemon looks for an interrupt while nobody asks.
const POLL: Duration = Duration::from_millis(100);
/// How long a client may take to ask, or to take its answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);
/// How much later the kernel's out-of-memory killer takes the daemon than by its size: who could give memory back is the last to go.
const OOM_SCORE_ADJ: i16 = -900;
/// Longest request.
const MAX_REQUEST_BYTES: u64 = 4096;
/// How long an orphaned VM may take to end.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

/// A fleet that is up, and the socket it is asked through.
pub struct Daemon {
    fleet: Fleet,
    dir: FleetDir,
    socket: UnixListener,
    interrupted: Arc<AtomicBool>,
}

impl Daemon {
    /// Brings the fleet up and begins merging. Guests that an earlier daemon left are taken over.
    pub fn up(spec: FleetSpec, watch: &Watch, interrupted: Arc<AtomicBool>) -> Result<Self, HostError> {
        let dir = FleetDir::of(&spec.name);
        dir.create()?;
        let path = dir.host_socket()?;
        if UnixStream::connect(&path).is_ok() {
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
        let result = Fleet::up(spec, &dir, Lifetime::TheirOwn, watch).and_then(|mut fleet| {
            fleet.start_merging().inspect_err(|_| fleet.stop())?;
            Ok(fleet)
        });
        match result {
            Ok(fleet) => Ok(Self { fleet, dir, socket, interrupted }),
            Err(e) => {
                dir.remove();
                Err(e)
            }
        }
    }

    /// How the fleet is.
    pub fn status(&mut self) -> Result<FleetStatus, HostError> {
        FleetStatus::of(&mut self.fleet, false)
    }

    /// Answers clients until told to end, or interrupted; then ends all guests.
    pub fn serve(mut self) {
        while !self.interrupted.load(Ordering::Relaxed) {
            match self.socket.accept() {
                Ok((stream, _)) => {
                    if self.talk(stream) {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => std::thread::sleep(POLL),
            }
        }
        self.fleet.stop();
        self.dir.remove();
    }

    /// Answers one client. True when the fleet is to end. A client that is slow or talks rubbish is hung up on.
    fn talk(&mut self, mut stream: UnixStream) -> bool {
        let limits = stream.set_nonblocking(false).is_ok()
            && stream.set_read_timeout(Some(CLIENT_LIMIT)).is_ok()
            && stream.set_write_timeout(Some(CLIENT_LIMIT)).is_ok();
        let mut line = String::new();
        let read = BufReader::new(&stream).take(MAX_REQUEST_BYTES).read_line(&mut line);
        if !limits || !matches!(read, Ok(1..)) {
            return false;
        }
        let request = serde_json::from_str(&line);
        let down = matches!(request, Ok(Request::Down));
        if down {
            self.fleet.stop();
            self.dir.remove();
        }
        let reply = match request {
            Ok(request) => self.carry_out(request).unwrap_or_else(|e| Reply::Error(one_line(&e))),
            Err(e) => Reply::Error(format!("not a request: {e}")),
        };
        if let Ok(mut bytes) = serde_json::to_vec(&reply) {
            bytes.push(b'\n');
            let _ = stream.write_all(&bytes);
        }
        down
    }

    fn carry_out(&mut self, request: Request) -> Result<Reply, HostError> {
        let watch = Watch::new(|_, _, _, _| {}, self.interrupted.clone());
        match request {
            Request::Status { kvm, content, settle_seconds } => {
                if let Some(seconds) = settle_seconds {
                    self.fleet.settle(0, Duration::from_secs(seconds), &watch)?;
                }
                let content = content.then(|| self.fleet.content(&watch)).transpose()?;
                let mut status = FleetStatus::of(&mut self.fleet, kvm)?;
                status.content = content;
                Ok(Reply::Status(Box::new(status)))
            }
            Request::Verify => {
                let (verified_pages, mismatched_pages) = self.fleet.verify(&watch)?;
                Ok(Reply::Verified(Verified { verified_pages, mismatched_pages }))
            }
            Request::Down => Ok(Reply::Done),
        }
    }
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
