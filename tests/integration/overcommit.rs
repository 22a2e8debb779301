//! More promised than there is: the ledger and its audit, admission, what a killed daemon leaves to
//! the next one, and the shipped stress scenarios.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use memory::page_out::{PageOutError, has_swap};
use serde_json::{Value, json};
use tests::require_slabs;
use tests::sandbox::{Process, Sandbox};
use tests::zram::{Zram, swap_alone};

use super::experiment::check_page;

/// Ends a hang. Guests that are held to a rate take their time on a busy machine.
const LIMIT: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(10);

fn fleet_file(sandbox: &Sandbox, text: &str) -> PathBuf {
    let path = sandbox.file("fleet.toml");
    fs::write(&path, text).expect("a fleet file");
    path
}

fn text(path: &std::path::Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn number(value: &Value, pointer: &str) -> u64 {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .unwrap_or_else(|| panic!("no number {pointer} in {value:#}"))
}

/// Every page of `account` is in exactly one class.
fn assert_adds_up(account: &Value) {
    let classes = ["absent", "image", "ballooned", "zero", "private", "shared", "swapped"];
    let sum: u64 = classes.iter().map(|class| number(account, &format!("/{class}"))).sum();
    assert_eq!(sum, number(account, "/promised"), "{account:#}");
}

#[test]
fn the_ledger_adds_up_and_its_audit_finds_nothing() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let example = tests::workspace().join("resources/fleets/builtin.toml");
    let _ = sandbox.samepage(["fleet", "up", text(&example)]).timeout(LIMIT).output().success();
    let _ = sandbox.samepage(["balloon", "set", "small-0", "1M", "--wait"]).timeout(LIMIT).output();
    let status = ["fleet", "status", "--settle", "--audit", "--json"];
    let status = sandbox.samepage(status).timeout(LIMIT).output().success().json();
    let ledger = &status["ledger"];
    assert_adds_up(ledger);
    ledger["guests"].as_array().expect("guests").iter().for_each(assert_adds_up);
    assert_eq!(number(ledger, "/promised") * 4096, number(&status, "/promised_bytes"));
    assert_eq!(number(ledger, "/saved"), number(&status, "/saved_pages"));
    let unwritten = number(ledger, "/zero") + number(ledger, "/image");
    assert_eq!(number(ledger, "/debt/sharing"), number(&status, "/saved_pages") + unwritten);
    assert_eq!(number(ledger, "/debt/demand"), number(ledger, "/absent") + number(ledger, "/swapped"));
    let parts: f64 =
        ledger["guests"].as_array().expect("guests").iter().filter_map(|g| g["frames"].as_f64()).sum();
    assert!((parts - number(ledger, "/frames") as f64).abs() < 0.5, "{parts} of {ledger:#}");
    let audit = &status["audit"];
    assert_eq!(number(audit, "/residue_pages"), 0, "{audit:#}");
    assert!(audit["still"] == true && number(audit, "/guests/0/resident") > 1000, "{audit:#}");
    assert!(
        status["guests"].as_array().expect("guests").iter().all(|g| g["state"] == "running"),
        "{status:#}"
    );
    let _ = sandbox.samepage(["fleet", "down"]).timeout(LIMIT).output().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_guest_that_does_not_fit_is_not_admitted_and_nothing_is_left() {
    let sandbox = Sandbox::new();
    let _alone = swap_alone();
    // Swap is cover, too.
    let swap = has_swap().is_ok();
    let fleet = |admission: &str| {
        format!(
            "name = 'f'\nengine = 'off'\n[overcommit]\ncapacity = '100M'\n{admission}\n[defaults]\nmemory = '64M'\n\
             [[guest]]\nname = 'g'\ncount = 2\n"
        )
    };
    for (admission, fits) in [
        ("admission = 'strict'", [true, false]),
        ("admission = 'ratio'\nratio_percent = 128", [true, true]),
        ("admission = 'covered'\nfloor = 0.78", [true, true]),
        ("admission = 'covered'\nfloor = 1.0", [true, swap]),
    ] {
        let file = fleet_file(&sandbox, &fleet(admission));
        let dry = sandbox.samepage(["fleet", "up", text(&file), "--dry-run", "--json"]).output();
        let decided: Value = serde_json::from_str(&dry.stdout).unwrap_or_else(|e| panic!("{e}: {dry}"));
        let is = [0, 1].map(|n| decided["guests"][n]["decision"] == "admitted");
        assert_eq!((is, dry.code), (fits, Some(i32::from(fits != [true, true]))), "{admission}: {dry}");
    }
    let file = fleet_file(&sandbox, &fleet("admission = 'strict'"));
    let up = sandbox.samepage(["fleet", "up", text(&file)]).timeout(LIMIT).output();
    assert!(up.code == Some(1) && up.stderr.contains("guest g-1 is not admitted"), "{up}");
    assert!(up.stderr.contains("a guest of 36.0 MiB fits"), "{up}");
    let file = fleet_file(&sandbox, &fleet("").replace("100M", "100T"));
    let up = sandbox.samepage(["fleet", "up", text(&file)]).timeout(LIMIT).output();
    assert!(up.code == Some(1) && up.stderr.contains("this host has"), "{up}");
    sandbox.assert_clean_within(SOON);
}

/// What the daemon says of its work, at once.
fn management(sandbox: &Sandbox, fleet: &str) -> Option<Value> {
    let socket = sandbox.runtime_dir().join("fleets").join(fleet).join("host.sock");
    let stream = fleet::client::connect(&socket, SOON).ok()?;
    let answer: Value = fleet::client::ask(stream, &json!({"op": "management"}), SOON).ok()?;
    Some(answer["management"].clone())
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(90);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "never: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn daemon(sandbox: &Sandbox) -> Process {
    let is = |p: &Process| p.args.split(' ').nth(1) == Some("host");
    sandbox.processes().into_iter().find(is).expect("a daemon")
}

/// Two guests have more than there is, and nothing can be taken from them: one is suspended. The
/// daemon is killed; the next one knows that it was suspended, and why, and one that has more room
/// lets it run again.
#[test]
fn a_suspended_guest_is_not_forgotten_by_the_next_daemon() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let up = |capacity: &str| {
        let fleet = format!(
            "name = 'f'\nengine = 'off'\n[overcommit]\ncapacity = '{capacity}'\nadmission = 'off'\n\
             knobs = {{ suspend_hold_seconds = 0.5, resume_hold_seconds = 1.0, may_stop = false }}\n\
             [defaults]\nmemory = '80M'\nmin = '80M'\nfill = {{ unique = 100 }}\n\
             [[guest]]\nname = 'dear'\npriority = 1\n[[guest]]\nname = 'cheap'\n"
        );
        let file = fleet_file(&sandbox, &fleet);
        let _ = sandbox.samepage(["fleet", "up", text(&file)]).timeout(LIMIT).output().success();
    };
    let verify = || sandbox.samepage(["fleet", "verify", "--json"]).timeout(LIMIT).output().success().json();
    // A daemon that has not looked yet has nothing to say.
    let looked = || management(&sandbox, "f").filter(|now| now["looks"].as_u64() > Some(2));
    let suspended = || looked().map(|now| now["suspended"]["cheap"].clone());
    up("300M");
    eventually("no guest is suspended", || suspended().filter(Value::is_null));
    daemon(&sandbox).kill();
    up("132M");
    let why = eventually("one is suspended", || suspended().filter(Value::is_string));
    assert!(why.as_str().is_some_and(|why| why.contains("MiB free, below the ")), "{why}");
    daemon(&sandbox).kill();
    up("132M");
    let known = eventually("the next daemon has looked", looked);
    assert_eq!(known["suspended"], json!({"cheap": why}), "{known:#}");
    let verified = verify();
    assert_eq!((number(&verified, "/mismatched_pages"), &verified["skipped"]), (0, &json!(["cheap"])));
    daemon(&sandbox).kill();
    up("300M");
    eventually("it runs again", || suspended().filter(Value::is_null));
    let verified = verify();
    assert_eq!((number(&verified, "/mismatched_pages"), &verified["skipped"]), (0, &json!([])));
    let _ = sandbox.samepage(["fleet", "down"]).timeout(LIMIT).output().success();
    sandbox.assert_clean_within(SOON);
}

