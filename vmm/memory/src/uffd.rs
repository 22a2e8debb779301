//! The userfaultfd requests that are made about guest RAM, and their structures.
//!
//! Source: the kernel's include/uapi/linux/userfaultfd.h.
#![expect(unsafe_code, reason = "userfaultfd is reached by ioctls")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{Hva, PAGE_BYTES};
use crate::ram::GuestRange;

/// `_UFFDIO_REGISTER` and its kin, with the sizes of their structures.
const REGISTER: libc::c_ulong = 0xC020_AA00;
const UNREGISTER: libc::c_ulong = 0x8010_AA01;
const WAKE: libc::c_ulong = 0x8010_AA02;
const COPY: libc::c_ulong = 0xC028_AA03;
const WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// What is reported of a range: `UFFDIO_REGISTER_MODE_...`.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(super) enum Watched {
    /// Touches of pages that are not there.
    Missing = 1 << 0,
    /// Writes to pages that are write-protected.
    WriteProtected = 1 << 1,
}

/// `struct uffdio_range`: whole pages of guest RAM.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdRange {
    start: u64,
    bytes: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    range: UffdRange,
    mode: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copied {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

const _: () = assert!(size_of::<UffdRange>() == 16 && size_of::<Register>() == 32);
const _: () = assert!(size_of::<WriteProtect>() == 24 && size_of::<Copied>() == 40);

impl UffdRange {
    /// A run of pages.
    pub(super) fn of(run: GuestRange<'_>) -> Self {
        Self { start: run.hva().0, bytes: run.pages().bytes() }
    }

    /// The page at an address.
    pub(super) fn page(hva: Hva) -> Self {
        Self { start: hva.0, bytes: PAGE_BYTES }
    }
}

/// Has touches of a range reported to `descriptor`.
pub(super) fn register(descriptor: &OwnedFd, range: UffdRange, watched: Watched) -> io::Result<()> {
    ioctl(descriptor, REGISTER, &mut Register { range, mode: watched as u64, ioctls: 0 })
}

/// Unregisters a range, which drops its write protection. Wakes no sleeper.
pub(super) fn unregister(descriptor: &OwnedFd, mut range: UffdRange) -> io::Result<()> {
    ioctl(descriptor, UNREGISTER, &mut range)
}

/// Write-protects a range that is registered for that.
pub(super) fn write_protect(descriptor: &OwnedFd, range: UffdRange) -> io::Result<()> {
    ioctl(descriptor, WRITEPROTECT, &mut WriteProtect { range, mode: WRITEPROTECT_MODE_WP })
}

/// Wakes threads that sleep on a range.
pub(super) fn wake(descriptor: &OwnedFd, mut range: UffdRange) -> io::Result<()> {
    ioctl(descriptor, WAKE, &mut range)
}

/// Fills the missing page at `to` with the bytes of the page at `from`, and wakes threads that
/// sleep on it.
///
/// # Safety
/// `from` is a page that stays mapped and that nothing writes to meanwhile; `to` is a missing page
/// of guest RAM that is to hold those bytes.
pub(super) unsafe fn copy_page(descriptor: &OwnedFd, to: Hva, from: Hva) -> io::Result<()> {
    let mut copied = Copied { to: to.0, from: from.0, bytes: PAGE_BYTES, mode: 0, copied: 0 };
    ioctl(descriptor, COPY, &mut copied)
}

fn ioctl<T>(descriptor: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request here takes the structure it is called with, which is exclusively ours.
    // COPY writes to memory, for which the caller of `copy_page` vouches; the others change which
    // pages may be written, and no content.
    match unsafe { libc::ioctl(descriptor.as_raw_fd(), request, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
