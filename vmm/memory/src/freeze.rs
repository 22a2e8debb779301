//! Freezing a run of pages: until it is thawed nobody writes to it, be it a vCPU, a thread of ours or the kernel for either;
//! who tries sleeps.
//!
//! By userfaultfd's write protection, registered for the run just in time (all of RAM registered from the start would cost
//! fault-around and forbid large folios). Nobody reads the descriptor's messages: sleepers are woken by address. Who has
//! pinned a page before writes on, see [`super::in_flight`].
#![expect(unsafe_code, reason = "userfaultfd is reached by ioctls")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::ram::GuestRange;
use super::userfault;

const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
}

impl Range {
    fn of(run: GuestRange<'_>) -> Self {
        Self { start: run.hva().0, bytes: run.pages().bytes() }
    }
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const _: () =
    assert!(size_of::<Range>() == 16 && size_of::<Register>() == 32 && size_of::<WriteProtect>() == 24);

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
        let mut register = Register { range: Range::of(run), mode: REGISTER_MODE_WP, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut register)?;
        // From here on dropping undoes everything, also a protection that was put up in part.
        let frozen = Frozen { freezer: self, run, registered: true };
        let mut protect = WriteProtect { range: Range::of(run), mode: WRITEPROTECT_MODE_WP };
        frozen.freezer.ioctl(UFFDIO_WRITEPROTECT, &mut protect)?;
        Ok(frozen)
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        let descriptor = self.descriptor.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        // SAFETY: each request here takes the structure it is called with, which is exclusively ours. It changes who may write
        // to which page, and no content.
        match unsafe { libc::ioctl(descriptor.as_raw_fd(), request, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// A run that nobody writes to. Dropped, it is thawed and as it was.
pub(super) struct Frozen<'a> {
    freezer: &'a mut Freezer,
    run: GuestRange<'a>,
    registered: bool,
}

impl Frozen<'_> {
    /// Says that something else is mapped over the whole run now, which has dropped the registration with the old mapping.
    /// Sleepers go on and find the new one.
    pub(super) fn replaced(mut self) {
        self.registered = false;
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let range = || Range::of(self.run);
        // In this order: unregistering takes the protection away and wakes nobody; a sleeper that is woken before looks again
        // and sleeps again.
        let thawed = match self.registered {
            true => self.freezer.ioctl(UFFDIO_UNREGISTER, &mut range()),
            false => Ok(()),
        };
        if thawed.and_then(|()| self.freezer.ioctl(UFFDIO_WAKE, &mut range())).is_err() {
            // Closing the descriptor frees everybody. Nothing is frozen by it ever after.
            self.freezer.descriptor = None;
        }
    }
}
