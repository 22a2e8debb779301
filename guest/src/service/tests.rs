//! Whole sessions, with a clock of the test's own.

use super::*;
use crate::protocol::Class;
use crate::workload::tests::TestPages;
use std::string::{String, ToString};
use std::vec::Vec;

const FILL: &str = "fill seed=1 common=2 zero=25 common_pct=25 dup=25 unique=25";

#[derive(Default)]
struct Sent(Vec<(Port, String)>);

impl Out for Sent {
    fn send(&mut self, port: Port, reply: &Reply) {
        self.0.push((port, reply.to_string()));
    }
}

/// Sends a line, steps until there is nothing to do at once, and returns what was said.
fn say(service: &mut Service<'_, TestPages>, line: &str, now: u64) -> Vec<String> {
    let mut out = Sent::default();
    assert_eq!(service.line(Port::Control, Ok(line), now, &mut out), None);
    while service.step(now, &mut out) == Wait::No {}
    out.0.into_iter().map(|(_, line)| line).collect()
}

#[test]
fn a_session() {
    let mut generations = [0; 1000];
    let mut service = Service::new(Workload::new(TestPages::new(1000), &mut generations));
    for (line, reply) in [
        ("verify", "ok command=verify checked=0 mismatched=0 first=none"),
        ("churn class=dup rate=1", "err code=empty no pages of class dup are held"),
        ("fill seed=1", "err code=parse common= is missing"),
        (FILL, "ok command=fill pages=1000"),
        ("verify", "ok command=verify checked=1000 mismatched=0 first=none"),
        ("disk drop", "err code=unsupported this guest has no disk"),
        ("free percent=50", "ok command=free freed=500 filled=500"),
        (
            "report",
            "ok command=report filled=500 zero=125 common=125 dup=125 unique=125 generations=0 churned=0 \
             verified=2 mismatched=0",
        ),
        ("idle", "ok command=idle"),
        (
            "fill pages=1001 seed=1 common=2 zero=25 common_pct=25 dup=25 unique=25",
            "err code=memory pages=1001, expected at most 1000",
        ),
        ("verify", "ok command=verify checked=500 mismatched=0 first=none"),
    ] {
        assert_eq!(say(&mut service, line, 0), [reply], "{line}");
    }
    assert!(say(&mut service, "  ", 0).is_empty());
}

#[test]
fn only_idle_and_power_interrupt_a_job() {
    let mut generations = [0; 1000];
    let mut service = Service::new(Workload::new(TestPages::new(1000), &mut generations));
    let mut out = Sent::default();
    service.line(Port::Control, Ok(FILL), 0, &mut out);
    assert_eq!(service.step(0, &mut out), Wait::No);
    service.line(Port::Console, Ok("report"), 0, &mut out);
    assert_eq!(service.step(PROGRESS_MICROS, &mut out), Wait::No);
    service.line(Port::Console, Ok("idle"), 0, &mut out);
    assert_eq!(service.step(0, &mut out), Wait::Forever);
    assert_eq!(service.line(Port::Console, Ok("poweroff"), 0, &mut out), Some(Power::Off));
    let said: Vec<_> = out.0.iter().map(|(port, line)| (*port, line.as_str())).collect();
    assert_eq!(
        said,
        [
            (Port::Console, "err code=busy wait for the last command, or send idle"),
            (Port::Control, "progress done=512 total=1000"),
            (Port::Control, "err code=cancelled idle came before the end"),
            (Port::Console, "ok command=idle"),
            (Port::Console, "ok command=poweroff"),
        ]
    );
}

#[test]
fn churn_keeps_its_rate_and_its_end() {
    let mut generations = [0; 1000];
    let mut service = Service::new(Workload::new(TestPages::new(1000), &mut generations));
    say(&mut service, FILL, 0);
    assert_eq!(say(&mut service, "churn class=unique rate=700 seconds=2", 0), ["ok command=churn rate=700"]);
    let mut out = Sent::default();
    let mut now = 0;
    loop {
        match service.step(now, &mut out) {
            Wait::No => {}
            Wait::Millis(millis) => now += u64::from(millis) * 1000,
            Wait::Forever => break,
        }
    }
    assert!((2 * MICROS..2 * MICROS + 20_000).contains(&now), "{now}");
    let report = service.workload().report();
    assert_eq!((report.churned, report.generations, report.mismatched), (1400, 1400, 0));
    assert_eq!(service.workload().held(Target::Only(Class::Unique)), 250);
}

#[test]
fn slow_churn_sleeps_and_a_pause_is_not_made_up_for() {
    let mut generations = [0; 1000];
    let mut service = Service::new(Workload::new(TestPages::new(1000), &mut generations));
    say(&mut service, FILL, 0);
    say(&mut service, "churn class=all rate=2", 0);
    let mut out = Sent::default();
    assert_eq!(service.step(0, &mut out), Wait::Millis(500));
    assert_eq!(service.step(3600 * MICROS, &mut out), Wait::Millis(500));
    assert_eq!(service.workload().report().churned, 2);
    say(&mut service, "churn class=all rate=0", 0);
    assert_eq!(service.step(7200 * MICROS, &mut out), Wait::Forever);
    say(&mut service, "churn class=all rate=18446744073709551615 seconds=18446744073709551615", 0);
    assert_eq!(service.step(1, &mut out), Wait::No);
}

#[test]
fn timed_writes_are_counted_by_the_next_command_and_rewrite_pages() {
    let mut generations = [0; 1000];
    let mut service = Service::new(Workload::new(TestPages::new(1000), &mut generations));
    let refused = ["err code=empty no pages of class unique are held"];
    assert_eq!(say(&mut service, "latency class=unique rate=500", 0), refused);
    say(&mut service, FILL, 0);
    let none = "ok command=latency writes=0 p50_ns=0 p99_ns=0 p999_ns=0 max_ns=0 late_p99_us=0 late_max_us=0";
    assert_eq!(say(&mut service, "latency class=unique rate=500 seconds=2", 0), [none]);
    let mut out = Sent::default();
    let mut now = 0;
    loop {
        match service.step(now, &mut out) {
            Wait::No => {}
            // The rate means every 2 ms; churn would come every 10. The processor is busy elsewhere
            // for 7 us each time.
            Wait::Millis(millis) => now += u64::from(millis.clamp(1, 2)) * 1000 + 7,
            Wait::Forever => break,
        }
    }
    let said = say(&mut service, "latency class=unique rate=0", now);
    let prefix = "ok command=latency writes=1000 p50_ns=";
    let suffix = " late_p99_us=7 late_max_us=7";
    assert!(
        said[0].starts_with(prefix) && said[0].ends_with(suffix) && !said[0].contains("max_ns=0"),
        "{said:?}"
    );
    assert_eq!(say(&mut service, "latency class=unique rate=0", now), [none]);
    let report = service.workload().report();
    assert_eq!((report.churned, report.generations), (1000, 1000));
    assert_eq!(say(&mut service, "verify", now), ["ok command=verify checked=1000 mismatched=0 first=none"]);
    // Both go on beside each other, and the shorter wait counts.
    say(&mut service, "churn class=common rate=2", now);
    say(&mut service, "latency class=all rate=1000", now);
    assert_eq!(service.step(now, &mut out), Wait::Millis(1));
    say(&mut service, "idle", now);
    assert_eq!(service.step(now + MICROS, &mut out), Wait::Forever);
}
