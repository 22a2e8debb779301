use std::collections::BTreeMap;
use std::os::fd::AsFd;

use devices::reclaim::Reclaim;
use proptest::prelude::*;

use super::*;
use crate::Gpa;
use crate::shared_ram::SharedRam;
use crate::written::{OwnWrites, WriteLog};

/// Keeps the slabs of one image, and knows those of another.
#[derive(Default)]
struct Shelf {
    slabs: Vec<Slab>,
    known: BTreeMap<u64, Slab>,
    fails: bool,
}

fn same(slab: &Slab) -> Slab {
    Slab::receive(slab.as_fd().try_clone_to_owned().unwrap(), slab.pages()).unwrap()
}

impl Slabs for Shelf {
    fn draft(&mut self, pages: u64) -> io::Result<Draft> {
        match self.fails {
            true => Err(io::ErrorKind::OutOfMemory.into()),
            false => Draft::new(pages).map_err(io::Error::other),
        }
    }

    fn filled(&mut self, slab: &Slab) -> io::Result<u32> {
        self.slabs.push(same(slab));
        Ok(self.slabs.len() as u32 - 1)
    }

    fn known(&mut self, inode: u64, _used: u64) -> io::Result<Option<(u32, u64)>> {
        let Some(slab) = self.known.get(&inode) else { return Ok(None) };
        let at = self.slabs.iter().position(|other| other.inode() == inode).unwrap_or_else(|| {
            self.slabs.push(same(slab));
            self.slabs.len() - 1
        });
        Ok(Some((at as u32, slab.pages())))
    }
}

impl Shelf {
    /// One that knows the slabs of `self`.
    fn next(&self) -> Self {
        Self { known: self.slabs.iter().map(|slab| (slab.inode(), same(slab))).collect(), ..Self::default() }
    }
}

const BYTES: u64 = 16 << 20;

fn ram() -> Ram {
    Ram::new(BYTES, Backing::Anonymous).unwrap()
}

fn put(ram: &Ram, page: u64, value: u8) {
    ram.memory().write_slice(&[value; PAGE], GuestAddress(page * PAGE_BYTES)).unwrap();
}

fn values(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; BYTES as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    let pages = bytes.as_chunks::<PAGE>().0;
    assert!(pages.iter().all(|page| page.iter().all(|byte| *byte == page[0])));
    pages.iter().map(|page| page[0]).collect()
}

fn copy(taken: &Taken, shelf: &Shelf) -> Ram {
    let copy = ram();
    copy.map_image(&taken.runs, &shelf.slabs).unwrap();
    copy
}

#[test]
fn a_copy_holds_the_same_and_is_its_own() {
    let (origin, mut shelf) = (ram(), Shelf::default());
    for page in (10..3000).chain([3010, 4095]) {
        put(&origin, page, 1 + (page % 250) as u8);
    }
    put(&origin, 3500, 0);
    let taken = origin.capture(&mut shelf, &Ahead::default()).unwrap();
    // The first slab ends in the middle, ten zeros are bridged, and the last page is far away.
    let runs: Vec<_> = taken.runs.iter().map(|run| (run.page.0, run.pages, run.slab)).collect();
    assert_eq!(runs, [(10, 2048, 0), (2058, 953, 1), (4095, 1, 1)]);
    assert_eq!((taken.copied, taken.referenced), (3002, 0));
    assert_eq!(shelf.slabs.iter().map(Slab::pages).collect::<Vec<_>>(), [2048, 954]);
    let (one, two) = (copy(&taken, &shelf), copy(&taken, &shelf));
    drop(shelf);
    put(&one, 20, 7);
    assert_eq!(values(&two), values(&origin));
    assert_eq!(values(&one)[20], 7);
    assert_eq!(one.slab_pages().count(), 3002);
    // What is given back is zeros, not the slab's.
    one.discard(Gpa(20 * PAGE_BYTES)..Gpa(30 * PAGE_BYTES)).unwrap();
    assert!(values(&one)[20..30].iter().all(|value| *value == 0));
    assert_eq!(one.slab_pages().count(), 3002 - 10);
}

#[test]
fn a_copy_of_a_copy_copies_only_what_was_written() {
    let (origin, mut shelf) = (ram(), Shelf::default());
    (0..1000).for_each(|page| put(&origin, page, 1 + (page % 200) as u8));
    let taken = origin.capture(&mut shelf, &Ahead::default()).unwrap();
    let child = copy(&taken, &shelf);
    put(&child, 500, 255);
    child.discard(Gpa(100 * PAGE_BYTES)..Gpa(150 * PAGE_BYTES)).unwrap();
    // One page here alone is too short to be referenced.
    child.discard(Gpa(151 * PAGE_BYTES)..Gpa(152 * PAGE_BYTES)).unwrap();
    let mut next = shelf.next();
    let second = child.capture(&mut next, &Ahead::default()).unwrap();
    assert_eq!((second.copied, second.referenced), (2, 1000 - 52 - 1));
    assert_eq!(values(&copy(&second, &next)), values(&child));
    // Where the slabs cannot be had, everything is copied.
    let mut alone = Shelf::default();
    let third = child.capture(&mut alone, &Ahead::default()).unwrap();
    assert_eq!(third.referenced, 0);
    assert_eq!(values(&copy(&third, &alone)), values(&child));
}

