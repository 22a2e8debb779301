//! What a daemon saves, and what it reads back. It has the fleet while guests are captured or started, and not while pages are written or read.

use std::sync::Arc;
use std::time::Instant;

use store::Name;

use super::Daemon;
use crate::HostError;
use crate::checkpoints::{CheckpointError, CheckpointInfo, Description, Shelf, WorkKind, load, save};
use crate::status::{Cloned, OnDisk, Restore};
use crate::watch::Watch;

impl Daemon {
    /// Captures a guest, and saves that as `name`.
    pub(super) fn save(
        &self,
        guest: &str,
        name: &str,
        disk: &OnDisk,
        watch: &Watch,
    ) -> Result<CheckpointInfo, HostError> {
        let (called, began) = (named(name)?, Instant::now());
        let shelf = Shelf::find(Some(&disk.stores))?;
        let image = {
            let mut fleet = self.free(watch)?;
            // Before the guest is kept waiting.
            let domain = fleet.guest(guest)?.spec.domain.clone();
            let store = shelf.store(&domain)?;
            let names = store.map(|store| store.read(crate::checkpoints::STORE_LIMIT)?.names()).transpose();
            if names.map_err(CheckpointError::from)?.is_some_and(|names| names.contains(&called)) {
                return Err(CheckpointError::from(store::StoreError::Taken(name.into())).into());
            }
            fleet.capture(guest)?
        };
        let work = self.works.begin(WorkKind::Save, name);
        let saved = save(&image, &called, &shelf, (disk.compress, None), &mut |done, total| {
            work.tell(done, total);
            watch.check().is_ok()
        });
        Ok(CheckpointInfo { seconds: Some(began.elapsed().as_secs_f64()), ..saved? })
    }

    /// Has guests go on from a checkpoint.
    pub(super) fn restore(&self, wanted: &Restore, watch: &Watch) -> Result<Cloned, HostError> {
        let (name, began) = (named(&wanted.name)?, Instant::now());
        let shelf = Shelf::find(Some(&wanted.stores))?;
        let Some(store) = shelf.store(&wanted.domain)? else {
            return Err(CheckpointError::Missing { name: wanted.name.clone(), known: "none".into() }.into());
        };
        let description = {
            let reading = store.read(crate::checkpoints::STORE_LIMIT).map_err(CheckpointError::from)?;
            Description::read(&reading, &name)?
        };
        let near = {
            let mut fleet = self.free(watch)?;
            // Before all of it is read.
            fleet.restore_specs(&description.guest, wanted)?;
            fleet.images_of(&wanted.domain)
        };
        let work = self.works.begin(WorkKind::Restore, &wanted.name);
        let image = load(&shelf, &wanted.domain, &name, &near, &mut |done, total| {
            work.tell(done, total);
            watch.check().is_ok()
        })?;
        drop(work);
        let mut fleet = self.free(watch)?;
        let restored = fleet.restore(&Arc::new(image), wanted, began, watch);
        // Guests that have joined are managed from now on, those that have ended no more.
        self.governor.set_handles(fleet.handles()?);
        restored
    }

    /// Saves all guests and ends them.
    pub(super) fn suspend(&self, disk: &OnDisk, watch: &Watch) -> Result<(), HostError> {
        let shelf = Shelf::find(Some(&disk.stores))?;
        self.free(watch)?.suspend(&shelf, disk.compress, &self.works, watch)
    }
}

fn named(name: &str) -> Result<Name, HostError> {
    Ok(Name::new(name).map_err(CheckpointError::from)?)
}
