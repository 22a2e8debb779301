//! Guests that `fleet down --save` saved: `fleet up` goes on from there, and then their checkpoints are of no more use.

use std::collections::BTreeMap;
use std::sync::Arc;

use store::{Compression, Name};

use super::shelf::STORE_LIMIT;
use super::{CheckpointError, Description, Shelf, load};
use crate::HostError;
use crate::images::Image;
use crate::spec::FleetSpec;
use crate::state::Started;
use crate::watch::{Stage, Watch};

/// What a guest of a fleet is saved as: a name that no user gives.
pub fn name_of(fleet: &str, guest: &str) -> Result<Name, CheckpointError> {
    Ok(Name::new(&format!("{fleet}.{guest}"))?)
}

/// What there is of a fleet.
#[derive(Default)]
pub struct Suspended {
    shelf: Option<Shelf>,
    /// Domain and name.
    checkpoints: Vec<(String, Name)>,
    images: BTreeMap<String, Arc<Image>>,
}

impl Suspended {
    /// What was saved of the fleet of `spec`, read back but for guests that run already. Clones that were saved are guests of `spec` from now on.
    pub fn find(
        shelf: Option<&Shelf>,
        spec: &mut FleetSpec,
        runs: &dyn Fn(&str) -> bool,
        watch: &Watch,
    ) -> Result<Self, HostError> {
        let Some(shelf) = shelf else { return Ok(Self::default()) };
        let mut found = Self { shelf: Some(shelf.clone()), ..Self::default() };
        let mut domains: Vec<String> = spec.guests.iter().map(|guest| guest.domain.clone()).collect();
        domains.sort_unstable();
        domains.dedup();
        let mut to_load = Vec::new();
        for domain in domains {
            let Some(store) = shelf.store(&domain)? else { continue };
            let reading = store.read(STORE_LIMIT).map_err(CheckpointError::from)?;
            for name in reading.names().map_err(CheckpointError::from)? {
                if !name.as_str().starts_with(&format!("{}.", spec.name)) {
                    continue;
                }
                let description = Description::read(&reading, &name)?;
                if description.suspended.as_ref() != Some(&spec.name) {
                    continue;
                }
                let guest = description.guest.name.clone();
                if runs(&guest) {
                    // It has gone on from there, and its daemon was killed before this was removed.
                    found.checkpoints.push((domain.clone(), name));
                } else if found.expects(&description, &name, spec)? {
                    to_load.push((guest, domain.clone(), name));
                }
            }
        }
        for (number, (guest, domain, name)) in to_load.into_iter().enumerate() {
            let near: Vec<Arc<Image>> = found.images.values().cloned().collect();
            let image = load(shelf, &domain, &name, &near, &mut |done, total| {
                watch.tell(Stage::Restore, number, done, total);
                watch.check().is_ok()
            })?;
            found.images.insert(guest, Arc::new(image));
            found.checkpoints.push((domain, name));
        }
        Ok(found)
    }

    /// Whether the fleet has this guest, which then is as it was.
    fn expects(
        &self,
        description: &Description,
        name: &Name,
        spec: &mut FleetSpec,
    ) -> Result<bool, HostError> {
        let saved = description.guest(name.as_str())?;
        let Some(wanted) = spec.guests.iter().find(|guest| guest.name == saved.name) else {
            // One that no file names is a clone, or has been taken out of the file.
            let is_clone = saved.clone_of.is_some();
            if is_clone {
                spec.guests.push(saved);
            }
            return Ok(is_clone);
        };
        let started = |guest| Started { guest, engine: spec.engine, working_set_seconds: None };
        let differences = started(saved.clone()).differences(&started(wanted.clone()));
        match differences.is_empty() {
            true => Ok(true),
            false => Err(CheckpointError::Changed {
                guest: saved.name,
                differences: differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
                checkpoint: name.as_str().into(),
            }
            .into()),
        }
    }

    /// What a guest goes on from.
    pub fn image(&self, guest: &str) -> Option<&Arc<Image>> {
        self.images.get(guest)
    }

    /// All of them run: what they have gone on from is removed, and their images are their own.
    pub fn finish(&mut self) -> Result<(), CheckpointError> {
        let Some(shelf) = &self.shelf else { return Ok(()) };
        let mut domains: Vec<&String> = self.checkpoints.iter().map(|(domain, _)| domain).collect();
        domains.dedup();
        for domain in domains {
            let Some(store) = shelf.store(domain)? else { continue };
            let writing = store.write(STORE_LIMIT)?;
            for (_, name) in self.checkpoints.iter().filter(|(of, _)| of == domain) {
                writing.remove(name)?;
            }
            writing.collect(Compression::default(), &mut |_, _| true)?;
        }
        *self = Self::default();
        Ok(())
    }
}
