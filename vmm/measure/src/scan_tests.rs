use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::content::Content;
use crate::index::LEAST_LIMIT_BYTES;
use crate::source::{EachPage, Unread};

/// Guests in memory: a page for each number, 0 is zeros.
struct Pages {
    name: String,
    extents: Vec<Vec<u32>>,
    live: bool,
}

impl Pages {
    fn new(pages: &[u32]) -> Self {
        Self { name: "guest".to_owned(), extents: vec![pages.to_vec()], live: false }
    }
}

struct Reader(Vec<u32>);

impl Source for Pages {
    fn name(&self) -> &str {
        &self.name
    }

    fn extents(&self) -> Vec<u64> {
        self.extents.iter().map(|pages| pages.len() as u64).collect()
    }

    fn is_live(&self) -> bool {
        self.live
    }

    fn open(&self) -> Result<Box<dyn PageReader + '_>, MeasureError> {
        Ok(Box::new(Reader(self.extents.concat())))
    }
}

impl PageReader for Reader {
    fn read(&mut self, first: u64, pages: u64, each: EachPage<'_>) -> Result<Unread, MeasureError> {
        for page in first..first + pages {
            let mut content = [0; PAGE];
            content[100..104].copy_from_slice(&self.0[page as usize].to_ne_bytes());
            each(page, &content);
        }
        Ok(Unread::default())
    }
}

fn run(guests: &[Pages], threads: usize, index_limit_bytes: u64) -> Scan {
    let sources: Vec<&dyn Source> = guests.iter().map(|guest| guest as &dyn Source).collect();
    let options = Options { threads, index_limit_bytes, sample_contents: 100, second_look_pages: 1 << 20 };
    scan(&sources, &options, &mut |_, _| true).unwrap()
}

/// By whole contents, and another way: which guests hold each, how often.
fn expected(guests: &[Pages]) -> (u64, BTreeMap<Vec<u16>, u64>) {
    let mut holders: BTreeMap<u32, BTreeSet<u16>> = BTreeMap::new();
    let mut zero = 0;
    for (guest, pages) in guests.iter().enumerate() {
        for page in pages.extents.concat() {
            if page == 0 {
                zero += 1;
            } else {
                holders.entry(page).or_default().insert(guest as u16);
            }
        }
    }
    let mut by_set = BTreeMap::new();
    for guests in holders.into_values() {
        *by_set.entry(guests.into_iter().collect()).or_default() += 1;
    }
    (zero, by_set)
}

fn by_set(scan: &Scan) -> BTreeMap<Vec<u16>, u64> {
    let mut found = BTreeMap::new();
    for (set, contents) in scan.contents() {
        let mut guests: Vec<u16> = scan.sets.guests(set).collect();
        guests.reverse();
        *found.entry(guests).or_default() += contents;
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]
    #[test]
    fn threads_and_passes_change_nothing(
        seeds in prop::collection::vec((1u32..40_000, 1usize..8_000), 2..4),
        threads in 1usize..4,
    ) {
        let guests: Vec<Pages> = seeds
            .iter()
            .map(|(seed, pages)| {
                let number = |n: usize| (n as u32).wrapping_mul(*seed) % 50_021;
                Pages::new(&(0..*pages).map(number).collect::<Vec<_>>())
            })
            .collect();
        let (zero, sets) = expected(&guests);
        let one = run(&guests, 1, u64::MAX);
        let many = run(&guests, threads, u64::MAX);
        // The least there can be; with many contents it takes more than a pass.
        let small = run(&guests, threads, 0);
        for scan in [&one, &many, &small] {
            prop_assert_eq!(&by_set(scan), &sets);
            prop_assert_eq!(scan.guests.iter().map(|guest| guest.zero).sum::<u64>(), zero);
        }
        prop_assert_eq!((one.passes, &one.runs), (1, &many.runs));
        let distinct = Content::of(&one).distinct;
        prop_assert!(small.passes > 1 || distinct < 14_000);
        prop_assert!(small.runs.is_none() || small.passes == 1);
        let index = small.index_bytes - small.sets.bytes();
        prop_assert!(index <= LEAST_LIMIT_BYTES, "{} bytes of index", index);
    }
}

#[test]
fn samples_are_contents_of_this_memory() {
    let pages: Vec<u32> = (0..3000).chain(0..1000).collect();
    let guests = [Pages { live: true, ..Pages::new(&pages) }, Pages::new(&[7, 0, 0])];
    let scan = run(&guests, 2, u64::MAX);
    assert_eq!(scan.sample.len(), 100);
    for (_, number) in &scan.sample {
        let (guest, page) = scan.numbering.place(*number);
        assert!(guest == 0 && (1..3000).contains(&page), "the first that has it: {guest}, {page}");
    }
    let zeros = scan.second_look.iter().filter(|(_, tag)| tag.is_none()).count();
    assert_eq!((scan.second_look.len(), zeros), (4000, 2), "of what is live only");
}

#[test]
fn it_ends_when_progress_asks_to_stop() {
    let guest = Pages::new(&vec![3; 100_000]);
    let stopped = scan(&[&guest], &Options::default(), &mut |_, _| false);
    assert!(matches!(stopped, Err(MeasureError::Interrupted)));
}
