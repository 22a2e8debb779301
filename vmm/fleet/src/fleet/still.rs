//! Guests held still while they are measured, and let run again by a later daemon if this one is
//! killed meanwhile.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::super::HostError;
use super::super::guest::Guest;
use super::Fleet;
use machine::control::Request;

impl Fleet {
    /// Where it stands which guests are held still for a measurement.
    fn held(&self) -> PathBuf {
        self.dir.policy().with_file_name("held.state")
    }

    fn write_held(&self, guests: &[String]) -> Result<(), HostError> {
        let path = self.held();
        let written =
            serde_json::to_vec(guests).map_err(io::Error::from).and_then(|bytes| fs::write(&path, bytes));
        written.map_err(|source| HostError::Runtime { what: "write", path, source })
    }

    /// Has those guests run again that were held still for a measurement by a daemon that was
    /// killed, or that did not answer when they were to run again. Of those that do not answer yet
    /// it is tried again.
    pub(crate) fn release_held(&mut self) {
        let Ok(bytes) = fs::read(self.held()) else { return };
        let held: Vec<String> = serde_json::from_slice(&bytes).unwrap_or_default();
        let left_out = std::mem::take(&mut self.left_out);
        let waits = |guest: &mut Guest| {
            let asked = held.contains(&guest.spec.name) && guest.ended().is_none();
            asked && (left_out.contains(&guest.spec.name) || guest.control(&Request::Resume).is_err())
        };
        let held: Vec<String> =
            self.guests.iter_mut().filter_map(|g| waits(g).then(|| g.spec.name.clone())).collect();
        self.left_out = left_out;
        self.note_held(&held);
    }

    /// Writes down which guests are yet to be resumed.
    fn note_held(&self, guests: &[String]) {
        let noted = match guests {
            [] => fs::remove_file(self.held()).map_err(|source| HostError::Runtime {
                what: "remove",
                path: self.held(),
                source,
            }),
            guests => self.write_held(guests),
        };
        if let Err(error) = noted {
            tracing::warn!(%error, "cannot note which guests are paused for a measurement");
        }
    }

    /// Pauses all guests while `work` runs.
    pub fn paused<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        self.leave_out_silent()?;
        // A guest that others have paused stays so.
        let running = self.each(|guest| Ok((!guest.vm_status()?.paused).then(|| guest.spec.name.clone())))?;
        let ours: Vec<String> = running.into_iter().flatten().collect();
        // Written down first: were we killed now, they would be taken to be paused by their owner,
        // for ever.
        self.write_held(&ours)?;
        let is_ours = |guest: &Guest| ours.contains(&guest.spec.name);
        let paused = self.each(|guest| match is_ours(guest) {
            true => guest.control(&Request::Pause).map(drop),
            false => Ok(()),
        });
        let result = paused.and_then(|_| work(self));
        let resumed = self.each(|guest| {
            let resumed = if is_ours(guest) { guest.control(&Request::Resume).map(drop) } else { Ok(()) };
            Ok(resumed.map_err(|error| (guest.spec.name.clone(), error)))
        })?;
        let failed: Vec<(String, HostError)> = resumed.into_iter().filter_map(Result::err).collect();
        let names: Vec<String> = failed.iter().map(|(name, _)| name.clone()).collect();
        self.note_held(&names);
        let resumed = failed.into_iter().next().map_or(Ok(()), |(_, error)| Err(error));
        let value = result?;
        resumed?;
        Ok(value)
    }
}
