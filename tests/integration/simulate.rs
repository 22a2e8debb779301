//! `samepage simulate`: the shipped scenarios keep what the policy promises, and mistakes in a
//! scenario are named.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tests::sandbox::Sandbox;

const LIMIT: Duration = Duration::from_secs(120);

fn scenario(name: &str) -> PathBuf {
    tests::workspace().join(format!("resources/scenarios/sim-{name}.toml"))
}

/// Runs a shipped scenario, and sees what must hold of every one.
fn simulate(name: &str, more: &[&str]) -> Value {
    let file = scenario(name);
    let args = [&["simulate", file.to_str().expect("UTF-8"), "--json"], more].concat();
    let report = Sandbox::new().samepage(args).timeout(LIMIT).output().success().json();
    for phase in phases(&report) {
        assert_eq!(phase["minimum_violations"], 0, "{phase:#}");
        assert_eq!(phase["stops"], 0, "{phase:#}");
        let percent: f64 = phase["state_percent"].as_object().expect("states").values().map(number).sum();
        assert!((percent - 100.0).abs() < 1e-6, "{phase:#}");
    }
    report
}

fn phases(report: &Value) -> &Vec<Value> {
    report["phases"].as_array().unwrap_or_else(|| panic!("no phases in {report:#}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// What a kind of guest has of something at the end of phase `phase`.
fn of(report: &Value, phase: usize, kind: &str, what: &str) -> f64 {
    let guests = phases(report)[phase]["guests"].as_array().expect("guests");
    let guest =
        guests.iter().find(|g| g["name"] == kind).unwrap_or_else(|| panic!("no {kind} in {guests:#?}"));
    number(&guest[what])
}

#[test]
fn a_tax_moves_idle_memory_to_who_uses_it() {
    let report = simulate("idle-tax", &[]);
    let resident = |phase, kind| of(&report, phase, kind, "resident_pages");
    let promised = of(&report, 0, "first", "promised_pages");
    // Without a tax both have the same, whatever they use.
    assert!((resident(1, "first") / resident(1, "second") - 1.0).abs() < 0.05, "{report:#}");
    assert!(of(&report, 1, "first", "slowdown") > 2.0, "{report:#}");
    // With it the busy one has all that it uses; and the other one, when they change roles.
    assert!(resident(2, "first") > 0.98 * promised && resident(2, "second") < 0.5 * promised, "{report:#}");
    assert!(resident(3, "second") > 0.98 * promised && resident(3, "first") < 0.5 * promised, "{report:#}");
    for (phase, kind) in [(2, "first"), (3, "second")] {
        assert!(of(&report, phase, kind, "slowdown") < 1.2, "{report:#}");
    }
}

#[test]
fn five_guests_on_too_little_come_to_rest() {
    let report = simulate("admission", &[]);
    let all = phases(&report);
    let pressed = &all[1]["state_percent"];
    assert!(number(&pressed["soft"]) + number(&pressed["hard"]) > 0.0, "it was never short: {report:#}");
    for phase in all {
        assert_eq!(
            (&phase["denied_pages"], &phase["suspends"]),
            (&Value::from(0), &Value::from(0)),
            "{phase:#}"
        );
    }
    assert_eq!(all[2]["actions"], 0, "the load was constant: {report:#}");
    assert!(number(&all[3]["quiet_seconds"]) > 60.0, "{report:#}");
    // Twice the shares, and memory in that order.
    assert!(
        of(&report, 2, "database", "resident_pages") > of(&report, 2, "mail", "resident_pages"),
        "{report:#}"
    );
}

#[test]
fn a_storm_of_writes_is_weathered() {
    let report = simulate("cow-storm", &[]);
    for phase in phases(&report) {
        assert_eq!(phase["denied_pages"], 0, "{phase:#}");
        assert_eq!(phase["suspends"], 0, "{phase:#}");
    }
    let storm = &phases(&report)[5]["state_percent"];
    assert!(number(&storm["high"]) < 50.0, "it was no storm: {report:#}");
}

#[test]
fn a_thousand_guests_and_a_seed() {
    let report = simulate("fleet", &[]);
    assert_eq!((&report["hosts"], &report["guests_per_host"]), (&Value::from(100), &Value::from(10)));
    for phase in phases(&report) {
        assert_eq!(phase["denied_pages"], 0, "{phase:#}");
    }
    // A lying guest gains no more than its part.
    assert!(of(&report, 1, "store", "left_pages") > of(&report, 1, "liar", "left_pages"), "{report:#}");
    let small = |seed| simulate("fleet", &["--hosts", "2", "--seed", seed]);
    let seven = small("7");
    assert_eq!(seven["seed"], 7);
    assert_eq!(seven, small("7"), "what happens follows from the seed");
    assert!(seven["phases"] != small("8")["phases"], "and from nothing else");
}

#[test]
fn the_time_series_has_a_line_for_each_step() {
    let sandbox = Sandbox::new();
    let (file, csv) = (scenario("idle-tax"), sandbox.file("series.csv"));
    let args = ["simulate", file.to_str().expect("UTF-8"), "--csv", csv.to_str().expect("UTF-8")];
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success();
    assert!(outcome.stdout.contains("seed 1") && outcome.stdout.contains("second idle, no tax"), "{outcome}");
    let text = fs::read_to_string(&csv).expect("the series");
    let mut lines = text.lines();
    let columns = lines.next().expect("a header").split(',').count();
    assert!(lines.clone().all(|line| line.split(',').count() == columns));
    assert_eq!(lines.count(), 120 + 3 * 300);
}

#[test]
fn a_bad_scenario_is_refused_by_name() {
    let text = fs::read_to_string(scenario("idle-tax")).expect("a scenario");
    let cases: &[(&str, &str, &[&str])] = &[
        ("capacity_mib = 1560", "capacity_mib = 0", &["host: capacity_mib = 0", "expected 1 to"]),
        (
            "idle_tax = 0.75",
            "idle_tax = 1.5",
            &["phase second idle, tax 75 %", "idle_tax = 1.5", "0 to 0.99"],
        ),
        ("idle_tax = 0.75", "idle_taxes = 0.75", &["phase second idle, tax 75 %", "idle_taxes"]),
        ("second = \"idle\"", "third = \"idle\"", &["no guest \"third\"", "first, second"]),
        ("load = \"busy\"", "load = \"bussy\"", &["no load \"bussy\"", "busy, idle"]),
        ("min_mib = 128", "min_mib = 4096", &["guest first: min_mib = 4096", "0 to 1024"]),
        ("seconds = 120", "seconds = 1e12", &["phase both busy: seconds"]),
        ("name = \"second\"", "name = \"first\"", &["two guests are called \"first\""]),
        ("[host]", "[hosts]", &["hosts"]),
    ];
    for (from, to, expected) in cases {
        let sandbox = Sandbox::new();
        let file = sandbox.file("bad.toml");
        fs::write(&file, text.replace(from, to)).expect("a file in the sandbox");
        let file = file.to_str().expect("UTF-8");
        let outcome = sandbox.samepage(["simulate", file]).timeout(LIMIT).output();
        assert_eq!(outcome.code, Some(1), "{to}: {outcome}");
        for words in expected.iter().chain(&[file]) {
            assert!(outcome.stderr.contains(words), "{to}: no {words:?} in {outcome}");
        }
    }
    let sandbox = Sandbox::new();
    let file = scenario("idle-tax");
    let file = file.to_str().expect("UTF-8");
    for (args, expected) in [
        (vec!["simulate", file, "--hosts", "0"], "hosts = 0"),
        (vec!["simulate", "/nonexistent.toml"], "No such file"),
        (vec!["simulate", file, "--csv", "/nonexistent/a.csv"], "cannot write /nonexistent/a.csv"),
    ] {
        let outcome = sandbox.samepage(args).timeout(LIMIT).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains(expected), "{outcome}");
    }
}
