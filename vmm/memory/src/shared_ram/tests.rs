//! Merging and giving back, of the same pages at the same time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use devices::reclaim::Reclaim;
use vm_memory::{Bytes, GuestAddress};

use super::super::replace::Step;
use super::super::slab::Draft;
use super::*;
use crate::ram::Backing;
use crate::{Hva, PAGE};

const RAM_BYTES: u64 = 16 << 20;
/// Where the pages are that are merged and given back.
const FIRST: u64 = 100;
const PAGES: u64 = 4;

/// RAM with some pages of sevens, what merges them, and a slab of such; None, said aloud, where
/// userfaultfd is denied.
fn sevens() -> Option<(Ram, SharedRam, Slab)> {
    let ram = Ram::new(RAM_BYTES, Backing::Anonymous).unwrap();
    let shared_ram = match SharedRam::new(&ram) {
        Ok(shared_ram) => shared_ram,
        Err(error) => {
            testing::skipped(module_path!(), format_args!("userfaultfd: {error}"));
            return None;
        }
    };
    let draft = Draft::new(PAGES).unwrap();
    draft.write(SlabPage(0), &[7; PAGES as usize * PAGE]).unwrap();
    fill(&ram);
    Some((ram, shared_ram, draft.seal().unwrap()))
}

fn run(first: u64, pages: u64) -> PageRange {
    PageRange::new(PageNo(first), pages).unwrap()
}

fn fill(ram: &Ram) {
    ram.memory().write_slice(&[7; PAGES as usize * PAGE], GuestAddress(FIRST * PAGE_BYTES)).unwrap();
}

fn byte(ram: &Ram, page: u64) -> u8 {
    let mut bytes = [0; PAGE];
    ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE_BYTES)).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is of several makes");
    bytes[0]
}

#[test]
fn what_a_device_is_about_to_write_is_not_replaced() {
    let Some((ram, mut shared_ram, slab)) = sevens() else { return };
    let device: &dyn devices::in_flight::InFlight = &ram;
    let mut refused = None;
    let range = Gpa(FIRST * PAGE_BYTES)..Gpa(FIRST * PAGE_BYTES + 512);
    device.during(range, &mut || refused = shared_ram.merge(run(FIRST, 1), (&slab, SlabPage(0))).err());
    assert!(matches!(refused, Some(Refusal::InFlight)), "{refused:?}");
    shared_ram.merge(run(FIRST, 1), (&slab, SlabPage(0))).unwrap();
}

#[test]
fn what_is_replaced_is_remembered() {
    let Some((ram, mut shared_ram, slab)) = sevens() else { return };
    ram.memory().write_slice(&[0; PAGE], GuestAddress(5 * PAGE_BYTES)).unwrap();
    let left = shared_ram.left;
    assert!(
        shared_ram.drop_zeros(run(FIRST, 1)).is_err()
            && shared_ram.merge(run(5, 1), (&slab, SlabPage(0))).is_err()
    );
    assert_eq!(shared_ram.left, left, "mappings that were not made");
    assert!(ram.merges().last().is_empty(), "what was refused was not done");
    shared_ram.merge(run(FIRST + 1, 2), (&slab, SlabPage(1))).unwrap();
    shared_ram.drop_zeros(run(5, 1)).unwrap();
    assert_eq!(shared_ram.left, left - 4);
    ram.discard(Gpa(FIRST * PAGE_BYTES)..Gpa((FIRST + 3) * PAGE_BYTES)).unwrap();
    let last: Vec<_> = ram.merges().last().iter().map(|r| (r.gpa.0 / PAGE_BYTES, r.pages, r.with)).collect();
    assert_eq!(
        last,
        [(FIRST + 1, 2, With::Slab { first: SlabPage(1) }), (5, 1, With::Zeros), (FIRST, 3, With::Fresh)]
    );
}

/// A balloon that gives pages back between any two steps of their merge waits for its end: it would
/// be undone.
#[test]
fn giving_back_waits_for_the_merge() {
    /// In which step the balloon is told to go, and what says that it is about to.
    type When = (Step, Sender<()>, Receiver<()>);
    static WHEN: Mutex<Option<When>> = Mutex::new(None);
    static DONE: AtomicBool = AtomicBool::new(false);
    for when in [Step::Frozen, Step::Compared, Step::Mapped] {
        for at_once in [1, 2] {
            let Some((ram, mut shared_ram, slab)) = sevens() else { return };
            let (go, going) = channel();
            let (about, about_to) = channel();
            *WHEN.lock().unwrap() = Some((when, go, about_to));
            DONE.store(false, Ordering::SeqCst);
            shared_ram.region.between = |step| {
                if let Some((_, go, about_to)) = WHEN.lock().unwrap().take_if(|(when, ..)| *when == step) {
                    go.send(()).unwrap();
                    about_to.recv().unwrap();
                    // Time to be done, were there nothing to wait for.
                    thread::sleep(Duration::from_millis(20));
                }
                assert!(!DONE.load(Ordering::SeqCst), "given back at {step:?}, in the middle of the merge");
            };
            thread::scope(|scope| {
                let ram = &ram;
                scope.spawn(move || {
                    let page = |n: u64| Gpa((FIRST + n) * PAGE_BYTES);
                    // One range, and several that could go by one system call.
                    let ranges = match at_once {
                        1 => vec![page(0)..page(PAGES)],
                        _ => vec![page(0)..page(1), page(2)..page(PAGES)],
                    };
                    going.recv().unwrap();
                    about.send(()).unwrap();
                    ram.discard_all(&ranges, &mut |range, error| panic!("{range:?}: {error}"));
                    DONE.store(true, Ordering::SeqCst);
                });
                shared_ram.merge(run(FIRST, PAGES), (&slab, SlabPage(0))).unwrap();
            });
            let given = [true, at_once == 1, true, true];
            for (page, given) in (FIRST..).zip(given) {
                assert_eq!(byte(&ram, page), if given { 0 } else { 7 }, "page {page}, {when:?}");
            }
            assert_eq!(byte(&ram, FIRST - 1), 0);
        }
    }
}

/// What was advised of memory holds for what is mapped in its place: else neighbours never join
/// again.
#[test]
fn given_back_it_is_one_mapping_again() {
    let Some((ram, mut shared_ram, slab)) = sevens() else { return };
    ram.set_huge_pages(false).unwrap();
    let extent = ram.extents()[0];
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let start = |line: &str| u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        maps.lines().filter(|line| extent.hva.span(extent.bytes).contains(&Hva(start(line)))).count()
    };
    assert_eq!(mappings(), 1);
    shared_ram.merge(run(FIRST, PAGES), (&slab, SlabPage(0))).unwrap();
    shared_ram.drop_zeros(run(5, 3)).unwrap();
    assert_eq!(mappings(), 3, "before the slab, the slab, after it");
    ram.discard(Gpa(FIRST * PAGE_BYTES)..Gpa((FIRST + PAGES) * PAGE_BYTES)).unwrap();
    assert_eq!(mappings(), 1);
}