#[test]
fn what_was_not_written_since_it_was_copied_ahead_is_not_copied_again() {
    let (origin, mut shelf) = (ram(), Shelf::default());
    (0..1000).chain(1010..1100).for_each(|page| put(&origin, page, 1 + (page % 200) as u8));
    let ahead = origin.copy_ahead(&mut shelf).unwrap();
    put(&origin, 40, 255);
    // What has become zeros is none of the copy, and what has come anew is.
    origin.discard(Gpa(600 * PAGE_BYTES)..Gpa(640 * PAGE_BYTES)).unwrap();
    put(&origin, 2000, 9);
    let taken = origin.capture(&mut shelf, &ahead).unwrap();
    // Of the pages around 40 as many as are compared at once.
    assert_eq!(taken.copied, PIECE_PAGES + 1);
    assert_eq!(taken.ahead, 1090 - 40 - PIECE_PAGES);
    let runs: Vec<_> = taken.runs.iter().map(|run| (run.page.0, run.pages)).collect();
    // Ten zeros were bridged, and still are; forty that were other than zero are not.
    assert_eq!(runs, [(0, 32), (32, 16), (48, 552), (640, 460), (2000, 1)]);
    assert_eq!(values(&copy(&taken, &shelf)), values(&origin));
}

#[test]
fn of_what_a_log_tells_nothing_else_is_looked_at() {
    let (origin, mut shelf) = (ram(), Shelf::default());
    (0..1000).for_each(|page| put(&origin, page, 1 + (page % 200) as u8));
    let ahead = origin.copy_ahead(&mut shelf).unwrap();
    let mut written = PageSet::none(4096);
    for page in [40, 2000] {
        put(&origin, page, 255);
        written.insert(PageNo(page));
    }
    // The log says nothing of it.
    put(&origin, 500, 255);
    let taken = origin.capture_written(&mut shelf, &ahead, &written).unwrap();
    assert_eq!((taken.copied, taken.ahead), (PIECE_PAGES + 1, 1000 - PIECE_PAGES));
    let mut expected = values(&origin);
    expected[500] = 1 + (500 % 200) as u8;
    assert_eq!(values(&copy(&taken, &shelf)), expected);
    // Everything is.
    let (origin, mut shelf) = (ram(), Shelf::default());
    (0..4096).for_each(|page| put(&origin, page, 1));
    let ahead = origin.copy_ahead(&mut shelf).unwrap();
    let all = PageSet::all(4096);
    let taken = origin.capture_written(&mut shelf, &ahead, &all).unwrap();
    assert_eq!((taken.copied, taken.ahead), (4096, 0));
}

#[test]
fn a_run_ends_where_the_memory_has_its_hole() {
    const HOLE: u64 = crate::layout::HOLE_START / PAGE_BYTES;
    let big = || Ram::new((HOLE + 512) * PAGE_BYTES, Backing::Anonymous).unwrap();
    let (origin, mut shelf) = (big(), Shelf::default());
    let put = |page: u64| {
        let gpa = origin.gpa(PageNo(page)).unwrap().0;
        origin.memory().write_slice(&[7; PAGE], GuestAddress(gpa)).unwrap();
    };
    (HOLE - 20..HOLE + 20).for_each(put);
    let check = |taken: &Taken, shelf: &Shelf| {
        let runs: Vec<_> = taken.runs.iter().map(|run| (run.page.0, run.pages)).collect();
        assert_eq!(runs, [(HOLE - 20, 20), (HOLE, 20)]);
        big().map_image(&taken.runs, &shelf.slabs).unwrap();
    };
    let ahead = origin.copy_ahead(&mut shelf).unwrap();
    let taken = origin.capture(&mut shelf, &ahead).unwrap();
    assert_eq!((taken.copied, taken.ahead), (0, 40));
    check(&taken, &shelf);
    let mut shelf = Shelf::default();
    check(&origin.capture(&mut shelf, &Ahead::default()).unwrap(), &shelf);
}

#[test]
fn what_merging_replaced_is_captured_too() {
    let origin = ram();
    (0..64).for_each(|page| put(&origin, page, 9));
    let draft = Draft::new(64).unwrap();
    draft.write(SlabPage(0), &[9; 64 * PAGE]).unwrap();
    let slab = draft.seal().unwrap();
    let Ok(mut shared) = SharedRam::new(&origin) else {
        return testing::skipped(module_path!(), "no userfaultfd");
    };
    shared.merge(PageRange::between(PageNo(0), PageNo(64)), (&slab, SlabPage(0))).unwrap();
    put(&origin, 3, 4);
    let mut shelf = Shelf { known: BTreeMap::from([(slab.inode(), same(&slab))]), ..Shelf::default() };
    let taken = origin.capture(&mut shelf, &Ahead::default()).unwrap();
    assert_eq!((taken.referenced, taken.copied), (60, 4));
    assert_eq!(values(&copy(&taken, &shelf)), values(&origin));
}

