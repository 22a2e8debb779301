//! Features, queues, configuration space, and a driver that comes and goes.

use virtio_bindings::bindings::virtio_mmio as reg;

use super::*;
use crate::bus::BusDevice;

/// The configuration change bit of the interrupt status.
const CONFIG_CHANGE: u32 = reg::VIRTIO_MMIO_INT_CONFIG;

fn offered(config: Config) -> (u64, usize) {
    let (balloon, _) = Balloon::new(config, &ram(), Box::new(Host::default()));
    (balloon.features(), balloon.queue_max_sizes().len())
}

#[test]
fn what_is_offered_follows_the_configuration() {
    let none = Config::default();
    let always = MUST_TELL_HOST | PAGE_POISON;
    assert_eq!(offered(none), (always, 2));
    assert_eq!(offered(Config { deflate_on_oom: true, ..none }), (always | DEFLATE_ON_OOM, 2));
    assert_eq!(offered(Config { statistics: true, ..none }), (always | STATS_VQ, 3));
    assert_eq!(offered(Config { hinting: true, ..none }), (always | FREE_PAGE_HINT, 3));
    assert_eq!(offered(Config { reporting: true, ..none }), (always | REPORTING, 3));
    assert_eq!(offered(ALL), (ALL_FEATURES, 5));
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.driver.read(reg::VIRTIO_MMIO_DEVICE_ID), 5);
    assert_eq!(guest.handle.config(), ALL);
}

#[test]
fn queues_are_numbered_by_what_was_negotiated() {
    for bits in 0..8 {
        let (stats, hint, report) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
        let wanted = [(stats, STATS_VQ), (hint, FREE_PAGE_HINT), (report, REPORTING)];
        let features = wanted.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        let mut guest = Guest::running(ALL, features);
        guest.list(INFLATE, &[1]);
        guest.list(DEFLATE, &[1]);
        assert_eq!(guest.discarded(), [(1, 2)]);
        let mut next = 2;
        let mut index = |on: bool| on.then(|| (next, next += 1).0);
        let (stats, hint, report) = (index(stats), index(hint), index(report));
        if let Some(queue) = stats {
            assert_eq!(guest.send(queue, &[0; 10]), 0, "kept");
        }
        assert_eq!(guest.handle.request_statistics(), stats.is_some());
        assert_eq!(guest.handle.statistics().is_some(), stats.is_some());
        assert_eq!(guest.handle.start_hinting(false).is_ok(), hint.is_some());
        if let Some(queue) = hint {
            let run = guest.config(2);
            guest.list(queue, &[run]);
            guest.free(queue, &[(4, 6)]);
            assert_eq!(guest.discarded(), [(4, 6)]);
        }
        if let Some(queue) = report {
            guest.free(queue, &[(7, 9)]);
            assert_eq!(guest.discarded(), [(7, 9)]);
        }
        assert_eq!(guest.refused(), 0);
    }
}

