use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::Extent;
use memory::maps::SlabMapping;
use memory::{Gpa, PAGE_BYTES, SlabPage};

const ZERO_FRAME: u64 = 9;

fn space(name: &str) -> Space {
    Space { name: name.to_owned(), pid: 1, extents: Vec::new() }
}

/// Frames from 30 on are a file's, those that 4 divides are KSM's.
const FILES: u64 = 30;
const KSM: u64 = 4;

fn present(pfn: u64, exclusive: bool) -> PagemapEntry {
    PagemapEntry(1 << 63 | u64::from(pfn >= FILES) << 61 | u64::from(exclusive) << 56 | pfn)
}

/// Entries as a kernel would show them, for a world in which guest g's page p is on frame
/// `world[g][p]` (0: absent, 1: swapped, 2: marker) and an outsider maps each frame in `outside`.
fn entries(world: &[Vec<u64>], outside: &[u64]) -> (Vec<Vec<PagemapEntry>>, HashMap<u64, u64>) {
    let mut mappings: HashMap<u64, u64> = HashMap::new();
    for pfn in world.iter().flatten().filter(|pfn| **pfn > 2).chain(outside) {
        *mappings.entry(*pfn).or_default() += 1;
    }
    mappings.insert(ZERO_FRAME, 0);
    let entry = |pfn: &u64| match pfn {
        0 => PagemapEntry(0),
        1 => PagemapEntry(1 << 62 | 1 << 8),
        2 => PagemapEntry(1 << 62 | 1 << 57 | 0x3f),
        _ => present(*pfn, mappings[pfn] == 1),
    };
    (world.iter().map(|pages| pages.iter().map(entry).collect()).collect(), mappings)
}

fn count(census: &mut Census, guest: usize, hva: u64, entries: &[PagemapEntry], maps: &Maps) {
    for (hva, entry) in (hva..).step_by(PAGE_BYTES as usize).zip(entries) {
        census.count(guest, Hva(hva), *entry, &maps);
    }
}

