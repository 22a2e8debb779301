use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use devices::in_flight::InFlight;
use devices::reclaim::Reclaim;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::shared_ram::SharedRam;
use crate::slab::Draft;
use crate::{Gpa, PAGE, SlabPage};

const BYTES: u64 = 16 << 20;
const PAGES: u64 = BYTES / PAGE_BYTES;

/// RAM in which every page holds its number, and what parks pages of it. None where there is no
/// userfaultfd for us.
fn filled() -> Option<(Ram, Parker)> {
    let ram = Ram::new(BYTES, Backing::Anonymous).unwrap();
    for page in 0..PAGES {
        write(&ram, page, page);
    }
    match Parker::new(&ram) {
        Ok(parker) => Some((ram, parker)),
        Err(error) => {
            testing::skipped(
                module_path!(),
                format_args!("no userfaultfd that handles the kernel's faults ({error})"),
            );
            None
        }
    }
}

fn write(ram: &Ram, page: u64, what: u64) {
    ram.memory().write_obj(what, GuestAddress(page * PAGE_BYTES)).unwrap();
}

fn read(ram: &Ram, page: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(page * PAGE_BYTES)).unwrap()
}

fn hva(ram: &Ram, page: u64) -> u64 {
    ram.extents()[0].hva.0 + page * PAGE_BYTES
}

fn numbers(pages: impl IntoIterator<Item = u64>) -> Vec<PageNo> {
    pages.into_iter().map(PageNo).collect()
}

fn run(first: u64, pages: u64) -> PageRange {
    PageRange::new(PageNo(first), pages).unwrap()
}

/// Mappings that guest RAM consists of.
fn mappings(ram: &Ram) -> usize {
    let (start, end) = (hva(ram, 0), hva(ram, PAGES));
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let first = line.split_once('-').and_then(|(first, _)| u64::from_str_radix(first, 16).ok());
        first.is_some_and(|first| (start..end).contains(&first))
    };
    maps.lines().filter(inside).count()
}

/// Does `work` on another thread while this one serves what is touched.
fn served<T: Send>(parker: &mut Parker, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let worker = scope.spawn(work);
        while !worker.is_finished() {
            parker.watch(Duration::from_millis(1)).unwrap();
        }
        worker.join().unwrap()
    })
}

#[test]
fn pages_are_counted_touched_or_idle_and_hold_what_they_held() {
    let Some((ram, mut parker)) = filled() else { return };
    ram.discard(Gpa(0)..Gpa(16 * PAGE_BYTES)).unwrap();
    assert_eq!(parker.population().unwrap(), Population { pages: PAGES - 16, huge_pages: 0 });
    let chosen = parker.choose(&[0, 1, 100, PAGES - 17]).unwrap();
    assert_eq!(chosen, numbers([16, 17, 116, PAGES - 1]));
    let whole = mappings(&ram);
    assert_eq!(parker.park(&chosen).unwrap(), 4);
    assert_eq!((ram.parked_pages(), mappings(&ram) > whole), (4, true));
    served(&mut parker, || {
        assert_eq!(read(&ram, 17), 17);
        write(&ram, 116, 7);
        assert_eq!((read(&ram, 116), read(&ram, 115)), (7, 115));
    });
    assert_eq!(ram.parked_pages(), 2);
    assert_eq!(parker.end(), Some(Parked { touched: 2, withdrawn: 0, idle: 2, interrupted: false }));
    assert_eq!(mappings(&ram), whole, "all of RAM is in one piece again");
    for page in 16..PAGES {
        assert_eq!(read(&ram, page), if page == 116 { 7 } else { page });
    }
    assert_eq!(parker.population().unwrap().pages, PAGES - 16);
}

