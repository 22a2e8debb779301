//! The ring alone, as its device sees it.

use core::sync::atomic::Ordering;
use std::vec::Vec;

use super::StartError;
use super::fake::{ring, words};
use super::ring::{Buffer, Full, Ring, Unusable};

/// The used ring's first word.
const USED: usize = 256;

fn buffer(gpa: u64, len_bytes: u32, writable: bool) -> Buffer {
    Buffer { gpa, len_bytes, writable }
}

#[test]
fn chains_are_laid_out_as_the_specification_says() {
    let (mut ring, device) = ring(4);
    ring.add(&[buffer(0x1_2345_6000, 7, false), buffer(0x2000, 9, true)]).unwrap();
    ring.add(&[buffer(0x3000, 11, true)]).unwrap();
    let word = |range| -> Vec<u32> {
        words(&device, range).iter().map(|word| word.load(Ordering::Relaxed)).collect()
    };
    let next = 0x0001;
    assert_eq!(word(0..4), [0x2345_6000, 1, 7, next | 1 << 16]);
    assert_eq!(word(4..8), [0x2000, 0, 9, 2]);
    assert_eq!(word(8..12), [0x3000, 0, 11, 2]);
    assert_eq!(word(128..130), [2 << 16, 2 << 16], "the index, and heads 0 and 2");
    assert_eq!(ring.in_flight(), 2);
}

#[test]
fn a_full_ring_takes_nothing_and_is_free_again_when_all_is_back() {
    let (mut ring, device) = ring(4);
    let one = [buffer(0, 4, true)];
    assert_eq!(ring.add(&[]), Err(Full));
    assert_eq!(ring.add(&[one[0]; 5]), Err(Full));
    for round in 0..40_000 {
        for _ in 0..4 {
            ring.add(&one).unwrap();
        }
        assert_eq!(ring.add(&one), Err(Full));
        assert!(!ring.has_used() && ring.take_used() == Ok(None));
        ring.notify(&mut device.clone());
        device.answer();
        assert!(ring.has_used());
        assert_eq!(ring.all_used(), Ok(true), "round {round}");
    }
}

#[test]
fn what_was_not_given_cannot_be_used() {
    for (index, id) in [(2, 0), (1, 1), (1, u32::MAX), (0xffff, 0)] {
        let (mut ring, device) = ring(4);
        ring.add(&[buffer(0, 4, true)]).unwrap();
        let used = words(&device, USED..USED + 3);
        used[1].store(id, Ordering::Relaxed);
        used[0].store(index << 16, Ordering::Release);
        assert_eq!(ring.take_used(), Err(Unusable), "{index} {id}");
    }
}

#[test]
fn a_queue_has_a_power_of_two_of_entries_that_the_device_allows() {
    for (most, entries) in [(1, 1), (3, 2), (32, 32), (1024, 32)] {
        assert_eq!(ring(most).0.entries(), entries);
    }
    let (_, device) = ring(4);
    let at = words(&device, 0..8192);
    assert_eq!(Ring::start(&mut device.clone(), 7, at, 0).err(), Some(StartError::Queue(7)));
    assert_eq!(Ring::start(&mut device.clone(), 0, &at[..100], 0).err(), Some(StartError::Queue(0)));
}