proptest! {
    #[test]
    fn classes_sum_to_total_and_frames_to_what_is_mapped(
        world in prop::collection::vec(prop::collection::vec(0u64..40, 0..60), 1..5),
        outside in prop::collection::vec(10u64..50, 0..10),
    ) {
        let (entries, mappings) = entries(&world, &outside);
        let spaces: Vec<_> = world.iter().map(|_| space("g")).collect();
        let mut census = Census::new(&spaces);
        for (guest, entries) in entries.iter().enumerate() {
            count(&mut census, guest, 0, entries, &Maps::default());
        }
        let frames = census.join(|batch, out| {
            assert!(batch.is_sorted());
            out.clear();
            out.extend(batch.iter().map(|frame| FrameInfo {
                flags: FrameFlags(
                    u64::from(frame.0 == ZERO_FRAME) << 24 | u64::from(frame.0.is_multiple_of(KSM)) << 21,
                ),
                mappings: mappings[&frame.0],
            }));
            Ok(())
        }).unwrap();

        let mut sum = Pages::default();
        for (guest, pages) in frames.guests.iter().zip(&world) {
            let p = guest.pages;
            prop_assert_eq!(p.total, pages.len() as u64);
            prop_assert_eq!(p.total, p.absent + p.zero + p.private + p.shared + p.swapped);
            prop_assert_eq!(p.absent, pages.iter().filter(|pfn| [0, 2].contains(*pfn)).count() as u64);
            prop_assert_eq!(p.swapped, pages.iter().filter(|pfn| **pfn == 1).count() as u64);
            prop_assert_eq!(p.zero, pages.iter().filter(|pfn| **pfn == ZERO_FRAME).count() as u64);
            prop_assert_eq!(
                p.private,
                pages.iter().filter(|pfn| **pfn > 2 && **pfn != ZERO_FRAME && mappings[pfn] == 1).count() as u64
            );
            sum.add(&p);
        }
        prop_assert_eq!(frames.pages, sum);
        let mut distinct: Vec<u64> =
            world.iter().flatten().copied().filter(|pfn| *pfn > 2 && *pfn != ZERO_FRAME).collect();
        distinct.sort_unstable();
        distinct.dedup();
        prop_assert_eq!(frames.frames, distinct.len() as u64);
        prop_assert_eq!(frames.saved_pages, sum.present() - sum.zero - frames.frames);
        prop_assert_eq!(frames.freed_pages(), sum.present() - frames.frames);
        prop_assert_eq!(frames.shared_by.iter().map(|(by, count)| by * count).sum::<u64>(), sum.shared);
        let shared = |is: fn(u64) -> bool| {
            let pages = world.iter().flatten().filter(|pfn| **pfn > 2 && **pfn != ZERO_FRAME && mappings[pfn] > 1);
            pages.filter(|pfn| is(**pfn)).count() as u64
        };
        let by = frames.shared_by_what;
        prop_assert_eq!((by.file, by.slab), (shared(|pfn| pfn >= FILES), 0));
        prop_assert_eq!(by.ksm, Some(shared(|pfn| pfn < FILES && pfn.is_multiple_of(KSM))));
        prop_assert_eq!(by.ksm.unwrap_or(0) + by.file + by.other, sum.shared);
        let parts = frames.guests.iter().map(|guest| guest.frames).sum::<f64>();
        prop_assert!((parts - frames.frames as f64).abs() < 1e-6);
        prop_assert!(!frames.estimated);
    }

    #[test]
    fn an_estimate_keeps_every_page_in_one_class(
        pages in prop::collection::vec(0u8..5, 0..100), merging in 0u64..50, shared in 0u64..20, sharing in 0u64..90,
    ) {
        let entry = |kind: &u8| match kind {
            0 => PagemapEntry(0),
            1 => PagemapEntry(1 << 63 | 1 << 56),
            2 => PagemapEntry(1 << 63 | 1 << 61),
            3 => PagemapEntry(1 << 62 | 1 << 8),
            _ => PagemapEntry(1 << 63),
        };
        let entries: Vec<_> = pages.iter().map(entry).collect();
        let mut census = Census::new(&[space("g")]);
        count(&mut census, 0, 0, &entries, &Maps::default());
        let frames_per_page = if shared == 0 { 1.0 } else { shared as f64 / (shared + sharing) as f64 };
        let frames = census.estimate(&KsmView { merging_pages: vec![merging], frames_per_page });
        let p = frames.pages;
        prop_assert!(frames.estimated);
        prop_assert_eq!(p.total, p.absent + p.zero + p.private + p.shared + p.swapped);
        prop_assert!(frames.freed_pages() <= p.present());
    }
}

/// As an ordinary user sees them: no frame numbers.
#[test]
fn frames_of_slabs_are_known_by_the_slabs_files() {
    const HVA: u64 = 0x10_0000;
    let maps = |inode, first| {
        let mapping = SlabMapping { hvas: Hva(HVA).span(3 * PAGE_BYTES), inode, first: SlabPage(first) };
        Maps { slabs: vec![mapping], ..Maps::default() }
    };
    let (slab, private) = (PagemapEntry(1 << 63 | 1 << 61), PagemapEntry(1 << 63 | 1 << 56));
    let mut census = Census::new(&[space("a"), space("b"), space("c")]);
    // Pages 4, 5 and 6 of slab 9; 5 and 6 of it, and one of its own; 4 and 5 of another slab.
    count(&mut census, 0, HVA, &[slab, slab, slab], &maps(9, 4));
    count(&mut census, 1, HVA, &[slab, slab, private], &maps(9, 5));
    count(&mut census, 2, HVA, &[slab, slab], &maps(7, 4));
    let frames = census.estimate(&KsmView { merging_pages: vec![0; 3], frames_per_page: 1.0 });
    assert_eq!((frames.frames, frames.saved_pages), (6, 2));
    assert_eq!(frames.guests.iter().map(|g| g.frames).collect::<Vec<_>>(), [2.0, 2.0, 2.0]);
    assert_eq!((frames.pages.shared, frames.pages.private), (7, 1));
}