#[test]
fn the_kernel_and_other_threads_meet_parked_pages_at_the_same_time() {
    let Some((ram, mut parker)) = filled() else { return };
    parker.park(&numbers(100..140)).unwrap();
    served(&mut parker, || {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (100..140).for_each(|page| assert_eq!(read(&ram, page), page)));
            }
        });
    });
    assert_eq!(parker.end().map(|parked| (parked.touched, parked.idle)), Some((40, 0)));
    // A system call that writes to them for us.
    parker.park(&numbers(300..304)).unwrap();
    served(&mut parker, || {
        let mut file = tempfile::tempfile().unwrap();
        file.write_at(&[9; 4 * PAGE], 0).unwrap();
        let at = GuestAddress(300 * PAGE_BYTES);
        ram.memory().read_exact_volatile_from(at, &mut file, 4 * PAGE).unwrap();
    });
    assert_eq!(parker.end().map(|parked| parked.touched), Some(4));
    let mut read = [0; 4 * PAGE];
    ram.memory().read_slice(&mut read, GuestAddress(300 * PAGE_BYTES)).unwrap();
    assert_eq!(read, [9; 4 * PAGE]);
}

#[test]
fn what_is_given_back_while_it_is_parked_stays_away() {
    let Some((ram, mut parker)) = filled() else { return };
    let whole = mappings(&ram);
    // Alone, as one of several ranges at once, and as memory that may be a slab's.
    for slabs in [false, true] {
        ram.placement().slabs = slabs;
        (0..40).for_each(|page| write(&ram, page, 1));
        assert_eq!(parker.park(&numbers((0..40).step_by(2))).unwrap(), 20);
        let range = |pages: std::ops::Range<u64>| Gpa(pages.start * PAGE_BYTES)..Gpa(pages.end * PAGE_BYTES);
        // No thread serves faults: giving back does not need it.
        ram.discard(range(0..10)).unwrap();
        ram.discard_all(&[range(10..15), range(20..25)], &mut |_, error| panic!("{error}"));
        assert_eq!(ram.parked_pages(), 20 - 8 - 3);
        for page in (0..15).chain(20..25) {
            assert_eq!(read(&ram, page), 0);
        }
        let left = ram.parked_pages();
        let ended = parker.end().unwrap();
        assert_eq!((ended.touched, ended.idle, ended.withdrawn), (0, left, 20 - left));
        for page in 0..40 {
            let given = (0..15).contains(&page) || (20..25).contains(&page);
            assert_eq!(read(&ram, page), u64::from(!given), "page {page}");
        }
    }
    assert_eq!(mappings(&ram), whole);
}

#[test]
fn merging_and_advising_have_parked_pages_brought_back() {
    let Some((ram, mut parker)) = filled() else { return };
    let Ok(mut shared_ram) = SharedRam::new(&ram) else {
        return testing::skipped(module_path!(), "pages cannot be frozen");
    };
    (0..8).for_each(|page| write(&ram, page, 0));
    let parked = numbers([1, 3, 9]);
    assert_eq!(parker.park(&parked).unwrap(), 3);
    // Compared with zeros while no thread serves faults: it would sleep for ever.
    shared_ram.drop_zeros(run(0, 8)).unwrap();
    assert_eq!(ram.parked_pages(), 1);
    assert!(shared_ram.drop_zeros(run(8, 8)).is_err(), "they are no zeros");
    assert_eq!(ram.parked_pages(), 0);
    assert_eq!(read(&ram, 9), 9);
    assert_eq!(parker.end().map(|parked| parked.withdrawn), Some(3));
    if std::path::Path::new("/sys/kernel/mm/ksm").exists() {
        parker.park(&numbers([50, 60])).unwrap();
        let whole = mappings(&ram);
        ram.set_mergeable(true).unwrap();
        assert_eq!(ram.parked_pages(), 0);
        ram.set_mergeable(false).unwrap();
        assert!(mappings(&ram) < whole);
    }
}

