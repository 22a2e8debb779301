//! Whole sessions with a balloon, against a device of the test's own that really empties what it is
//! given.

mod telling;

use core::ops::Range;
use std::cell::Cell;
use std::format;
use std::rc::Rc;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::content::{PAGE_WORDS, Page};
use crate::protocol::{BalloonReport, Drive, Hinting, Hostile};
use crate::virtio::balloon::{F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_REPORTING, F_STATS_VQ};
use crate::virtio::fake::Device;
use crate::virtio::status;

const PAGES: u64 = 6000;
const ALL: u64 = F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_REPORTING;

/// Pages that lose their content when the device has emptied them.
#[derive(Debug)]
struct Memory {
    pages: Vec<Page>,
    device: Device,
}

impl Pages for Memory {
    fn count(&self) -> u64 {
        self.pages.len() as u64
    }

    fn page(&mut self, index: u64) -> &mut Page {
        if self.device.0.borrow_mut().emptied.remove(&index) {
            self.pages[index as usize] = [0; PAGE_WORDS];
        }
        &mut self.pages[index as usize]
    }

    fn release(&mut self, _pages: Range<u64>) {}
}

#[derive(Default)]
struct Sent(Vec<String>);

impl Out for Sent {
    fn send(&mut self, _port: Port, reply: &Reply) {
        self.0.push(reply.to_string());
    }
}

struct Guest {
    service: Service<'static, Memory, Device>,
    device: Device,
    now: Rc<Cell<u64>>,
}

impl Guest {
    fn new(features: u64) -> Self {
        let device = Device::new(features, PAGES);
        Self::of(device)
    }

    fn of(device: Device) -> Self {
        let mut driver = device.driver();
        driver.on().unwrap();
        let memory = Memory { pages: vec![[0; PAGE_WORDS]; PAGES as usize], device: device.clone() };
        let generations = std::boxed::Box::leak(vec![0; PAGES as usize].into_boxed_slice());
        let service = Service::with_balloon(Workload::new(memory, generations), Some(driver));
        let mut guest = Self { service, device, now: Rc::default() };
        guest.settle();
        guest
    }

    /// Goes on until there is nothing to do; what was said on the way.
    fn settle(&mut self) -> Vec<String> {
        let mut out = Sent::default();
        // A second of waiting ends everything that the device does not answer.
        for _ in 0..5000 {
            self.service.poll_balloon();
            match self.service.step(self.now.get(), &mut out) {
                Wait::Forever => return out.0,
                Wait::No => {}
                Wait::Millis(millis) => self.now.set(self.now.get() + u64::from(millis) * 1000),
            }
        }
        panic!("no end, {:?}", self.state());
    }

    fn say(&mut self, line: &str) -> String {
        let mut out = Sent::default();
        assert_eq!(self.service.line(Port::Control, Ok(line), self.now.get(), &mut out), None);
        out.0.extend(self.settle());
        out.0.retain(|line| !line.starts_with("progress "));
        assert_eq!(out.0.len(), 1, "{line}: {:?}", out.0);
        out.0.remove(0)
    }

    fn fill(&mut self, pages: u64) -> String {
        self.say(&format!("fill seed=1 common=2 zero=25 common_pct=25 dup=25 unique=25 pages={pages}"))
    }

    fn target(&mut self, pages: u32) {
        self.device.set(|state| state.num_pages = pages);
        self.settle();
    }

    fn state(&self) -> BalloonReport {
        self.service.balloon.as_ref().unwrap().report(&self.service.workload.in_use())
    }

    /// Driver and device agree, and the pages that are held are right.
    #[track_caller]
    fn assert_right(&mut self) {
        let filled = self.service.workload().held(Target::All);
        let verified = self.say("verify");
        assert_eq!(verified, format!("ok command=verify checked={filled} mismatched=0 first=none"));
        let state = self.state();
        let device = self.device.0.borrow();
        assert_eq!((state.given, state.actual), (device.held.len() as u64, u64::from(device.actual)));
        assert_eq!(state.given, state.actual);
        assert_eq!(state.free, PAGES - filled - state.given);
    }

    #[track_caller]
    fn assert_emptied(&mut self, checked: u64) {
        assert_eq!(
            self.say("balloon check"),
            format!("ok command=balloon action=check checked={checked} nonzero=0")
        );
    }
}

