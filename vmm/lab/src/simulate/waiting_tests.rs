//! Many random fleets against the promise to a suspended guest: it runs again, soon where memory is
//! available, in its turn where none is; and no guest gets memory that does not exist.
//!
//! A debug build tries some hundreds of fleets; a release build 100,000, in a minute or two on one
//! core: `cargo test --release -p lab --lib waiting_tests`.

use super::dice::Dice;
use super::guest::{Guest, PAGES_PER_MIB};
use super::host::Host;
use super::scenario::{Driver, Scenario};
use super::tally::Tally;
use overcommit::knobs::Knobs;
use overcommit::memory_state::{MemoryState, percent_of};
use overcommit::suspension::longest_wait_seconds;
use overcommit::view::GuestState;

const FLEETS: u64 = if cfg!(debug_assertions) { 400 } else { 100_000 };
/// Fleets that a debug build tries too, for they failed: limits above the brake; touches denied
/// while swap became free; what is used paged out before what is not.
const FAILED_ONCE: [u64; 3] = [1709, 26_379, 68_268];
/// Times are shorter than by default, so that a fleet is through with all of them soon.
const KNOBS: &str = "turn_seconds = 40\nturn_run_seconds = 10\nsuspend_hold_seconds = 5\nresume_hold_seconds = 10\nmay_stop = false";
/// Long enough for every wait there can be.
const SECONDS: u64 = 300;
/// How often guests are suspended, without asking the policy.
const SUSPENDED_EACH: u64 = 100;
/// Fewer pages are not worth a request, and a model that counts in fractions may be off by some.
const FEW_PAGES: f64 = 256.0;

fn pick(dice: &mut Dice, from: f64, to: f64) -> u64 {
    (from + dice.part() * (to - from)) as u64
}

/// Two to six guests on a host that is too small for them, which all change what they do half-way.
fn fleet(number: u64) -> Scenario {
    let mut dice = Dice::new(0x5a3e, number);
    let swap = if dice.part() < 0.3 { 0 } else { pick(&mut dice, 16.0, 2000.0) };
    let (count, equal) = (pick(&mut dice, 2.0, 7.0), dice.part() < 0.5);
    let (mut guests, mut loads, mut later, mut promised) = (String::new(), String::new(), String::new(), 0);
    for n in 0..count {
        let memory = pick(&mut dice, 32.0, 512.0);
        promised += memory;
        let balloon =
            ["follows", "follows", "slow", "none", "refuses", "lies"][pick(&mut dice, 0.0, 6.0) as usize];
        let priority = if equal { 0 } else { pick(&mut dice, 0.0, 3.0) };
        let least = pick(&mut dice, 0.0, memory as f64 * 0.3);
        guests += &format!(
            "[[guest]]\nname = 'g{n}'\nmemory_mib = {memory}\nmin_mib = {least}\nballoon = '{balloon}'\n\
             priority = {priority}\nload = 'a{n}'\n"
        );
        for when in ["a", "b"] {
            let active = if dice.part() < 0.3 { 0 } else { pick(&mut dice, 0.0, 101.0) };
            let touch = pick(&mut dice, 1.0, 200.0);
            loads +=
                &format!("[load.{when}{n}]\nactive_percent = {active}\ntouch_mib_per_second = {touch}\n");
        }
        later += &format!("g{n} = 'b{n}', ");
    }
    let capacity = (promised as f64 * (0.4 + 0.5 * dice.part())) as u64 + 8 * count;
    Scenario::parse(&format!(
        "name = 'f'\nseed = {number}\n[host]\ncapacity_mib = {capacity}\nswap_mib = {swap}\n[knobs]\n{KNOBS}\n{loads}{guests}\
         [[phase]]\nname = 'first'\nseconds = {SECONDS}\n\
         [[phase]]\nname = 'then'\nseconds = {SECONDS}\nloads = {{ {} }}\n",
        later.trim_end_matches(", ")
    ))
    .unwrap_or_else(|e| panic!("fleet {number}: {e}"))
}

/// What is seen of one suspended guest, in seconds: how long it has been suspended, and how long
/// memory was available for it.
#[derive(Clone, Copy, Default)]
struct Waited {
    suspended: u64,
    available: u64,
}

/// Suspends some of the running guests, but not the last one: limits alone keep nearly every fleet
/// of this model from coming to that by itself.
fn suspend_some(host: &mut Host, dice: &mut Dice) {
    let running: Vec<usize> =
        host.guests().enumerate().filter(|(_, guest)| guest.runs()).map(|(index, _)| index).collect();
    for index in running.into_iter().skip(1) {
        if dice.part() < 0.5 {
            host.suspend(index);
        }
    }
}

