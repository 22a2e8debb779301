//! The free page hinting queue.

use super::*;

const QUEUE: usize = 2;
const HOST_CMD: u32 = 2;

fn hinting() -> Guest {
    Guest::running(Config { hinting: true, ..Default::default() }, FREE_PAGE_HINT | PAGE_POISON)
}

/// Starts a run, which the driver answers. Returns its ID.
fn run(guest: &mut Guest, acknowledge_on_stop: bool) -> u32 {
    guest.handle.start_hinting(acknowledge_on_stop).unwrap();
    assert_eq!(guest.driver.interrupted(), Some(2), "a new ID is announced");
    let run = guest.config(HOST_CMD);
    assert!(run >= 2);
    guest.list(QUEUE, &[run]);
    guest.driver.interrupted();
    run
}

fn status(guest: &Guest) -> (u32, Option<u32>) {
    let HintStatus { host_cmd, guest_cmd } = guest.handle.hinting().unwrap();
    (host_cmd, guest_cmd)
}

#[test]
fn a_run_that_is_not_acknowledged() {
    let mut guest = hinting();
    assert_eq!(status(&guest), (0, None));
    let run = run(&mut guest, false);
    assert_eq!(status(&guest), (run, Some(run)));
    guest.free(QUEUE, &[(4, 8), (0x20, 0x21)]);
    guest.free(QUEUE, &[(0x200, 0x210)]);
    assert_eq!(guest.discarded(), [(4, 8), (0x20, 0x21), (0x200, 0x210)]);
    assert_eq!(guest.handle.counters().hinted_bytes, 21 * 4096);
    assert_eq!(guest.held(), [], "a hinted page is not in the balloon");
    guest.driver.interrupted();
    guest.list(QUEUE, &[0]);
    assert_eq!(guest.driver.interrupted(), Some(1), "the ID stays");
    assert_eq!(status(&guest), (run, Some(0)));
    guest.free(QUEUE, &[(1, 2)]);
    assert_eq!((guest.discarded(), guest.refused()), (vec![], 0), "late hints are no error");
    guest.driver.interrupted();
    guest.handle.stop_hinting().unwrap();
    assert_eq!(guest.driver.interrupted(), Some(2));
    assert_eq!((guest.config(HOST_CMD), status(&guest)), (1, (1, Some(0))));
}

#[test]
fn a_run_that_is_acknowledged() {
    let mut guest = hinting();
    for _ in 0..3 {
        let run = run(&mut guest, true);
        guest.free(QUEUE, &[(4, 8)]);
        guest.driver.interrupted();
        guest.list(QUEUE, &[0]);
        assert_eq!(guest.driver.interrupted(), Some(3), "completed, and the configuration changed");
        assert_eq!((guest.config(HOST_CMD), status(&guest)), (1, (1, Some(0))));
        guest.list(QUEUE, &[run]);
        guest.free(QUEUE, &[(9, 10)]);
        assert_eq!(guest.discarded(), [(4, 8)], "a run that is done stays done");
        guest.driver.interrupted();
    }
}

#[test]
fn after_a_stop_nothing_goes() {
    let mut guest = hinting();
    run(&mut guest, true);
    guest.handle.stop_hinting().unwrap();
    guest.free(QUEUE, &[(4, 8)]);
    assert_eq!(guest.discarded(), []);
    // Nor by the next run, until the driver has answered that.
    guest.handle.start_hinting(false).unwrap();
    guest.free(QUEUE, &[(4, 8)]);
    assert_eq!(guest.discarded(), []);
    let run = guest.config(HOST_CMD);
    guest.list(QUEUE, &[run - 1]);
    guest.free(QUEUE, &[(4, 8)]);
    assert_eq!(guest.discarded(), [], "the old run's number");
    guest.list(QUEUE, &[run]);
    guest.free(QUEUE, &[(4, 8)]);
    assert_eq!(guest.discarded(), [(4, 8)]);
}

#[test]
fn an_id_and_pages_may_come_in_one_chain() {
    let mut guest = hinting();
    let run = run(&mut guest, false);
    let mut both = |cmd: u32| {
        guest.driver.memory.write_obj(cmd, GuestAddress(DATA)).unwrap();
        // The ID itself lies in two buffers.
        assert_eq!(guest.send_chain(QUEUE, &[(DATA, 1, 0), (DATA + 1, 3, 0), (0x5000, 4096, WRITE)]), 1);
        guest.discarded()
    };
    assert_eq!(both(0), []);
    assert_eq!(both(run), [(5, 6)]);
}

#[test]
fn a_poisoned_page_keeps_what_is_in_it() {
    let mut guest = hinting();
    guest.driver.write(0x10c, 0xaa);
    run(&mut guest, false);
    guest.free(QUEUE, &[(4, 8)]);
    guest.driver.write(0x10c, 0);
    guest.free(QUEUE, &[(5, 6)]);
    assert_eq!(guest.discarded(), [(5, 6)]);
}

#[test]
fn hinting_must_have_been_negotiated() {
    let guest = Guest::running(ALL, REPORTING | STATS_VQ);
    assert_eq!(guest.handle.start_hinting(true), Err(HintError::Unavailable));
    assert_eq!(guest.handle.stop_hinting(), Err(HintError::Unavailable));
    assert_eq!(guest.handle.hinting(), Err(HintError::Unavailable));
}
