//! A governor's grip on a fleet that others use, too.

use std::sync::{Arc, Mutex, Weak};

use super::HostError;
use super::fleet::Fleet;
use super::governor::{Actuator, Governor};
use super::ledger::Budget;
use super::runtime::FleetDir;
use merge::SlabPages;
use os::lock;

/// Manages the memory of `fleet`, whose files are in `dir`, as its fleet file says. It goes on from
/// what an earlier governor has left there.
pub fn govern(fleet: &Arc<Mutex<Fleet>>, dir: &FleetDir) -> Result<Governor, HostError> {
    let (handles, overcommit) = {
        let mut fleet = lock(fleet);
        (fleet.handles()?, fleet.spec.overcommit)
    };
    let actuator = Box::new(FleetActuator::of(fleet));
    Governor::start(handles, dir, overcommit.knobs, overcommit.policy, actuator)
}

/// What the governor needs of the fleet, taken when it is free.
struct FleetActuator {
    /// Gone when its owner ends.
    fleet: Weak<Mutex<Fleet>>,
    budget: Budget,
    slab_pages: Option<SlabPages>,
    /// The merge priority to set as soon as the fleet is not locked.
    urgent: Option<bool>,
    /// Images that have no name are to go as soon as the fleet is not locked.
    drops_images: bool,
}

impl FleetActuator {
    fn of(fleet: &Arc<Mutex<Fleet>>) -> Self {
        let now = lock(fleet);
        Self {
            fleet: Arc::downgrade(fleet),
            budget: now.budget(),
            slab_pages: now.slab_pages(),
            urgent: None,
            drops_images: false,
        }
    }
}

impl Actuator for FleetActuator {
    fn budget(&mut self) -> Budget {
        if let Some(fleet) = self.fleet.upgrade()
            && let Ok(mut fleet) = fleet.try_lock()
        {
            if std::mem::take(&mut self.drops_images) {
                fleet.drop_unnamed_images();
            }
            self.budget = fleet.budget();
            if let Some(urgent) = self.urgent.take() {
                fleet.set_priority(urgent);
            }
        }
        Budget { slab_pages: self.slab_pages.as_ref().map(|ask| ask()), ..self.budget }
    }

    fn merge(&mut self, urgent: bool) {
        self.urgent = Some(urgent);
        self.budget();
    }

    fn drop_images(&mut self) -> bool {
        let is_new = !std::mem::replace(&mut self.drops_images, true);
        self.budget();
        is_new
    }
}