/// Runs a shipped scenario, by its file or as the experiment of its name, and returns its verdict.
fn stress(command: &[&str], scenario: &str) -> Value {
    let sandbox = Sandbox::new();
    let (csv, html) = (sandbox.file("series.csv"), sandbox.file("page.html"));
    let more = [scenario, "--json", "--csv", text(&csv), "--html", text(&html)];
    let args = [command, &more].concat();
    let verdict = sandbox.samepage(args).timeout(LIMIT).output().success().json();
    assert_eq!((&verdict["held"], number(&verdict, "/mismatched_pages")), (&json!(true), 0), "{verdict:#}");
    assert!(number(&verdict, "/verified_pages") > 0, "{verdict:#}");
    let lines = fs::read_to_string(csv).expect("a CSV file").lines().count();
    assert_eq!(lines, verdict["series"].as_array().expect("samples").len() + 1);
    let page = fs::read_to_string(html).expect("a page");
    let name = verdict["scenario"].as_str().expect("a name");
    check_page(&page, name);
    assert!(page.contains(verdict["phases"][0]["name"].as_str().expect("a phase")), "{page}");
    sandbox.assert_clean_within(SOON);
    verdict
}

#[test]
fn guests_that_refuse_or_die_and_a_daemon_that_is_started_again_harm_nobody() {
    require_slabs!();
    let file = tests::workspace().join("resources/scenarios/hostile-guests.toml");
    let verdict = stress(&["stress"], text(&file));
    let fates: Vec<_> = verdict["guests"].as_array().expect("guests").iter().map(|g| &g["fate"]).collect();
    assert_eq!(fates, ["running", "running", "running", "running", "killed"]);
}