#[test]
fn a_failure_changes_nothing() {
    let origin = ram();
    put(&origin, 3, 4);
    let error =
        origin.capture(&mut Shelf { fails: true, ..Shelf::default() }, &Ahead::default()).unwrap_err();
    assert!(error.to_string().contains("make a slab"), "{error}");
    assert_eq!(values(&origin)[3], 4);
    let memfd = Ram::new(BYTES, Backing::Memfd).unwrap();
    assert!(matches!(
        memfd.capture(&mut Shelf::default(), &Ahead::default()),
        Err(ImageError::Backing(Backing::Memfd))
    ));
}

#[test]
fn runs_that_cannot_be_are_refused() {
    let mut shelf = Shelf::default();
    let origin = ram();
    put(&origin, 3, 4);
    origin.capture(&mut shelf, &Ahead::default()).unwrap();
    let run = ImageRun { page: PageNo(3), pages: 1, slab: 0, slab_page: SlabPage(0) };
    for bad in [
        ImageRun { pages: 0, ..run },
        ImageRun { pages: 2, ..run },
        ImageRun { pages: u64::MAX, ..run },
        ImageRun { page: PageNo(4096), ..run },
        ImageRun { page: PageNo(u64::MAX), ..run },
        ImageRun { slab: 1, ..run },
        ImageRun { slab_page: SlabPage(1), ..run },
        ImageRun { slab_page: SlabPage(u32::MAX), ..run },
    ] {
        assert!(ram().map_image(&[bad], &shelf.slabs).is_err(), "{bad:?}");
    }
    assert!(ram().map_image(&[run, run], &shelf.slabs).is_err(), "one page twice");
    assert!(matches!(ram().map_image(&vec![run; MAX_RUNS + 1], &shelf.slabs), Err(ImageError::Runs)));
    ram().map_image(&[run], &shelf.slabs).unwrap();
}

#[test]
fn what_was_not_looked_at_is_no_gap_of_zeros() {
    let (origin, mut shelf) = (ram(), Shelf::default());
    (0..48).for_each(|page| put(&origin, page, 1));
    let ahead = origin.copy_ahead(&mut shelf).unwrap();
    let mut written = PageSet::none(4096);
    for page in [0, 40] {
        put(&origin, page, 2);
        written.insert_range(PageRange::one(PageNo(page)));
    }
    let taken = origin.capture_written(&mut shelf, &ahead, &written).unwrap();
    assert_eq!(values(&copy(&taken, &shelf)), values(&origin));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn whatever_is_in_it_the_copy_has_it(
        writes in prop::collection::vec((0u64..4096, 1u64..80, 0u8..4), 0..60),
        later in prop::collection::vec((0u64..4096, 1u64..80, 0u8..4), 0..30),
        meanwhile in prop::collection::vec((0u64..4096, 1u64..80, 0u8..4), 0..30),
    ) {
        let write = |ram: &Ram, writes: &[(u64, u64, u8)]| {
            for (first, pages, value) in writes {
                (*first..(first + pages).min(4096)).for_each(|page| put(ram, page, *value));
            }
        };
        let (origin, mut shelf) = (ram(), Shelf::default());
        write(&origin, &writes);
        let taken = origin.capture(&mut shelf, &Ahead::default()).unwrap();
        prop_assert!(taken.runs.windows(2).all(|two| two[0].page + two[0].pages <= two[1].page));
        let child = copy(&taken, &shelf);
        prop_assert_eq!(values(&child), values(&origin));
        write(&child, &later);
        let mut next = shelf.next();
        let again = child.capture(&mut next, &Ahead::default()).unwrap();
        prop_assert_eq!(values(&copy(&again, &next)), values(&child));
        let mut last = shelf.next();
        let ahead = child.copy_ahead(&mut last).unwrap();
        write(&child, &meanwhile);
        let third = child.capture(&mut last, &ahead).unwrap();
        prop_assert!(third.runs.windows(2).all(|two| two[0].page + two[0].pages <= two[1].page));
        prop_assert_eq!(values(&copy(&third, &last)), values(&child));
        // And once more by a log.
        let mut log = OwnWrites::new(&child);
        log.start().unwrap();
        log.clear(&PageSet::all(4096)).unwrap();
        let mut logged = shelf.next();
        let ahead = child.copy_ahead(&mut logged).unwrap();
        write(&child, &later);
        let mut written = PageSet::default();
        log.read(&mut written).unwrap();
        let fourth = child.capture_written(&mut logged, &ahead, &written).unwrap();
        prop_assert!(fourth.runs.windows(2).all(|two| two[0].page + two[0].pages <= two[1].page));
        prop_assert_eq!(values(&copy(&fourth, &logged)), values(&child));
        // It has a handle of its own.
        drop(log);
        for ram in [origin, child] {
            ram.unmap().ok().unwrap();
        }
    }
}
