//! One VM process of a fleet does not answer: the others are governed as before, it is shown as
//! silent, and afterwards it is governed again.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fleet::client;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, eventually};

/// Asks a VM by its control socket.
fn ask(socket: &Path, question: &Value) -> Value {
    let stream = client::connect(socket, SOON).expect("a VM");
    client::ask(stream, question, SOON).expect("an answer")
}

const LIMIT: Duration = Duration::from_secs(240);
/// The fleet is looked at five times a second, and once a second at the least; this allows for half
/// of the latter.
const SLOWEST_LOOK: Duration = Duration::from_secs(2);

struct Fleet {
    sandbox: Sandbox,
}

impl Fleet {
    /// Three guests that touch no more than the brake allows.
    fn up() -> Self {
        let sandbox = Sandbox::new();
        let file = sandbox.file("fleet.toml");
        let text = "name = 'f'\nengine = 'off'\n[overcommit]\ncapacity = '256M'\nadmission = 'off'\n\
                    [defaults]\nmemory = '64M'\nfill = { unique = 100, pages = 4000 }\n[[guest]]\nname = 'vm'\ncount = 3\n";
        fs::write(&file, text).expect("a fleet file");
        let fleet = Self { sandbox };
        let _ = fleet.run(&["fleet", "up", file.to_str().expect("UTF-8")]);
        fleet
    }

    fn run(&self, args: &[&str]) -> String {
        self.sandbox.samepage(args).timeout(LIMIT).output().success().stdout
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.run(&["fleet", "status", "--json"])).expect("JSON")
    }

    fn management(&self) -> Value {
        serde_json::from_str(&self.run(&["top", "--json"])).expect("JSON")
    }

    fn looks(&self) -> u64 {
        self.management()["looks"].as_u64().expect("a number of looks")
    }

    /// Lifts a guest's limit behind the governor's back: while it is governed, it soon has one
    /// again.
    fn is_governed(&self, guest: &str) -> bool {
        let socket = self.sandbox.runtime_dir().join("fleets/f").join(format!("{guest}.ctl"));
        let limit = || -> Option<u64> {
            let status = ask(&socket, &json!({"op": "status"}));
            status["status"]["throttle"]["pages_per_second"].as_u64()
        };
        let done = ask(&socket, &json!({"op": "throttle", "pages_per_second": null}));
        assert_eq!(done, json!("done"));
        let until = Instant::now() + SOON;
        while Instant::now() < until {
            if limit().is_some() {
                return true;
            }
            thread::sleep(Duration::from_millis(50));
        }
        false
    }
}

