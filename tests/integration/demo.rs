//! `samepage demo`: what it reports, and what it leaves behind.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tests::require_ksm;
use tests::run::Running;
use tests::sandbox::Sandbox;

/// A demo that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(240);
/// How long a fleet may take to be gone.
const SOON: Duration = Duration::from_secs(10);

#[track_caller]
fn number(report: &Value, pointer: &str) -> f64 {
    report
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("no number {pointer} in {report:#}"))
}

/// What must hold of every report of a demo that merged.
pub(crate) fn check_report(report: &Value, guests: f64) {
    assert_eq!(number(report, "/guests"), guests);
    for text in ["backend", "engine"] {
        assert!(report[text].as_str().is_some_and(|t| !t.is_empty()), "no {text} in {report:#}");
    }
    let classes = ["absent", "zero", "private", "shared", "swapped"];
    let sum: f64 = classes.iter().map(|class| number(report, &format!("/pages/{class}"))).sum();
    assert_eq!(sum, number(report, "/pages/total"), "each page is in exactly one class: {report:#}");
    for kind in ["zero", "self_duplicates", "cross_duplicates", "distinct"] {
        assert!(
            number(report, &format!("/content/{kind}")) > 0.0,
            "the mix has some of each: {kind} in {report:#}"
        );
    }
    assert_eq!(number(report, "/mismatched_pages"), 0.0, "{report:#}");
    assert!(number(report, "/verified_pages") > 0.0, "{report:#}");
    let (freed, ideal) = (number(report, "/freed_pages"), number(report, "/ideal_saved_pages"));
    assert!(number(report, "/fraction_of_ideal") >= 0.95, "{report:#}");
    assert!((freed / ideal - number(report, "/fraction_of_ideal")).abs() < 0.01, "{report:#}");
    assert!(
        number(report, "/merge_seconds") > 0.0 && number(report, "/merge_cpu_seconds") > 0.0,
        "{report:#}"
    );
}

#[test]
fn it_merges_what_can_be_merged_and_loses_nothing() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    for (args, engine) in [(&["demo", "--json"][..], "slab"), (&["demo", "--engine", "ksm", "--json"], "ksm")]
    {
        let report = sandbox.samepage(args).timeout(LIMIT).output().success().json();
        check_report(&report, 4.0);
        assert_eq!(report["engine"], engine);
        sandbox.assert_clean_within(SOON);
    }
}

#[test]
fn without_an_engine_nothing_is_saved() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let args = ["demo", "--guests", "2", "--memory", "32M", "--engine", "off", "--json"];
    let report = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    assert_eq!(number(&report, "/mismatched_pages"), 0.0);
    assert_eq!(number(&report, "/pages/shared"), 0.0, "{report:#}");
    assert!(number(&report, "/ideal_saved_pages") > 0.0, "{report:#}");
    sandbox.assert_clean_within(SOON);
}

/// A demo of which some VMs run already.
fn midway(sandbox: &Sandbox) -> Running {
    let mut running = sandbox.samepage(["demo"]).timeout(LIMIT).start();
    let until = Instant::now() + Duration::from_secs(60);
    while sandbox.processes().len() < 3 {
        assert!(running.is_running() && Instant::now() < until, "no VMs: {}", running.stderr_so_far());
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(1500));
    running
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let running = midway(&sandbox);
    running.kill_group(Signal::INT);
    let outcome = running.wait();
    assert_ne!(outcome.code, Some(0), "{outcome}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_killed_demo_leaves_no_process_and_no_changed_setting() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let running = midway(&sandbox);
    running.kill(Signal::KILL);
    let until = Instant::now() + SOON;
    loop {
        // No process is left to remove socket files; processes and KSM settings are what matters.
        let leaks: Vec<_> = sandbox.leaks().into_iter().filter(|leak| !leak.starts_with("file")).collect();
        if leaks.is_empty() {
            break;
        }
        assert!(Instant::now() < until, "left behind: {leaks:?}");
        thread::sleep(Duration::from_millis(100));
    }
}