/// Runs a fleet. Returns how often a guest was suspended, and the longest that one was.
fn watch(number: u64) -> (u64, u64) {
    let scenario = fleet(number);
    let mut host = Host::new(&scenario, 0);
    let mut dice = Dice::new(0x5a3e, u64::MAX - number);
    let mut waited = vec![Waited::default(); scenario.guests.len()];
    let knobs: Knobs = toml::from_str(KNOBS).expect("knobs");
    let count = scenario.guests.len();
    let one_turn = longest_wait_seconds(count, &knobs) - 3.0 * knobs.turn_seconds;
    let (mut suspensions, mut longest) = (0, 0);
    let capacity = scenario.host.capacity_mib * PAGES_PER_MIB as u64;
    let kept =
        percent_of(capacity, MemoryState::High.threshold_percent(&knobs) + 2.0 * knobs.margin_percent) as f64;
    let overhead = (scenario.host.overhead_mib_per_guest * PAGES_PER_MIB as u64) as f64;
    for phase in &scenario.phases {
        let mut tally = Tally::new(count);
        host.begin(phase);
        for second in 0..scenario.phase_steps(phase) {
            if second % SUSPENDED_EACH == SUSPENDED_EACH / 2 {
                suspend_some(&mut host, &mut dice);
            }
            let denied = tally.denied_pages;
            let sample = host.step(phase, 0, &mut tally);
            // Before its first step the policy has set no limits; and a guest below its minimum may
            // take that, as it was promised.
            let below =
                |guest: &Guest| guest.lives() && guest.resident_pages < guest.view.floor_pages() as f64;
            if sample.seconds <= 1.0 || host.guests().any(below) {
                tally.denied_pages = denied;
            }
            let at = || format!("fleet {number}, {} after {second} s", phase.name);
            let taken: f64 = host.guests().filter(|g| g.lives()).map(|g| g.frames() + overhead).sum();
            assert!(taken <= capacity as f64 + 1.0, "{}: {taken} of {capacity} pages are taken", at());
            let mut swap = scenario.host.swap_mib as f64 * PAGES_PER_MIB - sample.swapped_pages;
            swap = (swap - knobs.swap_reserve_pages as f64 - FEW_PAGES).max(0.0);
            // What the running guests neither use nor were promised.
            let (mut to_balloon, mut to_swap) = (0.0, 0.0);
            for guest in host.guests().filter(|g| g.runs()) {
                let idle = guest.resident_pages - guest.active_pages().max(guest.view.floor_pages() as f64);
                let idle = (idle - FEW_PAGES).max(0.0);
                match guest.driver {
                    Driver::Follows => to_balloon += idle,
                    _ => to_swap += idle,
                }
            }
            let available = sample.free_pages + to_balloon + to_swap.min(swap);
            let runs = host.guests().filter(|g| g.runs()).count();
            assert!(runs > 0, "{}: no guest runs", at());
            let lacks: f64 = host
                .guests()
                .filter(|g| g.view.state == GuestState::Suspended)
                .map(|g| (g.promised_pages() - g.resident_pages).max(0.0))
                .sum();
            for (guest, waited) in host.guests().zip(&mut waited) {
                if guest.view.state != GuestState::Suspended {
                    *waited = Waited::default();
                    continue;
                }
                suspensions += u64::from(waited.suspended == 0);
                waited.suspended += 1;
                waited.available = if available >= kept + lacks { waited.available + 1 } else { 0 };
                longest = longest.max(waited.suspended);
                let all = longest_wait_seconds(count, &knobs) + count as f64;
                assert!(waited.suspended as f64 <= all, "{}: {} waits too long", at(), guest.view.name);
                assert!(
                    waited.available as f64 <= one_turn,
                    "{}: {} waits though {available} pages are available",
                    at(),
                    guest.view.name
                );
            }
        }
        let denied = tally.denied_pages;
        assert!(
            denied <= FEW_PAGES * count as f64,
            "fleet {number}, {}: {denied} pages were not there",
            phase.name
        );
    }
    (suspensions, longest)
}

#[test]
fn in_no_fleet_is_a_guest_suspended_for_ever() {
    let (mut suspensions, mut longest) = (0, 0);
    for number in (0..FLEETS).chain(FAILED_ONCE.into_iter().filter(|number| *number >= FLEETS)) {
        let (more, seconds) = watch(number);
        suspensions += more;
        longest = longest.max(seconds);
    }
    eprintln!("{FLEETS} fleets: {suspensions} suspensions, the longest of {longest} s");
    assert!(suspensions > FLEETS, "{suspensions}");
}