/// Linux 6.12 has the flag of KSM on every anonymous frame.
#[test]
fn where_frames_do_not_tell_ksm_its_counters_do() {
    let page = |pfn: u64| PagemapEntry(1 << 63 | pfn);
    let split = |counters: Vec<Option<u64>>| {
        let mut census = Census::new(&[space("a"), space("b")]);
        // Three pages of each on the same frames; a fork's child has two of them, say.
        for guest in [0, 1] {
            count(&mut census, guest, 0, &[page(7), page(8), page(9)], &Maps::default());
        }
        census.ksm_by_counters = Some(counters);
        let frames = census.join(|batch, out| {
            out.clear();
            out.resize(batch.len(), FrameInfo { flags: FrameFlags(1 << 21), mappings: 2 });
            Ok(())
        });
        let frames = frames.unwrap();
        assert_eq!((frames.saved_pages, frames.pages.shared, frames.notes.len()), (3, 6, 1));
        (frames.shared_by_what.ksm, frames.shared_by_what.other)
    };
    assert_eq!(split(vec![Some(3), Some(3)]), (Some(6), 0));
    // It counts all memory of the process, so more than these pages; or KSM has done nothing.
    assert_eq!(split(vec![Some(300), Some(1)]), (Some(4), 2));
    assert_eq!(split(vec![Some(0), Some(0)]), (Some(0), 6));
    assert_eq!(split(vec![Some(3), None]), (None, 6));
}

#[test]
fn private_memory_of_ours_is_private() {
    const PAGES: usize = 64;
    let memory = vec![1u8; (PAGES + 1) * PAGE_BYTES as usize];
    let hva = (memory.as_ptr() as u64).next_multiple_of(PAGE_BYTES);
    let me = Space {
        name: "me".to_owned(),
        pid: std::process::id(),
        extents: vec![Extent { gpa: Gpa(0), hva: Hva(hva), bytes: PAGES as u64 * PAGE_BYTES }],
    };
    let frames = measure(&[me]).unwrap();
    assert_eq!(frames.pages, Pages { total: PAGES as u64, private: PAGES as u64, ..Pages::default() });
    assert_eq!(frames.saved_pages, 0);
}

#[test]
fn pages_that_were_only_read_are_on_the_zero_frame() {
    const PAGES: usize = 64;
    // Above 32 MiB an allocation is always a fresh mapping, which `vec!` does not touch. Without
    // privilege the frame is hidden and the result an estimate, which is exact where KSM merged
    // nothing.
    let memory = vec![0u8; 64 << 20];
    let skip = memory.as_ptr().align_offset(PAGE_BYTES as usize) + (1 << 20);
    let sum: u64 =
        memory[skip..].iter().step_by(PAGE_BYTES as usize).take(PAGES).map(|byte| u64::from(*byte)).sum();
    assert_eq!(std::hint::black_box(sum), 0);
    let hva = memory[skip..].as_ptr() as u64;
    let extent = Extent { gpa: Gpa(0), hva: Hva(hva), bytes: 2 * PAGES as u64 * PAGE_BYTES };
    let me = Space { name: "me".to_owned(), pid: std::process::id(), extents: vec![extent] };
    let frames = measure(&[me]).unwrap();
    let half = PAGES as u64;
    assert_eq!(frames.pages, Pages { total: 2 * half, absent: half, zero: half, ..Pages::default() });
    assert_eq!((frames.saved_pages, frames.freed_pages(), frames.frames), (0, half, 0));
}

#[test]
fn a_guest_that_is_gone_is_named_with_its_pid() {
    let mut gone = space("web-3");
    gone.pid = i32::MAX as u32;
    let error = measure(&[gone]).unwrap_err().to_string();
    assert!(error.contains("web-3") && error.contains("2147483647"), "{error}");
}

#[test]
fn an_extent_off_a_page_boundary_is_refused() {
    let mut odd = space("odd");
    odd.extents.push(Extent { gpa: Gpa(0), hva: Hva(4096), bytes: 5000 });
    assert!(measure(&[odd]).unwrap_err().to_string().contains("5000"));
}
