//! The merge step on memory of this process, alone and among writers.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::super::slab::Draft;
use super::*;
use crate::{Hva, PAGE, PageNo};
use kernel_view::pagemap::Pagemap;

mod pinned;

/// All of RAM; the tests use the first of it.
const RAM_PAGES: u64 = 4096;

/// The first of RAM that stays mapped as long as the test's process, and what merges it; None, said
/// aloud, where userfaultfd is denied.
fn memory() -> Option<(usize, RamRegion)> {
    let ram = Ram::new(RAM_PAGES * PAGE_BYTES, Backing::Anonymous).unwrap();
    match RamRegion::new(&ram) {
        Ok(region) => {
            let hva = to_usize(ram.extents()[0].hva.0);
            Some((hva, region))
        }
        Err(error) => {
            testing::skipped(module_path!(), format_args!("userfaultfd: {error}"));
            None
        }
    }
}

fn run(first: u64, pages: u64) -> PageRange {
    PageRange::new(PageNo(first), pages).unwrap()
}

/// What page `page` holds in every test.
fn content(page: u64) -> [u8; PAGE] {
    let word = (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    std::array::from_fn(|n| word[n % 8])
}

fn slab(pages: u64) -> Slab {
    let draft = Draft::new(pages).unwrap();
    for page in 0..pages {
        draft.write(SlabPage(page as u32), &content(page)).unwrap();
    }
    draft.seal().unwrap()
}

fn fill(hva: usize, pages: u64) {
    for page in 0..pages {
        let to = (hva + page as usize * PAGE) as *mut u8;
        // SAFETY: `memory` mapped it, and no other thread runs yet.
        unsafe { to.copy_from_nonoverlapping(content(page).as_ptr(), PAGE) };
    }
}

fn read(hva: usize, page: u64) -> Vec<u8> {
    let from = (hva + page as usize * PAGE) as *const u8;
    // SAFETY: as in `fill`.
    (0..PAGE).map(|n| unsafe { from.add(n).read_volatile() }).collect()
}

fn write(hva: usize, page: u64, at: usize, byte: u8) {
    // SAFETY: as in `fill`.
    unsafe { ((hva + page as usize * PAGE + at) as *mut u8).write_volatile(byte) };
}

/// For each page, whether it is the slab's: a page of a file, and not a private copy of one.
fn shared(hva: usize, pages: u64) -> Vec<bool> {
    // One that was not read yet has no entry.
    (0..pages).for_each(|page| drop(read(hva, page)));
    let mut entries = Vec::new();
    Pagemap::open_self().unwrap().read(Hva(hva as u64), pages as usize, &mut entries).unwrap();
    entries.iter().map(|entry| entry.file_or_shared()).collect()
}

#[test]
fn equal_pages_are_shared_until_written() {
    let Some((hva, mut memory)) = memory() else { return };
    let slab = slab(8);
    fill(hva, 8);
    memory.merge(run(2, 4), (&slab, SlabPage(2))).unwrap();
    for page in 0..8 {
        assert!(read(hva, page) == content(page), "{page}");
    }
    assert_eq!(shared(hva, 8), [false, false, true, true, true, true, false, false]);
    write(hva, 3, 10, 7);
    assert_eq!(shared(hva, 8), [false, false, true, false, true, true, false, false]);
    assert_eq!(read(hva, 3)[10], 7);
    assert!(slab.bytes(SlabPage(3), 1).unwrap() == content(3), "the slab has changed");
    // Written back, it can be merged again.
    write(hva, 3, 10, content(3)[10]);
    memory.merge(run(3, 1), (&slab, SlabPage(3))).unwrap();
    assert!(shared(hva, 4)[3] && read(hva, 3) == content(3));
}

#[test]
fn what_differs_stays_as_it_is() {
    let Some((hva, mut memory)) = memory() else { return };
    let slab = slab(70);
    fill(hva, 70);
    write(hva, 5, PAGE - 1, !content(5)[PAGE - 1]);
    let before = read(hva, 5);
    assert!(matches!(memory.merge(run(0, 8), (&slab, SlabPage(0))), Err(Refusal::Differs)));
    assert!(matches!(memory.merge(run(0, 4), (&slab, SlabPage(1))), Err(Refusal::Differs)), "a wrong place");
    let last = RAM_PAGES - 1;
    for ((first, pages), from) in
        [((0, 0), 0), ((0, 65), 0), ((last, 2), 0), ((0, 2), 69), ((u64::MAX - 2, 2), 0), ((0, 2), u32::MAX)]
    {
        let refused = memory.merge(run(first, pages), (&slab, SlabPage(from)));
        assert!(matches!(refused, Err(Refusal::Run)), "{first} {pages} {from}");
    }
    let ram = memory.ram.clone();
    let mark = ram.in_flight().mark(run(3, 1));
    assert!(matches!(memory.merge(run(0, 4), (&slab, SlabPage(0))), Err(Refusal::InFlight)));
    drop(mark);
    assert!(read(hva, 5) == before && !shared(hva, 70).contains(&true));
    // The run stays writable, and can be merged after all.
    write(hva, 5, PAGE - 1, content(5)[PAGE - 1]);
    memory.merge(run(0, 8), (&slab, SlabPage(0))).unwrap();
    assert_eq!(shared(hva, 8), [true; 8]);
}

#[test]
fn an_untouched_page_is_compared_as_zeros() {
    let Some((hva, mut memory)) = memory() else { return };
    let draft = Draft::new(2).unwrap();
    draft.write(SlabPage(1), &content(1)).unwrap();
    let slab = draft.seal().unwrap();
    assert!(matches!(memory.merge(run(0, 2), (&slab, SlabPage(0))), Err(Refusal::Differs)));
    memory.merge(run(0, 1), (&slab, SlabPage(0))).unwrap();
    assert!(read(hva, 0) == [0; PAGE]);
}

/// Adjacent runs of adjacent pages are one mapping, in whatever order they were merged.
#[test]
fn adjacent_runs_become_one_mapping() {
    let Some((hva, mut memory)) = memory() else { return };
    let slab = slab(64);
    fill(hva, 64);
    for first in [32, 0, 48, 16] {
        memory.merge(run(first, 16), (&slab, SlabPage(first as u32))).unwrap();
    }
    let line = format!("{hva:x}-{:x} ", hva + 64 * PAGE);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(
        maps.lines().any(|l| l.starts_with(&line) && l.contains("samepage-slab")),
        "no {line} in\n{maps}"
    );
}

/// A write at the worst moment: in each step another thread writes to the run that is being merged.
#[test]
fn a_write_between_any_two_steps_is_kept() {
    /// In which step the writer is told to go, and hears that it is about to.
    type When = (Step, Sender<()>, Receiver<()>);
    static WHEN: Mutex<Option<When>> = Mutex::new(None);
    for when in [Step::Frozen, Step::Compared, Step::Mapped] {
        for how in How::ALL {
            let Some((hva, mut memory)) = memory() else { return };
            let slab = slab(4);
            fill(hva, 4);
            let (go, going) = channel();
            let (about, about_to) = channel();
            *WHEN.lock().unwrap() = Some((when, go, about_to));
            memory.between = |step| {
                let now = WHEN.lock().unwrap().take_if(|(when, ..)| *when == step);
                let Some((_, go, about_to)) = now else { return };
                go.send(()).unwrap();
                about_to.recv().unwrap();
                // Time to get as far as it gets: into the kernel and asleep, or done.
                thread::sleep(Duration::from_millis(20));
            };
            let address = hva + 2 * PAGE + 800;
            let source = &Source::new();
            thread::scope(|scope| {
                scope.spawn(move || {
                    going.recv().unwrap();
                    about.send(()).unwrap();
                    source.put(how, address, 0x1234);
                });
                memory.merge(run(0, 4), (&slab, SlabPage(0))).unwrap();
            });
            // SAFETY: inside the mapping; the writer is done.
            assert_eq!(unsafe { (address as *const u64).read_volatile() }, 0x1234, "{when:?} {how:?}");
            assert_eq!(shared(hva, 4), [true, true, false, true], "{when:?} {how:?}");
        }
    }
}

/// How a writer writes a word.
#[derive(Clone, Copy, Debug)]
enum How {
    /// By a store, as any thread of ours does.
    Store,
    /// By `pread` of a file.
    File,
    /// By `pread` of a memfd.
    Memfd,
    /// By `read` of a pipe.
    Pipe,
}

impl How {
    const ALL: [Self; 4] = [Self::Store, Self::File, Self::Memfd, Self::Pipe];
}

/// Where the writes by system calls come from.
struct Source {
    file: File,
    memfd: OwnedFd,
    pipe: (PipeReader, PipeWriter),
}

impl Source {
    fn new() -> Self {
        let memfd = rustix::fs::memfd_create("source", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        Self { file: tempfile::tempfile().unwrap(), memfd, pipe: std::io::pipe().unwrap() }
    }

    fn put(&self, how: How, address: usize, value: u64) {
        let (to, bytes) = (address as *mut libc::c_void, value.to_le_bytes());
        let got = match how {
            // SAFETY: inside a mapping; this word is this thread's alone.
            How::Store => return unsafe { (address as *mut u64).write_volatile(value) },
            How::File => {
                self.file.write_all_at(&bytes, 0).unwrap();
                // SAFETY: as above; the kernel writes 8 bytes there.
                unsafe { libc::pread(self.file.as_raw_fd(), to, 8, 0) }
            }
            How::Memfd => {
                rustix::io::pwrite(&self.memfd, &bytes, 0).unwrap();
                // SAFETY: as above.
                unsafe { libc::pread(self.memfd.as_raw_fd(), to, 8, 0) }
            }
            How::Pipe => {
                (&self.pipe.1).write_all(&bytes).unwrap();
                // SAFETY: as above.
                unsafe { libc::read(self.pipe.0.as_raw_fd(), to, 8) }
            }
        };
        assert_eq!(got, 8);
    }
}

/// Writes to words that have no other writer, each time looks whether it is there, and puts the old
/// content back. Returns how many writes were lost.
fn writer(hva: usize, pages: u64, place: usize, how: How, writes: &AtomicU64, end: &AtomicBool) -> u64 {
    let source = Source::new();
    let (mut lost, mut turn) = (0, place as u64);
    while !end.load(Ordering::Relaxed) {
        turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let page = (turn >> 33) % pages;
        let address = hva + page as usize * PAGE + place * 8;
        let old = u64::from_le_bytes(content(page)[..8].try_into().unwrap());
        for value in [turn | 1, old] {
            source.put(how, address, value);
            for _ in 0..20 {
                // SAFETY: as above.
                lost += u64::from(unsafe { (address as *const u64).read_volatile() } != value);
                std::hint::spin_loop();
            }
        }
        writes.fetch_add(2, Ordering::Relaxed);
    }
    lost
}

#[test]
fn no_write_is_lost_while_runs_are_merged() {
    const PAGES: u64 = 256;
    const MERGES: u64 = 3000;
    let Some((hva, mut memory)) = memory() else { return };
    let slab = slab(PAGES);
    fill(hva, PAGES);
    let (end, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut merged, mut differed) = (0, 0u64);
    let lost: u64 = thread::scope(|scope| {
        let writers: Vec<_> = How::ALL
            .into_iter()
            .enumerate()
            .map(|(n, how)| {
                let (writes, end) = (&writes, &end);
                scope.spawn(move || writer(hva, PAGES, 1 + 100 * n, how, writes, end))
            })
            .collect();
        let mut turn = 1u64;
        while merged < MERGES {
            turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (first, pages) = ((turn >> 33) % PAGES, 1 + (turn >> 20) % 8);
            match memory.merge(run(first, pages.min(PAGES - first)), (&slab, SlabPage(first as u32))) {
                Ok(()) => merged += 1,
                Err(Refusal::Differs) => differed += 1,
                Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
            }
        }
        end.store(true, Ordering::Relaxed);
        writers.into_iter().map(|writer| writer.join().unwrap()).sum()
    });
    assert_eq!(lost, 0, "of {writes:?} writes, during {merged} merges");
    assert!(writes.load(Ordering::Relaxed) > 1000, "{writes:?} writes, {differed} runs differed");
    for page in 0..PAGES {
        assert!(read(hva, page) == content(page), "{page}");
    }
}
