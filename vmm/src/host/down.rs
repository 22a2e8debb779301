//! Takes a fleet down: through its daemon, or without one.

use std::io;
use std::time::Duration;

use super::HostError;
use super::claim::Claim;
use super::client::ask;
use super::daemon::connect;
use super::living::{LivingVm, vms};
use super::runtime::FleetDir;
use super::status::{Reply, Request};
use super::takeover::end_all;
use crate::os::Peer;

/// How long the daemon may take to end its guests.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// How long it may take to end itself after that.
const END_LIMIT: Duration = Duration::from_secs(30);

/// How a fleet went down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// Its daemon ended it, and has ended.
    ByDaemon,
    /// The daemon was gone already; so many VMs were still running.
    Orphans(usize),
}

/// Takes a fleet down. When it returns none of its processes is left, and its name is free.
pub fn take_down(fleet: &str) -> Result<Down, HostError> {
    let stream = match connect(fleet, ANSWER_LIMIT) {
        Err(HostError::NoDaemon { .. }) => return take_down_orphans(fleet),
        connected => connected?,
    };
    let failed = |source| HostError::Socket { who: format!("the daemon of fleet {fleet}"), source };
    // Held before it is asked: afterwards its number could be another's.
    let daemon = match Peer::process(&stream) {
        Err(_) => return take_down_orphans(fleet),
        Ok(daemon) => daemon,
    };
    match ask(stream, &Request::Down, ANSWER_LIMIT) {
        Ok(Reply::Error(answer)) => return Err(HostError::Daemon(answer)),
        Ok(_) => {}
        // Killed meanwhile, or it was going down already.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof && daemon.ends_within(END_LIMIT) => {
            return take_down_orphans(fleet);
        }
        Err(e) => return Err(failed(e)),
    }
    match daemon.ends_within(END_LIMIT) {
        true => Ok(Down::ByDaemon),
        false => Err(HostError::DaemonStays { fleet: fleet.into(), pid: daemon.pid(), limit: END_LIMIT }),
    }
}

/// Takes a fleet down whose daemon is gone: ends the VMs it left and removes their directory. They are found as processes; what answers
/// at a socket is not believed.
fn take_down_orphans(fleet: &str) -> Result<Down, HostError> {
    // Nobody brings it up meanwhile.
    let _claim = Claim::take(fleet).map_err(|error| match error {
        HostError::UpAlready { fleet, pid } => HostError::Held { fleet, pid },
        error => error,
    })?;
    let dir = FleetDir::of(fleet);
    dir.create()?;
    let orphans = vms(&dir);
    end_all(&orphans, &dir);
    dir.remove();
    Ok(Down::Orphans(orphans.len()))
}

/// After the daemon with this number has failed to bring a fleet up, and before its number can be another's: ends the VMs that it
/// started, if it could not do that itself. Returns those that run on, because it did not start them.
pub fn clean_up(fleet: &str, daemon: u32) -> Result<Vec<LivingVm>, HostError> {
    let dir = FleetDir::of(fleet);
    dir.check_owners()?;
    let (started, others): (Vec<_>, Vec<_>) = vms(&dir).into_iter().partition(|vm| vm.daemon == Some(daemon));
    end_all(&started, &dir);
    if others.is_empty()
        && dir.path().exists()
        && let Ok(_claim) = Claim::take(fleet)
    {
        dir.create()?;
        dir.remove();
    }
    Ok(others)
}
