//! The registers and the status machine, driven by good and bad drivers.

use std::sync::{Arc, Mutex};

use virtio_bindings::bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::virtio::drain::MAX_PASSES;
use crate::virtio::rng::Rng;
use crate::virtio::testing::probe::{Probe, Seen};
use crate::virtio::testing::*;
use crate::virtio::{Progress, TRANSPORT_FEATURES};

fn probe() -> (Driver, Arc<Mutex<Seen>>) {
    let seen = Arc::new(Mutex::new(Seen::default()));
    (Driver::new(Probe { seen: seen.clone(), ..Default::default() }), seen)
}

#[test]
fn features_are_offered_in_words_and_handed_over() {
    let (mut driver, seen) = probe();
    let mut offered = 0;
    for word in [0u32, 1, 2, u32::MAX] {
        driver.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, word);
        let value = u64::from(driver.read(reg::VIRTIO_MMIO_DEVICE_FEATURES));
        if word < 2 { offered |= value << (32 * word) } else { assert_eq!(value, 0) }
    }
    assert_eq!(offered, TRANSPORT_FEATURES | 1 << 3);
    driver.negotiate(1 << 32 | 1 << 3);
    driver.add_queue(1, 4);
    driver.add_status(DRIVER_OK);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.features, 1 << 32 | 1 << 3);
    assert_eq!(seen.queues, [false, true], "a queue that was not made ready is not handed over");
}

#[test]
fn features_ok_is_refused_without_version_1_or_with_unknown_bits() {
    for features in [0, 1 << 3, 1 << 32 | 1 << 40, 1 << 32 | 1 << 2] {
        let (mut driver, _) = probe();
        driver.negotiate(features);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
        // The driver may try again with fewer.
        driver.write_features(1 << 32);
        driver.add_status(FEATURES_OK);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }
}

#[test]
fn steps_out_of_order_need_a_reset() {
    let ready = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    let sequences: [&[u32]; 7] = [
        &[ACKNOWLEDGE, ACKNOWLEDGE | FEATURES_OK],
        &[ACKNOWLEDGE, ready],
        &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | DRIVER_OK],
        &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ready | DRIVER_OK],
        &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, DRIVER],
        &[ACKNOWLEDGE, ACKNOWLEDGE | 0x10],
        &[ACKNOWLEDGE, 0xffff_ffff],
    ];
    for sequence in sequences {
        let (mut driver, seen) = probe();
        for &value in sequence {
            driver.write(reg::VIRTIO_MMIO_STATUS, value);
        }
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{sequence:x?}");
        assert_eq!(driver.transport.violations(), 1);
        assert_eq!(driver.interrupted(), None, "a driver that is not running is not interrupted");
        assert!(seen.lock().unwrap().interrupt.is_none(), "the device was not started");
        driver.start(4, false);
    }
}

#[test]
fn before_initialisation_nothing_sticks() {
    let (mut driver, _) = probe();
    driver.write(reg::VIRTIO_MMIO_STATUS, DRIVER_OK);
    driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 8);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    driver.write(reg::VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!((driver.status(), driver.read(reg::VIRTIO_MMIO_QUEUE_READY)), (0, 0));
    assert_eq!(driver.transport.violations(), 4);
    driver.start(4, false);
}

