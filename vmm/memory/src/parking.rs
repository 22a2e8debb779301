//! Parking pages: for a while a page of guest RAM is somewhere else in this process, so that its
//! first access is noticed, be it a vCPU's, a thread's of ours, or the kernel's on their behalf.
//! The access sleeps until the page is back, some microseconds later.
//!
//! The page is moved, never copied (mremap with MREMAP_DONTUNMAP), so it keeps its frame. Where it
//! was, userfaultfd reports a missing page. [`Parking`] is behind the lock that every replacement
//! of guest pages takes, and what is to be replaced is unparked first: a page discarded while
//! parked would otherwise come back with its old bytes, and a page being merged would be compared
//! by a thread that sleeps on it while it holds the lock. So:
//!
//! - a thread that holds the lock touches no guest RAM but pages that it has unparked under it;
//! - the thread that serves faults ([`super::parker`]) never touches guest RAM at all.
#![expect(unsafe_code, reason = "moves guest pages")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::ram::GuestRange;
use super::uffd::{self, UffdRange, Watched};
use super::{Hva, PAGE, PageNo, PageRange};

/// What became of the pages that were parked since [`Parking::begin`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parked {
    /// Touched, and brought back for that.
    pub touched: u64,
    /// Brought back because something else was to be done to them: of those it is not known whether
    /// they would have been touched.
    pub withdrawn: u64,
    /// Untouched to the end.
    pub idle: u64,
    /// Parking was not allowed for a part of the time.
    pub interrupted: bool,
}

/// A page that is parked. Made by [`Parking::park`] alone.
#[derive(Clone, Copy, Debug)]
struct Away {
    /// Where it belongs: a page of guest RAM.
    home: *mut c_void,
    /// Where it is: in a mapping of its own, reached from nowhere else.
    place: *mut c_void,
}

// SAFETY: addresses, which mean the same to every thread of this process.
unsafe impl Send for Away {}

impl Away {
    fn home(self) -> Hva {
        Hva::of(self.home)
    }
}

/// The pages of one VM's RAM that are parked. It is reached by way of that
/// [`Ram`](super::ram::Ram), so the RAM is mapped wherever this is used.
#[derive(Debug, Default)]
pub(super) struct Parking {
    /// Set once a thread serves its faults.
    descriptor: Option<Arc<OwnedFd>>,
    places: BTreeMap<PageNo, Away>,
    closed: bool,
    so_far: Parked,
}

impl Parking {
    /// Parks with `descriptor`, whose faults a thread serves from now on for as long as this
    /// process lives.
    pub(super) fn serve_by(&mut self, descriptor: Arc<OwnedFd>) {
        self.descriptor = Some(descriptor);
    }

    /// How many pages are parked.
    pub(super) fn pages(&self) -> u64 {
        self.places.len() as u64
    }

    /// Begins to count anew.
    pub(super) fn begin(&mut self) {
        self.so_far = Parked { interrupted: self.closed, ..Parked::default() };
    }

    /// What was counted since.
    pub(super) fn so_far(&self) -> Parked {
        self.so_far
    }

