use std::os::fd::AsFd;

use devices::reclaim::Reclaim;
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::ram::{Backing, Ram};
use crate::slab::Draft;
use crate::{Extent, Gpa, PageNo, PageRange, SlabPage};

/// Memory of some pages, none of them touched, and both ways to look at it. They are huge pages
/// only where that is wanted.
fn ram() -> (Ram, Extent, [PageScan; 2]) {
    let ram = Ram::new(32 << 20, Backing::Anonymous).unwrap();
    ram.set_huge_pages(false).unwrap();
    let extent = ram.extents()[0];
    (ram, extent, [PageScan::open_self().unwrap(), PageScan::by_entries().unwrap()])
}

fn file_pages(scan: &mut PageScan, hvas: Range<Hva>) -> u64 {
    let mut sum = 0;
    scan.files(hvas, |found| sum += found.pages).unwrap();
    sum
}

fn whole(extent: &Extent) -> Range<Hva> {
    extent.hva.span(extent.bytes)
}

fn write(ram: &Ram, page: u64) {
    ram.memory().write_obj(1u8, GuestAddress(page * PAGE_BYTES)).unwrap();
}

/// First page and number of pages.
fn anonymous(scan: &mut PageScan, extent: &Extent) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    scan.anonymous(whole(extent), |p| found.push(((p.hva - extent.hva) / PAGE_BYTES, p.pages))).unwrap();
    found
}

/// Maps a slab of `pages` pages at `page`.
fn map_slab(ram: &Ram, page: u64, pages: u64) {
    let draft = Draft::new(pages).unwrap();
    draft.write(SlabPage(0), &vec![5; to_usize(pages * PAGE_BYTES)]).unwrap();
    let slab = draft.seal().unwrap();
    let range = ram.range(PageRange::new(PageNo(page), pages).unwrap()).unwrap();
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the pages are those of a `Ram` of this test, which has no other user.
    unsafe {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        rustix::mm::mmap(range.as_ptr(), range.bytes(), prot, flags, slab.as_fd(), 0).unwrap();
        assert_eq!(libc::madvise(range.as_ptr(), range.bytes(), libc::MADV_POPULATE_READ), 0);
    }
}

#[test]
fn pages_that_were_written_are_found_in_ranges() {
    let (ram, extent, scans) = ram();
    for page in [0, 1, 2, 77, 4096, 8191] {
        write(&ram, page);
    }
    for mut scan in scans {
        assert_eq!(anonymous(&mut scan, &extent), [(0, 3), (77, 1), (4096, 1), (8191, 1)]);
        let mut frames = Vec::new();
        scan.frames(whole(&extent), |p| frames.push(((p.hva - extent.hva) / PAGE_BYTES, p.pages))).unwrap();
        assert_eq!(frames, [(0, 3), (77, 1), (4096, 1), (8191, 1)]);
        let mut all = Vec::new();
        scan.walk(extent.hva + PAGE_BYTES..extent.hva + 78 * PAGE_BYTES, |p| all.push(p)).unwrap();
        assert_eq!(all.iter().map(|p| p.pages).collect::<Vec<_>>(), [2, 1]);
        assert!(all.iter().all(|p| p.categories.present() && !p.categories.file() && !p.categories.zero()));
        assert_eq!(file_pages(&mut scan, whole(&extent)), 0);
        scan.walk(extent.hva..extent.hva, |_| panic!("no pages")).unwrap();
        assert!(scan.walk(extent.hva + 1..extent.hva + PAGE_BYTES, |_| {}).is_err());
    }
    ram.discard(Gpa(PAGE_BYTES)..Gpa(2 * PAGE_BYTES)).unwrap();
    assert_eq!(
        anonymous(&mut PageScan::open_self().unwrap(), &extent),
        [(0, 1), (2, 1), (77, 1), (4096, 1), (8191, 1)]
    );
}

