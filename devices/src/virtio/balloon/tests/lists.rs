//! The inflate and the deflate queue.

use super::*;
use crate::virtio::Progress;
use crate::virtio::balloon::requests::MAX_REQUEST_PAGES;

#[test]
fn pages_go_and_come_back() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    assert_eq!((guest.held(), guest.handle.held_pages()), (vec![], 0));
    guest.list(INFLATE, &[12, 11, 10, 40, 41, 0x200, 0x20f]);
    assert_eq!(guest.discarded(), [(10, 13), (40, 42), (0x200, 0x201), (0x20f, 0x210)]);
    assert_eq!(guest.held(), [(10, 13), (40, 42), (0x200, 0x201), (0x20f, 0x210)]);
    assert_eq!(guest.driver.interrupted(), Some(1));

    guest.list(DEFLATE, &[11, 40, 99]);
    assert_eq!(guest.discarded(), [], "taking back discards nothing");
    assert_eq!(guest.held(), [(10, 11), (12, 13), (41, 42), (0x200, 0x201), (0x20f, 0x210)]);

    let counters = guest.handle.counters();
    assert_eq!((counters.inflated_pages, counters.deflated_pages), (7, 3));
    assert_eq!(
        counters,
        Counters { inflated_pages: 7, deflated_pages: 3, reclaimed_bytes: 7 * 4096, ..Default::default() }
    );
}

#[test]
fn a_page_given_again_is_discarded_again() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    guest.list(INFLATE, &[5, 6]);
    guest.list(INFLATE, &[6, 7, 6, 6]);
    assert_eq!(guest.discarded(), [(5, 7), (6, 8)]);
    assert_eq!(guest.held(), [(5, 8)]);
    let counters = guest.handle.counters();
    assert_eq!((counters.inflated_pages, counters.reclaimed_bytes, counters.refused), (6, 4 * 4096, 0));
}

#[test]
fn what_the_host_frees_in_granules_is_gathered_until_one_is_whole() {
    let mut guest = Guest::with_granule(ALL, ram(), 16);
    guest.start(ALL_FEATURES);
    let reclaimed = |guest: &Guest| guest.handle.counters().reclaimed_bytes;
    // Half of a granule, and of the next all but one page: nothing is freed, and all read as zeros.
    guest.list(INFLATE, &(8..31).collect::<Vec<_>>());
    assert_eq!((guest.discarded(), reclaimed(&guest)), (vec![(8, 31)], 0));
    // The last one, and pages of a third: the whole granule goes, once.
    guest.list(INFLATE, &[31, 40]);
    assert_eq!((guest.discarded(), reclaimed(&guest)), (vec![(16, 32), (40, 41)], 16 * 4096));
    guest.list(INFLATE, &[16, 31]);
    assert_eq!((guest.discarded(), reclaimed(&guest)), (vec![], 16 * 4096), "it is gone already");
    // Taken back and given again: the host may have it again.
    guest.list(DEFLATE, &[20]);
    guest.list(INFLATE, &[20]);
    assert_eq!((guest.discarded(), reclaimed(&guest)), (vec![(16, 32)], 32 * 4096));
    // In any order, and several at once with what is between.
    guest.list(INFLATE, &(0..8).chain((48..100).rev()).collect::<Vec<_>>());
    assert_eq!(guest.discarded(), [(0, 16), (48, 96), (96, 100)]);
    assert_eq!(guest.held(), [(0, 32), (40, 41), (48, 100)]);
    assert_eq!(guest.handle.counters().inflated_pages, 23 + 2 + 2 + 1 + 8 + 52);
}

#[test]
fn of_pages_that_are_only_free_whole_granules_go_and_the_rest_is_left_alone() {
    let config = Config { reporting: true, ..Default::default() };
    let mut guest = Guest::with_granule(config, ram(), 16);
    guest.start(REPORTING);
    guest.free(2, &[(5, 50), (16, 31), (0x200, 0x210)]);
    assert_eq!(guest.discarded(), [(16, 48), (0x200, 0x210)]);
    assert_eq!(guest.handle.counters().reported_bytes, 48 * 4096);
}

#[test]
fn a_request_is_completed_after_its_pages_are_gone() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    let (memory, at) = (guest.driver.memory.clone(), GuestAddress(guest.rings[INFLATE].used + 2));
    let completed = Arc::new(Mutex::new(Vec::new()));
    let seen = completed.clone();
    let look = move || seen.lock().unwrap().push(memory.read_obj::<u16>(at).unwrap());
    guest.host.0.lock().unwrap().meanwhile = Some(Box::new(look));
    guest.list(INFLATE, &[1, 3, 5]);
    guest.list(INFLATE, &[7]);
    assert_eq!(*completed.lock().unwrap(), [0, 0, 0, 1]);
}

