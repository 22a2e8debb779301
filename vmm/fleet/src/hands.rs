//! A governor's grip on a fleet that others use, too.

use std::sync::{Arc, Mutex, Weak};

use super::HostError;
use super::fleet::Fleet;
use super::governor::{Governor, Hands};
use super::ledger::Means;
use super::runtime::FleetDir;
use merge::SlabPages;
use os::lock;

/// Has `fleet`, whose files are in `dir`, kept within its means, as its fleet file says. It goes on from what an earlier governor has
/// left there.
pub fn govern(fleet: &Arc<Mutex<Fleet>>, dir: &FleetDir) -> Result<Governor, HostError> {
    let (posts, overcommit) = {
        let mut fleet = lock(fleet);
        (fleet.posts()?, fleet.spec.overcommit)
    };
    let hands = Box::new(FleetHands::of(fleet));
    Governor::start(posts, dir, overcommit.knobs, overcommit.policy, hands)
}

/// What the governor needs of the fleet, taken when nobody else has it.
struct FleetHands {
    /// Gone when its owner ends.
    fleet: Weak<Mutex<Fleet>>,
    means: Means,
    slab_pages: Option<SlabPages>,
    /// What the engine is to be told as soon as nobody has the fleet.
    eager: Option<bool>,
}

impl FleetHands {
    fn of(fleet: &Arc<Mutex<Fleet>>) -> Self {
        let now = lock(fleet);
        Self { fleet: Arc::downgrade(fleet), means: now.means(), slab_pages: now.slab_pages(), eager: None }
    }
}

impl Hands for FleetHands {
    fn means(&mut self) -> Means {
        if let Some(fleet) = self.fleet.upgrade()
            && let Ok(mut fleet) = fleet.try_lock()
        {
            self.means = fleet.means();
            if let Some(eager) = self.eager.take() {
                fleet.urge(eager);
            }
        }
        Means { slab_pages: self.slab_pages.as_ref().map(|ask| ask()), ..self.means }
    }

    fn merge(&mut self, eager: bool) {
        self.eager = Some(eager);
        self.means();
    }
}