#[test]
fn pages_that_a_device_is_about_to_write_are_left_where_they_are() {
    let Some((ram, mut parker)) = filled() else { return };
    // Marks are those of 64 pages together: 70 is a neighbour of the page that is read into, 200 is
    // not.
    let (device, range): (&dyn InFlight, _) = (&ram, Gpa(80 * PAGE_BYTES)..Gpa(80 * PAGE_BYTES + 512));
    let chosen = numbers([70, 80, 200]);
    let mut parked = None;
    device.during(range, &mut || parked = Some(parker.park(&chosen).unwrap()));
    assert_eq!((parked, ram.parked_pages()), (Some(1), 1));
    assert_eq!((read(&ram, 70), read(&ram, 80)), (70, 80));
    assert_eq!(parker.end(), Some(Parked { touched: 0, withdrawn: 2, idle: 1, interrupted: false }));
    assert_eq!(parker.park(&chosen).unwrap(), 3, "the mark is gone");
    assert!(parker.end().is_some());
}

#[test]
fn a_page_that_was_a_slabs_before_it_was_written_is_not_parked() {
    let Some((ram, mut parker)) = filled() else { return };
    let Ok(mut shared_ram) = SharedRam::new(&ram) else {
        return testing::skipped(module_path!(), "pages cannot be frozen");
    };
    let draft = Draft::new(4).unwrap();
    draft.write(SlabPage(0), &[7; 4 * PAGE]).unwrap();
    let slab = draft.seal().unwrap();
    ram.memory().write_slice(&[7; 4 * PAGE], GuestAddress(100 * PAGE_BYTES)).unwrap();
    shared_ram.merge(run(100, 4), (&slab, SlabPage(0))).unwrap();
    write(&ram, 101, 9);
    // 99 and 104 are the guest's alone, 100 is the slab's, 101 a copy.
    let pages = numbers([99, 100, 101, 104]);
    assert_eq!(parker.park(&pages).unwrap(), 2);
    served(&mut parker, || assert_eq!((read(&ram, 101), read(&ram, 104)), (9, 104)));
    assert_eq!(parker.end().map(|parked| (parked.touched, parked.idle)), Some((1, 1)));
    // Fresh memory instead of the slab's is like any other; and so is what is above.
    ram.discard(Gpa(101 * PAGE_BYTES)..Gpa(102 * PAGE_BYTES)).unwrap();
    write(&ram, 101, 11);
    assert_eq!(parker.park(&pages).unwrap(), 3);
    served(&mut parker, || assert_eq!(read(&ram, 101), 11));
    parker.end().unwrap();
}

#[test]
fn nothing_is_parked_while_it_is_forbidden() {
    let Some((ram, mut parker)) = filled() else { return };
    parker.park(&numbers([1, 2])).unwrap();
    ram.forbid_parking();
    assert_eq!((ram.parked_pages(), read(&ram, 1)), (0, 1));
    assert_eq!(parker.end().map(|parked| parked.interrupted), Some(true));
    assert_eq!(parker.park(&numbers([3])).unwrap(), 0);
    ram.allow_parking();
    assert_eq!(parker.end().map(|parked| parked.interrupted), Some(true), "it was when it began");
    assert_eq!(parker.park(&numbers([3])).unwrap(), 1);
    assert_eq!(parker.end(), Some(Parked { idle: 1, ..Parked::default() }));
    // Without a server nothing may stay away.
    parker.park(&numbers([3])).unwrap();
    drop(parker);
    assert_eq!((ram.parked_pages(), read(&ram, 3)), (0, 3));
    ram.allow_parking();
    assert!(!ram.placement().parking.park(ram.range(run(3, 1)).unwrap()).unwrap());
}

#[test]
fn absent_shared_and_zero_pages_are_not_parked() {
    let Some((ram, mut parker)) = filled() else { return };
    ram.discard(Gpa(0)..Gpa(2 * PAGE_BYTES)).unwrap();
    assert_eq!(read(&ram, 1), 0);
    let pages = numbers([0, 1, 2, 2]);
    assert_eq!(parker.park(&pages).unwrap(), 1, "one is absent, one the kernel's zeros, one parked already");
    assert_eq!(parker.end().map(|parked| parked.idle), Some(1));
}

