//! What a Linux guest's kernel uses its frames for, asked of its agent, a reply at a time.

use std::fmt::Write;
use std::io;
use std::time::{Duration, Instant};

use guest::protocol::{Command, Done, Reply};

use super::HostError;
use super::daemon_client::{request, unexpected};
use super::fleet::Fleet;
use super::guest::Guest;
use super::status;
use super::watch::Watch;
use memory::PAGE_BYTES;

/// How long a guest may take to tell of all its frames.
const LIMIT: Duration = Duration::from_secs(60);
/// How long the daemon may take: others may have asked before.
const DAEMON_LIMIT: Duration = Duration::from_secs(180);

/// Asks the daemon of `fleet` what the kernel of `guest` uses its frames for: runs from guest frame
/// 0 on, as [`guest::protocol::frame_runs`] reads them.
///
/// # Errors
/// The guest cannot tell (the built-in one never can), is paused, or is gone; or the daemon is.
pub fn page_types(fleet: &str, guest: &str) -> Result<String, HostError> {
    match request(fleet, &status::Request::PageTypes { guest: guest.into() }, DAEMON_LIMIT)? {
        status::Reply::PageTypes(runs) => Ok(runs),
        other => Err(unexpected(&other)),
    }
}

impl Fleet {
    /// What the kernel of the guest of this name uses its frames for: see [`page_types`].
    pub(super) fn page_types(&mut self, name: &str, watch: &Watch) -> Result<String, HostError> {
        self.guest(name)?.page_types(watch)
    }
}

impl Guest {
    fn page_types(&mut self, watch: &Watch) -> Result<String, HostError> {
        let status = self.vm_status()?;
        if status.paused {
            return Err(HostError::Paused { guest: self.spec.name.clone() });
        }
        let end = status.extents.iter().map(|extent| extent.gpas().end.0 / PAGE_BYTES).max();
        let (mut text, mut from, began) = (String::new(), 0, Instant::now());
        // Each reply has at least one frame, or is the last one.
        while from < end.unwrap_or(0) {
            let command = Command::Frames { from };
            let Some(com2) = &mut self.com2 else {
                let peer = format!("COM2 of guest {}", self.spec.name);
                return Err(HostError::socket(peer, io::Error::from(io::ErrorKind::NotConnected)));
            };
            // Unlike other commands this one does not wait for a guest that is held back: the whole
            // fleet would.
            let slow = || HostError::Slow { guest: self.spec.name.clone(), command: "frames", limit: LIMIT };
            let reply = com2.command(&command, LIMIT, &mut |_| {
                watch.check()?;
                if began.elapsed() > LIMIT { Err(slow()) } else { Ok(false) }
            })?;
            let Reply::Ok(Done::Frames(frames)) = reply else { break };
            if from.checked_add(frames.runs.frames()) != Some(frames.next) {
                let answer = format!("{} frames, and {} is the next", frames.runs.frames(), frames.next);
                return Err(HostError::Refused {
                    guest: self.spec.name.clone(),
                    command: command.to_string(),
                    answer,
                });
            }
            if frames.next == from {
                break;
            }
            if began.elapsed() > LIMIT {
                return Err(slow());
            }
            let _ = write!(text, "{}", frames.runs);
            from = frames.next;
        }
        Ok(text)
    }
}
