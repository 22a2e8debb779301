//! `samepage fleet`: up, status, down, and what a killed VM or daemon does to the rest.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::require_ksm;
use tests::sandbox::{Process, Sandbox};

const LIMIT: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(10);

fn example() -> PathBuf {
    tests::workspace().join("resources/fleets/builtin.toml")
}

fn up(sandbox: &Sandbox) {
    let file = example();
    let _ =
        sandbox.samepage(["fleet", "up", file.to_str().expect("UTF-8")]).timeout(LIMIT).output().success();
}

fn status(sandbox: &Sandbox) -> Value {
    sandbox.samepage(["fleet", "status", "--json"]).timeout(LIMIT).output().success().json()
}

fn down(sandbox: &Sandbox) {
    let _ = sandbox.samepage(["fleet", "down"]).timeout(LIMIT).output().success();
    sandbox.assert_clean_within(SOON);
}

fn guests(status: &Value) -> &Vec<Value> {
    status["guests"].as_array().unwrap_or_else(|| panic!("no guests in {status:#}"))
}

fn in_state(status: &Value, state: &str) -> usize {
    guests(status).iter().filter(|guest| guest["state"] == state).count()
}

/// The processes whose subcommand this is: `run` for VMs, `host` for the daemon.
fn running(sandbox: &Sandbox, subcommand: &str) -> Vec<Process> {
    let is = |p: &Process| p.args.split(' ').nth(1) == Some(subcommand);
    sandbox.processes().into_iter().filter(is).collect()
}

#[test]
fn it_comes_up_and_goes_down() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    up(&sandbox);
    let report = status(&sandbox);
    let vms = running(&sandbox, "run");
    assert_eq!(in_state(&report, "running"), vms.len(), "{report:#}");
    assert_eq!(running(&sandbox, "host").len(), 1, "{:?}", sandbox.processes());
    let kvm = sandbox.samepage(["fleet", "status", "--kvm"]).timeout(LIMIT).output().success();
    assert!(kvm.stdout.contains("exits"), "{kvm}");
    let file = example();
    let again = sandbox.samepage(["fleet", "up", file.to_str().expect("UTF-8")]).timeout(LIMIT).output();
    assert!(again.code == Some(1) && again.stderr.contains("up already"), "{again}");
    assert_eq!(running(&sandbox, "run").len(), vms.len(), "a second `up` must not touch the first");
    down(&sandbox);
}

fn oom_score_adj(pid: i32) -> i32 {
    let path = format!("/proc/{pid}/oom_score_adj");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    text.trim().parse().unwrap_or_else(|e| panic!("{path}: {text:?}: {e}"))
}

#[test]
fn the_kernel_takes_guests_before_the_daemon_when_memory_is_out() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let own = oom_score_adj(std::process::id().cast_signed());
    up(&sandbox);
    for vm in running(&sandbox, "run") {
        assert_eq!(oom_score_adj(vm.pid), 300, "{}", vm.args);
    }
    let [daemon] = &running(&sandbox, "host")[..] else { panic!("no daemon in {:?}", sandbox.processes()) };
    // CAP_SYS_RESOURCE, which also root may be without.
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("CapEff");
    let may_lower = u64::from_str_radix(capabilities.trim(), 16).expect("hexadecimal") >> 24 & 1 != 0;
    assert_eq!(oom_score_adj(daemon.pid), if may_lower { -900 } else { own });
    down(&sandbox);
}

#[test]
fn a_killed_vm_is_reported_and_harms_no_other() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    up(&sandbox);
    let vms = running(&sandbox, "run");
    vms[0].kill();
    let until = Instant::now() + SOON;
    let mut report = status(&sandbox);
    while in_state(&report, "dead") == 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(200));
        report = status(&sandbox);
    }
    assert_eq!(in_state(&report, "dead"), 1, "{report:#}");
    assert_eq!(in_state(&report, "running"), vms.len() - 1, "{report:#}");
    down(&sandbox);
}

#[test]
fn guests_outlive_a_killed_daemon() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    up(&sandbox);
    let before = running(&sandbox, "run").len();
    for daemon in running(&sandbox, "host") {
        daemon.kill();
    }
    thread::sleep(Duration::from_secs(2));
    assert_eq!(running(&sandbox, "run").len(), before, "the guests run on");
    down(&sandbox);
}
