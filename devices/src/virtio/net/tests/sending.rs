//! From the driver to the host.

use super::*;

fn send(guest: &mut Guest, bytes: &[u8], cuts: &[usize]) {
    guest.driver.memory.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
    let mut at = 0;
    let ends: Vec<usize> = cuts.iter().copied().chain([bytes.len()]).collect();
    for (slot, end) in ends.iter().enumerate() {
        let more = if slot + 1 < ends.len() { NEXT } else { 0 };
        let descriptor = (BUFFERS + at as u64, (end - at) as u32, more, slot as u16 + 1);
        guest.rings[TRANSMIT].descriptor(slot as u16, descriptor);
        at = *end;
    }
    guest.rings[TRANSMIT].offer(0);
    guest.driver.kick(TRANSMIT as u32);
}

#[test]
fn a_frame_arrives_whole_however_it_is_cut() {
    let mut guest = Guest::running(ALL);
    let cases = [(60, &[12][..]), (1514, &[]), (26, &[1, 5, 12]), (MAX_BYTES, &[12, 4096, 40_000])];
    for (n, (bytes, cuts)) in cases.into_iter().enumerate() {
        let sent = frame(bytes, n as u8);
        send(&mut guest, &sent, cuts);
        assert!(guest.sent() == Some(sent), "{bytes} bytes");
        assert_eq!(guest.rings[TRANSMIT].used(n as u16), (0, 0));
        assert_eq!(guest.driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_VRING));
    }
}

#[test]
fn frames_of_wrong_lengths_are_given_back_and_not_sent() {
    let mut guest = Guest::running(ALL);
    for (n, bytes) in [0, 1, 11, 12, 25, MAX_BYTES + 1, 0x5_0000].into_iter().enumerate() {
        guest.rings[TRANSMIT].descriptor(0, (BUFFERS, bytes as u32, 0, 0));
        guest.rings[TRANSMIT].offer(0);
        guest.driver.kick(TRANSMIT as u32);
        assert_eq!(guest.rings[TRANSMIT].used_idx(), n as u16 + 1, "{bytes} bytes");
        assert_eq!(guest.sent(), None, "{bytes} bytes");
    }
    // Nor is a buffer read that is there to be written.
    guest.rings[TRANSMIT].descriptor(0, (BUFFERS, 100, WRITE, 0));
    guest.rings[TRANSMIT].offer(0);
    guest.driver.kick(TRANSMIT as u32);
    assert_eq!(guest.sent(), None);
    send(&mut guest, &frame(60, 1), &[]);
    assert_eq!(guest.sent(), Some(frame(60, 1)));
}

#[test]
fn a_host_that_takes_nothing_stalls_no_driver() {
    let mut guest = Guest::running(ALL);
    for n in 0..2000u16 {
        send(&mut guest, &frame(1514, 3), &[]);
        assert_eq!(guest.rings[TRANSMIT].used_idx(), n + 1);
    }
    while guest.sent().is_some() {}
    send(&mut guest, &frame(60, 1), &[]);
    assert_eq!(guest.sent(), Some(frame(60, 1)));
}

#[test]
fn a_turn_ends_after_so_many_bytes() {
    let mut guest = Guest::running(ALL);
    let frame = frame(0xffff, 1);
    guest.driver.memory.write_slice(&frame, GuestAddress(BUFFERS)).unwrap();
    guest.rings[TRANSMIT].descriptor(0, (BUFFERS, 0xffff, 0, 0));
    // More than the ring has, as from a driver that adds while the device sends.
    (0..40).for_each(|_| guest.rings[TRANSMIT].offer(0));
    let turn = TURN_BYTES.div_ceil(0xffff) as u16;
    assert!(guest.driver.transport.notify(TRANSMIT) == Progress::More || turn > 16);
    assert!(guest.rings[TRANSMIT].used_idx() <= turn);
}