#[test]
fn the_balloon_follows_its_target_and_leaves_filled_pages_alone() {
    let mut guest = Guest::new(F_STATS_VQ);
    assert_eq!(guest.fill(2000), "ok command=fill pages=2000");
    guest.target(3500);
    assert_eq!((guest.state().actual, guest.state().free), (3500, 500));
    guest.assert_right();
    // More than there is.
    guest.target(5000);
    assert_eq!((guest.state().actual, guest.state().free), (4000, 0));
    guest.assert_right();
    // What is freed goes in at once.
    assert_eq!(guest.say("free percent=50"), "ok command=free freed=1000 filled=1000");
    assert_eq!((guest.state().actual, guest.state().free), (5000, 0));
    guest.assert_right();
    guest.target(0);
    assert_eq!((guest.state().actual, guest.state().free), (0, 5000));
    guest.assert_right();
    // All that was in the balloon, freed pages too, is empty.
    guest.assert_emptied(5000);
    assert_eq!(guest.fill(PAGES), "ok command=fill pages=6000");
    guest.assert_right();
}

#[test]
fn without_deflate_on_oom_a_fill_gets_what_is_left_and_the_balloon_keeps_its_size() {
    let mut guest = Guest::new(0);
    guest.target(2000);
    assert_eq!(guest.fill(4001), "err code=memory pages=4001, expected at most 4000");
    assert_eq!(guest.fill(4000), "ok command=fill pages=4000");
    guest.say("free percent=100");
    guest.target(3000);
    assert_eq!(
        guest.say("fill seed=1 common=2 zero=25 common_pct=25 dup=25 unique=25"),
        "ok command=fill pages=3000"
    );
    assert_eq!(guest.state().actual, 3000);
    guest.assert_right();
}

#[test]
fn pages_that_a_fill_needs_are_exchanged_for_others() {
    let mut guest = Guest::new(0);
    guest.fill(PAGES);
    guest.say("free percent=50");
    guest.target(3000);
    guest.say("free percent=100");
    // The balloon has half of each quarter now, and 1500 of its pages are among the first 3000.
    guest.device.0.borrow_mut().most = 0;
    assert_eq!(guest.fill(3000), "ok command=fill pages=3000");
    assert_eq!(guest.device.0.borrow().most, 4500, "others went in before these came out");
    assert_eq!(guest.state().actual, 3000);
    guest.assert_right();
}

#[test]
fn with_deflate_on_oom_a_fill_takes_the_balloon_s_pages() {
    let mut guest = Guest::new(F_DEFLATE_ON_OOM);
    guest.target(4000);
    assert_eq!(guest.fill(5000), "ok command=fill pages=5000");
    assert_eq!((guest.state().target, guest.state().actual), (4000, 1000));
    guest.assert_right();
    // When they are freed the balloon gets to its size again.
    guest.say("free percent=100");
    assert_eq!(guest.state().actual, 4000);
    assert_eq!(guest.fill(6001), "err code=memory pages=6001, expected at most 6000");
    assert_eq!(
        guest.say("fill seed=1 common=2 zero=25 common_pct=25 dup=25 unique=25"),
        "ok command=fill pages=2000"
    );
    guest.assert_right();
}

#[test]
fn a_fill_waits_until_the_host_was_told() {
    let mut guest = Guest::new(F_DEFLATE_ON_OOM);
    guest.target(6000);
    guest.device.0.borrow_mut().late = true;
    let mut out = Sent::default();
    let line = "fill seed=1 common=2 zero=0 common_pct=50 dup=25 unique=25 pages=100";
    guest.service.line(Port::Control, Ok(line), 0, &mut out);
    for _ in 0..10 {
        assert_eq!(guest.service.step(0, &mut out), Wait::Millis(1));
    }
    assert_eq!((guest.service.workload().held(Target::All), out.0.len()), (0, 0));
    assert_eq!(guest.state().actual, 6000);
    guest.device.answer();
    assert_eq!(guest.settle(), ["ok command=fill pages=100"]);
    assert_eq!(guest.state().actual, 5900);
    guest.assert_right();
}

#[test]
fn a_fill_that_waits_can_be_cancelled() {
    let mut guest = Guest::new(F_DEFLATE_ON_OOM);
    guest.target(6000);
    guest.device.0.borrow_mut().late = true;
    let mut out = Sent::default();
    let line = "fill seed=1 common=2 zero=0 common_pct=50 dup=25 unique=25 pages=100";
    guest.service.line(Port::Control, Ok(line), 0, &mut out);
    guest.service.step(0, &mut out);
    guest.service.line(Port::Control, Ok("idle"), 0, &mut out);
    assert_eq!(out.0, ["err code=cancelled idle came before the end", "ok command=idle"]);
    guest.device.answer();
    guest.device.0.borrow_mut().late = false;
    guest.settle();
    assert_eq!(guest.state().actual, 6000);
    guest.assert_right();
}