    /// Unparks all, and parks none until it is opened. What cannot be unparked now is on its next
    /// touch.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.so_far.interrupted = true;
        if let Err(error) = self.unpark_range(PageRange::between(PageNo(0), PageNo(u64::MAX))) {
            tracing::error!("{error}");
        }
    }

    /// No thread serves faults from now on.
    pub(super) fn retire(&mut self) {
        self.close();
        if self.places.is_empty() {
            self.descriptor = None;
        }
    }

    /// Allows parking again.
    pub(super) fn open(&mut self) {
        self.closed = false;
    }

    /// Parks a page, of this Parking's RAM and one only, which must be a present page of private
    /// anonymous memory, seen so under the lock. False where parking is not allowed, or it is
    /// parked already.
    pub(super) fn park(&mut self, page: GuestRange<'_>) -> io::Result<bool> {
        let Some(descriptor) = self.descriptor.as_ref().filter(|_| !self.closed) else { return Ok(false) };
        if page.bytes() != PAGE || self.places.contains_key(&page.pages().first()) {
            return Ok(false);
        }
        uffd::register(descriptor, UffdRange::of(page), Watched::Missing)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        // The fifth argument must be there: the kernel takes it for a hint.
        let anywhere: *mut c_void = std::ptr::null_mut();
        // SAFETY: a page of guest RAM, which stays mapped where it is: a touch there is answered by
        // the page's return. Where it goes is the kernel's choice among unused addresses.
        let place = unsafe { libc::mremap(page.as_ptr(), PAGE, PAGE, flags, anywhere) };
        if place == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // The page is there, so no thread sleeps on it.
            uffd::unregister(descriptor, UffdRange::page(page.hva()))?;
            return Err(error);
        }
        self.places.insert(page.pages().first(), Away { home: page.as_ptr(), place });
        Ok(true)
    }

    /// Brings back the page of an address that was touched, if it is parked, and wakes its sleepers
    /// in any case: the message of a touch may come after the page was brought back.
    pub(super) fn touched(&mut self, page: Option<PageNo>, hva: Hva) {
        if page.is_some_and(|page| self.unpark(page).is_some()) {
            self.so_far.touched += 1;
        } else if page.is_some_and(|page| self.places.contains_key(&page)) {
            // Not back yet. A sleeper woken now would only fault again.
            return;
        } else if let Some(descriptor) = &self.descriptor {
            // Nearly always there is nothing to undo. But where unregistering failed before, and
            // the page is gone since, a sleeper that was only woken would fault again for ever.
            let _ = uffd::unregister(descriptor, UffdRange::page(hva));
        }
        self.wake(hva);
    }

    /// Brings back what is parked of these pages: they are about to be replaced or moved.
    ///
    /// # Errors
    /// Some is not back: nothing else may be done to it.
    pub(super) fn unpark_range(&mut self, pages: PageRange) -> io::Result<()> {
        let here: Vec<PageNo> =
            self.places.range(pages.first()..pages.end()).map(|(page, _)| *page).collect();
        let mut left = 0;
        for page in here {
            match self.unpark(page) {
                Some(home) => {
                    self.so_far.withdrawn += 1;
                    self.wake(home);
                }
                None => left += 1,
            }
        }
        match left {
            0 => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("{left} pages of guest RAM that are being sampled could not be brought back"),
            )),
        }
    }

    /// Brings back one of those that are left, untouched. False when there is none.
    pub(super) fn unpark_next(&mut self) -> bool {
        let Some((&page, _)) = self.places.first_key_value() else { return false };
        let home = self.unpark(page);
        if let Some(home) = home {
            self.so_far.idle += 1;
            self.wake(home);
        }
        home.is_some()
    }

    /// Moves a page back. Where that is; None if it is not parked, or stays so.
    fn unpark(&mut self, page: PageNo) -> Option<Hva> {
        let away = *self.places.get(&page)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the page at `place` is ours alone, and is no more after that. What it replaces at
        // `home` is of guest RAM and empty, and ends its registration.
        let moved = unsafe { libc::mremap(away.place, PAGE, PAGE, flags, away.home) };
        if moved == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            if let Err(copying) = self.copy_back(away) {
                // Tried again when the period ends, until it is back; its sleepers wait.
                tracing::error!("a sampled page of guest RAM is not back yet: {error}; {copying}");
                return None;
            }
        }
        self.places.remove(&page);
        Some(away.home())
    }

    /// The way back that needs no mapping, where the kernel allows no more of them. Unlike the
    /// other it makes a new frame, which a device that had pinned the old one would not know of:
    /// what is marked ([`super::in_flight`]) is not parked.
    fn copy_back(&self, away: Away) -> io::Result<()> {
        let descriptor = self.descriptor.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        // SAFETY: the page at `place` is ours alone; the one at `home` is missing, and what it held
        // is at `place`.
        unsafe { uffd::copy_page(descriptor, away.home(), Hva::of(away.place)) }?;
        // From here on the page is the one at `home`. A registration that stays reports nothing as
        // long as that is there; after, see `touched`.
        if let Err(error) = uffd::unregister(descriptor, UffdRange::page(away.home())) {
            tracing::debug!("a sampled page of guest RAM stays watched: {error}");
        }
        // SAFETY: the page at `place` is ours alone.
        unsafe { libc::munmap(away.place, PAGE) };
        Ok(())
    }

    fn wake(&self, hva: Hva) {
        if let Some(descriptor) = &self.descriptor
            && let Err(error) = uffd::wake(descriptor, UffdRange::page(hva))
        {
            tracing::error!("cannot wake the sleepers on a sampled page of guest RAM: {error}");
        }
    }
}

#[cfg(test)]
impl Parking {
    /// As [`Self::unpark`], by the way that is for want of mappings.
    pub(super) fn copy_back_now(&mut self, page: PageNo) -> io::Result<()> {
        let away = self.places.get(&page).copied().ok_or(io::ErrorKind::NotFound)?;
        self.copy_back(away)?;
        self.places.remove(&page);
        self.wake(away.home());
        Ok(())
    }

    /// Registers the page, and leaves it where it is.
    pub(super) fn watch_only(&mut self, page: GuestRange<'_>) -> io::Result<()> {
        let descriptor = self.descriptor.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        uffd::register(descriptor, UffdRange::of(page), Watched::Missing)
    }
}
