//! Guests of a fleet that go on from a checkpoint, and a fleet that is saved.

use std::sync::Arc;
use std::time::Instant;

use store::{Compression, Name};

use super::Fleet;
use crate::HostError;
use crate::checkpoints::suspended::name_of;
use crate::checkpoints::{CheckpointError, Shelf, WorkKind, Works, save};
use crate::images::Image;
use crate::spec::{EngineName, GuestSpec, MAX_GUESTS};
use crate::status::{Cloned, Restore};
use crate::watch::Watch;
use machine::control::Request;

impl Fleet {
    /// The images of a domain that are kept by a name, or by clones.
    pub(crate) fn images_of(&self, domain: &str) -> Vec<Arc<Image>> {
        let named = self.images.iter().map(|(_, image)| image);
        let all = named.chain(self.guests.iter().filter_map(|guest| guest.image()));
        all.filter(|image| image.spec.domain == domain).cloned().collect()
    }

    /// What guests that go on from `origin` as `wanted` are to be, if the fleet may have them.
    pub(crate) fn restore_specs(
        &mut self,
        origin: &GuestSpec,
        wanted: &Restore,
    ) -> Result<Vec<GuestSpec>, HostError> {
        let room = MAX_GUESTS.saturating_sub(self.guests.len());
        if !(1..=room).contains(&wanted.count) {
            return Err(HostError::CloneCount { asked: wanted.count, room, most: MAX_GUESTS });
        }
        let domains = self.spec.guests.iter().map(|guest| &guest.domain);
        if self.spec.engine == EngineName::Ksm && domains.into_iter().any(|domain| *domain != origin.domain) {
            let (name, domain) = (wanted.name.clone(), origin.domain.clone());
            return Err(CheckpointError::Domain { name, domain }.into());
        }
        // Alone, and under a name that is free, it is the guest that it was.
        let is_free = !self.guests.iter().any(|guest| guest.spec.name == origin.name)
            && self.images.get(&origin.name).is_none();
        let specs = match (&wanted.prefix, wanted.count) {
            (None, 1) if is_free => vec![GuestSpec { clone_of: Some(origin.name.clone()), ..origin.clone() }],
            (prefix, count) => {
                self.clone_specs(origin, prefix.as_deref().unwrap_or(&origin.name), count, &[])?
            }
        };
        self.fits(&specs)?;
        Ok(specs)
    }

    /// Starts guests that go on from `image`, which was asked for when it `began`, and waits until each has answered. All of them, or none.
    pub(crate) fn restore(
        &mut self,
        image: &Arc<Image>,
        wanted: &Restore,
        began: Instant,
        watch: &Watch,
    ) -> Result<Cloned, HostError> {
        let specs = self.restore_specs(&image.spec, wanted)?;
        self.start_named(specs, image, &wanted.name, began, watch)
    }

    /// Its guests run: what they have gone on from is of no more use.
    pub(crate) fn forget_suspended(&mut self) {
        if let Err(error) = self.suspended.finish() {
            tracing::warn!("what the guests have gone on from is still there: {}", os::one_line(&error));
        }
    }

    /// Saves every guest that runs, and ends it. All of them, or none: then they run on.
    pub(crate) fn suspend(
        &mut self,
        shelf: &Shelf,
        compression: Compression,
        works: &Works,
        watch: &Watch,
    ) -> Result<(), HostError> {
        let names: Vec<String> =
            self.guests.iter_mut().filter_map(|g| g.ended().is_none().then(|| g.spec.name.clone())).collect();
        let mut saved: Vec<(String, Name)> = Vec::new();
        let mut paused = Vec::new();
        let done = names.iter().try_for_each(|name| {
            let guest = self.guest(name)?;
            // What it did after it was captured would be undone.
            if !guest.vm_status()?.paused {
                guest.control(&Request::Pause)?;
                paused.push(name.clone());
            }
            let image = self.capture(name)?;
            let called = name_of(&self.spec.name, name)?;
            forget(shelf, &image.spec.domain, &called)?;
            let work = works.begin(WorkKind::Save, called.as_str());
            let suspended = Some(self.spec.name.clone());
            save(&image, &called, shelf, (compression, suspended), &mut |done, total| {
                work.tell(done, total);
                watch.check().is_ok()
            })?;
            saved.push((image.spec.domain.clone(), called));
            // The next one shares with it: by what is on the disk, not by its slabs.
            Ok(())
        });
        if let Err(error) = done {
            for (domain, name) in saved {
                let _ = forget(shelf, &domain, &name);
            }
            for name in paused {
                let _ = self.guest(&name).and_then(|guest| guest.control(&Request::Resume));
            }
            return Err(error);
        }
        self.guests.iter_mut().for_each(|guest| guest.stop());
        Ok(())
    }
}

/// Removes a checkpoint, if it is there.
fn forget(shelf: &Shelf, domain: &str, name: &Name) -> Result<(), CheckpointError> {
    let Some(store) = shelf.store(domain)? else { return Ok(()) };
    let writing = store.write(crate::checkpoints::STORE_LIMIT)?;
    if writing.names()?.contains(name) {
        writing.remove(name)?;
    }
    Ok(())
}