#[test]
fn a_target_is_told() {
    let mut guest = Guest::new(Config { target_pages: 3, ..ALL });
    assert_eq!((guest.config(0), guest.handle.target_pages()), (3, 3));
    guest.handle.set_target(7);
    assert_eq!(guest.driver.interrupted(), None, "no driver to notify");
    guest.start(ALL_FEATURES);
    assert_eq!(guest.config(0), 7);
    let generation = guest.driver.read(reg::VIRTIO_MMIO_CONFIG_GENERATION);
    guest.handle.set_target(7);
    assert_eq!(guest.driver.interrupted(), None, "nothing new");
    guest.handle.set_target(u32::MAX);
    assert_eq!(guest.driver.interrupted(), Some(CONFIG_CHANGE));
    assert_ne!(guest.driver.read(reg::VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_eq!((guest.config(0), guest.handle.target_pages()), (u32::MAX, u32::MAX));
}

#[test]
fn the_driver_writes_two_of_the_four_words() {
    let mut guest = Guest::running(Config { target_pages: 0x0403_0201, ..ALL }, ALL_FEATURES);
    for word in 0..5 {
        guest.driver.write(0x100 + 4 * word, 0x1817_1615 + word);
    }
    assert_eq!([0, 1, 2, 3, 4].map(|word| guest.config(word)), [0x0403_0201, 0x1817_1616, 0, 0x1817_1618, 0]);
    assert_eq!(guest.handle.actual_pages(), 0x1817_1616);
    assert_eq!(guest.refused(), 3, "two words that are the device's, one that is not there");
    // Single bytes, and accesses across fields and across the end.
    guest.driver.transport.write(0x105, &[0xff]);
    assert_eq!(guest.handle.actual_pages(), 0x1817_ff16);
    guest.driver.transport.write(0x102, &[9, 9, 1, 2]);
    assert_eq!((guest.config(0), guest.handle.actual_pages()), (0x0403_0201, 0x1817_0201));
    guest.driver.transport.write(0x10e, &[5, 6, 7, 8]);
    assert_eq!(guest.config(3), 0x0605_1618);
    assert_eq!(guest.refused(), 5);
    let mut read = [0xee; 8];
    guest.driver.transport.read(0x102, &mut read);
    assert_eq!(read, [3, 4, 1, 2, 0x17, 0x18, 0, 0]);
    guest.driver.transport.read(0x10d, &mut read);
    assert_eq!(read, [0x16, 5, 6, 0, 0, 0, 0, 0]);
    for offset in [0x110, 0x1000, u64::from(u32::MAX), u64::MAX] {
        guest.driver.transport.write(offset, &[1; 8]);
        guest.driver.transport.read(offset, &mut read);
        assert_eq!(read, [0; 8]);
    }
    assert_eq!(guest.handle.actual_pages(), 0x1817_0201);
}

#[test]
fn poison_may_come_before_the_driver_is_ready_but_pages_may_not() {
    let mut guest = Guest::new(ALL);
    guest.driver.write(0x10c, 7);
    guest.driver.write(0x104, 9);
    assert_eq!((guest.config(3), guest.handle.actual_pages()), (7, 0));
    guest.start(ALL_FEATURES);
    guest.free(4, &[(1, 2)]);
    assert_eq!(guest.discarded(), []);
}

#[test]
fn a_driver_that_goes_leaves_nothing_held() {
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    for life in 1..4 {
        assert!(guest.handle.has_driver());
        guest.list(INFLATE, &[1, 2, 3]);
        guest.driver.write(0x104, 3);
        guest.driver.write(0x10c, 5);
        guest.send(2, &[1; 10]);
        guest.handle.set_target(life + 10);
        guest.handle.start_hinting(true).unwrap();
        assert!(guest.driver.interrupted().is_some());

        guest.driver.write(reg::VIRTIO_MMIO_STATUS, 0);
        let handle = &guest.handle;
        assert!(!handle.has_driver() && !handle.request_statistics());
        assert_eq!((handle.actual_pages(), handle.held_pages(), handle.held()), (0, 0, vec![]));
        assert_eq!((handle.statistics(), handle.hinting()), (None, Err(HintError::Unavailable)));
        assert_eq!(handle.target_pages(), life + 10, "the host still wants it");
        assert_eq!(handle.counters().inflated_pages, 3 * u64::from(life), "counters go on");
        assert_eq!([0, 1, 2, 3].map(|word| guest.config(word)), [life + 10, 0, 0, 0]);
        assert_eq!(guest.driver.interrupted(), None);
        // A driver with other wishes, so with other queues.
        guest.start(if life % 2 == 1 { REPORTING } else { ALL_FEATURES });
        let reporting = guest.rings.len() - 1;
        guest.discarded();
        guest.free(reporting, &[(6, 7)]);
        assert_eq!(guest.discarded(), [(6, 7)], "the poison was the other driver's");
        guest.start(ALL_FEATURES);
    }
}

#[test]
fn without_a_driver_the_handle_does_no_harm() {
    let mut guest = Guest::new(ALL);
    assert!(!guest.handle.has_driver() && !guest.handle.request_statistics());
    assert_eq!(guest.handle.start_hinting(true), Err(HintError::Unavailable));
    assert_eq!(guest.handle.stop_hinting(), Err(HintError::Unavailable));
    assert_eq!(guest.handle.hinting(), Err(HintError::Unavailable));
    assert_eq!(
        (guest.handle.statistics(), guest.handle.held(), guest.handle.actual_pages()),
        (None, vec![], 0)
    );
    assert_eq!(guest.handle.counters(), Counters::default());
    assert_eq!(guest.driver.interrupted(), None);
}
