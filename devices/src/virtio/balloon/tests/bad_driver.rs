//! A driver that gets everything wrong: it is counted, completed, and nothing else happens.

use super::*;

const STATS: usize = 2;
const HINT: usize = 3;
const REPORT: usize = 4;

/// A guest whose queues all work, in a run of hinting.
fn guest() -> Guest {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    guest.handle.start_hinting(false).unwrap();
    let run = guest.config(2);
    guest.list(HINT, &[run]);
    guest
}

#[test]
fn requests_that_make_no_sense() {
    /// (queue, chain, what is refused)
    type Case = (usize, Vec<(u64, u32, u16)>, u64);
    let cases: Vec<Case> = vec![
        // Lists of a length that is none, or with buffers to write.
        (INFLATE, vec![(DATA, 0, 0)], 1),
        (DEFLATE, vec![(DATA, 3, 0)], 1),
        (INFLATE, vec![(DATA, 1, 0), (DATA, 2, 0)], 1),
        (INFLATE, vec![(DATA, 4096, WRITE)], 2),
        // Chains that are broken: outside RAM, across its end, in the wrong order.
        (INFLATE, vec![(LOW_RAM, 4, 0)], 1),
        (INFLATE, vec![(LOW_RAM - 2, 4, 0)], 1),
        (DEFLATE, vec![(u64::MAX - 1, 4, 0)], 1),
        (INFLATE, vec![(DATA, 4, WRITE), (DATA, 4, 0)], 1),
        (REPORT, vec![(LOW_RAM - 0x1000, 0x2000, WRITE)], 1),
        (REPORT, vec![(0, u32::MAX, WRITE)], 1),
        (HINT, vec![(HIGH_RAM_END, 4096, WRITE)], 1),
        // Reports that are no pages, or to be read.
        (REPORT, vec![(DATA, 4096, 0)], 1),
        (REPORT, vec![(DATA + 1, 4096, WRITE)], 1),
        (REPORT, vec![(DATA, 0, WRITE)], 1),
        (REPORT, vec![(DATA, 4095, WRITE)], 1),
        // Hints that are neither an ID nor pages.
        (HINT, vec![(DATA, 3, 0)], 1),
        (HINT, vec![(DATA, 8, 0)], 1),
        (HINT, vec![(DATA, 0, 0)], 1),
        (HINT, vec![(DATA + 5, 4096, WRITE)], 1),
    ];
    for (queue, chain, refused) in cases {
        let mut guest = guest();
        assert_eq!(guest.send_chain(queue, &chain), 1, "{queue}: {chain:x?} is completed");
        assert_eq!((guest.discarded(), guest.held()), (vec![], vec![]), "{queue}: {chain:x?}");
        assert_eq!(guest.refused(), refused, "{queue}: {chain:x?}");
        assert_eq!(guest.driver.status() & NEEDS_RESET, 0, "the device goes on");
        guest.list(INFLATE, &[1]);
        assert_eq!(guest.discarded(), [(1, 2)]);
    }
}

#[test]
fn what_is_right_in_a_wrong_request_is_done() {
    let mut guest = guest();
    // Six bytes are a page and a half; the buffer to write has no business there.
    guest.driver.memory.write_slice(&bytes(&[7, 9]), GuestAddress(DATA)).unwrap();
    assert_eq!(guest.send_chain(INFLATE, &[(DATA, 6, 0), (DATA + 0x1000, 4096, WRITE)]), 1);
    assert_eq!((guest.discarded(), guest.held(), guest.refused()), (vec![(7, 8)], vec![(7, 8)], 2));
    assert_eq!(guest.send_chain(REPORT, &[(DATA, 4, 0), (0x5000, 4096, WRITE)]), 1);
    assert_eq!((guest.discarded(), guest.refused()), (vec![(5, 6)], 3));
}

#[test]
fn loops_and_endless_chains() {
    for queue in [INFLATE, DEFLATE, STATS, HINT, REPORT] {
        let mut guest = guest();
        let flags = if queue == REPORT { WRITE } else { 0 };
        let before = guest.rings[queue].used_idx();
        let ring = &mut guest.rings[queue];
        // A descriptor that is its own successor, a next that is none, a table in a table, a head
        // that is none.
        ring.descriptor(0, (DATA, 4096, flags | NEXT, 0));
        ring.descriptor(1, (DATA, 4096, flags | NEXT, 256));
        ring.descriptor(2, (DATA, 32, INDIRECT, 0));
        ring.descriptor_at(DATA, 0, (DATA, 32, INDIRECT, 0));
        for head in [0, 1, 2, 300] {
            ring.offer(head);
        }
        guest.driver.kick(queue as u32);
        assert_eq!(guest.rings[queue].used_idx(), before + 3, "queue {queue}: all that can be are completed");
        assert_eq!((guest.discarded(), guest.refused()), (vec![], 4), "queue {queue}");
        assert_eq!(guest.driver.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn an_impossible_ring_stops_the_device_until_its_reset() {
    for queue in [INFLATE, DEFLATE, STATS, HINT, REPORT] {
        let mut guest = guest();
        guest.rings[queue].set_avail_idx(1000);
        guest.driver.kick(queue as u32);
        assert_ne!(guest.driver.status() & NEEDS_RESET, 0, "queue {queue}");
        assert!(!guest.handle.has_driver());
        assert_eq!(guest.handle.start_hinting(true), Err(HintError::Unavailable));
        guest.start(ALL_FEATURES);
        guest.list(INFLATE, &[1]);
        assert!(guest.handle.has_driver());
    }
}

#[test]
fn queues_that_are_not_there() {
    let mut guest = Guest::new(ALL);
    guest.driver.negotiate(TRANSPORT | REPORTING);
    // Inflate is left out, and a fourth queue is made that nothing was negotiated for.
    guest.rings = (0..4).map(|index| Ring::new(&guest.driver.memory, index, 256)).collect();
    for index in [1, 2, 3] {
        guest.rings[index] = guest.driver.add_queue(index, 256);
    }
    guest.driver.add_status(DRIVER_OK);
    assert_eq!(guest.send(INFLATE, &bytes(&[1])), 0);
    assert_eq!(guest.send(3, &bytes(&[1])), 0);
    guest.list(DEFLATE, &[1]);
    guest.free(2, &[(3, 4)]);
    assert_eq!(guest.discarded(), [(3, 4)]);
    for queue in [4, 5, u32::MAX] {
        guest.driver.kick(queue);
    }
    assert_eq!(guest.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn a_driver_that_lies_of_its_size_is_not_believed() {
    let mut guest = guest();
    guest.list(INFLATE, &[1, 2]);
    guest.driver.write(0x104, u32::MAX);
    assert_eq!((guest.handle.actual_pages(), guest.handle.held_pages()), (u32::MAX, 2));
    // It takes back what it never gave.
    guest.list(DEFLATE, &(0..0x100).collect::<Vec<_>>());
    assert_eq!((guest.handle.held_pages(), guest.handle.counters().deflated_pages), (0, 0x100));
}