#[test]
fn where_no_mapping_is_left_the_page_is_copied_back() {
    let Some((ram, mut parker)) = filled() else { return };
    let whole = mappings(&ram);
    parker.park(&numbers([5, 6])).unwrap();
    ram.placement().parking.copy_back_now(PageNo(5)).unwrap();
    assert_eq!((read(&ram, 5), ram.parked_pages()), (5, 1));
    ram.discard(Gpa(5 * PAGE_BYTES)..Gpa(6 * PAGE_BYTES)).unwrap();
    assert_eq!(read(&ram, 5), 0, "it is not watched any more");
    parker.end().unwrap();
    assert_eq!((read(&ram, 6), mappings(&ram)), (6, whole));
}

#[test]
fn a_page_that_is_missing_and_not_parked_is_not_waited_for() {
    let Some((ram, mut parker)) = filled() else { return };
    let whole = mappings(&ram);
    // As if it could not be unregistered when it was brought back, and was given back to the host
    // since.
    ram.placement().parking.watch_only(ram.range(run(5, 1)).unwrap()).unwrap();
    ram.discard(Gpa(5 * PAGE_BYTES)..Gpa(6 * PAGE_BYTES)).unwrap();
    served(&mut parker, || assert_eq!(read(&ram, 5), 0));
    assert_eq!((mappings(&ram), parker.end().map(|parked| parked.touched)), (whole, Some(0)));
}

/// What a look from outside sees: a read of another process's memory neither hangs nor disturbs,
/// and after parking was forbidden, as a pause does, all is there.
#[test]
fn a_read_from_outside_does_not_hang() {
    let Some((ram, mut parker)) = filled() else { return };
    let memory = fs::File::open("/proc/self/mem").unwrap();
    let mut page = [0u8; PAGE];
    parker.park(&numbers([5])).unwrap();
    served(&mut parker, || match memory.read_exact_at(&mut page, hva(&ram, 5)) {
        Ok(()) => assert_eq!(page[..8], 5u64.to_ne_bytes()),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}"),
    });
    ram.forbid_parking();
    memory.read_exact_at(&mut page, hva(&ram, 5)).unwrap();
    assert_eq!(page[..8], 5u64.to_ne_bytes());
}

#[test]
fn nothing_is_lost_among_writers_and_givers_back() {
    let Some((ram, mut parker)) = filled() else { return };
    let whole = mappings(&ram);
    let over = &AtomicBool::new(false);
    // Each thread has pages of its own, writes what it counts, and finds it again; and gives some
    // back, and finds zeros.
    let worker = |first: u64| {
        let mut held: Vec<u64> = (0..PAGES / 4).map(|page| first * PAGES / 4 + page).collect();
        let mut random = first.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut rounds = 0;
        while !over.load(Ordering::Relaxed) || rounds == 0 {
            for (page, held) in (first * PAGES / 4..).zip(&mut held) {
                assert_eq!(read(&ram, page), *held, "page {page} in round {rounds}");
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                match random % 16 {
                    0 => {
                        ram.discard(Gpa(page * PAGE_BYTES)..Gpa((page + 1) * PAGE_BYTES)).unwrap();
                        *held = 0;
                    }
                    1..8 => {
                        *held = random;
                        write(&ram, page, random);
                    }
                    _ => {}
                }
            }
            rounds += 1;
        }
    };
    let mut all = Parked::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|first| scope.spawn(move || worker(first))).collect();
        for round in 0..100 {
            let chosen = parker.choose(&(0..PAGES - 1).step_by(7 + round % 5).collect::<Vec<_>>()).unwrap();
            parker.park(&chosen).unwrap();
            parker.watch(Duration::from_millis(1)).unwrap();
            let ended = parker.end().unwrap();
            all.touched += ended.touched;
            all.withdrawn += ended.withdrawn;
        }
        over.store(true, Ordering::Relaxed);
        while !workers.iter().all(|worker| worker.is_finished()) {
            parker.watch(Duration::from_millis(1)).unwrap();
        }
    });
    assert!(all.touched > 0 && all.withdrawn > 0, "{all:?}");
    assert_eq!((mappings(&ram), ram.parked_pages()), (whole, 0));
}
