//! The free page reporting queue.

use super::*;
use crate::virtio::Progress;
use crate::virtio::balloon::requests::MAX_REQUEST_PAGES;

const QUEUE: usize = 2;

fn reporting(features: u64) -> Guest {
    Guest::running(Config { reporting: true, ..Default::default() }, features | REPORTING)
}

#[test]
fn reported_pages_go() {
    let mut guest = reporting(0);
    guest.free(QUEUE, &[(0, 0x100), (0x200, 0x204), (5, 6)]);
    assert_eq!(guest.discarded(), [(0, 0x100), (0x200, 0x204), (5, 6)]);
    assert_eq!(guest.rings[QUEUE].used(0), (0, 0), "nothing was written");
    assert_eq!(guest.handle.counters(), Counters { reported_bytes: 0x105 * 4096, ..Default::default() });
    assert_eq!(guest.held(), []);
}

#[test]
fn only_whole_pages_go() {
    let mut guest = reporting(0);
    let unaligned =
        [(0x1001, 0x3000, WRITE), (0x5000, 0x1800, WRITE), (0x7800, 0x800, WRITE), (0x8001, 0x1ffe, WRITE)];
    assert_eq!(guest.send_chain(QUEUE, &unaligned), 1);
    assert_eq!(guest.discarded(), [(2, 4), (5, 6)]);
    assert_eq!((guest.refused(), guest.handle.counters().reported_bytes), (4, 3 * 4096));
}

#[test]
fn poison_decides_only_if_it_was_negotiated() {
    for (features, poison, discarded) in
        [(0, 7, true), (PAGE_POISON, 0, true), (PAGE_POISON, 7, false), (PAGE_POISON, 0x0100_0000, false)]
    {
        let mut guest = reporting(features);
        guest.driver.write(0x10c, poison);
        guest.free(QUEUE, &[(3, 4)]);
        assert_eq!(!guest.discarded().is_empty(), discarded, "{features:#x} {poison:#x}");
        assert_eq!(guest.refused(), 0);
    }
}

#[test]
fn a_report_has_a_cap() {
    let config = Config { reporting: true, ..Default::default() };
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), 2 * MAX_REQUEST_PAGES as usize * 4096)]).unwrap();
    let mut guest = Guest::over(config, Arc::new(memory));
    guest.start(REPORTING);
    let some = (10, 1000);
    let rest = (1000, MAX_REQUEST_PAGES + 10);
    guest.free(QUEUE, &[some, rest]);
    assert_eq!((guest.discarded(), guest.refused()), (vec![some, rest], 0));
    guest.free(QUEUE, &[some, (1000, MAX_REQUEST_PAGES + 11), (0, 1)]);
    assert_eq!((guest.discarded(), guest.refused()), (vec![some], 1));
}

#[test]
fn a_turn_ends_after_many_pages() {
    let mut guest = reporting(0);
    for _ in 0..4 {
        // 255 times all of low RAM is just short of a turn.
        guest.offer_chain(QUEUE, &[(0, LOW_RAM as u32, WRITE); 255]);
    }
    assert_eq!(guest.driver.transport.notify(QUEUE), Progress::More);
    assert_eq!(guest.rings[QUEUE].used_idx(), 2);
    assert_eq!(guest.driver.transport.notify(QUEUE), Progress::More);
    assert_eq!(guest.driver.transport.notify(QUEUE), Progress::Idle);
    assert_eq!((guest.rings[QUEUE].used_idx(), guest.refused()), (4, 0));
}

#[test]
fn a_failed_discard_is_counted_and_the_rest_goes_on() {
    let mut guest = reporting(0);
    guest.host.0.lock().unwrap().fails = true;
    guest.free(QUEUE, &[(1, 2), (3, 4)]);
    guest.host.0.lock().unwrap().fails = false;
    guest.free(QUEUE, &[(1, 2)]);
    let counters = guest.handle.counters();
    assert_eq!((counters.failed_discards, counters.reported_bytes), (2, 4096));
}
