//! From the host to the driver.

use super::*;

/// The number of buffers that a header tells.
fn num_buffers(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[10], bytes[11]])
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs() {
    for event_idx in [0, EVENT_IDX] {
        let mut guest = Guest::running(ALL | event_idx);
        (0..16).for_each(|slot| guest.offer(slot, 1000));
        for (bytes, first, buffers) in [(60, 0, 1), (2500, 1, 3), (1000, 4, 1), (1001, 5, 2)] {
            guest.rings[RECEIVE].set_used_event(first);
            guest.host.send(&frame(bytes, first as u8)).unwrap();
            assert_eq!(guest.poll(), Progress::Idle);
            assert_eq!(guest.rings[RECEIVE].used_idx(), first + buffers);
            let mut got = Vec::new();
            for n in first..first + buffers {
                let (head, len) = guest.rings[RECEIVE].used(n);
                assert_eq!(head, u32::from(n));
                got.extend(guest.driver.bytes(buffer(n), len as usize));
            }
            assert_eq!(num_buffers(&got), buffers);
            assert!(got[HEADER_BYTES..] == frame(bytes, first as u8)[HEADER_BYTES..], "{bytes} bytes");
            assert_eq!(guest.driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_VRING));
        }
    }
}

#[test]
fn an_event_index_that_is_not_passed_is_no_interrupt() {
    let mut guest = Guest::running(ALL | EVENT_IDX);
    (0..16).for_each(|slot| guest.offer(slot, 1000));
    // The driver wants to hear of the third buffer, and a frame has two.
    guest.rings[RECEIVE].set_used_event(2);
    guest.host.send(&frame(1500, 1)).unwrap();
    guest.poll();
    assert_eq!((guest.rings[RECEIVE].used_idx(), guest.driver.interrupted()), (2, None));
    guest.host.send(&frame(1500, 1)).unwrap();
    guest.poll();
    assert_eq!(guest.rings[RECEIVE].used_idx(), 4);
    assert_eq!(guest.driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_VRING));
    // Nothing came, so nothing is told.
    guest.rings[RECEIVE].set_used_event(3);
    guest.poll();
    assert_eq!(guest.driver.interrupted(), None);
}

#[test]
fn a_frame_waits_for_buffers() {
    let mut guest = Guest::running(ALL);
    for seed in 0..3 {
        guest.host.send(&frame(2500, seed)).unwrap();
    }
    guest.offer(0, 1000);
    guest.offer(1, 1000);
    guest.poll();
    assert_eq!((guest.rings[RECEIVE].used_idx(), guest.driver.interrupted()), (0, None));
    (2..7).for_each(|slot| guest.offer(slot, 1000));
    guest.driver.kick(RECEIVE as u32);
    assert_eq!(guest.rings[RECEIVE].used_idx(), 6);
    assert_eq!(guest.driver.bytes(buffer(0) + 12, 988), frame(2500, 0)[12..1000]);
    assert_eq!(guest.driver.bytes(buffer(3) + 12, 988), frame(2500, 1)[12..1000]);
    // The next driver hears nothing of the third, which was taken for this one.
    guest.host.send(&frame(60, 9)).unwrap();
    guest.start(ALL);
    guest.offer(0, 1000);
    guest.poll();
    assert_eq!(guest.rings[RECEIVE].used(0), (0, 60));
    assert_eq!(guest.driver.bytes(buffer(0) + 12, 48), frame(60, 9)[12..]);
}

#[test]
fn without_joined_buffers_each_holds_a_frame_or_none() {
    let mut guest = Guest::running(ALL & !(1 << bits::VIRTIO_NET_F_MRG_RXBUF));
    (0..3).for_each(|slot| guest.offer(slot, 1000));
    for bytes in [1000, 1001, 60] {
        guest.host.send(&frame(bytes, 1)).unwrap();
    }
    guest.poll();
    let used = [0, 1, 2].map(|n| guest.rings[RECEIVE].used(n));
    assert_eq!(used, [(0, 1000), (1, 0), (2, 60)]);
    assert_eq!(num_buffers(&guest.driver.bytes(buffer(0), 12)), 1);
    assert_eq!(guest.driver.bytes(buffer(1), 1000), vec![0; 1000]);
}

#[test]
fn a_frame_that_no_ring_has_room_for_is_dropped() {
    let mut guest = Guest::running(ALL);
    (0..16).for_each(|slot| guest.offer(slot, 10));
    guest.host.send(&frame(1000, 1)).unwrap();
    guest.host.send(&frame(60, 2)).unwrap();
    guest.poll();
    assert_eq!(guest.rings[RECEIVE].used_idx(), 16);
    assert!((0..16).all(|n| guest.rings[RECEIVE].used(n).1 == 0));
    // The one behind it finds buffers later, in pieces if it must.
    (0..6).for_each(|slot| guest.offer(slot, 10));
    guest.poll();
    assert_eq!(guest.rings[RECEIVE].used_idx(), 22);
}

#[test]
fn frames_of_wrong_lengths_from_the_host_go_nowhere() {
    let mut guest = Guest::running(ALL);
    (0..16).for_each(|slot| guest.offer(slot, 0x1000));
    for bytes in [0, 1, 12, 25] {
        guest.host.send(&frame(bytes, 1)).unwrap();
        guest.poll();
    }
    assert_eq!(guest.rings[RECEIVE].used_idx(), 0);
    // The longest takes seventeen pages, and the ring has sixteen.
    guest.host.send(&frame(MAX_BYTES, 1)).unwrap();
    guest.host.send(&frame(60, 2)).unwrap();
    guest.poll();
    assert_eq!(guest.rings[RECEIVE].used_idx(), 16);
    guest.offer(0, 0x1000);
    guest.poll();
    assert_eq!(guest.rings[RECEIVE].used(16), (0, 60));
}

#[test]
fn broken_buffers_are_given_back_empty() {
    let mut guest = Guest::running(ALL);
    let ring = &mut guest.rings[RECEIVE];
    // Outside RAM; nothing to write to; a loop; no descriptor; then a good one.
    ring.descriptor(0, (LOW_RAM, 1000, WRITE, 0));
    ring.descriptor(1, (BUFFERS, 1000, 0, 0));
    ring.descriptor(2, (BUFFERS, 1000, WRITE | NEXT, 2));
    (0..3).for_each(|slot| ring.offer(slot));
    ring.offer(77);
    guest.offer(4, 1000);
    guest.host.send(&frame(60, 2)).unwrap();
    guest.poll();
    let used = [0, 1, 2, 3].map(|n| guest.rings[RECEIVE].used(n));
    assert_eq!((guest.rings[RECEIVE].used_idx(), used), (4, [(0, 0), (1, 0), (2, 0), (4, 60)]));
    assert_eq!(guest.driver.bytes(buffer(4) + 12, 48), frame(60, 2)[12..]);
}

#[test]
fn a_turn_ends_with_frames_without_end() {
    let mut guest = Guest::running(ALL);
    // What is dropped for its length costs no buffer, and comes as fast as it is read.
    (0..200).for_each(|_| _ = guest.host.send(&[0; 3]));
    let turns = (0..10_000).take_while(|_| guest.poll() == Progress::More).count();
    assert!(turns < 10_000);
    (0..16).for_each(|slot| guest.offer(slot, 1000));
    guest.host.send(&frame(60, 1)).unwrap();
    guest.poll();
    assert_eq!(guest.rings[RECEIVE].used_idx(), 1);
}
