//! `samepage experiment`: the experiments that come along, what they report, and that an
//! interrupted one can go on.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tests::require_slabs;
use tests::sandbox::Sandbox;

/// A run that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(240);
/// How long a fleet may take to be gone.
const SOON: Duration = Duration::from_secs(10);

/// Small guests, one repetition, the engine that any user can have.
const SMALL: [&str; 6] = ["--memory", "32M", "--engine", "slab", "--repeat", "1"];

fn run<'a>(name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["experiment", "run", name], &SMALL[..], more].concat()
}

#[track_caller]
fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number {pointer} in {value:#}"))
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn all_that_come_along_are_listed() {
    let sandbox = Sandbox::new();
    let plans = sandbox.samepage(["experiment", "list", "--json"]).output().success().json();
    let names: Vec<&str> =
        plans.as_array().expect("plans").iter().filter_map(|p| p["name"].as_str()).collect();
    let text = sandbox.samepage(["experiment", "list"]).output().success().stdout;
    let plans = [
        "identical-vms",
        "ideal",
        "side-channel",
        "fidelity",
        "page-cache",
        "scanner-pareto",
        "clone-fanout",
        "inflate-deflate",
        "shootdown",
        "huge-pages",
        "mixed",
        "thrashing",
    ];
    let scenarios = [
        "ksm-52",
        "cow-storm",
        "cow-storm-ratio",
        "cow-storm-strict",
        "idle-tax",
        "admission",
        "thrashing-knee",
        "hostile-guests",
        "swap-full",
    ];
    assert!(text.contains("samepage experiment run NAME"), "{text}");
    assert!(
        text.lines().filter(|line| line.starts_with('│')).all(|line| line.chars().count() <= 100),
        "{text}"
    );
    for (directory, all) in [("experiments", &plans[..]), ("scenarios", &scenarios[..])] {
        for name in all {
            let is_listed = text.lines().any(|line| line.split_whitespace().nth(1) == Some(*name));
            assert!(names.contains(name) && is_listed, "no {name} in {names:?} or {text}");
            let file = tests::workspace().join(format!("resources/{directory}/{name}.toml"));
            assert!(file.is_file(), "{} is not there", file.display());
        }
    }
}

#[test]
fn identical_guests_share_more_the_more_they_are() {
    let sandbox = Sandbox::new();
    let (html, csv) = (sandbox.file("page.html"), sandbox.file("figures.csv"));
    let more = ["--guests", "1,2,3", "--json", "--html", path(&html), "--csv", path(&csv)];
    let outcome = sandbox.samepage(run("identical-vms", &more)).timeout(LIMIT).output().success().json();
    assert_eq!(outcome["complete"], true, "{outcome:#}");
    for key in ["cpu", "kernel", "backend", "samepage"] {
        let text = outcome["environment"][key].as_str().unwrap_or_default();
        assert!(!text.is_empty(), "no {key} in {:#}", outcome["environment"]);
    }
    let summary = outcome["summary"].as_array().expect("a summary");
    assert_eq!(summary.len(), 3, "{outcome:#}");
    let median = |n: usize, figure: &str| number(&summary[n], &format!("/figures/{figure}/median"));
    for (n, point) in summary.iter().enumerate() {
        assert_eq!(number(point, "/guests"), n as f64 + 1.0);
        let (saved, ideal) = (median(n, "freed_pages"), median(n, "ideal_pages"));
        assert!(saved <= ideal && saved > 0.9 * ideal, "{saved} of {ideal} pages: {point:#}");
        let parts = ["freed_zero_pages", "freed_self_pages", "freed_cross_pages"];
        assert_eq!(parts.map(|part| median(n, part)).iter().sum::<f64>(), saved, "{point:#}");
        assert!(median(n, "zero_only_pages") > 0.0, "{point:#}");
    }
    assert_eq!(median(0, "freed_cross_pages"), 0.0, "one guest has no other to share with");
    // Each guest after the first adds its common pages, and the same number of them.
    let [one, two, three] = [0, 1, 2].map(|n| median(n, "freed_cross_pages"));
    assert!(two > one && (three - 2.0 * two).abs() < 0.1 * two, "{one}, {two}, {three}");
    check_page(&fs::read_to_string(&html).expect("a page"), "identical-vms");
    let text = fs::read_to_string(&csv).expect("figures");
    let columns = text.lines().next().expect("a heading").split(',').count();
    assert!(
        text.lines().count() > 30 && text.lines().all(|line| line.split(',').count() == columns),
        "{text}"
    );
    sandbox.assert_clean_within(SOON);
}

/// Every element that is opened is closed, in order, and nothing is asked of a network.
pub(crate) fn check_page(page: &str, name: &str) {
    assert!(page.starts_with("<!doctype html>") && page.contains(name), "{page}");
    for outside in ["http://", "https://", "<script", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside} in {page}");
    }
    let mut open = Vec::new();
    for tag in page.split('<').skip(1).filter(|tag| !tag.starts_with('!')) {
        let inner = tag.split('>').next().expect("a tag that ends");
        let word = inner.trim_start_matches('/').split([' ', '/', '\n']).next().unwrap_or_default();
        if inner.starts_with('/') {
            assert_eq!(open.pop(), Some(word), "</{word}> in {page}");
        } else if !inner.ends_with('/') && word != "meta" {
            open.push(word);
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
}

#[test]
fn the_ideal_is_approached_and_sharing_ends_where_pages_are_written() {
    let sandbox = Sandbox::new();
    let plan =
        fs::read_to_string(tests::workspace().join("resources/experiments/ideal.toml")).expect("a plan");
    let file = sandbox.file("short.toml");
    fs::write(&file, plan.replace("seconds = 10", "seconds = 2")).expect("a file in the sandbox");
    let args = run(path(&file), &["--guests", "2", "--json"]);
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let trial = &outcome["trials"][0];
    assert!(number(trial, "/figures/achieved_percent") > 90.0, "{trial:#}");
    assert!(number(trial, "/figures/churn_ended_pages") > 0.0, "{trial:#}");
    let achieved = trial["series"]["achieved_percent_of_ideal"].as_array().expect("a series");
    let values: Vec<f64> = achieved.iter().map(|pair| number(pair, "/1")).collect();
    assert!(values.len() > 1 && values.first() < values.last(), "{values:?}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn only_a_guest_of_the_same_domain_has_merged_pages_to_observe() {
    let sandbox = Sandbox::new();
    let plan = fs::read_to_string(tests::workspace().join("resources/experiments/side-channel.toml"));
    let file = sandbox.file("short.toml");
    fs::write(&file, plan.expect("a plan").replace("windows = 40", "windows = 5"))
        .expect("a file in the sandbox");
    let outcome = sandbox.samepage(run(path(&file), &["--json"])).timeout(LIMIT).output().success().json();
    let trial = &outcome["trials"][0];
    let figure = |name: &str| number(trial, &format!("/figures/{name}"));
    assert!(figure("same_domain_shared_pages") > 1000.0, "{trial:#}");
    assert!(figure("other_domain_shared_pages") < 100.0, "{trial:#}");
    for who in ["same_domain", "other_domain"] {
        assert!((0.0..=100.0).contains(&figure(&format!("{who}_slower_percent"))), "{trial:#}");
        for kind in ["common", "unique"] {
            assert!(figure(&format!("{who}_{kind}_p50_ns")) > 0.0, "{trial:#}");
            let windows = trial["series"][format!("{who}_{kind}_windows")].as_array().expect("windows");
            assert_eq!(windows.len(), 5, "{trial:#}");
        }
    }
    sandbox.assert_clean_within(SOON);
}

#[test]
fn clones_have_little_of_their_own() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let args = [
        "experiment",
        "run",
        "clone-fanout",
        "--memory",
        "32M",
        "--guests",
        "1,6",
        "--repeat",
        "1",
        "--json",
    ];
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let trials = outcome["trials"].as_array().expect("trials");
    assert!(trials.len() == 2 && outcome["complete"] == true, "{outcome:#}");
    for trial in trials {
        let figure = |name: &str| number(trial, &format!("/figures/{name}"));
        let own = figure("own_at_0_s_pages");
        // What it shares is 30 MiB; a VMM and page tables it has in any case.
        assert!(own > 50.0 && own < 1000.0 && figure("untouched_pages") > 5000.0, "{trial:#}");
        assert!(figure("first_write_p50_ns") > 0.0 && figure("ready_seconds") > 0.0, "{trial:#}");
        assert_eq!(figure("residue_pages"), 0.0, "{trial:#}");
    }
    sandbox.assert_clean_within(SOON);
}

#[test]
fn what_a_balloon_gives_back_is_empty_and_what_was_kept_is_right() {
    let sandbox = Sandbox::new();
    let args = ["experiment", "run", "inflate-deflate", "--memory", "32M", "--repeat", "1", "--json"];
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let trials = outcome["trials"].as_array().expect("trials");
    assert!(!trials.is_empty() && outcome["complete"] == true, "{outcome:#}");
    for trial in trials {
        let figure = |name: String| number(trial, &format!("/figures/{name}"));
        let moved = figure("moved_pages".into());
        assert!(moved > 1000.0, "{trial:#}");
        for memory in ["untouched", "touched"] {
            // The guest has read every page that came back: zeros, or the run had ended.
            assert!(figure(format!("{memory}_read_as_zeros_pages")) >= moved, "{trial:#}");
            for step in ["reclaim", "return", "return_install"] {
                assert!(figure(format!("{memory}_{step}_gib_per_second")) > 0.0, "{trial:#}");
            }
        }
        if trial["point"]["variant"] == "4 KiB" {
            assert_eq!(figure("touched_reclaimed_percent".into()), 100.0, "{trial:#}");
        }
    }
    // The built-in guest has no command line.
    assert!(trials.iter().all(|trial| trial["point"]["variant"] != "4 KiB, init_on_alloc=0"), "{outcome:#}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn running_vcpus_feel_what_the_host_does_to_pages() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let html = sandbox.file("page.html");
    let plan = fs::read_to_string(tests::workspace().join("resources/experiments/shootdown.toml"));
    let plan = plan.expect("a plan").split("\n[[variant]]\nname = \"4 vCPUs\"").next().map(String::from);
    let file = sandbox.file("short.toml");
    fs::write(&file, plan.expect("two variants").replace("writes = 2000", "writes = 200")).expect("a file");
    let args = ["experiment", "run", path(&file), "--engine", "slab", "--repeat", "1"];
    let args = [&args[..], &["--json", "--html", path(&html)]].concat();
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let trials = outcome["trials"].as_array().expect("trials");
    assert!(trials.len() == 2 && outcome["complete"] == true, "{outcome:#}");
    for (trial, running) in trials.iter().zip([1.0, 2.0]) {
        let figure = |name: &str| number(trial, &format!("/figures/{name}"));
        assert_eq!(figure("running_vcpus"), running, "{trial:#}");
        for step in ["quiet", "discard_at_once", "discard_one_by_one", "merge", "break"] {
            // Those vCPUs did read, and KVM's count is a count.
            assert!(figure(&format!("{step}_reads")) > 0.0, "{step}: {trial:#}");
            assert!(figure(&format!("{step}_remote_tlb_flush_requests")) >= 0.0, "{step}: {trial:#}");
        }
        assert!(figure("merge_touched_pages") > 1000.0 && figure("break_touched_pages") > 50.0, "{trial:#}");
        // Each write to a merged page takes it out of the page tables of all vCPUs; a run of merged
        // pages goes at once.
        let flushes = |step: &str| figure(&format!("{step}_remote_tlb_flush_requests_per_page"));
        assert!(flushes("break") > 0.1 && flushes("merge") < flushes("break"), "{trial:#}");
        // Pages that no vCPU has touched for long may be in no TLB, and then cost none one by one
        // either.
        assert!(flushes("discard_at_once") < 0.1 && flushes("discard_one_by_one") <= 1.5, "{trial:#}");
    }
    check_page(&fs::read_to_string(&html).expect("a page"), "shootdown");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn the_reach_of_the_tlb_is_measured_in_every_kind_of_page() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let html = sandbox.file("page.html");
    let args = ["experiment", "run", "huge-pages", "--memory", "64M", "--engine", "slab", "--repeat", "1"];
    let args = [&args[..], &["--json", "--html", path(&html)]].concat();
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let trials = outcome["trials"].as_array().expect("trials");
    assert!(!trials.is_empty() && outcome["complete"] == true, "{outcome:#}");
    for trial in trials {
        let figure = |name: &str| number(trial, &format!("/figures/{name}"));
        for set in ["unmerged", "merged", "beside_merged", "after_merging"] {
            let series = trial["series"][format!("{set}_ticks")].as_array().expect("a series");
            assert!(
                series.len() > 5 && series.iter().all(|pair| number(pair, "/1") > 0.0),
                "{set}: {trial:#}"
            );
            assert!(figure(&format!("{set}_reach_pages")) >= 8.0, "{set}: {trial:#}");
        }
        // Reading shares nothing again: half of both guests is common.
        assert!(figure("freed_pages") > 5000.0, "{trial:#}");
        let huge = figure("huge_before_pages");
        match trial["point"]["variant"].as_str() {
            Some("4 KiB") => assert_eq!(huge, 0.0, "{trial:#}"),
            _ => assert!(huge > 0.0, "{trial:#}"),
        }
    }
    check_page(&fs::read_to_string(&html).expect("a page"), "huge-pages");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn guests_that_are_not_alike_share_what_they_have_in_common() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let html = sandbox.file("page.html");
    let args = run("mixed", &["--guests", "3", "--json", "--html", path(&html)]);
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let trial = &outcome["trials"][0];
    let figure = |name: &str| number(trial, &format!("/figures/{name}"));
    let sharing = figure("sharing_percent");
    assert!(figure("freed_cross_pages") > 500.0 && sharing > 20.0, "{trial:#}");
    assert!(figure("sharing_compression_percent") >= sharing, "{trial:#}");
    let all = figure("sharing_patches_compression_percent");
    assert!(all >= figure("sharing_compression_percent") && all <= 100.0, "{trial:#}");
    check_page(&fs::read_to_string(&html).expect("a page"), "mixed");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn work_collapses_once_the_working_set_does_not_fit() {
    require_slabs!();
    let _alone = tests::zram::swap_alone();
    let _swap = match tests::zram::Zram::new(256) {
        Ok(swap) => swap,
        Err(why) => return tests::host::skipped(module_path!(), &format!("{why:#}")),
    };
    let sandbox = Sandbox::new();
    let plan =
        fs::read_to_string(tests::workspace().join("resources/experiments/thrashing.toml")).expect("a plan");
    let file = sandbox.file("short.toml");
    fs::write(&file, plan.replace("merge_seconds = 2 ", "merge_seconds = 0.5 "))
        .expect("a file in the sandbox");
    let html = sandbox.file("page.html");
    let args = [
        "experiment",
        "run",
        path(&file),
        "--memory",
        "32M",
        "--guests",
        "1",
        "--repeat",
        "1",
        "--json",
        "--html",
        path(&html),
    ];
    let outcome = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let trials = outcome["trials"].as_array().expect("trials");
    assert!(trials.len() == 2 && outcome["complete"] == true, "{outcome:#}");
    for trial in trials {
        let figure = |name: &str| number(trial, &format!("/figures/{name}"));
        assert!(
            figure("at_100_writes_per_second") > 0.0 && figure("at_100_paged_out_per_second") == 0.0,
            "{trial:#}"
        );
        // A sixth of the memory is less than the two fifths that are written.
        assert!(figure("at_600_paged_out_per_second") > 0.0, "{trial:#}");
        assert!(figure("at_600_resident_pages") < figure("at_100_resident_pages"), "{trial:#}");
    }
    check_page(&fs::read_to_string(&html).expect("a page"), "thrashing");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn an_interrupted_run_leaves_nothing_and_goes_on_where_it_was() {
    let sandbox = Sandbox::new();
    let results = sandbox.file("results.jsonl");
    let args = run("identical-vms", &["--guests", "1,2", "--json", "--results", path(&results)]);
    let lines = || fs::read_to_string(&results).unwrap_or_default().lines().count();
    let running = sandbox.samepage(args.clone()).timeout(LIMIT).start();
    let until = Instant::now() + LIMIT;
    while lines() == 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    running.kill(Signal::INT);
    let interrupted = running.wait();
    assert_eq!(interrupted.code, Some(1), "{interrupted}");
    assert!(
        interrupted.stderr.contains("interrupted") && interrupted.stderr.contains("1 of 2"),
        "{interrupted}"
    );
    let outcome = interrupted.json();
    assert_eq!((&outcome["complete"], lines()), (&Value::from(false), 1), "{outcome:#}");
    sandbox.assert_clean_within(SOON);

    let first = outcome["trials"][0].clone();
    let outcome = sandbox.samepage(args.clone()).timeout(LIMIT).output().success().json();
    assert_eq!((&outcome["complete"], &outcome["trials"][0]), (&Value::from(true), &first), "{outcome:#}");
    assert_eq!(outcome["trials"].as_array().map(Vec::len), Some(2));
    // All results of the file, on a page.
    let html = sandbox.file("report.html");
    let report = ["experiment", "report", path(&results), "--html", path(&html)];
    let report = sandbox.samepage(report).timeout(LIMIT).output().success();
    assert!(report.stdout.contains("2 of 2 trials") && report.stdout.contains("published: "), "{report}");
    check_page(&fs::read_to_string(&html).expect("a page"), "identical-vms");
    // A third time there is nothing left to run.
    let again = sandbox.samepage(args).timeout(LIMIT).output().success();
    assert!(again.stderr.contains("2 of 2 trials are finished"), "{again}");
    assert_eq!(again.json()["trials"], outcome["trials"]);
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let sandbox = Sandbox::new();
    let plan = sandbox.file("bad.toml");
    fs::write(&plan, "name = 'x'\nkind = 'identical-vms'\n").expect("a file in the sandbox");
    let foreign = sandbox.file("foreign.jsonl");
    fs::write(&foreign, "a,b\n").expect("a file in the sandbox");
    for (args, expected) in [
        (vec!["identical-vm"], "did you mean \"identical-vms\"?"),
        (vec!["none.toml"], "the experiment none.toml cannot be read"),
        (vec![path(&plan)], "missing field"),
        (vec!["identical-vms", "--guests", "0"], "guests = 0 is not possible: expected 1 to 512"),
        (vec!["identical-vms", "--memory", "7"], "\"7\" has no unit"),
        (vec!["side-channel", "--guests", "4"], "leave the number of guests out"),
        (vec!["page-cache", "--guests", "3"], "leave the number of guests out"),
        (vec!["page-cache"], "guests that read files are Linux guests"),
        (vec!["page-cache", "--memory", "64M"], "file: size"),
        (vec!["shootdown", "--memory", "16M", "--engine", "off", "--repeat", "1"], "refused"),
        (vec!["ksm-52", "--guests", "4"], "--guests does not apply to ksm-52"),
        (vec!["ksm-52", "--html", "/nonexistent/a.html"], "cannot write /nonexistent/a.html"),
        (vec!["identical-vms", "--html", "/nonexistent/a.html"], "cannot write /nonexistent/a.html"),
        (vec!["identical-vms", "--results", path(&foreign)], "is no result of an experiment"),
    ] {
        let args = [&["experiment", "run"], &args[..]].concat();
        let outcome = sandbox.samepage(args).timeout(LIMIT).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains(expected), "no {expected:?} in {outcome}");
    }
    for args in
        [vec!["ideal", "--repeat", "0"], vec!["ideal", "--engine", "uksm"], vec!["ideal", "--kernel", "k"]]
    {
        let args = [&["experiment", "run"], &args[..]].concat();
        let outcome = sandbox.samepage(args).timeout(LIMIT).output();
        assert_eq!(outcome.code, Some(2), "{outcome}");
    }
    sandbox.assert_clean_within(SOON);
}
