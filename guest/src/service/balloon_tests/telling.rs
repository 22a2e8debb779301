//! Reporting and hinting.

use super::*;

#[test]
fn free_pages_are_reported_once_and_again_when_they_were_written() {
    let mut guest = Guest::new(F_REPORTING);
    assert_eq!(guest.state().reported, 0, "nothing was written yet");
    guest.fill(4000);
    guest.say("free percent=50");
    assert_eq!(guest.state().reported, 2000);
    guest.settle();
    assert_eq!(guest.device.0.borrow().told.len(), 2000);
    guest.assert_right();
    guest.assert_emptied(4000);
    // A smaller fill leaves the rest of the last one.
    guest.fill(100);
    assert_eq!(guest.state().reported, 3900);
    guest.say("free percent=100");
    assert_eq!(guest.state().reported, 4000);
    guest.assert_emptied(6000);
}

#[test]
fn a_page_being_reported_is_not_filled() {
    let mut guest = Guest::new(F_REPORTING);
    guest.fill(4000);
    guest.device.0.borrow_mut().late = true;
    let mut out = Sent::default();
    guest.service.line(Port::Control, Ok("free percent=100"), 0, &mut out);
    guest.service.step(0, &mut out);
    let line = "fill seed=1 common=2 zero=0 common_pct=50 dup=25 unique=25 pages=100";
    guest.service.line(Port::Control, Ok(line), 0, &mut out);
    for _ in 0..10 {
        guest.service.step(0, &mut out);
    }
    assert_eq!(guest.service.workload().held(Target::All), 0);
    guest.device.answer();
    guest.device.0.borrow_mut().late = false;
    assert_eq!(guest.settle(), ["ok command=fill pages=100"]);
    guest.assert_right();
}

#[test]
fn hints_begin_with_their_run_and_end_with_a_stop() {
    let mut guest = Guest::new(F_FREE_PAGE_HINT);
    guest.fill(1000);
    guest.target(500);
    guest.device.set(|state| state.hint_cmd = 2);
    guest.settle();
    assert_eq!(guest.device.0.borrow().hint_cmds, [2, 0]);
    let mut told = core::mem::take(&mut guest.device.0.borrow_mut().told);
    told.sort_unstable();
    assert!(told.iter().copied().eq(1000..5500), "{} pages", told.len());
    assert_eq!((guest.state().hinting, guest.state().hinted), (Hinting::Finished, 4500));
    // The same run again is none.
    guest.device.set(|_| ());
    guest.settle();
    assert_eq!(guest.device.0.borrow().hint_cmds, [2, 0]);
    guest.device.set(|state| state.hint_cmd = 1);
    guest.settle();
    assert_eq!((guest.state().hinting, guest.state().hinted), (Hinting::Idle, 0));
    guest.device.set(|state| state.hint_cmd = 3);
    guest.settle();
    assert_eq!(guest.device.0.borrow().hint_cmds, [2, 0, 3, 0]);
    // A fill does not wait for the host to be done.
    assert_eq!(guest.fill(5500), "ok command=fill pages=5500");
    assert_eq!((guest.state().hinting, guest.state().hinted), (Hinting::Idle, 0));
    guest.assert_right();
}

#[test]
fn a_page_being_hinted_is_not_filled_and_a_run_that_is_stopped_ends_early() {
    let device = Device::new(F_FREE_PAGE_HINT, PAGES);
    device.0.borrow_mut().entries_max = 2;
    let mut guest = Guest::of(device);
    guest.device.0.borrow_mut().late = true;
    guest.device.set(|state| state.hint_cmd = 9);
    let mut out = Sent::default();
    guest.service.poll_balloon();
    guest.service.step(0, &mut out);
    guest.device.answer();
    // Two ranges are out now, and stay out.
    guest.service.step(0, &mut out);
    guest.device.set(|state| state.hint_cmd = 0);
    let line = "fill seed=1 common=2 zero=0 common_pct=50 dup=25 unique=25 pages=100";
    guest.service.line(Port::Control, Ok(line), 0, &mut out);
    for _ in 0..10 {
        guest.service.poll_balloon();
        assert_eq!(guest.service.step(0, &mut out), Wait::Millis(1));
    }
    assert_eq!(guest.service.workload().held(Target::All), 0);
    guest.device.answer();
    guest.device.0.borrow_mut().late = false;
    assert_eq!(guest.settle(), ["ok command=fill pages=100"]);
    assert_eq!(guest.device.0.borrow().hint_cmds, [9, 0]);
    assert_eq!(guest.device.0.borrow().told.len(), 2 * 1024);
    guest.assert_right();
}
