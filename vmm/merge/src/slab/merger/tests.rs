//! What is merged, held back and counted, in memory that belongs to no VM.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use memory::ram::{Backing, Ram};
use memory::slab::Draft;
use memory::{PAGE_BYTES, PageNo};

const FIRST: u64 = 1024;

/// 16 MiB of which some pages are filled, and what merges them. None, said aloud, where userfaultfd
/// is denied.
fn world(pages: u64) -> Option<(Ram, Merger, Counters)> {
    let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
    for page in FIRST..FIRST + pages {
        ram.memory().write_slice(&content(page), GuestAddress(page * PAGE_BYTES)).unwrap();
    }
    match SharedRam::new(&ram) {
        Ok(shared_ram) => Some((ram, Merger::new(shared_ram, 4096), Counters::default())),
        Err(error) => {
            testing::skipped(module_path!(), format_args!("userfaultfd: {error}"));
            None
        }
    }
}

fn content(page: u64) -> Vec<u8> {
    vec![page as u8 | 1; PAGE_BYTES as usize]
}

/// A slab of the pages from [`FIRST`] on, in the order of `pages`.
fn slab(pages: impl IntoIterator<Item = u64>) -> Slab {
    let bytes: Vec<u8> = pages.into_iter().flat_map(|page| content(FIRST + page)).collect();
    let draft = Draft::new(bytes.len() as u64 / PAGE_BYTES).unwrap();
    draft.write(SlabPage(0), &bytes).unwrap();
    draft.seal().unwrap()
}

fn run(page: u64, pages: u32, slab: u32, slab_page: u32) -> Run {
    Run { page: PageNo(FIRST + page), pages, slab, slab_page: SlabPage(slab_page) }
}

fn assert_unharmed(ram: &Ram, pages: u64) {
    let mut bytes = vec![0; PAGE_BYTES as usize];
    for page in FIRST..FIRST + pages {
        ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE_BYTES)).unwrap();
        assert!(bytes == content(page), "{page}");
    }
}

#[test]
fn a_run_of_any_length_is_merged_and_what_differs_is_left_out() {
    let Some((ram, mut merger, mut counters)) = world(200) else { return };
    // Number 77 is something else there.
    merger.learn(3, slab((0..200).map(|page| if page == 77 { 0 } else { page })));
    merger.merge_all(vec![run(0, 200, 3, 0), run(10, 5, 9, 0)], &mut counters);
    assert_eq!((counters.merged_pages, counters.differed_pages, counters.refused_pages), (199, 1, 5));
    assert_eq!((counters.shared_now, counters.matched_pages), (199, 205));
    let live = merger.count(&mut counters).unwrap();
    assert_eq!(counters.shared_now, 199);
    assert!(live[&3].count() == 199 && !live[&3].has(SlabPage(77)));
    assert_eq!(counters.mappings_now, 2, "one before and one after the page that differs");
    assert_unharmed(&ram, 200);
    // The guest writes to one of them.
    ram.memory().write_slice(&content(FIRST + 5), GuestAddress((FIRST + 5) * PAGE_BYTES)).unwrap();
    let mut written = PageSet::none(4096);
    written.insert(PageNo(FIRST + 5));
    merger.written(&written, &mut counters);
    assert_eq!((counters.broken_pages, counters.shared_now), (1, 198));
    merger.count(&mut counters).unwrap();
    assert_eq!(counters.shared_now, 198);
}

#[test]
fn pages_move_from_slabs_into_another() {
    let Some((ram, mut merger, mut counters)) = world(100) else { return };
    merger.learn(1, slab(0..50));
    merger.learn(2, slab(50..100));
    merger.merge_all(vec![run(0, 50, 1, 0), run(50, 50, 2, 0)], &mut counters);
    let places: Vec<_> = (40..50).map(|page| SlabPlace { slab: 1, page: SlabPage(page) }).collect();
    let places = [places, (0..10).map(|page| SlabPlace { slab: 2, page: SlabPage(page) }).collect()].concat();
    // A page in it is not what it should be.
    merger.learn(7, slab((40..60).map(|page| if page == 45 { 0 } else { page })));
    merger.put_together(7, &places, &mut counters).unwrap();
    assert_eq!((counters.moved_pages, counters.differed_pages), (19, 1));
    merger.forget(1);
    merger.forget(2);
    let live = merger.count(&mut counters).unwrap();
    assert_eq!((live.len(), live[&7].count(), counters.shared_now), (1, 19, 100));
    assert_unharmed(&ram, 100);
}

#[test]
fn a_huge_page_is_broken_up_for_enough_only() {
    let Some((ram, mut merger, mut counters)) = world(1024) else { return };
    merger.settings.huge_page_percent = 10;
    merger.learn(1, slab(0..1024));
    merger.is_huge(PageRange::new(PageNo(FIRST), 512).unwrap());
    // 51 pages are less than a tenth of 512. What lies in the next huge page is merged: it is none.
    merger.merge_all(vec![run(461, 100, 1, 461)], &mut counters);
    assert_eq!((counters.merged_pages, counters.huge_pages), (49, 51));
    let mut written = PageSet::none(4096);
    written.insert(PageNo(FIRST + 500));
    merger.written(&written, &mut counters);
    assert_eq!(counters.huge_pages, 0, "what was found out of a page that was written is true no more");
    merger.merge_all(vec![run(0, 51, 1, 0)], &mut counters);
    assert_eq!((counters.merged_pages, counters.huge_pages), (49, 51));
    merger.merge_all(vec![run(60, 1, 1, 60)], &mut counters);
    assert_eq!((counters.merged_pages, counters.huge_pages), (49 + 52, 0));
    assert_unharmed(&ram, 1024);
}

#[test]
fn the_last_mappings_are_for_the_longest_runs() {
    let Some((_ram, mut merger, mut counters)) = world(200) else { return };
    merger.learn(1, slab(0..200));
    merger.settings.min_run_pages = 16;
    merger.merge_all(vec![run(0, 15, 1, 0), run(20, 16, 1, 20), run(100, 64, 1, 100)], &mut counters);
    assert_eq!((counters.merged_pages, counters.over_budget_pages), (80, 15));
    merger.retry(&mut counters);
    assert_eq!(counters.merged_pages, 80, "it is not long enough yet");
    merger.settings.min_run_pages = 15;
    merger.retry(&mut counters);
    assert_eq!((counters.merged_pages, counters.over_budget_pages), (95, 0));
}