#[test]
fn statistics_are_sent_at_the_start_and_when_asked_for() {
    let mut guest = Guest::new(F_STATS_VQ);
    let value = |guest: &Guest, tag: u16| {
        let stats = guest.device.0.borrow().statistics.clone();
        assert_eq!(stats.len(), 16);
        stats.iter().find(|stat| stat.0 == tag).unwrap().1
    };
    assert_eq!((value(&guest, 4), value(&guest, 5)), (PAGES * 4096, (PAGES + 100) * 4096));
    guest.fill(1000);
    guest.target(2000);
    assert_eq!(value(&guest, 4), PAGES * 4096, "not before it is asked for");
    guest.device.ask_statistics();
    guest.settle();
    assert_eq!((value(&guest, 4), value(&guest, 6)), (3000 * 4096, 3000 * 4096));
    assert_eq!((value(&guest, 5), value(&guest, 3)), (4100 * 4096, 1000));
    assert_eq!(guest.state().statistics, 2);
}

#[test]
fn writing_to_the_balloon_s_pages_shows() {
    let mut guest = Guest::new(0);
    guest.target(1000);
    assert_eq!(guest.say("balloon touch pages=300"), "ok command=balloon action=touch touched=300");
    assert_eq!(guest.say("balloon touch pages=3000"), "ok command=balloon action=touch touched=1000");
    guest.target(0);
    // What was written is not expected to be empty.
    guest.assert_emptied(5000);
}

#[test]
fn a_page_that_the_host_did_not_empty_is_found() {
    let mut guest = Guest::new(0);
    guest.fill(1000);
    guest.say("free percent=100");
    guest.target(6000);
    guest.target(0);
    guest.device.0.borrow_mut().emptied.remove(&999);
    assert_eq!(guest.say("balloon check"), "ok command=balloon action=check checked=6000 nonzero=1");
}

#[test]
fn off_empties_the_balloon_and_on_fills_it_again() {
    let mut guest = Guest::new(ALL);
    guest.target(3000);
    assert_eq!(guest.say("balloon off"), "ok command=balloon action=off");
    assert_eq!((guest.device.0.borrow().status, guest.state().drive), (0, Drive::Off));
    assert_eq!((guest.state().given, guest.state().free), (0, PAGES));
    assert_eq!(guest.say("balloon off"), "ok command=balloon action=off");
    assert_eq!(guest.fill(PAGES), "ok command=fill pages=6000");
    guest.assert_right();
    guest.say("free percent=100");
    assert_eq!(guest.say("balloon on"), "ok command=balloon action=on features=0x10000002e");
    assert_eq!(guest.state().actual, 3000);
    guest.assert_right();
}

#[test]
fn a_device_that_does_not_answer_holds_up_neither_off_nor_the_guest() {
    let mut guest = Guest::new(ALL);
    guest.target(3000);
    guest.device.0.borrow_mut().dead = true;
    guest.device.set(|state| state.num_pages = 100);
    let mut out = Sent::default();
    assert_eq!(guest.service.step(0, &mut out), Wait::Forever);
    guest.service.poll_balloon();
    assert_eq!(guest.service.step(0, &mut out), Wait::Millis(1));
    assert_eq!(guest.say("balloon off"), "ok command=balloon action=off");
    assert_eq!((guest.state().drive, guest.state().given), (Drive::Off, 0));
}

#[test]
fn a_device_that_needs_a_reset_is_left_alone_until_it_gets_one() {
    let mut guest = Guest::new(ALL);
    guest.target(3000);
    guest.device.set(|state| state.status |= status::NEEDS_RESET);
    guest.settle();
    assert_eq!(guest.state().drive, Drive::Broken);
    assert_eq!(guest.fill(PAGES), "err code=memory pages=6000, expected at most 3000");
    assert_eq!(guest.fill(3000), "ok command=fill pages=3000");
    assert_eq!(guest.say("balloon off"), "ok command=balloon action=off");
    assert_eq!(guest.say("balloon on"), "ok command=balloon action=on features=0x10000002e");
    assert_eq!(guest.state().actual, 3000);
    guest.assert_right();
}

#[test]
fn a_device_that_breaks_while_it_is_let_go_of_is_reset() {
    let mut guest = Guest::new(ALL);
    guest.target(3000);
    guest.device.0.borrow_mut().late = true;
    let mut out = Sent::default();
    guest.service.line(Port::Control, Ok("balloon off"), 0, &mut out);
    assert_eq!(guest.service.step(0, &mut out), Wait::Millis(1));
    guest.device.set(|state| state.status |= status::NEEDS_RESET);
    assert_eq!(guest.settle(), ["ok command=balloon action=off"]);
    assert_eq!((guest.device.0.borrow().status, guest.now.get() < 100_000), (0, true));
}

