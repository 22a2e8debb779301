//! Writers that pin a page before it is frozen and write to its frame later, whatever is mapped by
//! then: why devices mark what they have in flight.

use std::fs::OpenOptions;
use std::io::{Error, Read};
use std::os::unix::fs::OpenOptionsExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::super::userfault;
use super::*;

const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
/// Bytes of a message of userfaultfd.
const MESSAGE: usize = 32;

/// A page whose first reader sleeps until [`Late::arrive`] fills it.
struct Late {
    page: usize,
    faults: File,
}

impl Late {
    fn new() -> Self {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping where the kernel likes.
        let page = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), PAGE, ProtFlags::READ, flags) };
        let late = Self { page: page.unwrap() as usize, faults: userfault::open(&[]).unwrap().into() };
        late.ioctl(UFFDIO_REGISTER, &mut [late.page as u64, PAGE_BYTES, REGISTER_MODE_MISSING, 0]);
        late
    }

    /// Waits until a reader sleeps.
    fn wait(&self) {
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        let asleep = poll(&mut [PollFd::new(&self.faults, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(asleep, 1, "the page has not been read");
        (&self.faults).read_exact(&mut [0; MESSAGE]).unwrap();
    }

    /// Says what is in it.
    fn arrive(&self, word: u64) {
        let page = [word; PAGE / 8];
        self.ioctl(UFFDIO_COPY, &mut [self.page as u64, page.as_ptr() as u64, PAGE_BYTES, 0, 0]);
    }

    fn ioctl<const N: usize>(&self, request: libc::c_ulong, argument: &mut [u64; N]) {
        // SAFETY: each request here takes this many words. It concerns the page above, to which
        // there is no reference, and the kernel copies from one that lives.
        let done = unsafe { libc::ioctl(self.faults.as_raw_fd(), request, argument) };
        assert_eq!(done, 0, "{}", Error::last_os_error());
    }
}

/// Merges a run in which a word is pinned to be written, lets the write happen, and reads the word.
fn merge_what_is_pinned(marked: bool) -> Option<(Result<(), Refusal>, u64)> {
    let (hva, mut memory) = memory()?;
    let (slab, ram, late) = (slab(4), memory.ram.clone(), Late::new());
    fill(hva, 4);
    let address = hva + 2 * PAGE + 800;
    let merged = thread::scope(|scope| {
        let _mark = marked.then(|| ram.in_flight().mark(run(2, 1)));
        let from = late.page;
        let writer = scope.spawn(move || {
            let local = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: 8 };
            let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 8 };
            // SAFETY: the kernel reads from one mapping and writes to another, in a word that is
            // this thread's alone.
            unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) }
        });
        // It has pinned what it will write to when it looks for what to write.
        late.wait();
        let merged = memory.merge(run(0, 4), (&slab, SlabPage(0)));
        late.arrive(0x1234);
        assert_eq!(writer.join().unwrap(), 8, "{}", Error::last_os_error());
        merged
    });
    // SAFETY: inside the mapping; the writer is done.
    Some((merged, unsafe { (address as *const u64).read_volatile() }))
}

#[test]
fn a_pinned_page_is_merged_only_where_it_is_not_marked() {
    let Some((merged, word)) = merge_what_is_pinned(true) else { return };
    assert!(matches!(merged, Err(Refusal::InFlight)), "{merged:?}");
    assert_eq!(word, 0x1234, "the write was lost");
    // The kernel does not keep us from it. Should that change, devices need mark nothing.
    let Some((merged, word)) = merge_what_is_pinned(false) else { return };
    assert!(merged.is_ok(), "{merged:?}");
    assert_eq!(word.to_le_bytes(), content(2)[..8], "the write went to a frame that is still mapped");
}

/// A file of `pages` pages, each other than what is in memory, that is read past the page cache;
/// None, said aloud, where the file system cannot.
fn direct_file(pages: u64) -> Option<File> {
    let named = tempfile::NamedTempFile::new().unwrap();
    for page in 0..pages {
        named.as_file().write_all_at(&content(page).map(|byte| !byte), page * PAGE_BYTES).unwrap();
    }
    named.as_file().sync_all().unwrap();
    match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(named.path()) {
        Ok(file) => Some(file),
        Err(error) => {
            testing::skipped(module_path!(), format_args!("O_DIRECT in {}: {error}", named.path().display()));
            None
        }
    }
}

#[test]
fn no_direct_read_is_lost_while_runs_are_merged() {
    const PAGES: u64 = 512;
    const READS: u64 = 3000;
    const READERS: u64 = 2;
    let Some((hva, mut memory)) = memory() else { return };
    let Some(file) = &direct_file(PAGES) else { return };
    let (slab, ram) = (slab(PAGES), &memory.ram.clone());
    fill(hva, PAGES);
    // Each has pages of its own.
    let reader = move |own: u64| {
        let (mut turn, mut lost) = (own, 0u64);
        for _ in 0..READS {
            turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (turn >> 33) % (PAGES / READERS) * READERS + own;
            let mark = ram.in_flight().mark(run(page, 1));
            let (to, offset) = (hva + page as usize * PAGE, (page * PAGE_BYTES) as i64);
            // SAFETY: the page is this thread's alone; the device, or the kernel, writes all of it.
            let got = unsafe { libc::pread(file.as_raw_fd(), to as *mut libc::c_void, PAGE, offset) };
            drop(mark);
            assert_eq!(got, PAGE as isize, "{}", Error::last_os_error());
            lost += u64::from(read(hva, page) != content(page).map(|byte| !byte));
            // SAFETY: as above.
            unsafe { (to as *mut u8).copy_from_nonoverlapping(content(page).as_ptr(), PAGE) };
        }
        lost
    };
    let (mut merged, mut in_flight, mut turn) = (0, 0, 1u64);
    let lost: u64 = thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|own| scope.spawn(move || reader(own))).collect();
        while readers.iter().any(|reader| !reader.is_finished()) {
            turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (first, pages) = ((turn >> 33) % PAGES, 1 + (turn >> 20) % 8);
            match memory.merge(run(first, pages.min(PAGES - first)), (&slab, SlabPage(first as u32))) {
                Ok(()) => merged += 1,
                Err(Refusal::InFlight) => in_flight += 1,
                Err(Refusal::Differs) => {}
                Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
            }
        }
        readers.into_iter().map(|reader| reader.join().unwrap()).sum()
    });
    assert_eq!(lost, 0, "of {} reads, among {merged} merges", READS * READERS);
    assert!(merged > 100 && in_flight > 0, "{merged} merged, {in_flight} were in flight");
    for page in 0..PAGES {
        assert!(read(hva, page) == content(page), "{page}");
    }
}
