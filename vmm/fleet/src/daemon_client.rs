//! Asking the daemon of a fleet.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::HostError;
use super::client::{self, MAX_ANSWER_BYTES};
use super::living;
use super::runtime::FleetDir;
use super::status::{Answer, Reply, Request};
use os::Peer;
use wire::{LineError, Lines};

/// Connects to the daemon of a fleet. That there is none is an error, and so is one of another
/// user.
pub fn connect(fleet: &str, limit: Duration) -> Result<UnixStream, HostError> {
    let dir = FleetDir::of(fleet);
    dir.check_owners()?;
    let path = dir.host_socket()?;
    let failed = |source: io::Error| HostError::socket(format!("the daemon of fleet {fleet}"), source);
    let stream = match client::connect(&path, limit) {
        Err(e) if is_absence(&e) => {
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

/// Whether nothing is there to connect to.
fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::ConnectionRefused
    )
}

/// Asks the daemon of a fleet; its refusal is an error, and so is its absence.
pub fn request(fleet: &str, request: &Request, limit: Duration) -> Result<Reply, HostError> {
    let until = Instant::now() + limit;
    answer_of(fleet, Lines::new(connect(fleet, limit)?, MAX_ANSWER_BYTES).ask(request, until))
}

/// What came of asking the daemon of `fleet`.
pub(super) fn answer_of(fleet: &str, answer: Result<Answer, LineError>) -> Result<Reply, HostError> {
    match answer {
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(refusal)) => Err(HostError::Daemon(refusal)),
        Err(source) => Err(HostError::socket(format!("the daemon of fleet {fleet}"), source)),
    }
}

/// The daemon answered another question than it was asked.
pub fn unexpected(answer: &Reply) -> HostError {
    HostError::unexpected("the fleet's daemon".into(), answer)
}
