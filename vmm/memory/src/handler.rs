//! Guest RAM that another process fills: a page that is touched for the first time is asked for by
//! userfaultfd, and the thread that touches it, a vCPU's, a device's or KVM's, sleeps until the
//! page is there.
//!
//! This process keeps the descriptor for as long as there is RAM. So a handler that is gone leaves
//! sleepers asleep: no page ever reads as zeros because nothing fills it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::ram::{Backing, Ram};
use super::uffd::{self, UffdRange, Watched};
use super::userfault;

/// What is reported to the handler besides missing pages: pages that are given back, which it is to
/// fill with zeros.
const FEATURES: [&str; 1] = ["event_remove"];

/// The descriptor by which a handler fills RAM.
#[derive(Debug)]
pub struct HandlerFd(OwnedFd);

impl AsFd for HandlerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Ram {
    /// Has all of RAM, to which nothing was written yet, filled by the process that has the
    /// descriptor. From now on a thread that touches RAM may wait for it.
    ///
    /// # Errors
    /// RAM is not anonymous memory, or this process may have no userfaultfd that handles faults of
    /// the kernel.
    pub fn fill_by_handler(&self) -> io::Result<HandlerFd> {
        if self.backing() != Backing::Anonymous {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "guest RAM is not anonymous memory"));
        }
        let descriptor = userfault::open(&FEATURES)?;
        // A handler polls it.
        fcntl_setfl(&descriptor, fcntl_getfl(&descriptor)? | OFlags::NONBLOCK)?;
        for stretch in self.stretches() {
            uffd::register(&descriptor, UffdRange::of(stretch), Watched::Missing)?;
        }
        self.is_filled_by_handler_from_now_on();
        Ok(HandlerFd(descriptor))
    }
}
