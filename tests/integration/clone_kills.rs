//! Processes that are killed at any moment of a capture or of a clone's start: what is left goes on
//! and is right, and nothing else is left. When is up to dice, which fall the same each time; what
//! has been done by then is not.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::Duration;

use splitmix::SplitMix64;
use tests::require_slabs;
use tests::vm::eventually;

use super::clones::Fleet;

const ROUNDS: u64 = 8;
const FLEET: &str = r#"
name = "clones"
[overcommit]
admission = "off"
policy = false
[[guest]]
name = "web"
memory = "32M"
fill = { zero = 10, common = 40, duplicate = 10, unique = 40 }
[[guest]]
name = "neighbour"
memory = "32M"
fill = { zero = 10, common = 40, duplicate = 10, unique = 40 }
"#;

fn wait_up_to(dice: &mut SplitMix64, most: Duration) {
    thread::sleep(Duration::from_micros(dice.draw() % most.as_micros() as u64));
}

/// Every VM process is a guest of the fleet and every guest that runs has one; each file is the
/// fleet's or a guest's.
#[track_caller]
fn assert_nothing_is_left(fleet: &Fleet) {
    let running: BTreeSet<String> = (fleet.guests().iter())
        .filter(|guest| guest["state"] == "running")
        .map(|guest| guest["name"].as_str().expect("a name").to_owned())
        .collect();
    let name = |args: &str| args.split(" --name ").nth(1)?.split(' ').next().map(str::to_owned);
    eventually("each VM process is a guest's", || {
        let vms: BTreeSet<String> =
            fleet.sandbox.processes().iter().filter_map(|process| name(&process.args)).collect();
        vms == running
    });
    let all = fleet.names();
    let files = fs::read_dir(fleet.sandbox.runtime_dir().join("fleets/clones")).expect("its directory");
    for file in files.flatten() {
        let file = file.file_name().into_string().expect("UTF-8");
        let stem = file.split('.').next().unwrap_or_default();
        // Names of clones end in a number, and the fleet's own files' do not.
        let is_clones = stem.rsplit_once('-').is_some_and(|(_, number)| number.parse::<u32>().is_ok());
        assert!(!is_clones || all.iter().any(|name| name == stem), "{file} is of none of {all:?}");
        assert!(!file.ends_with(".cap") && !file.ends_with(".new"), "{file}");
    }
}

#[test]
fn a_daemon_that_is_killed_while_it_clones_or_captures_harms_no_guest() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let mut dice = SplitMix64::new(3);
    for round in 0..ROUNDS {
        let (clones, snapshot) = (format!("k{round}"), format!("s{round}"));
        let args = match round % 2 {
            0 => vec!["clone", "web", "--count", "3", "--as", &clones],
            _ => vec!["snapshot", "web", &snapshot],
        };
        let command = fleet.run(&args).start();
        wait_up_to(&mut dice, Duration::from_millis(150));
        fleet.kill_daemon();
        // It had its answer before, or says that it has none.
        let outcome = command.wait();
        assert!(outcome.code == Some(0) || !outcome.stderr.is_empty(), "{outcome}");
        fleet.come_up();
        assert_nothing_is_left(&fleet);
        fleet.verify();
    }
    // Nothing that was begun is in the way of the next.
    let _ = fleet.ok(&["clone", "web", "--count", "2", "--as", "last"]);
    assert_nothing_is_left(&fleet);
    fleet.verify();
    fleet.assert_audit();
    fleet.down();
}

#[test]
fn a_vm_that_is_killed_while_it_is_captured_is_all_that_ends() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let mut dice = SplitMix64::new(4);
    let mut captured = 0;
    for round in 0..ROUNDS {
        let (prefix, victim) = (format!("v{round}"), format!("v{round}-0"));
        let (snapshot, of_it) = (format!("s{round}"), format!("c{round}"));
        let _ = fleet.ok(&["clone", "web", "--as", &prefix]);
        let command = fleet.run(&["snapshot", &victim, &snapshot]).start();
        wait_up_to(&mut dice, Duration::from_millis(60));
        fleet.vm(&victim).kill();
        let outcome = command.wait();
        let is_there = fleet.ok(&["snapshot", "list"]).stdout.contains(&snapshot);
        assert_eq!(outcome.code == Some(0), is_there, "{outcome}");
        match is_there {
            // Whole, as it was.
            true => {
                captured += 1;
                let _ = fleet.ok(&["clone", &snapshot, "--as", &of_it]);
                let _ = fleet.ok(&["snapshot", "rm", &snapshot]);
            }
            false => assert!(outcome.stderr.contains(&victim), "{outcome}"),
        }
        eventually("it has ended", || {
            fleet.guests().iter().any(|guest| guest["name"] == *victim && guest["state"] == "dead")
        });
        assert_nothing_is_left(&fleet);
        fleet.verify();
    }
    eprintln!("{captured} of {ROUNDS} were captured before they were killed");
    fleet.down();
}

#[test]
fn a_clone_that_is_killed_while_it_starts_takes_back_those_that_were_to_come_with_it() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let _ = fleet.ok(&["snapshot", "web", "warm"]);
    let mut dice = SplitMix64::new(5);
    for round in 0..ROUNDS {
        let prefix = format!("c{round}");
        let mark = format!(" --name {prefix}-");
        let command = fleet.run(&["clone", "warm", "--count", "6", "--as", &prefix]).start();
        let first = || fleet.sandbox.processes().into_iter().find(|p| p.args.contains(&mark));
        eventually("one is started", || first().is_some());
        wait_up_to(&mut dice, Duration::from_millis(60));
        if let Some(clone) = first() {
            clone.kill();
        }
        let outcome = command.wait();
        let there = fleet.names().iter().filter(|name| name.starts_with(&prefix)).count();
        match outcome.code {
            // It was killed after all had answered.
            Some(0) => assert_eq!(there, 6, "{outcome}"),
            _ => {
                assert_eq!(there, 0, "{outcome}");
                assert!(outcome.stderr.contains(&prefix), "{outcome}");
            }
        }
        assert_nothing_is_left(&fleet);
        fleet.verify();
    }
    fleet.down();
}