#[test]
fn a_page_of_a_slab_is_a_files_until_it_is_written() {
    let (ram, extent, scans) = ram();
    map_slab(&ram, 100, 8);
    write(&ram, 99);
    for mut scan in scans {
        assert_eq!(file_pages(&mut scan, whole(&extent)), 8);
        assert_eq!(anonymous(&mut scan, &extent), [(99, 1)]);
    }
    write(&ram, 103);
    for mut scan in [PageScan::open_self().unwrap(), PageScan::by_entries().unwrap()] {
        assert_eq!(file_pages(&mut scan, whole(&extent)), 7);
        assert_eq!(anonymous(&mut scan, &extent), [(99, 1), (103, 1)]);
    }
}

#[test]
fn more_ranges_than_fit_in_one_call_are_all_found() {
    let (ram, extent, scans) = ram();
    let pages: Vec<u64> = (0..3 * MAX_REGIONS as u64).map(|n| 2 * n).collect();
    pages.iter().for_each(|page| write(&ram, *page));
    for mut scan in scans {
        let found = anonymous(&mut scan, &extent);
        let wrong = found.iter().zip(&pages).find(|(found, page)| **found != (**page, 1));
        assert_eq!((wrong, found.len()), (None, pages.len()));
    }
}

#[test]
fn one_range_goes_on_from_one_call_to_the_next() {
    let ram = Ram::new((MAX_CALL_PAGES + 512) * PAGE_BYTES, Backing::Anonymous).unwrap();
    ram.set_huge_pages(false).unwrap();
    let extent = ram.extents()[0];
    write(&ram, MAX_CALL_PAGES - 1);
    write(&ram, MAX_CALL_PAGES);
    for mut scan in [PageScan::open_self().unwrap(), PageScan::by_entries().unwrap()] {
        assert_eq!(anonymous(&mut scan, &extent), [(MAX_CALL_PAGES - 1, 2)]);
    }
}

/// None, said aloud, where the kernel has no PAGEMAP_SCAN.
fn by_ioctl() -> Option<PageScan> {
    let scan = PageScan::open_self().unwrap();
    let found = matches!(scan.0, How::Scan { .. });
    if !found {
        testing::skipped(module_path!(), "no PAGEMAP_SCAN here");
    }
    found.then_some(scan)
}

#[test]
fn a_page_that_was_only_read_is_the_zero_page() {
    let Some(mut scan) = by_ioctl() else { return };
    let (ram, extent, _) = ram();
    ram.memory().read_obj::<u8>(GuestAddress(7 * PAGE_BYTES)).unwrap();
    write(&ram, 8);
    assert_eq!(anonymous(&mut scan, &extent), [(8, 1)]);
    let mut all = Vec::new();
    scan.walk(whole(&extent), |p| all.push((p.pages, p.categories.zero()))).unwrap();
    assert_eq!(all, [(1, true), (1, false)]);
}

#[test]
fn huge_pages_are_told_from_others() {
    let Some(mut scan) = by_ioctl() else { return };
    let ram = Ram::new(32 << 20, Backing::Anonymous).unwrap();
    ram.set_huge_pages(true).unwrap();
    let extent = ram.extents()[0];
    write(&ram, 512);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let of_ours = smaps.split_once(&format!("{:x}-", extent.hva)).unwrap().1;
    let huge = of_ours.lines().find(|line| line.starts_with("AnonHugePages:")).unwrap();
    if !huge.contains("2048 kB") {
        testing::skipped(module_path!(), "this kernel gave no huge page");
        return;
    }
    let mut found = Vec::new();
    scan.anonymous(whole(&extent), |p| found.push(p)).unwrap();
    let [pages] = found[..] else { panic!("{found:?}") };
    assert_eq!((pages.hva, pages.pages), (extent.hva + 512 * PAGE_BYTES, 512));
    assert!(pages.categories.huge() && !pages.categories.present(), "only what was asked for is reported");
}
