//! Reading pages of another process with process_vm_readv: one copy instead of two, and many pages
//! by one call.
//!
//! It pins what it reads, for reading and for as long as the call lasts. Before it does, the kernel
//! (since 5.19; `gup_must_unshare` in its mm/internal.h) makes an anonymous page the process's
//! alone if that is not marked as such: a page that KSM merged never is, nor one that a fork
//! shares. Such a page gets a frame of its own, which is what a reader must not cause. Pages of
//! files, memfds and shared memory stay as they are, as the pin is not a long one. So what
//! [`PagemapEntry::keeps_frame_when_pinned`] says yes to may be read here, and everything else by
//! [`RemoteMemory::read`].
//!
//! Between a look at the page table and the pin a page may be merged: then it is unshared, and
//! merged again by the next pass. And one that a userfaultfd takes away in that moment is waited
//! for, as its own process would.
//!
//! [`PagemapEntry::keeps_frame_when_pinned`]: kernel_view::pagemap::PagemapEntry::keeps_frame_when_pinned
#![expect(unsafe_code, reason = "process_vm_readv takes lists of addresses")]

use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

use super::super::Hva;
use super::super::page::to_usize;
use super::RemoteMemory;
use super::error::RemoteError;

/// Ranges in one call: the kernel's UIO_MAXIOV.
const MAX_RANGES: usize = 1024;

/// An address that no process has: reading it faults nothing in.
const NOWHERE: u64 = 1 << 62;

impl RemoteMemory {
    /// Fills `into` from the addresses `hvas`, one for each. Says whether all of it was read; if
    /// not, `into` holds garbage, and [`RemoteMemory::read`] says what is wrong. Where it is not
    /// permitted it is not tried again.
    ///
    /// The process is known by its number here: see [`Self::check_alive`].
    pub fn read_pinned(&mut self, hvas: &[Hva], into: &mut [IoSliceMut<'_>]) -> bool {
        if !self.may_pin || hvas.len() != into.len() || hvas.len() > MAX_RANGES {
            return false;
        }
        let range = |(hva, part): (&Hva, &IoSliceMut<'_>)| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(to_usize(hva.0)),
            iov_len: part.len(),
        };
        let remote: Vec<libc::iovec> = hvas.iter().zip(into.iter()).map(range).collect();
        let wanted: usize = into.iter().map(|part| part.len()).sum();
        let count = remote.len() as libc::c_ulong;
        // SAFETY: an IoSliceMut is an iovec by its documentation, and each is memory that is ours
        // alone for as long as the call lasts. The other list's addresses mean something in the
        // other process only, which is not written to.
        let read = unsafe {
            libc::process_vm_readv(
                self.pid.cast_signed(),
                into.as_mut_ptr().cast(),
                count,
                remote.as_ptr(),
                count,
                0,
            )
        };
        if read < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT) {
            self.may_pin = false;
        }
        usize::try_from(read) == Ok(wanted)
    }

    /// Whether the process that was opened is still there, after it was read by its number: that
    /// may be another's by now.
    ///
    /// # Errors
    /// [`RemoteError::Exited`]: what [`Self::read_pinned`] read since the last check may be another process's.
    pub fn check_alive(&self) -> Result<(), RemoteError> {
        match self.file.read_at(&mut [0], NOWHERE) {
            Ok(0) => Err(RemoteError::Exited { pid: self.pid }),
            // There is an address space to find nothing in, and it is the one that was opened.
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn pieces_are_read_in_one_call() {
        let data: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let base = Hva::of(data.as_ptr());
        let (mut first, mut second) = ([0; 100], [0; 50]);
        let mut memory = RemoteMemory::open(process::id()).unwrap();
        let mut into = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        assert!(memory.read_pinned(&[base + 5_000, base], &mut into));
        assert_eq!((&first[..], &second[..]), (&data[5_000..5_100], &data[..50]));
        memory.check_alive().unwrap();
        // Nothing is mapped there: no reason not to go on.
        let mut into = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        assert!(!memory.read_pinned(&[base, Hva(4096)], &mut into));
        assert!(memory.read_pinned(&[base], &mut [IoSliceMut::new(&mut second)]));
        memory.may_pin = false;
        assert!(!memory.read_pinned(&[base], &mut [IoSliceMut::new(&mut second)]));
    }

    #[test]
    fn who_has_ended_is_not_taken_for_another() {
        let mut child = process::Command::new("sleep").arg("60").spawn().unwrap();
        let mut memory = RemoteMemory::open(child.id()).unwrap();
        memory.check_alive().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!memory.read_pinned(&[Hva(1 << 20)], &mut [IoSliceMut::new(&mut [0; 8])]));
        assert!(matches!(memory.check_alive(), Err(RemoteError::Exited { .. })));
    }
}
