//! The processes that stand by for a fleet's clones.

use super::Fleet;
use crate::HostError;
use crate::pool::{Hold, Pool, PoolStatus, Standby};
use crate::spec::GuestSpec;

impl Fleet {
    /// Begins to start what the fleet file wants to stand by.
    pub(super) fn start_pool(&mut self) -> Result<(), HostError> {
        if self.spec.pool > 0 {
            let pool =
                Pool::start(self.spec.pool, self.lifetime).map_err(|source| HostError::Pool { source })?;
            self.pool = Some(pool);
        }
        Ok(())
    }

    /// A process for a clone that is to be as `spec` says. One that belongs to a NUMA node is there from its first page on.
    pub(super) fn standby_for(&self, spec: &GuestSpec) -> Option<Standby> {
        self.pool.as_ref().filter(|_| spec.vm.numa.is_none())?.take()
    }

    /// While this is there, clones that are started have the processors for themselves.
    pub(super) fn hold_pool(&self) -> Option<Hold> {
        self.pool.as_ref().map(Pool::hold)
    }

    /// How its pool is, if it has one.
    pub fn pool_status(&self) -> Option<PoolStatus> {
        self.pool.as_ref().map(Pool::status)
    }
}
