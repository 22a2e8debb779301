//! KSM's settings belong to the host: what an operator sets meanwhile stays, what a killed fleet
//! leaves is seen and put back.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tests::host::KsmSettings;
use tests::require_ksm;
use tests::sandbox::Sandbox;
use tests::vm::eventually;

use super::measure::{LIMIT, text};

const KSM: &str = "/sys/kernel/mm/ksm";

fn set(name: &str, value: &str) {
    fs::write(Path::new(KSM).join(name), value).expect("a KSM setting");
}

fn get(name: &str) -> String {
    fs::read_to_string(Path::new(KSM).join(name)).expect("a KSM setting").trim().to_owned()
}

fn up(sandbox: &Sandbox) {
    let file = sandbox.file("fleet.toml");
    let fleet = "name = \"merged\"\nengine = \"ksm\"\n[defaults]\nmemory = \"32M\"\n\
                 fill = { zero = 10, common = 40, duplicate = 10, unique = 40 }\n[[guest]]\nname = \"g\"\ncount = 2\n";
    fs::write(&file, fleet).expect("a file in the sandbox");
    let _ = sandbox.samepage(["fleet", "up", text(&file)]).timeout(LIMIT).output().success();
}

#[test]
fn ksm_that_an_operator_stops_stays_stopped_and_is_not_waited_for() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let settings = KsmSettings::now();
    // It ran before, and so it would be turned on again.
    set("run", "1");
    up(&sandbox);
    assert_eq!(get("pages_to_scan"), "20000");
    set("run", "0");
    set("sleep_millisecs", "777");
    // It would wait for 300 s otherwise, which is longer than the limit.
    let status = ["fleet", "status", "--settle", "--json"];
    let status = sandbox.samepage(status).timeout(LIMIT).output().success().json();
    assert!(status["notes"].to_string().contains("nothing merges any more"), "{:#}", status["notes"]);
    let down = sandbox.samepage(["fleet", "down"]).timeout(LIMIT).output().success().stdout;
    assert!(
        down.contains("run was changed to 0") && down.contains("sleep_millisecs was changed to 777"),
        "{down}"
    );
    assert_eq!(["run", "sleep_millisecs"].map(get), ["0", "777"]);
    assert_ne!(get("pages_to_scan"), "20000", "what was not touched is put back");
    settings.restore();
}

fn ksm_of_doctor(sandbox: &Sandbox) -> Value {
    let found = sandbox.samepage(["doctor", "--json"]).timeout(LIMIT).output().json();
    let findings = found["findings"].as_array().cloned().unwrap_or_default();
    findings.into_iter().find(|finding| finding["name"] == "KSM").expect("a finding of KSM")
}

#[test]
fn ksm_that_a_killed_fleet_leaves_running_is_seen_and_put_back() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let settings = KsmSettings::now();
    up(&sandbox);
    assert_eq!(ksm_of_doctor(&sandbox)["level"], "ok");
    let kill = |name: &str| {
        let all = sandbox.processes();
        let process = all.iter().find(|process| process.args.contains(name)).expect("a process of the fleet");
        process.kill();
        let pid = process.pid;
        eventually("it is gone", || sandbox.processes().iter().all(|process| process.pid != pid));
    };
    // The guard first: it would put everything back.
    kill("ksm-guard");
    kill(" host ");
    assert_eq!([get("run"), get("pages_to_scan")], ["1", "20000"], "full speed");
    let finding = ksm_of_doctor(&sandbox);
    assert_eq!(finding["level"], "limited", "{finding:#}");
    let (found, change) = (finding["found"].to_string(), finding["change"].to_string());
    assert!(found.contains("run=1 (was ") && change.contains("/sys/kernel/mm/ksm/run"), "{finding:#}");
    let _ = sandbox.samepage(["fleet", "down", "--name", "merged"]).timeout(LIMIT).output();
    let demo = ["demo", "--guests", "2", "--memory", "16M", "--engine", "ksm", "--json"];
    let demo = sandbox.samepage(demo).timeout(LIMIT).output().success().json();
    assert!(demo["notes"].to_string().contains("put back before"), "{:#}", demo["notes"]);
    assert_eq!(settings.changes(), Vec::<String>::new());
    assert_eq!(ksm_of_doctor(&sandbox)["level"], "ok");
}
