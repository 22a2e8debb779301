use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::{Extent, PAGE};
use kernel_view::pagemap::Pagemap;
use memory::{Gpa, Hva, PAGE_BYTES};

/// Page-aligned memory of this process that stands for a guest.
struct Ram {
    memory: Vec<u8>,
    pages: usize,
}

impl Ram {
    /// One page for each of `contents`: 0 is zeros, any other value a content of its own.
    fn filled(contents: &[u32]) -> Self {
        let mut ram = Self { memory: vec![0; (contents.len() + 1) * PAGE], pages: contents.len() };
        let start = ram.start();
        for (page, content) in contents.iter().enumerate() {
            let bytes = &mut ram.memory[start + page * PAGE..][..PAGE];
            bytes.fill(0);
            bytes[0] = 1;
            bytes[0] = 0;
            bytes[PAGE - 4..].copy_from_slice(&content.to_ne_bytes());
        }
        ram
    }

    fn start(&self) -> usize {
        (self.memory.as_ptr() as usize).next_multiple_of(PAGE) - self.memory.as_ptr() as usize
    }

    fn space(&self, name: &str) -> Space {
        let hva = (self.memory.as_ptr() as u64).next_multiple_of(PAGE_BYTES);
        let extents = vec![Extent { gpa: Gpa(0), hva: Hva(hva), bytes: self.pages as u64 * PAGE_BYTES }];
        Space { name: name.to_owned(), pid: std::process::id(), extents }
    }
}

fn expected(guests: &[Vec<u32>]) -> Content {
    let mut content = Content::default();
    let mut seen: HashMap<u32, HashSet<usize>> = HashMap::new();
    for (guest, pages) in guests.iter().enumerate() {
        for page in pages {
            match seen.get_mut(page) {
                _ if *page == 0 => content.zero += 1,
                None => {
                    seen.insert(*page, HashSet::from([guest]));
                    content.distinct += 1;
                }
                Some(guests) if guests.contains(&guest) => content.self_duplicates += 1,
                Some(guests) => {
                    guests.insert(guest);
                    content.cross_duplicates += 1;
                }
            }
        }
    }
    content.ideal_saved_pages = content.zero + content.self_duplicates + content.cross_duplicates;
    content
}

fn counts(content: &Content) -> [u64; 5] {
    let c = content;
    [c.zero, c.self_duplicates, c.cross_duplicates, c.distinct, c.ideal_saved_pages]
}

fn run(guests: &[Vec<u32>]) -> Content {
    let rams: Vec<_> = guests.iter().map(|pages| Ram::filled(pages)).collect();
    let spaces: Vec<_> = rams.iter().map(|ram| ram.space("g")).collect();
    let mut last = (0, 0);
    let mut progress = |done, total| {
        assert!(last.0 <= done && done <= total);
        last = (done, total);
    };
    let content = measure(&spaces, &mut progress);
    assert_eq!(last.0, last.1);
    content.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn duplicates_are_counted_as_a_naive_count_does(
        guests in prop::collection::vec(prop::collection::vec(0u32..30, 0..600), 1..5),
    ) {
        let content = run(&guests);
        prop_assert_eq!(counts(&content), counts(&expected(&guests)));
        prop_assert_eq!(content.present(), guests.iter().map(|pages| pages.len() as u64).sum::<u64>());
        prop_assert!(content.runs.pages_in_64 <= content.runs.pages_in_8);
        prop_assert!(content.runs.pages_in_8 <= content.cross_duplicates);
    }
}

#[test]
fn runs_follow_the_first_holder() {
    let first: Vec<u32> = (1..=300).collect();
    // 100 in a row, a page of its own, 10 in a row, then 3.
    let second: Vec<u32> = (51..=150).chain([1000]).chain(201..=210).chain([0]).chain(1..=3).collect();
    let content = run(&[first, second]);
    assert_eq!(content.cross_duplicates, 113);
    assert_eq!(content.runs, Runs { runs: 3, pages_in_8: 110, pages_in_64: 100, longest: 100 });
}

#[test]
fn a_run_does_not_cross_extents() {
    let first = Ram::filled(&(1..=20).collect::<Vec<_>>());
    let second = Ram::filled(&(1..=20).collect::<Vec<_>>());
    let mut split = second.space("second");
    let whole = split.extents[0];
    let half = whole.bytes / 2;
    split.extents = vec![
        Extent { bytes: half, ..whole },
        Extent { gpa: Gpa(1 << 32), hva: whole.hva + half, bytes: half },
    ];
    let content = measure(&[first.space("first"), split], &mut |_, _| {}).unwrap();
    assert_eq!(content.runs, Runs { runs: 2, pages_in_8: 20, pages_in_64: 0, longest: 10 });
}

#[test]
fn absent_pages_are_neither_read_nor_touched() {
    // Above 32 MiB an allocation is always a fresh mapping, which `vec!` does not touch.
    let ram = Ram { memory: vec![0; 64 << 20], pages: 1024 };
    let space = ram.space("idle");
    let absent = || {
        let mut entries = Vec::new();
        Pagemap::open_self().unwrap().read(space.extents[0].hva, 1024, &mut entries).unwrap();
        entries.iter().filter(|entry| !entry.present()).count()
    };
    let before = absent();
    assert!(before > 900, "{before}");
    let content = measure(std::slice::from_ref(&space), &mut |_, _| {}).unwrap();
    assert_eq!(content.present() as usize, 1024 - before);
    assert_eq!(absent(), before);
}

#[test]
fn a_guest_that_is_gone_is_named_with_its_pid() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let pid = child.id();
    child.kill().unwrap();
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z ") {
        std::thread::yield_now();
    }
    let gone = Space {
        name: "db-1".to_owned(),
        pid,
        extents: vec![Extent { gpa: Gpa(0), hva: Hva(4096), bytes: 4096 }],
    };
    // First a zombie, then nothing at all.
    for _ in 0..2 {
        let error = measure(std::slice::from_ref(&gone), &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("db-1") && error.contains(&pid.to_string()), "{error}");
        child.wait().unwrap();
    }
}
