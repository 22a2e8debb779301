use std::fs;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use kernel_view::own_pages::OwnPages;
use kernel_view::pagemap::Pagemap;

const BYTES: u64 = 16 << 20;

/// Pages of `range` that have a frame, or are in the file's page cache and would be found again.
fn resident_pages(ram: &Ram, range: Range<Gpa>) -> usize {
    let range = ram.range_at(&range).unwrap();
    let mut entries = Vec::new();
    Pagemap::open_self().unwrap().read(range.hva(), range.bytes() / PAGE, &mut entries).unwrap();
    entries.iter().filter(|e| e.present()).count()
}

fn fill(ram: &Ram, byte: u8) {
    for gpa in (0..BYTES).step_by(4096) {
        ram.memory().write_slice(&[byte; 4096], GuestAddress(gpa)).unwrap();
    }
}

fn bytes_other_than(ram: &Ram, byte: u8, range: Range<u64>) -> usize {
    let mut page = [0u8; 4096];
    range
        .step_by(4096)
        .map(|gpa| {
            ram.memory().read_slice(&mut page, GuestAddress(gpa)).unwrap();
            page.iter().filter(|b| **b != byte).count()
        })
        .sum()
}

fn pages_come_back_as_zeros(backing: Backing) {
    let ram = Ram::new(BYTES, backing).unwrap();
    fill(&ram, 7);
    let given = Gpa(0x3000)..Gpa(0x60_5000);
    ram.discard(given.clone()).unwrap();
    if backing != Backing::Hugetlb {
        assert_eq!(resident_pages(&ram, given.clone()), 0);
    } else {
        // Two whole huge pages lie inside; of those at the ends a part is in use.
        assert_eq!(resident_pages(&ram, Gpa(0x20_0000)..Gpa(0x60_0000)), 0);
    }
    assert_eq!(bytes_other_than(&ram, 0, 0x3000..0x60_5000), 0, "given pages are zeros");
    assert_eq!(bytes_other_than(&ram, 7, 0..0x3000), 0, "their neighbours below are whole");
    assert_eq!(bytes_other_than(&ram, 7, 0x60_5000..BYTES), 0, "and those above");
    // And again, after the guest has written to them.
    fill(&ram, 9);
    ram.discard(given).unwrap();
    assert_eq!(bytes_other_than(&ram, 0, 0x3000..0x60_5000), 0);
}

#[test]
fn anonymous_pages_come_back_as_zeros() {
    pages_come_back_as_zeros(Backing::Anonymous);
}

#[test]
fn memfd_pages_come_back_as_zeros_and_leave_the_file() {
    pages_come_back_as_zeros(Backing::Memfd);
    let ram = Ram::new(BYTES, Backing::Memfd).unwrap();
    fill(&ram, 7);
    let hva = ram.extents()[0].hva;
    let rollup = |what: &str| -> u64 {
        let text = fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{hva:x}-");
        let lines = text.lines().skip_while(|l| !l.starts_with(&start));
        lines
            .filter_map(|l| l.strip_prefix(what))
            .next()
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    };
    assert_eq!(rollup("Rss:"), BYTES >> 10);
    ram.discard(Gpa(0)..Gpa(BYTES / 2)).unwrap();
    assert_eq!(rollup("Rss:"), BYTES >> 11);
}

#[test]
fn huge_pages_come_back_as_zeros_where_there_is_a_pool() {
    match Ram::new(BYTES, Backing::Hugetlb) {
        Ok(_) => pages_come_back_as_zeros(Backing::Hugetlb),
        Err(e) => {
            assert!(e.to_string().contains("vm.nr_hugepages"), "{e}");
            testing::skipped(module_path!(), format_args!("no pool of huge pages on this host ({e})"));
        }
    }
}

#[test]
fn of_the_pool_only_whole_huge_pages_can_be_given_back() {
    let ram = Ram::new(BYTES, Backing::Anonymous).unwrap();
    let ranges = [Gpa(0x1000)..Gpa(0x60_3000), Gpa(0x70_0000)..Gpa(0x70_1000)];
    assert_eq!(ram.units(&ranges), (ranges.to_vec(), vec![]));
    let Ok(ram) = Ram::new(BYTES, Backing::Hugetlb) else { return };
    let whole = Gpa(0x20_0000)..Gpa(0x60_0000);
    let parts = [Gpa(0x1000)..Gpa(0x20_0000), Gpa(0x60_0000)..Gpa(0x60_3000), ranges[1].clone()];
    assert_eq!(ram.units(&ranges), (vec![whole], parts.to_vec()));
}

#[test]
fn transparent_huge_pages_are_split() {
    let ram = Ram::new(BYTES, Backing::Anonymous).unwrap();
    let _ = ram.set_huge_pages(true);
    fill(&ram, 7);
    ram.discard(Gpa(0x1000)..Gpa(0x2000)).unwrap();
    assert_eq!(resident_pages(&ram, Gpa(0)..Gpa(BYTES)) as u64, BYTES / 4096 - 1);
    assert_eq!(bytes_other_than(&ram, 7, 0x2000..BYTES), 0);
}

#[test]
fn what_is_not_whole_pages_of_one_stretch_is_refused_and_changes_nothing() {
    let ram = Ram::new(BYTES, Backing::Anonymous).unwrap();
    fill(&ram, 7);
    for (start, end) in
        [(1, 4096), (0, 4095), (0, 0), (8192, 4096), (0, BYTES + 4096), (BYTES, BYTES + 4096), (!4095, 0)]
    {
        let error = ram.discard(Gpa(start)..Gpa(end)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{start:#x}..{end:#x}");
    }
    assert_eq!(bytes_other_than(&ram, 7, 0..BYTES), 0);
    let above = Ram::new((3 << 30) + BYTES, Backing::Anonymous).unwrap();
    assert!(above.discard(Gpa((3 << 30) - 4096)..Gpa((4 << 30) + 4096)).is_err(), "across the hole");
    above.discard(Gpa(4 << 30)..Gpa((4 << 30) + 4096)).unwrap();
}

#[test]
fn the_kernel_s_count_of_our_frames_follows() {
    const PAGES: u64 = 16 << 10;
    let (ram, own) = (Ram::new(PAGES * PAGE_BYTES, Backing::Anonymous).unwrap(), OwnPages::open().unwrap());
    let before = own.anonymous().unwrap();
    for page in 0..PAGES {
        ram.memory().write_obj(1u8, GuestAddress(page * PAGE_BYTES)).unwrap();
    }
    // Other tests of this process have memory, too: far less.
    let touched = own.anonymous().unwrap();
    assert!(touched > before + PAGES / 2, "{before} before, {touched} after");
    ram.discard(Gpa(0)..Gpa(PAGES * PAGE_BYTES)).unwrap();
    assert!(own.anonymous().unwrap() + PAGES / 2 < touched);
}
