//! Takes a fleet down: through its daemon, or without one.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;
use std::net::Shutdown as Close;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::HostError;
use super::claim::Claim;
use super::client::MAX_ANSWER_BYTES;
use super::daemon_client::{answer_of, connect, unexpected};
use super::living::{LivingVm, vms};
use super::runtime::FleetDir;
use super::shutdown::{CutOff, Left, Shutdown};
use super::status::{Answer, OnDisk, Reply, Request};
use super::takeover::{end_all, shut_down_each};
use os::Peer;
use wire::{LineError, Lines};

/// How long the daemon may take to end its guests.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// The same, with saving them before.
const SAVE_LIMIT: Duration = Duration::from_secs(3600);
/// How long it may take to end itself after that.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often it is asked how far it is, and how long it may take to say so.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// How a fleet went down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Down {
    /// Its name.
    pub fleet: String,
    /// Where its daemon was gone already: how many VMs were still running.
    pub orphans: Option<usize>,
    /// The guests that did not end in good order.
    pub cut_off: Vec<CutOff>,
    /// What of the host's settings was left otherwise than it was found.
    pub notes: Vec<String>,
}

/// Takes a fleet down, its guests in good order as far as that takes no longer than `limit`. When it returns none of its processes is
/// left, and its name is free. `watch` sees how far it is, several times a second; once it says false, the guests that are left are cut off.
pub fn take_down(
    fleet: &str,
    limit: Duration,
    save: Option<&OnDisk>,
    watch: &mut dyn FnMut(&Left) -> bool,
) -> Result<Down, HostError> {
    let stream = match connect(fleet, ANSWER_LIMIT) {
        // Only a daemon captures guests.
        Err(HostError::NoDaemon { .. }) if save.is_none() => return take_down_orphans(fleet, limit, watch),
        connected => connected?,
    };
    // Held before it is asked: afterwards its number could be another's.
    let daemon = match Peer::process(&stream) {
        Err(_) if save.is_some() => return Err(HostError::NoDaemon { fleet: fleet.into() }),
        Err(_) => return take_down_orphans(fleet, limit, watch),
        Ok(daemon) => daemon,
    };
    let was_wanted = Cell::new(true);
    let mut watch = |left: &Left| {
        was_wanted.set(was_wanted.get() && watch(left));
        was_wanted.get()
    };
    let (cut_off, notes) = match ask_down(fleet, stream, (limit, save), &mut watch) {
        Err(_) if save.is_some() && !was_wanted.get() => return Err(HostError::Interrupted),
        // Killed meanwhile, or it was going down already.
        Err(LineError::Closed | LineError::Cut) if save.is_none() && daemon.ends_within(END_LIMIT) => {
            return take_down_orphans(fleet, limit, &mut watch);
        }
        answer => match answer_of(fleet, answer)? {
            Reply::Down { cut_off, notes } => (cut_off, notes),
            other => return Err(unexpected(&other)),
        },
    };
    match daemon.ends_within(END_LIMIT) {
        true => Ok(Down { fleet: fleet.into(), orphans: None, cut_off, notes }),
        false => Err(HostError::DaemonStays { fleet: fleet.into(), pid: daemon.pid(), limit: END_LIMIT }),
    }
}

/// Asks the daemon, and how far it is until it answers.
fn ask_down(
    fleet: &str,
    stream: UnixStream,
    (limit, save): (Duration, Option<&OnDisk>),
    watch: &mut dyn FnMut(&Left) -> bool,
) -> Result<Answer, LineError> {
    let down = |limit: Duration, save| Request::Down { timeout_seconds: limit.as_secs(), save };
    let answer_limit = if save.is_some() { SAVE_LIMIT } else { ANSWER_LIMIT };
    let ask = |stream, question: Request, limit| -> Result<Answer, LineError> {
        Lines::new(stream, MAX_ANSWER_BYTES).ask(&question, Instant::now() + limit)
    };
    // What comes of it, or does not, is seen by the first question.
    let ask_again = |question: Request, limit| ask(connect(fleet, limit).ok()?, question, limit).ok()?.ok();
    let closes = stream.try_clone()?;
    thread::scope(|scope| {
        let asked = scope.spawn(|| ask(stream, down(limit, save.cloned()), limit + answer_limit));
        let mut is_wanted = true;
        while !asked.is_finished() {
            thread::sleep(LOOK);
            if let Some(Reply::Ending(left)) = ask_again(Request::Ending, LOOK_LIMIT)
                && is_wanted
                && !watch(&left)
            {
                is_wanted = false;
                match save {
                    None => _ = scope.spawn(|| ask_again(down(Duration::ZERO, None), ANSWER_LIMIT)),
                    // Nothing is cut off that is to be saved: when its client is gone it runs on.
                    Some(_) => _ = closes.shutdown(Close::Both),
                }
            }
        }
        asked.join().unwrap_or_else(|_| Err(LineError::Io(io::Error::other("its thread panicked"))))
    })
}

/// Takes a fleet down whose daemon is gone: ends the VMs it left and removes their directory. They are found as processes; what answers
/// at a socket is not believed.
fn take_down_orphans(
    fleet: &str,
    limit: Duration,
    watch: &mut dyn FnMut(&Left) -> bool,
) -> Result<Down, HostError> {
    // It is not brought up meanwhile.
    let _claim = Claim::take(fleet).map_err(|error| match error {
        HostError::UpAlready { fleet, pid } => HostError::Held { fleet, pid },
        error => error,
    })?;
    let dir = FleetDir::of(fleet);
    dir.create()?;
    let orphans = vms(&dir);
    let cut_off = shut_down_all(&orphans, &dir, limit, watch);
    dir.remove();
    Ok(Down { fleet: fleet.into(), orphans: Some(orphans.len()), cut_off, notes: Vec::new() })
}

/// Has VMs end in good order that have no daemon.
fn shut_down_all(
    vms: &[LivingVm],
    dir: &FleetDir,
    limit: Duration,
    watch: &mut dyn FnMut(&Left) -> bool,
) -> Vec<CutOff> {
    let shutdown = Shutdown::within(limit);
    if !limit.is_zero() {
        shut_down_each(vms, dir, &shutdown);
    }
    let left = || vms.iter().filter(|vm| !vm.process.has_ended()).map(|vm| vm.guest.clone());
    loop {
        let guests: BTreeSet<_> = left().collect();
        let seconds = shutdown.time_left();
        if guests.is_empty() || seconds.is_zero() {
            break;
        }
        if !watch(&Left { guests, seconds: seconds.as_secs() }) {
            shutdown.allow(Duration::ZERO);
        }
        thread::sleep(LOOK);
    }
    let why = format!("it did not power off within {} s", limit.as_secs());
    let late = left().map(|guest| CutOff { guest, why: why.clone() }).filter(|_| !limit.is_zero()).collect();
    end_all(vms, dir);
    late
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
