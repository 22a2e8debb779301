//! Freezing a run of pages: until it is thawed, a vCPU, a thread of ours, or the kernel on behalf
//! of either that writes to it sleeps.
//!
//! By userfaultfd's write protection, registered for the run just in time (all of RAM registered
//! from the start would cost fault-around and forbid large folios). The descriptor's messages are
//! never read: sleepers are woken by address. I/O that has pinned a page before still writes to it,
//! see [`super::in_flight`].

use std::io;
use std::os::fd::OwnedFd;

use super::ram::GuestRange;
use super::uffd::{self, UffdRange, Watched};
use super::userfault;

/// Freezes runs, one at a time.
#[derive(Debug)]
pub(super) struct Freezer {
    /// None after a failure that left no other way to free the sleepers.
    descriptor: Option<OwnedFd>,
}

impl Freezer {
    /// Needs Linux 6.4, and a userfaultfd that handles faults of the kernel (KVM's are such).
    pub(super) fn new() -> io::Result<Self> {
        let descriptor = userfault::open(&userfault::TO_FREEZE)?;
        Ok(Self { descriptor: Some(descriptor) })
    }

    /// Freezes a run. On an error nothing is frozen.
    pub(super) fn freeze<'a>(&'a mut self, run: GuestRange<'a>) -> io::Result<Frozen<'a>> {
        uffd::register(self.descriptor()?, UffdRange::of(run), Watched::WriteProtected)?;
        // From here on dropping undoes everything, also a protection that was put up in part.
        let frozen = Frozen { freezer: self, run, registered: true };
        uffd::write_protect(frozen.freezer.descriptor()?, UffdRange::of(run))?;
        Ok(frozen)
    }

    fn descriptor(&self) -> io::Result<&OwnedFd> {
        self.descriptor.as_ref().ok_or(io::ErrorKind::NotConnected.into())
    }
}

/// A run that cannot be written to. Dropping it thaws the run.
pub(super) struct Frozen<'a> {
    freezer: &'a mut Freezer,
    run: GuestRange<'a>,
    registered: bool,
}

impl Frozen<'_> {
    /// Says that something else is mapped over the whole run now, which has dropped the
    /// registration with the old mapping. Sleepers go on and find the new one.
    pub(super) fn replaced(mut self) {
        self.registered = false;
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let range = UffdRange::of(self.run);
        // In this order: unregistering takes the protection away and wakes no sleeper; one that is
        // woken before faults and sleeps again.
        let thawed = self.freezer.descriptor().and_then(|descriptor| {
            if self.registered {
                uffd::unregister(descriptor, range)?;
            }
            uffd::wake(descriptor, range)
        });
        if thawed.is_err() {
            // Closing the descriptor wakes all sleepers. Nothing is frozen by it ever after.
            self.freezer.descriptor = None;
        }
    }
}