#[test]
fn a_storm_of_copies_loses_nothing() {
    require_slabs!();
    let verdict = stress(&["experiment", "run"], "cow-storm");
    let stormed = verdict["guests"]
        .as_array()
        .expect("guests")
        .iter()
        .filter(|g| g["storms"][3]["pages"].as_u64() > Some(20_000));
    assert!(stormed.count() >= 4, "{:#}", verdict["guests"]);
}

#[test]
fn swap_that_is_full_loses_nothing() {
    const NAME: &str = "swap_that_is_full_loses_nothing";
    require_slabs!();
    let _alone = swap_alone();
    if !matches!(has_swap(), Err(PageOutError::NoSwap)) {
        // It would be filled, too.
        return tests::host::skipped(NAME, "this host has swap of its own");
    }
    let sandbox = Sandbox::new();
    let file = tests::workspace().join("resources/scenarios/swap-full.toml");
    let refused = sandbox.samepage(["stress", text(&file)]).timeout(LIMIT).output();
    assert!(refused.stderr.contains("no active swap"), "{}", refused.stderr);
    sandbox.assert_clean_within(SOON);
    let _zram = match Zram::new(512) {
        Ok(zram) => zram,
        Err(why) => return tests::host::skipped(NAME, &format!("{why:#}")),
    };
    let verdict = stress(&["stress"], text(&file));
    assert!(number(&verdict, "/swap_taken_pages") > 10_000, "{verdict:#}");
    let swapped = |sample: &Value| number(sample, "/swapped_pages");
    let samples = verdict["series"].as_array().expect("samples");
    assert!(samples.iter().map(swapped).max() > Some(10_000), "nothing was on swap: {verdict:#}");
}