#[test]
fn a_round_waits_for_a_hostile_request_that_is_out() {
    let device = Device::new(ALL, PAGES);
    device.0.borrow_mut().entries_max = 1;
    let mut guest = Guest::of(device);
    guest.device.0.borrow_mut().late = true;
    let mut out = Sent::default();
    guest.service.line(Port::Control, Ok("balloon hostile kind=direction"), 0, &mut out);
    guest.service.step(0, &mut out);
    guest.device.set(|state| state.num_pages = 1000);
    for _ in 0..10 {
        guest.service.poll_balloon();
        guest.service.step(0, &mut out);
    }
    guest.device.0.borrow_mut().late = false;
    guest.device.answer();
    let said = guest.settle();
    assert_eq!(said, ["ok command=balloon action=hostile kind=direction completed=yes status=0xf"]);
    assert_eq!(guest.state().actual, 1000);
    guest.assert_right();
}

#[test]
fn hostile_requests_are_sent_and_what_became_of_them_is_told() {
    for kind in Hostile::ALL {
        let mut guest = Guest::new(ALL);
        guest.target(1000);
        let (completed, status) = if kind == Hostile::Loop { ("no", 0x4f) } else { ("yes", 0xf) };
        assert_eq!(
            guest.say(&format!("balloon hostile kind={}", kind.name())),
            format!(
                "ok command=balloon action=hostile kind={} completed={completed} status={status:#x}",
                kind.name()
            ),
        );
        if completed == "no" {
            assert_eq!(guest.state().drive, Drive::Broken);
            let line = guest.say("balloon hostile kind=loop");
            assert!(line.starts_with("err code=failed the balloon is not driven"), "{line}");
            guest.say("balloon off");
            guest.say("balloon on");
        }
        // The lie about one page is over when the device is driven anew.
        guest.target(0);
        guest.say("balloon off");
        guest.say("balloon on");
        guest.target(500);
        guest.assert_right();
    }
    let mut guest = Guest::new(0);
    for kind in ["statistics", "reporting", "hinting"] {
        let line = guest.say(&format!("balloon hostile kind={kind}"));
        assert_eq!(line, "err code=failed the device does not offer that queue");
    }
}

#[test]
fn without_a_balloon_its_commands_are_refused() {
    let mut generations = [0; 10];
    let pages = crate::workload::tests::TestPages::new(10);
    let mut service = Service::new(Workload::new(pages, &mut generations));
    let mut out = Sent::default();
    service.line(Port::Control, Ok("balloon report"), 0, &mut out);
    assert_eq!(out.0, ["err code=unsupported this guest drives no balloon device"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_no_page_is_lost(
        features in 0_u64..64,
        entries in prop::sample::select(std::vec![1_u32, 2, 8, 256]),
        steps in proptest::collection::vec((0_u8..9, 0_u64..7000), 1..25),
    ) {
        let device = Device::new(features & ALL, PAGES);
        device.0.borrow_mut().entries_max = entries;
        let mut guest = Guest::of(device);
        let mut out = Sent::default();
        let mut cmd = 2;
        for (step, amount) in steps {
            match step {
                0 | 1 => guest.device.set(|state| state.num_pages = amount as u32),
                2 => {
                    let line = format!("fill seed=3 common=4 zero=10 common_pct=40 dup=10 unique=40 pages={amount}");
                    guest.service.line(Port::Control, Ok(&line), guest.now.get(), &mut out);
                }
                3 => {
                    let line = format!("free percent={}", amount % 101);
                    guest.service.line(Port::Control, Ok(&line), guest.now.get(), &mut out);
                }
                4 => {
                    cmd += 1;
                    guest.device.set(|state| state.hint_cmd = if amount % 3 == 2 { cmd } else { (amount % 3) as u32 });
                }
                5 => guest.device.ask_statistics(),
                6 => guest.device.0.borrow_mut().late = amount % 2 == 0,
                7 => _ = guest.service.line(Port::Control, Ok("idle"), guest.now.get(), &mut out),
                _ => guest.device.answer(),
            }
            for _ in 0..amount % 5 {
                guest.service.poll_balloon();
                guest.service.step(guest.now.get(), &mut out);
            }
        }
        guest.device.0.borrow_mut().late = false;
        guest.device.answer();
        guest.settle();
        guest.assert_right();
        let state = guest.state();
        let wanted = state.target.min(PAGES - guest.service.workload().held(Target::All));
        prop_assert_eq!(state.actual, wanted);
        guest.target(0);
        let check = guest.say("balloon check");
        prop_assert!(check.ends_with(" nonzero=0"), "{}", check);
        guest.assert_right();
    }
}
