//! A balloon that goes on elsewhere.

use super::*;
use crate::state::{BalloonState, DeviceState};

/// The same driver over another device.
fn elsewhere(guest: Guest) -> Guest {
    let saved = guest.driver.transport.save();
    let mut next = Guest::over(guest.handle.config(), guest.driver.memory.clone());
    next.driver.transport.restore(&saved).unwrap();
    assert_eq!(next.driver.transport.save(), saved);
    next.rings = guest.rings;
    next
}

#[test]
fn it_knows_its_pages_and_keeps_its_buffer() {
    let mut guest = Guest::running(ALL, ALL_FEATURES & !PAGE_POISON);
    guest.handle.set_target(7);
    assert_eq!(guest.driver.interrupted(), Some(2));
    guest.list(INFLATE, &[5, 6, 7, 0x205]);
    guest.send(2, &[4, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    guest.driver.interrupted();
    let mut next = elsewhere(guest);
    assert_eq!(next.held(), [(5, 8), (0x205, 0x206)]);
    assert_eq!((next.config(0), next.handle.target_pages()), (7, 7));
    assert_eq!(next.handle.counters().inflated_pages, 4);
    assert!(next.discarded().is_empty() && next.handle.statistics().is_none());
    assert!(next.handle.request_statistics(), "the buffer that was kept");
    next.list(1, &[6]);
    assert_eq!(next.held(), [(5, 6), (7, 8), (0x205, 0x206)]);
    let next = elsewhere(next);
    assert!(!next.handle.request_statistics());
}

#[test]
fn hinting_goes_on_with_its_run() {
    let mut guest = Guest::running(ALL, FREE_PAGE_HINT | MUST_TELL_HOST);
    guest.handle.start_hinting(true).unwrap();
    let run = guest.config(2);
    assert_eq!(guest.send(2, &run.to_le_bytes()), 1);
    let mut next = elsewhere(guest);
    next.free(2, &[(9, 12)]);
    assert_eq!(next.discarded(), [(9, 12)]);
    next.handle.start_hinting(false).unwrap();
    assert_eq!(next.config(2), run + 1);
}

#[test]
fn pages_that_are_not_there_are_in_no_balloon() {
    let guest = Guest::running(ALL, MUST_TELL_HOST);
    let mut saved = guest.driver.transport.save();
    let held = vec![(0, 2), (0xff, 0x200), (u64::MAX, u64::MAX), (1 << 50, 7), (3, 0)];
    saved.device = DeviceState::Balloon(BalloonState { held, kept: Some(u16::MAX), ..Default::default() });
    let mut next = Guest::over(ALL, guest.driver.memory.clone());
    next.driver.transport.restore(&saved).unwrap();
    assert_eq!(next.held(), [(0, 2), (0xff, 0x100), (0x200, 0x210)]);
    next.handle.request_statistics();
}
