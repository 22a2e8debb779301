//! A file mapped for a guest to use as memory beside its RAM: its pages are those of the host's page cache, which all guests of the file have in
//! common. Nothing in this process reads or writes there.
#![expect(unsafe_code, reason = "maps a file for the guest")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use super::page::to_usize;
use super::ram::HUGE_PAGE_BYTES;
use super::{Gpa, Hva, PAGE_BYTES};

/// A file, mapped, and where the guest has it. It is unmapped when this is dropped.
#[derive(Debug)]
pub struct FileRegion {
    gpa: Gpa,
    file: File,
    read_only: bool,
    reservation: (*mut libc::c_void, usize),
    start: *mut libc::c_void,
    bytes: u64,
    /// How much of the file is mapped: less after it was cut short.
    mapped: Mutex<u64>,
}

// SAFETY: nothing is reached by its addresses but mappings, which any thread may replace; `mapped` says what of them is the file's.
unsafe impl Send for FileRegion {}
// SAFETY: as above.
unsafe impl Sync for FileRegion {}

/// What so many bytes of a file take up of guest-physical space.
pub const fn region_bytes(file_bytes: u64) -> u64 {
    file_bytes.next_multiple_of(HUGE_PAGE_BYTES)
}

impl FileRegion {
    /// Maps the first `file_bytes` of `file`, for the guest to have at `gpa`, and zeros behind them up to a multiple of 2 MiB. With `read_only`
    /// nothing can be written; else what the guest writes is in the file, but for those zeros.
    pub fn map(file: File, file_bytes: u64, gpa: Gpa, read_only: bool) -> io::Result<Self> {
        let bytes = region_bytes(file_bytes);
        let huge = to_usize(HUGE_PAGE_BYTES);
        let reserved = to_usize(bytes) + huge;
        // SAFETY: a fresh reservation at an address of the kernel's choice touches no other mapping.
        let base = unsafe {
            let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, how, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = base.wrapping_byte_add(base.addr().next_multiple_of(huge) - base.addr());
        let file_pages = file_bytes.next_multiple_of(PAGE_BYTES);
        let region = Self {
            gpa,
            file,
            read_only,
            reservation: (base, reserved),
            start,
            bytes,
            mapped: Mutex::new(file_pages),
        };
        region.map_part(0, file_pages, true)?;
        region.map_part(file_pages, bytes, false)?;
        Ok(region)
    }

    /// Where the guest has it.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// Where this process has it.
    pub fn hva(&self) -> Hva {
        Hva::of(self.start.cast::<u8>())
    }

    /// Its length, a multiple of 2 MiB.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the guest may only read it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Has the guest see zeros where the file has ended meanwhile, and has no pages any more. How many bytes those are: none if it is as long
    /// as it was.
    pub fn replace_lost(&self) -> io::Result<u64> {
        let mut mapped = os::lock(&self.mapped);
        let size = rustix::fs::fstat(&self.file)?.st_size;
        let there = u64::try_from(size).unwrap_or_default().next_multiple_of(PAGE_BYTES);
        if there >= *mapped {
            return Ok(0);
        }
        self.map_part(there, *mapped, false)?;
        let lost = *mapped - there;
        *mapped = there;
        Ok(lost)
    }

    /// Puts the file, or zeros, at these offsets.
    fn map_part(&self, from: u64, to: u64, of_file: bool) -> io::Result<()> {
        if from >= to {
            return Ok(());
        }
        let prot = libc::PROT_READ | if self.read_only { 0 } else { libc::PROT_WRITE };
        let (fd, how) = match of_file {
            true => (self.file.as_raw_fd(), libc::MAP_SHARED),
            false => (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        };
        let at = self.start.wrapping_byte_add(to_usize(from));
        let (len, offset) = (to_usize(to - from), if of_file { from.cast_signed() } else { 0 });
        // SAFETY: the range lies within the reservation, which is this region's alone: its bytes end before the reservation does.
        let done = unsafe { libc::mmap(at, len, prot, how | libc::MAP_FIXED, fd, offset) };
        if done == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Dumps of the VMM must not hold what guests keep. Failure costs nothing but dump size.
        // SAFETY: the range is the mapping just made; the advice changes no contents.
        unsafe { libc::madvise(done, len, libc::MADV_DONTDUMP) };
        Ok(())
    }
}

impl Drop for FileRegion {
    fn drop(&mut self) {
        let (base, bytes) = self.reservation;
        // SAFETY: the reservation is this region's alone, and nothing in this process refers to what is there. KVM is told by the kernel.
        unsafe { libc::munmap(base, bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const BYTES: u64 = 3 * PAGE_BYTES + 100;

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; BYTES as usize], 0).unwrap();
        file
    }

    fn byte(region: &FileRegion, at: u64) -> u8 {
        // SAFETY: the byte is in the region, which is mapped for reading.
        unsafe { region.start.byte_add(at as usize).cast::<u8>().read_volatile() }
    }

    fn put(region: &FileRegion, at: u64, value: u8) {
        // SAFETY: the byte is in the region, which is mapped for writing.
        unsafe { region.start.byte_add(at as usize).cast::<u8>().write_volatile(value) }
    }

    #[test]
    fn what_is_written_is_in_the_file_and_behind_it_are_zeros() {
        let file = file();
        let map =
            |read_only| FileRegion::map(file.try_clone().unwrap(), BYTES, Gpa(4 << 30), read_only).unwrap();
        let (one, two) = (map(false), map(true));
        assert_eq!((one.bytes(), one.hva().0 % HUGE_PAGE_BYTES), (HUGE_PAGE_BYTES, 0));
        put(&one, PAGE_BYTES, 9);
        // Behind the end of the file, in its last page and in those behind it.
        put(&one, HUGE_PAGE_BYTES - 1, 9);
        let seen = [0, PAGE_BYTES, BYTES - 1, BYTES, HUGE_PAGE_BYTES - 1].map(|at| byte(&two, at));
        assert_eq!(seen, [7, 9, 7, 0, 0]);
        let mut read = [0; 1];
        file.read_exact_at(&mut read, PAGE_BYTES).unwrap();
        assert_eq!((read, file.metadata().unwrap().len()), ([9], BYTES));
    }

    #[test]
    fn a_file_that_is_cut_short_reads_as_zeros_where_it_was() {
        let file = file();
        let region = FileRegion::map(file.try_clone().unwrap(), BYTES, Gpa(4 << 30), false).unwrap();
        assert_eq!(region.replace_lost().unwrap(), 0);
        file.set_len(PAGE_BYTES + 1).unwrap();
        assert_eq!(region.replace_lost().unwrap(), 2 * PAGE_BYTES);
        assert_eq!(region.replace_lost().unwrap(), 0);
        assert_eq!([0, PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES].map(|at| byte(&region, at)), [7, 7, 0, 0]);
        // It does not come back: the guest has seen that it is gone.
        file.set_len(BYTES).unwrap();
        file.write_all_at(&[5; BYTES as usize], 0).unwrap();
        assert_eq!(region.replace_lost().unwrap(), 0);
        assert_eq!([0, 3 * PAGE_BYTES].map(|at| byte(&region, at)), [5, 0]);
    }
}
