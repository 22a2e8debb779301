//! Processes that stand by to become clones.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;
use tests::require_slabs;
use tests::sandbox::Process;
use tests::vm::{SOON, eventually};

use super::clones::Fleet;
use super::confinement::assert_confined;

const FLEET: &str = r#"
name = "clones"
pool = 3
[overcommit]
admission = "off"
policy = false
[[guest]]
name = "web"
memory = "32M"
fill = { zero = 10, common = 40, duplicate = 10, unique = 40 }
"#;

/// Processes that stand by.
fn standbys(fleet: &Fleet) -> Vec<Process> {
    fleet.sandbox.processes().into_iter().filter(|process| process.args.contains(" standby ")).collect()
}

fn pids(processes: &[Process]) -> BTreeSet<i32> {
    processes.iter().map(|process| process.pid).collect()
}

fn pool(fleet: &Fleet) -> Value {
    fleet.status(&[])["pool"].clone()
}

#[track_caller]
fn assert_full(fleet: &Fleet) {
    eventually("all that are wanted stand by", || {
        let pool = pool(fleet);
        pool["standing_by"] == pool["wanted"]
    });
}

#[test]
fn clones_are_processes_that_stood_by() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    assert_full(&fleet);
    let before = standbys(&fleet);
    assert_eq!(before.len(), 3);
    // They are counted, and are nobody's guests.
    let status = fleet.status(&[]);
    assert_eq!(fleet.names(), ["web"]);
    let bytes = status["pool"]["bytes"].as_u64().expect("bytes");
    assert!(bytes > 0 && status["ledger"]["overhead"]["pool"] == bytes / 4096, "{status}");
    assert!(fleet.ok(&["fleet", "status"]).stdout.contains("pool: 3 of 3 processes stand by, "));
    let _ = fleet.ok(&["clone", "web", "--count", "2", "--as", "w"]);
    for name in ["w-0", "w-1"] {
        let vm = fleet.vm(name);
        assert!(pids(&before).contains(&vm.pid), "{name} is a new process: {vm:?}");
        assert_confined(name, vm.pid.cast_unsigned());
        let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", vm.pid)).expect("its score");
        assert_eq!(score.trim(), "300");
    }
    // More than stand by: the others are new processes. Others take their places.
    let _ = fleet.ok(&["clone", "web", "--count", "5", "--as", "v"]);
    assert_eq!(fleet.names().len(), 8);
    assert_full(&fleet);
    assert_eq!(pool(&fleet)["ended"], 0);
    assert!(pids(&standbys(&fleet)).is_disjoint(&pids(&before)));
    fleet.verify();
    fleet.assert_audit();
    fleet.down();
}

#[test]
fn one_that_stands_by_and_is_killed_is_replaced() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    assert_full(&fleet);
    let before = standbys(&fleet);
    before.iter().for_each(Process::kill);
    eventually("they are gone", || pids(&standbys(&fleet)).is_disjoint(&pids(&before)));
    // Whether the daemon has seen it yet or not.
    let _ = fleet.ok(&["clone", "web", "--count", "3", "--as", "w"]);
    assert_full(&fleet);
    assert_eq!(pool(&fleet)["ended"].as_u64(), Some(3));
    assert!(pids(&standbys(&fleet)).is_disjoint(&pids(&before)));
    fleet.verify();
    fleet.down();
}

#[test]
fn they_end_with_their_daemon_and_their_clones_do_not() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    assert_full(&fleet);
    let _ = fleet.ok(&["clone", "web", "--count", "2", "--as", "w"]);
    assert_full(&fleet);
    let before = standbys(&fleet);
    fleet.kill_daemon();
    eventually("none stands by", || standbys(&fleet).is_empty());
    let vms = ["web", "w-0", "w-1"].map(|name| fleet.vm(name).pid);
    fleet.come_up();
    // Found and taken over as any other VM.
    assert_eq!(fleet.names(), ["web", "w-0", "w-1"]);
    assert_eq!(["web", "w-0", "w-1"].map(|name| fleet.vm(name).pid), vms);
    assert_full(&fleet);
    assert!(pids(&standbys(&fleet)).is_disjoint(&pids(&before)));
    fleet.verify();
    fleet.down();
}

#[test]
fn a_fleet_that_comes_up_no_further_leaves_none_behind() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    // Whatever the pool is doing just now.
    for _ in 0..3 {
        let _ = fleet.ok(&["fleet", "down"]);
        fleet.sandbox.assert_clean_within(SOON);
        fleet.come_up();
    }
    fleet.down();
}