#[test]
fn acknowledge_and_driver_may_come_at_once() {
    let (mut driver, _) = probe();
    driver.write(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    driver.write_features(1 << 32);
    driver.add_status(FEATURES_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn a_running_driver_that_changes_its_mind_is_told_to_reset() {
    for register in [
        reg::VIRTIO_MMIO_DRIVER_FEATURES,
        reg::VIRTIO_MMIO_QUEUE_NUM,
        reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
        reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        reg::VIRTIO_MMIO_QUEUE_USED_LOW,
    ] {
        let (mut driver, seen) = probe();
        let mut ring = driver.start(4, false);
        driver.write(register, 4);
        assert_ne!(driver.status() & NEEDS_RESET, 0);
        assert_eq!(driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_CONFIG));
        ring.descriptor(0, (BUFFERS, 64, WRITE, 0));
        ring.offer(0);
        driver.kick(0);
        assert_eq!(ring.used_idx(), 0, "nothing is processed until the reset");
        driver.write(reg::VIRTIO_MMIO_STATUS, 0);
        assert_eq!((driver.status(), seen.lock().unwrap().resets), (0, 1));
        driver.start(4, false);
    }
}

#[test]
fn a_failed_driver_gets_no_service() {
    let (mut driver, seen) = probe();
    let mut ring = driver.start(4, false);
    driver.add_status(FAILED);
    ring.offer(0);
    driver.kick(0);
    assert_eq!((ring.used_idx(), seen.lock().unwrap().chains), (0, 0));
}

#[test]
fn a_queue_that_cannot_be_needs_a_reset() {
    let good = (0x1_0000u64, 0x1_4000u64, 0x1_8000u64);
    let bad: [(u32, (u64, u64, u64)); 14] = [
        (0, good),
        (3, good),
        (512, good),
        (0x1_0004, good),
        (u32::MAX, good),
        (4, (LOW_RAM - 16, good.1, good.2)),
        (4, (LOW_RAM, good.1, good.2)),
        (4, (good.0, HIGH_RAM_START - 4, good.2)),
        (4, (good.0, good.1, HIGH_RAM_END - 4)),
        (4, (u64::MAX - 15, good.1, good.2)),
        (4, (good.0, u64::MAX - 1, good.2)),
        (4, (good.0 + 8, good.1, good.2)),
        (4, (good.0, good.1 + 1, good.2)),
        (4, (good.0, 0, good.2 + 2)),
    ];
    for (size, (desc, avail, used)) in bad {
        let (mut driver, _) = probe();
        driver.negotiate(TRANSPORT_FEATURES);
        driver.describe_queue(0, size, desc, avail, used);
        driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0, "{size} {desc:#x} {avail:#x} {used:#x}");
        assert_ne!(driver.status() & NEEDS_RESET, 0);
        driver.add_status(DRIVER_OK);
        driver.kick(0);
        assert_eq!(driver.status() & DRIVER_OK, 0);
    }
}

#[test]
fn registers_of_a_missing_queue_are_ignored() {
    let (mut driver, _) = probe();
    driver.negotiate(TRANSPORT_FEATURES);
    for index in [2, 0x1_0000, u32::MAX as usize] {
        driver.describe_queue(index, 4, 0, 0, 0);
        driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    }
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(driver.transport.ignored(), 3 * 8);
}

#[test]
fn notifications_that_mean_nothing_are_counted() {
    let (mut driver, seen) = probe();
    driver.kick(0);
    driver.negotiate(TRANSPORT_FEATURES);
    driver.kick(0);
    let _ = driver.add_queue(0, 4);
    driver.kick(0);
    assert_eq!(driver.transport.ignored(), 2, "a queue that is set up is only early");
    driver.start(4, false);
    driver.kick(1);
    driver.kick(2);
    driver.kick(u32::MAX);
    assert_eq!(driver.transport.ignored(), 5);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(seen.lock().unwrap().chains, 0);
}

#[test]
fn a_stopped_queue_reads_as_stopped_and_is_not_processed() {
    let (mut driver, seen) = probe();
    let mut ring = driver.start(4, false);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    ring.offer(0);
    driver.kick(0);
    assert_eq!(seen.lock().unwrap().chains, 0);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn a_reset_during_setup_forgets_the_queues() {
    let (mut driver, seen) = probe();
    driver.negotiate(TRANSPORT_FEATURES);
    driver.add_queue(0, 4);
    driver.negotiate(TRANSPORT_FEATURES);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    driver.add_queue(1, 4);
    driver.add_status(DRIVER_OK);
    assert_eq!(seen.lock().unwrap().queues, [false, true]);
    assert_eq!(seen.lock().unwrap().resets, 0, "a device that was never started is not reset");
}

#[test]
fn widths_and_unknown_registers_are_ignored() {
    let (mut driver, _) = probe();
    for (offset, len) in [(0u64, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfc, 8), (0x70, 1), (0x9c, 4), (0, 0)]
    {
        let mut data = vec![0xaa; len];
        driver.transport.read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0), "{offset:#x}+{len}");
        driver.transport.write(offset, &vec![1; len]);
    }
    assert_eq!((driver.status(), driver.transport.ignored()), (0, 18));
}

#[test]
fn configuration_space_is_bounded_and_has_a_generation() {
    let (mut driver, seen) = probe();
    driver.transport.write(0x102, &[1, 2, 3]);
    driver.transport.write(0x107, &[9, 9]);
    driver.transport.write(0xfff, &[9]);
    let mut data = [0xaa; 16];
    driver.transport.read(0x100, &mut data);
    assert_eq!(data, [0, 0, 1, 2, 3, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0]);

    driver.start(4, false);
    let before = driver.read(reg::VIRTIO_MMIO_CONFIG_GENERATION);
    seen.lock().unwrap().interrupt.as_ref().unwrap().config_changed();
    assert_ne!(driver.read(reg::VIRTIO_MMIO_CONFIG_GENERATION), before);
    assert_eq!(driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_CONFIG));
}

#[test]
fn no_shared_memory() {
    let (mut driver, _) = probe();
    driver.write(reg::VIRTIO_MMIO_SHM_SEL, 0);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn an_available_index_that_jumps_breaks_the_ring_and_a_reset_mends_it() {
    for jump in [5u16, 0x8000, u16::MAX] {
        let mut driver = Driver::new(Rng::new());
        let mut ring = driver.start(4, false);
        ring.set_avail_idx(jump);
        driver.kick(0);
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{jump}");
        assert_eq!(driver.interrupted(), Some(reg::VIRTIO_MMIO_INT_CONFIG));
        assert_eq!(ring.used_idx(), 0);

        let mut ring = driver.start(4, false);
        ring.descriptor(0, (BUFFERS, 8, WRITE, 0));
        ring.offer(0);
        driver.kick(0);
        assert_eq!(ring.used(0), (0, 8));
    }
}

#[test]
fn a_driver_that_never_stops_yields_and_is_not_forgotten() {
    let mut driver = Driver::new(Probe { refill: true, ..Default::default() });
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    driver.transport.set_kick(0, kick.try_clone().unwrap());
    driver.transport.set_kick(99, kick.try_clone().unwrap());
    let mut ring = driver.start(4, false);
    assert_eq!(kick.read().unwrap(), 1, "what was offered before DRIVER_OK is looked at");
    ring.descriptor(0, (BUFFERS, 8, WRITE, 0));
    ring.offer(0);
    assert_eq!(driver.transport.notify(0), Progress::More);
    assert_eq!(usize::from(ring.used_idx()), 4 * MAX_PASSES, "a bounded number of chains");
    assert_eq!(kick.read().unwrap(), 1, "the event loop is asked to come back");
}