#[test]
fn pages_outside_ram_are_left_out_and_counted() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    // The last page below the hole, the first in it, the ends of the upper region, and the highest
    // there can be.
    guest.list(INFLATE, &[0xff, 0x100, 0x1ff, 0x200, 0x20f, 0x210, u32::MAX, u32::MAX]);
    assert_eq!(guest.discarded(), [(0xff, 0x100), (0x200, 0x201), (0x20f, 0x210)]);
    assert_eq!((guest.handle.counters().inflated_pages, guest.refused()), (3, 5));
    // A run across the whole hole.
    guest.list(INFLATE, &(0xfe..0x202).collect::<Vec<_>>());
    assert_eq!(guest.discarded(), [(0xfe, 0x100), (0x200, 0x202)]);
    assert_eq!((guest.handle.counters().inflated_pages, guest.refused()), (7, 5 + 0x100));
    guest.list(DEFLATE, &[0x100, 0xff]);
    assert_eq!((guest.handle.counters().deflated_pages, guest.refused()), (1, 6 + 0x100));
    assert_eq!(guest.held(), [(0xfe, 0xff), (0x200, 0x202), (0x20f, 0x210)]);
}

#[test]
fn a_list_may_be_scattered_at_any_byte() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    guest.driver.memory.write_slice(&bytes(&[1, 2, 300]), GuestAddress(DATA)).unwrap();
    guest.driver.memory.write_slice(&bytes(&[9])[1..], GuestAddress(DATA + 0x100)).unwrap();
    // Page 9 lies in two buffers.
    guest.driver.memory.write_slice(&[9], GuestAddress(DATA + 8)).unwrap();
    assert_eq!(guest.send_chain(INFLATE, &[(DATA, 9, 0), (DATA + 0x100, 3, 0)]), 1);
    assert_eq!((guest.discarded(), guest.refused()), (vec![(1, 3), (9, 10)], 0));
}

#[test]
fn a_long_list_is_done_in_pieces_up_to_the_cap() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    // 64 KiB of the same list, read again and again by a chain of many descriptors.
    let pfns: Vec<u32> = (0..0x4000).map(|i| i % 0x100).collect();
    guest.driver.memory.write_slice(&bytes(&pfns), GuestAddress(DATA)).unwrap();
    assert_eq!(guest.send_chain(INFLATE, &[(DATA, 0x1_0000, 0); 16]), 1);
    let counters = guest.handle.counters();
    assert_eq!((counters.inflated_pages, counters.refused), (MAX_REQUEST_PAGES, 0));
    assert_eq!(guest.held(), [(0, 0x100)]);
    // One more than the cap.
    let mut buffers = vec![(DATA, 0x1_0000, 0); 16];
    buffers.push((DATA, 4, 0));
    assert_eq!(guest.send_chain(INFLATE, &buffers), 1);
    let counters = guest.handle.counters();
    assert_eq!((counters.inflated_pages, counters.refused), (2 * MAX_REQUEST_PAGES, 1));
}

#[test]
fn a_turn_ends_and_the_rest_is_not_forgotten() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    let pfns: Vec<u32> = (0..0x4000).map(|i| i % 0x100).collect();
    guest.driver.memory.write_slice(&bytes(&pfns), GuestAddress(DATA)).unwrap();
    for _ in 0..10 {
        guest.offer_chain(INFLATE, &[(DATA, 0x1_0000, 0)]);
    }
    assert_eq!(guest.driver.transport.notify(INFLATE), Progress::More);
    assert_eq!(guest.rings[INFLATE].used_idx(), 4, "65,536 pages are a turn");
    assert_eq!(guest.driver.interrupted(), Some(1));
    assert_eq!(guest.driver.transport.notify(INFLATE), Progress::More);
    assert_eq!(guest.driver.transport.notify(INFLATE), Progress::Idle);
    assert_eq!(guest.rings[INFLATE].used_idx(), 10);
}

#[test]
fn what_the_host_does_not_take_is_held_all_the_same() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    guest.host.0.lock().unwrap().fails = true;
    guest.list(INFLATE, &[1, 2, 8]);
    let counters = guest.handle.counters();
    assert_eq!(counters, Counters { inflated_pages: 3, failed_discards: 2, ..Default::default() });
    assert_eq!(guest.held(), [(1, 3), (8, 9)]);
    guest.host.0.lock().unwrap().fails = false;
    guest.list(INFLATE, &[8]);
    assert_eq!(guest.handle.counters().reclaimed_bytes, 4096);
}

#[test]
fn pages_in_the_balloon_go_whatever_the_poison() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    guest.driver.write(0x10c, 0xaaaa_aaaa);
    guest.list(INFLATE, &[3]);
    assert_eq!(guest.discarded(), [(3, 4)]);
}

#[test]
fn a_sweep_sees_what_is_held_and_is_counted() {
    let mut guest = Guest::new(ALL);
    let never = |_: &[Range<Gpa>]| -> u64 { panic!("swept") };
    guest.handle.sweep(never);
    guest.start(ALL_FEATURES);
    guest.handle.sweep(never);
    guest.list(INFLATE, &[10, 11, 40]);
    let page = |number: u64| Gpa(number * 4096);
    let mut seen = Vec::new();
    guest.handle.sweep(|held| {
        seen.extend_from_slice(held);
        2
    });
    assert_eq!(seen, [page(10)..page(12), page(40)..page(41)]);
    assert_eq!(guest.handle.counters().swept_pages, 2);

    // One that uses pages before it tells could lose what it has written there.
    let mut hasty = Guest::running(ALL, ALL_FEATURES & !MUST_TELL_HOST);
    hasty.list(INFLATE, &[10]);
    hasty.handle.sweep(never);
}
