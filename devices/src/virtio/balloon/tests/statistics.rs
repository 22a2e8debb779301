//! The statistics queue.

use super::*;
use crate::virtio::balloon::stats::MAX_ENTRIES;

const QUEUE: usize = 2;

fn guest() -> Guest {
    Guest::running(Config { statistics: true, ..Default::default() }, STATS_VQ)
}

fn entries(entries: &[(u16, u64)]) -> Vec<u8> {
    entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

fn all(guest: &Guest) -> Vec<(Tag, u64)> {
    guest.handle.statistics().map(|statistics| statistics.iter().collect()).unwrap_or_default()
}

#[test]
fn a_buffer_is_kept_until_the_next_is_wanted() {
    let mut guest = guest();
    assert_eq!((guest.handle.statistics(), guest.handle.request_statistics()), (None, false));
    for round in 1..=3u64 {
        assert_eq!(guest.send(QUEUE, &entries(&[(4, 100 + round), (0, u64::MAX)])), 0);
        assert_eq!(guest.driver.interrupted(), None);
        assert_eq!(all(&guest), [(Tag::SwapIn, u64::MAX), (Tag::FreeMemory, 100 + round)]);
        assert_eq!(guest.handle.statistics().unwrap().updates, round);
        assert!(guest.handle.request_statistics());
        assert_eq!(guest.driver.interrupted(), Some(1));
        assert_eq!(guest.rings[QUEUE].used_idx(), round as u16);
        assert_eq!(guest.rings[QUEUE].used(round as u16 - 1), (0, 0));
        assert!(!guest.handle.request_statistics(), "the driver has not answered");
        assert_eq!(guest.driver.interrupted(), None);
    }
    assert_eq!(guest.refused(), 0);
}

#[test]
fn a_second_buffer_returns_the_first() {
    let mut guest = guest();
    let ring = &mut guest.rings[QUEUE];
    for head in 0..3 {
        ring.descriptor(head, (DATA, 10, 0, 0));
        ring.offer(head);
    }
    guest.driver.kick(QUEUE as u32);
    assert_eq!(guest.driver.interrupted(), Some(1));
    assert_eq!(guest.rings[QUEUE].used_idx(), 2);
    assert_eq!([0, 1].map(|at| guest.rings[QUEUE].used(at).0), [0, 1]);
    assert!(guest.handle.request_statistics());
    assert_eq!((guest.rings[QUEUE].used_idx(), guest.rings[QUEUE].used(2)), (3, (2, 0)));
    assert!(!guest.handle.request_statistics());
}

#[test]
fn what_makes_no_sense_is_left_out() {
    let mut guest = guest();
    // An unknown tag, one that is there twice, an entry cut short.
    let mut bytes = entries(&[(99, 1), (5, 2), (5, 3)]);
    bytes.extend([1, 0, 7]);
    guest.send(QUEUE, &bytes);
    assert_eq!((all(&guest), guest.refused()), (vec![(Tag::TotalMemory, 3)], 2));
    // Nothing at all, and nothing to read.
    assert_eq!(guest.send(QUEUE, &[]), 1, "the older one comes back");
    assert_eq!(guest.send_chain(QUEUE, &[(DATA, 10, WRITE)]), 1);
    assert_eq!((guest.handle.statistics().unwrap().updates, guest.refused()), (1, 4));
    assert_eq!(all(&guest), [(Tag::TotalMemory, 3)], "what was known stays");
    // More entries than there are tags, by far: the last ones are not looked at.
    let mut many = vec![(1, 1); MAX_ENTRIES];
    many.push((1, 2));
    guest.send(QUEUE, &entries(&many));
    assert_eq!(all(&guest), [(Tag::SwapOut, 1), (Tag::TotalMemory, 3)]);
    assert_eq!(guest.refused(), 5);
}

#[test]
fn a_ring_that_breaks_while_a_buffer_is_kept_stops_the_device() {
    let mut guest = guest();
    guest.send(QUEUE, &entries(&[(1, 1)]));
    // Nothing can make the used ring unwritable; a ring whose indices are impossible can be made.
    let idx = guest.rings[QUEUE].used_idx();
    guest.rings[QUEUE].set_avail_idx(idx.wrapping_add(1000));
    guest.driver.kick(QUEUE as u32);
    assert_ne!(guest.driver.status() & NEEDS_RESET, 0);
    assert!(!guest.handle.request_statistics(), "a device that needs a reset leaves its rings alone");
    assert!(!guest.handle.has_driver());
    guest.start(STATS_VQ);
    guest.send(QUEUE, &entries(&[(1, 2)]));
    assert!(guest.handle.request_statistics());
}