fn signal(guest: &Value, signal: Signal) {
    let pid = guest["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32)).expect("a process");
    kill_process(pid, signal).expect("a signal sent");
}

#[test]
fn a_vm_that_does_not_answer_blinds_nobody() {
    require_kvm!();
    let fleet = Fleet::up();
    let before = fleet.status();
    let names = ["vm-0", "vm-1", "vm-2"];
    assert!(names.iter().all(|guest| fleet.is_governed(guest)), "{before:#}");

    let stopped = &before["guests"][1];
    signal(stopped, Signal::STOP);
    eventually("it is seen as silent", || fleet.management()["guests"][1]["state"] == "silent");
    let (looks, began) = (fleet.looks(), Instant::now());
    assert!(fleet.is_governed("vm-0") && fleet.is_governed("vm-2"));
    let status = fleet.status();
    let silent = &status["guests"][1];
    assert_eq!(silent["state"], "silent", "{status:#}");
    assert!(silent["silent_seconds"].as_f64() >= Some(2.0), "{status:#}");
    assert_eq!(status["guests"][0]["state"], "running", "{status:#}");
    // What its process has needs no answer.
    assert!(silent["pages"]["private"].as_u64() >= Some(4000), "{status:#}");
    assert_eq!(status["ledger"]["promised"], before["ledger"]["promised"], "{status:#}");
    let note = |status: &Value| status["notes"].to_string().contains("vm-1 has not answered for");
    assert!(note(&status), "{status:#}");
    assert!(fleet.run(&["fleet", "status"]).contains("silent for"), "in the table");
    assert!(fleet.run(&["top", "--once"]).contains("vm-1 has not answered for"), "in top");
    let metrics = fleet.run(&["fleet", "metrics"]);
    assert!(metrics.contains("samepage_guest_silent_seconds{fleet=\"f\",guest=\"vm-1\"}"), "{metrics}");
    let verified: Value = serde_json::from_str(&fleet.run(&["fleet", "verify", "--json"])).expect("JSON");
    assert_eq!((&verified["skipped"], &verified["mismatched_pages"]), (&json!(["vm-1"]), &json!(0)));
    let age = |now: &Value| now["guests"][1]["silent_seconds"].as_f64().expect("an age");
    let earlier = fleet.management();
    eventually("the age grows", || age(&fleet.management()) >= age(&earlier) + 3.0);
    let (seen, least) = (fleet.looks() - looks, began.elapsed().as_secs_f64() / SLOWEST_LOOK.as_secs_f64());
    assert!(seen as f64 >= least, "{seen} looks, expected {least} at least");

    signal(stopped, Signal::CONT);
    eventually("it answers again", || {
        let now = fleet.management();
        now["guests"][1]["state"] == "running" && now["guests"][1]["silent_seconds"].is_null()
    });
    assert!(fleet.is_governed("vm-1"));
    let verified: Value = serde_json::from_str(&fleet.run(&["fleet", "verify", "--json"])).expect("JSON");
    assert_eq!((&verified["skipped"], &verified["mismatched_pages"]), (&json!([]), &json!(0)));
    let _ = fleet.run(&["fleet", "down"]);
    fleet.sandbox.assert_clean_within(SOON);
}

/// The daemon has not noticed yet that it is silent.
#[test]
fn one_that_has_just_fallen_silent_is_left_out_of_a_check() {
    require_kvm!();
    let fleet = Fleet::up();
    let stopped = &fleet.status()["guests"][1];
    signal(stopped, Signal::STOP);
    let verified: Value = serde_json::from_str(&fleet.run(&["fleet", "verify", "--json"])).expect("JSON");
    assert_eq!((&verified["skipped"], &verified["mismatched_pages"]), (&json!(["vm-1"]), &json!(0)));
    signal(stopped, Signal::CONT);
    let _ = fleet.run(&["fleet", "down"]);
    fleet.sandbox.assert_clean_within(SOON);
}

/// The guests are full, and the policy wants nothing of them.
#[test]
fn a_balloon_that_the_policy_sets_back_is_not_reached() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("fleet.toml");
    let text = "name = 'f'\nengine = 'off'\n[overcommit]\ncapacity = '512M'\nadmission = 'off'\n\
                [defaults]\nmemory = '64M'\nfill = { unique = 100 }\n[[guest]]\nname = 'vm'\n";
    fs::write(&file, text).expect("a fleet file");
    let _ =
        sandbox.samepage(["fleet", "up", file.to_str().expect("UTF-8")]).timeout(LIMIT).output().success();
    let set = sandbox.samepage(["balloon", "set", "vm", "32M", "--wait", "--json"]).timeout(LIMIT).output();
    let waited: Value = serde_json::from_str(&set.stdout).unwrap_or_else(|e| panic!("{e}: {set}"));
    assert_eq!(
        (set.code, &waited["stopped"], &waited["asked_pages"]),
        (Some(1), &json!("overruled"), &json!(8192)),
        "{set}"
    );
    let reason = waited["reason"].as_str().expect("a reason");
    assert!(reason.contains("not 32.0 MiB") && reason.contains("by the fleet's policy"), "{reason}");
    let set = sandbox.samepage(["balloon", "set", "vm", "32M"]).timeout(LIMIT).output().success();
    assert!(set.stderr.contains("this fleet's policy"), "{set}");
    let _ = sandbox.samepage(["fleet", "down"]).timeout(LIMIT).output().success();
    sandbox.assert_clean_within(SOON);
}

/// A daemon that is killed while it holds guests still to measure them leaves them so: the next one
/// lets them run again.
#[test]
fn who_was_held_still_for_a_measurement_runs_again() {
    require_kvm!();
    let fleet = Fleet::up();
    let socket = fleet.sandbox.runtime_dir().join("fleets/f/vm-0.ctl");
    let paused = || -> bool {
        let status = ask(&socket, &json!({"op": "status"}));
        status["status"]["paused"] == true
    };
    // It is measured again and again until the daemon was killed at the right moment.
    for attempt in 0.. {
        assert!(attempt < 50, "never killed while a guest was paused");
        let daemon =
            fleet.status()["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32)).expect("a daemon");
        let measuring = fleet.sandbox.samepage(["fleet", "status", "--content"]).timeout(LIMIT).start();
        let until = Instant::now() + SOON;
        while !paused() && Instant::now() < until {}
        kill_process(daemon, Signal::KILL).expect("a signal sent");
        let _ = measuring.wait();
        let stands = paused();
        let file = fleet.sandbox.file("fleet.toml");
        let _ = fleet.run(&["fleet", "up", file.to_str().expect("UTF-8")]);
        eventually("it runs", || !paused());
        if stands {
            break;
        }
    }
    assert!(fleet.status()["guests"].as_array().expect("guests").iter().all(|g| g["state"] == "running"));
    let _ = fleet.run(&["fleet", "down"]);
    fleet.sandbox.assert_clean_within(SOON);
}
