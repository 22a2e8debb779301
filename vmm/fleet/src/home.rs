//! Where a daemon is found: its claim to the fleet's name, and its socket in the fleet's directory, which is made again when it is removed.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;

use super::HostError;
use super::claim::Claim;
use super::living;
use super::runtime::FleetDir;
use os::lock;
use os::one_line;
use os::socket_file::State;
use os::{Peer, SocketFile};

/// How often the directory is checked to be there.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// The places at which a daemon is asked. Dropped, the directory goes before the name is free again, unless guests run on: through it
/// they are reached.
pub struct Home {
    ground: Ground,
    log: bool,
    place: Mutex<Place>,
}

/// A claimed name, and the directory that goes with it.
struct Ground {
    dir: FleetDir,
    claim: Claim,
}

impl Drop for Ground {
    fn drop(&mut self) {
        if living::vms(&self.dir).is_empty() {
            self.dir.remove();
        }
    }
}

struct Place {
    socket: Arc<UnixListener>,
    file: SocketFile,
    looked: Instant,
    /// How often it was made anew.
    remade: u32,
    /// What is known of the guests is not in the new directory yet.
    to_save: bool,
    /// Why it cannot be made anew, if it cannot.
    lost: Option<String>,
}

impl Home {
    /// Makes the directory of the fleet called `name`, whose name it claims before it looks at anything, and a socket there. With `log`,
    /// standard error goes to a file there.
    pub fn make(name: &str, log: bool) -> Result<Self, HostError> {
        let ground = Ground { claim: Claim::take(name)?, dir: FleetDir::of(name) };
        ground.dir.create()?;
        let (socket, file) = listen(&ground.dir)?;
        if log {
            log_to(&ground.dir)?;
        }
        let looked = Instant::now();
        let place = Mutex::new(Place { socket, file, looked, remade: 0, to_save: false, lost: None });
        Ok(Self { ground, log, place })
    }

    /// The fleet's directory.
    pub fn dir(&self) -> &FleetDir {
        &self.ground.dir
    }

    /// Clients that have come, within `time` if there are none yet.
    pub fn clients(&self, time: Duration) -> Vec<UnixStream> {
        let socket = lock(&self.place).socket.clone();
        let claim = self.ground.claim.listener();
        let time_out = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        let mut fds = [PollFd::new(&socket, PollFlags::IN), PollFd::new(claim, PollFlags::IN)];
        if !matches!(poll(&mut fds, Some(&time_out)), Ok(1..)) {
            return Vec::new();
        }
        let own = socket.accept().ok().map(|(stream, _)| stream);
        // The name has no permissions of its own, as a directory has.
        let by_name = claim.accept().ok().map(|(stream, _)| stream);
        let by_name = by_name.filter(|stream| Peer::of(stream).is_ok_and(Peer::is_this_user));
        let clients: Vec<_> = own.into_iter().chain(by_name).collect();
        if clients.is_empty() {
            // Of too many open files, say: not to be tried without a pause.
            thread::sleep(time);
        }
        clients
    }

    /// Sees to it that the directory and the socket in it are there, and makes them anew if they were removed (VMs do the same with theirs).
    /// `save` writes down there what is known of the guests; false: not now.
    pub fn look_after(&self, save: impl FnOnce() -> bool) {
        let mut place = lock(&self.place);
        if place.looked.elapsed() < LOOK_INTERVAL {
            return;
        }
        place.looked = Instant::now();
        if !self.ground.dir.is_in_place() || place.file.state() == State::Gone {
            match self.make_anew(&mut place) {
                Ok(()) => {
                    tracing::warn!("{} was removed, and was made anew", self.ground.dir.path().display())
                }
                Err(error) if place.lost.is_none() => {
                    tracing::warn!("{} was removed: {}", self.ground.dir.path().display(), one_line(&error));
                    place.lost = Some(one_line(&error));
                }
                Err(_) => {}
            }
        }
        if place.to_save && save() {
            place.to_save = false;
        }
    }

    fn make_anew(&self, place: &mut Place) -> Result<(), HostError> {
        self.ground.dir.create()?;
        (place.socket, place.file) = listen(&self.ground.dir)?;
        if self.log {
            log_to(&self.ground.dir)?;
        }
        (place.remade, place.to_save, place.lost) = (place.remade + 1, true, None);
        Ok(())
    }

    /// What a reader of the fleet's status should know.
    pub fn note(&self) -> Option<String> {
        let place = lock(&self.place);
        let path = self.ground.dir.path().display();
        match (&place.lost, place.remade) {
            (Some(why), _) => Some(format!(
                "{path} was removed and cannot be made anew ({why}): the guests run on, but are not reached by their sockets"
            )),
            (None, 0) => None,
            (None, times) => {
                Some(format!("{path} was removed and made anew (times: {times}); logs of before are lost"))
            }
        }
    }
}

/// The daemon's socket, for this user alone.
fn listen(dir: &FleetDir) -> Result<(Arc<UnixListener>, SocketFile), HostError> {
    let path = dir.host_socket()?;
    let failed = |source| HostError::Runtime { what: "make the socket", path: path.clone(), source };
    let (socket, file) = SocketFile::stream(&path, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    Ok((Arc::new(socket), file))
}

/// Has standard error go to the daemon's log.
fn log_to(dir: &FleetDir) -> Result<(), HostError> {
    let path = dir.host_log();
    let failed = |source| HostError::Runtime { what: "make the log", path: path.clone(), source };
    let log: OwnedFd = File::options().create(true).append(true).open(&path).map_err(failed)?.into();
    rustix::stdio::dup2_stderr(log).map_err(|e| failed(e.into()))
}
