//! Devices that go on elsewhere, over the same RAM, and states that no device was ever in.

use proptest::prelude::*;

use super::{EventFd, TRANSPORT_FEATURES, TransportState};
use crate::virtio::rng::Rng;
use crate::virtio::testing::*;

fn elsewhere(driver: &Driver) -> Driver {
    Driver::over(driver.memory.clone(), Rng::new())
}

#[test]
fn a_queue_goes_on_where_it_was() {
    let mut driver = Driver::new(Rng::new());
    let mut ring = driver.start(8, true);
    for life in 0..3u16 {
        for request in 0..5u16 {
            let at = life * 5 + request;
            ring.descriptor(at % 8, (BUFFERS, 64, WRITE, 0));
            ring.set_used_event(at);
            ring.offer(at % 8);
            driver.kick(0);
            assert_eq!((driver.interrupted(), ring.used_idx()), (Some(1), at + 1));
        }
        let saved = driver.transport.save();
        let mut next = elsewhere(&driver);
        next.transport.restore(&saved).unwrap();
        assert_eq!(next.transport.save(), saved);
        assert!(next.irq.read().is_err());
        driver = next;
    }
}

#[test]
fn what_was_not_seen_and_what_was_not_acknowledged_comes_again() {
    let mut driver = Driver::new(Rng::new());
    let mut ring = driver.start(8, false);
    ring.descriptor(0, (BUFFERS, 64, WRITE, 0));
    ring.offer(0);
    driver.kick(0);
    // Not notified of, and the interrupt is not acknowledged.
    ring.offer(0);
    let mut next = elsewhere(&driver);
    let kick = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    next.transport.set_kick(0, kick.try_clone().unwrap());
    next.transport.restore(&driver.transport.save()).unwrap();
    assert!(kick.read().is_err() && next.irq.read().is_err());
    next.transport.wake();
    assert!(kick.read().is_ok());
    assert_eq!(next.interrupted(), Some(1));
    next.transport.notify(0);
    assert_eq!((ring.used_idx(), next.interrupted()), (2, Some(1)));
}

#[test]
fn a_driver_that_is_half_way_goes_on_with_its_steps() {
    let mut driver = Driver::new(Rng::new());
    driver.negotiate(TRANSPORT_FEATURES);
    let mut ring = driver.add_queue(0, 8);
    let mut next = elsewhere(&driver);
    next.transport.restore(&driver.transport.save()).unwrap();
    next.add_status(DRIVER_OK);
    ring.descriptor(0, (BUFFERS, 64, WRITE, 0));
    ring.offer(0);
    next.kick(0);
    assert_eq!(ring.used_idx(), 1);
}

#[test]
fn what_no_driver_gets_to_is_refused() {
    let mut driver = Driver::new(Rng::new());
    driver.start(8, true);
    let good = driver.transport.save();
    let refused = |change: &dyn Fn(&mut TransportState)| {
        let mut bad = good.clone();
        change(&mut bad);
        elsewhere(&driver).transport.restore(&bad).unwrap_err().to_string()
    };
    for (said, change) in [
        ("kind 5", &(|s: &mut TransportState| s.device_id = 5) as &dyn Fn(&mut TransportState)),
        ("0 queues", &|s| s.queues.clear()),
        ("status 0x4", &|s| s.status = 4),
        ("none that a driver gets to", &|s| s.driver_features |= 1 << 3),
        ("none that a driver gets to", &|s| s.driver_features = 0),
        ("none that a driver gets to", &|s| s.status = 3),
        ("power of two", &|s| s.queues[0].size = 7),
        ("power of two", &|s| s.queues[0].size = 1 << 16),
        ("outside RAM", &|s| s.queues[0].used_ring = 1 << 62),
        ("outside RAM", &|s| s.queues[0].desc_table = HIGH_RAM_END - 16),
        ("of another one", &|s| s.device = crate::state::DeviceState::Balloon(Default::default())),
    ] {
        let error = refused(change);
        assert!(error.contains(said), "{error}");
    }
}

proptest! {
    #[test]
    fn no_state_makes_a_device_panic(
        status in 0u32..256, features: u64, selectors: [u32; 3], queue: [u64; 3], size in 0u32..20, ready: bool,
        place: [u16; 2],
    ) {
        let mut state = Driver::new(Rng::new()).transport.save();
        state.status = status;
        state.driver_features = features & 7 << 28 | 1 << 32;
        [state.device_features_sel, state.driver_features_sel, state.queue_sel] = selectors;
        state.queues[0] = crate::state::QueueState {
            size: 1 << (size % 8),
            desc_table: (queue[0] % 0x30_0000) & !15,
            avail_ring: (queue[1] % 0x30_0000) & !1,
            used_ring: (queue[2] % 0x30_0000) & !3,
            ready,
            next_avail: place[0],
            next_used: place[1],
        };
        let mut driver = Driver::new(Rng::new());
        let _ = driver.transport.restore(&state);
        driver.transport.wake();
        driver.kick(0);
        driver.transport.notify(0);
        prop_assert_eq!(driver.transport.save().device_id, state.device_id);
    }
}
