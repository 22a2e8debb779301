//! Watching a fleet: `samepage top`, metrics over HTTP, and the dashboard that shows them.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::open_metrics::Metrics;
use tests::sandbox::Sandbox;
use tests::terminal::Terminal;
use tests::vm::{SOON, eventually};
use tests::{require_kvm, require_slabs};

const LIMIT: Duration = Duration::from_secs(240);
/// How long metrics may take to agree with the status of a fleet at rest.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGE_BYTES: f64 = 4096.0;
const GUESTS: usize = 3;
const FLEET: &str = r#"
name = "watched"
engine = "slab"
[defaults]
memory = "32M"
fill = { zero = 10, common = 50, duplicate = 20, unique = 20, pages = 4000 }
[[guest]]
name = "vm"
count = 3
"#;

/// A fleet that is up.
struct Fleet {
    sandbox: Sandbox,
    file: PathBuf,
}

impl Fleet {
    /// With `first` before everything else in its file.
    fn up(first: &str) -> Self {
        let sandbox = Sandbox::new();
        let file = sandbox.file("fleet.toml");
        fs::write(&file, format!("{first}\n{FLEET}")).expect("a fleet file");
        let fleet = Self { sandbox, file };
        let _ = fleet.samepage(&["fleet", "up", fleet.file.to_str().expect("UTF-8")]);
        fleet
    }

    /// What a command prints that succeeds.
    fn samepage(&self, args: &[&str]) -> String {
        self.sandbox.samepage(args).timeout(LIMIT).output().success().stdout
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.samepage(args)).expect("JSON")
    }

    fn down(self) {
        let _ = self.samepage(&["fleet", "down"]);
        self.sandbox.assert_clean_within(SOON);
    }

    fn kill_daemon(&self) {
        for process in self.sandbox.processes() {
            if process.args.split(' ').nth(1) == Some("host") {
                process.kill();
            }
        }
    }
}

/// An unused port of this host.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port")
}

/// The head and the body of what is answered to this request.
fn http(address: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("a listener");
    stream.write_all(request.as_bytes()).expect("a request sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_owned(), body.to_owned())
}

fn scrape(address: SocketAddr) -> Metrics {
    let (head, body) = http(
        address,
        "GET /metrics HTTP/1.1\r\nHost: watched\r\nAccept: application/openmetrics-text\r\n\r\n",
    );
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    Metrics::parse(&body).unwrap_or_else(|mistake| panic!("{mistake}\n{body}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// What differs between metrics and `fleet status --json`, by name. Only what a fleet at rest does
/// not change is compared.
fn differences(metrics: &Metrics, status: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |name: &str, labels: &[(&str, &str)], expected: f64| {
        let value = metrics.samples(name, labels);
        if value.len() != 1 || (value[0] - expected).abs() > 1e-6 * expected.abs() {
            found.push(format!("{name} {labels:?}: {value:?}, expected {expected}"));
        }
    };
    let pages = |value: &Value| number(value) * PAGE_BYTES;
    let ledger = &status["ledger"];
    for name in ["promised", "resident", "frames", "saved", "capacity"] {
        compare(&format!("samepage_{name}_bytes"), &[("fleet", "watched")], pages(&ledger[name]));
    }
    for kind in ["sharing", "demand"] {
        compare("samepage_debt_bytes", &[("kind", kind)], pages(&ledger["debt"][kind]));
    }
    compare("samepage_cover_bytes", &[("kind", "balloon")], pages(&ledger["cover"]["balloon"]));
    for guest in ledger["guests"].as_array().expect("guests") {
        let name = guest["name"].as_str().expect("a name");
        for class in ["private", "shared", "zero", "ballooned", "swapped", "absent"] {
            compare(
                "samepage_guest_memory_bytes",
                &[("guest", name), ("class", class)],
                pages(&guest[class]),
            );
        }
        for number in ["promised", "frames", "saved"] {
            compare(&format!("samepage_guest_{number}_bytes"), &[("guest", name)], pages(&guest[number]));
        }
        let merged = &status["merge"]["guests"][name];
        for counter in ["merged_pages", "published_pages", "broken_pages"] {
            compare(&format!("samepage_{counter}"), &[("guest", name)], number(&merged[counter]));
        }
    }
    for guest in status["guests"].as_array().expect("guests") {
        let name = guest["name"].as_str().expect("a name");
        let balloon = &guest["balloon"];
        compare("samepage_guest_balloon_actual_bytes", &[("guest", name)], pages(&balloon["actual_pages"]));
        compare("samepage_guest_balloon_target_bytes", &[("guest", name)], pages(&balloon["target_pages"]));
        compare("samepage_guest_state", &[("guest", name), ("state", "running")], 1.0);
        compare("samepage_guest_state", &[("guest", name), ("state", "dead")], 0.0);
    }
    found
}

/// The status and metrics, as soon as they agree: the ledger is read the less often, the longer
/// that takes.
fn agreeing(fleet: &Fleet, address: SocketAddr) -> (Value, Metrics) {
    let until = Instant::now() + PATIENCE;
    loop {
        let (status, metrics) = (fleet.json(&["fleet", "status", "--json"]), scrape(address));
        let differences = differences(&metrics, &status);
        if differences.is_empty() {
            return (status, metrics);
        }
        assert!(Instant::now() < until, "still after {PATIENCE:?}: {differences:#?}");
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn metrics_say_what_the_status_says() {
    require_slabs!();
    let address = free_address();
    let fleet = Fleet::up(&format!("metrics = \"{address}\""));
    let _ = fleet.samepage(&["balloon", "set", "vm-1", "4M", "--wait"]);
    let _ = fleet.samepage(&["fleet", "status", "--settle"]);
    let (status, metrics) = agreeing(&fleet, address);
    // That nothing differs says little if everything is 0.
    assert!(metrics.value("samepage_saved_bytes", &[]) > 8e6);
    assert!(metrics.value("samepage_guest_memory_bytes", &[("guest", "vm-1"), ("class", "ballooned")]) > 0.0);
    assert_eq!(
        metrics.value("samepage_guest_balloon_target_bytes", &[("guest", "vm-1")]),
        4.0 * 1024.0 * 1024.0
    );
    assert_eq!(metrics.samples("samepage_guest_promised_bytes", &[]).len(), GUESTS);
    assert_eq!(metrics.samples("samepage_memory_state", &[]).iter().sum::<f64>(), 1.0);
    // What moves: within bounds.
    let (capacity, used, free) = (
        metrics.value("samepage_capacity_bytes", &[]),
        metrics.value("samepage_used_bytes", &[]),
        metrics.value("samepage_free_bytes", &[]),
    );
    assert!(used > metrics.value("samepage_frames_bytes", &[]) && free <= capacity - used, "{used} {free}");
    for kind in ["page_tables", "daemon"] {
        let told = metrics.value("samepage_overhead_bytes", &[("kind", kind)]);
        let expected = number(&status["ledger"]["overhead"][kind]) * PAGE_BYTES;
        assert!(
            expected > 0.0 && told > 0.5 * expected && told < 2.0 * expected,
            "{kind}: {told}, {expected}"
        );
    }
    let later = {
        let looks = metrics.value("samepage_governor_looks", &[]);
        let mut later = scrape(address);
        eventually("another look", || {
            later = scrape(address);
            later.value("samepage_governor_looks", &[]) > looks
        });
        later
    };
    assert_eq!(later.sample_names(), metrics.sample_names());
    let printed = fleet.samepage(&["fleet", "metrics", "--format", "openmetrics"]);
    let printed = Metrics::parse(&printed).expect("OpenMetrics");
    assert_eq!(printed.sample_names(), metrics.sample_names());
    let asked = names_in_dashboard();
    let missing: Vec<_> = asked.difference(&metrics.sample_names()).cloned().collect();
    assert!(asked.len() > 20 && missing.is_empty(), "the dashboard asks for {missing:?}");
    // It is no way in.
    assert!(http(address, "GET / HTTP/1.1\r\n\r\n").0.starts_with("HTTP/1.1 404 "));
    assert!(http(address, "DELETE /metrics HTTP/1.1\r\n\r\n").0.starts_with("HTTP/1.1 405 "));
    fleet.down();
    assert!(TcpStream::connect(address).is_err(), "it still listens");
}

#[test]
fn an_address_that_is_taken_is_named_and_nothing_is_started() {
    require_kvm!();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("its address");
    let sandbox = Sandbox::new();
    let file = sandbox.file("fleet.toml");
    fs::write(&file, format!("metrics = \"{address}\"\n{FLEET}")).expect("a fleet file");
    let up = sandbox.samepage(["fleet", "up", file.to_str().expect("UTF-8")]).timeout(LIMIT).output();
    assert_eq!(up.code, Some(1), "{up}");
    let said = format!("http://{address}/metrics: the address is taken");
    assert!(up.stderr.contains(&said) && up.stderr.contains("another fleet"), "{up}");
    sandbox.assert_clean_within(SOON);
}

/// Everything in the dashboard's queries that looks like one of our metrics.
fn names_in_dashboard() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for query in queries(&dashboard()) {
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        names.extend(words.filter(|word| word.starts_with("samepage_")).map(str::to_owned));
    }
    names
}

fn dashboard() -> Value {
    let path = tests::workspace().join("resources/dashboards/samepage.json");
    serde_json::from_str(&fs::read_to_string(path).expect("the dashboard")).expect("JSON")
}

/// The queries of panels and variables.
fn queries(dashboard: &Value) -> Vec<String> {
    let targets =
        dashboard["panels"].as_array().expect("panels").iter().flat_map(|panel| {
            panel["targets"].as_array().expect("targets").iter().map(|target| &target["expr"])
        });
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let definitions =
        variables.iter().map(|variable| &variable["definition"]).filter(|query| query.is_string());
    targets.chain(definitions).map(|query| query.as_str().expect("a query").to_owned()).collect()
}

#[test]
fn the_dashboard_can_be_imported() {
    let dashboard = dashboard();
    assert!(
        dashboard["schemaVersion"].as_u64().is_some_and(|version| version >= 36),
        "{}",
        dashboard["schemaVersion"]
    );
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let variable =
        |name: &str| variables.iter().find(|variable| variable["name"] == name).expect("a variable");
    assert_eq!(variable("datasource")["type"], "datasource");
    assert_eq!(variable("datasource")["query"], "prometheus");
    let panels = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().expect("an id")).collect();
    assert_eq!(ids.len(), panels.len(), "two panels with one id");
    let mut cells = BTreeSet::new();
    for panel in panels {
        let title = &panel["title"];
        let [x, y, w, h] =
            ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().expect("a place in the grid"));
        assert!(x + w <= 24, "{title} is too far to the right");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(cells.insert(cell), "{title} lies over another panel");
        }
        for target in panel["targets"].as_array().expect("targets") {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            let query = target["expr"].as_str().expect("a query");
            let count = |c| query.matches(c).count();
            assert!(count('(') == count(')') && count('{') == count('}'), "{title}: {query}");
            assert!(query.contains("fleet=\"$fleet\""), "{title} mixes fleets: {query}");
        }
    }
}

/// `samepage top` on a terminal. Dropped, it is killed.
struct Top {
    child: Child,
}

impl Top {
    fn start(fleet: &Fleet, terminal: &Terminal) -> Self {
        Self { child: terminal.samepage(&fleet.sandbox, &["top", "--interval", "0.1", "--sort", "frames"]) }
    }

    /// How it ended.
    fn end(mut self) -> Option<i32> {
        let mut status = None;
        eventually("the end of samepage top", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn top_draws_follows_the_terminal_and_leaves_it_as_it_was() {
    require_slabs!();
    let fleet = Fleet::up("");
    let terminal = Terminal::new(80, 24);
    let before = terminal.modes();
    let top = Top::start(&fleet, &terminal);
    let shows = |text: &str| {
        eventually(&format!("{text:?} on the terminal"), || terminal.shows(text));
    };
    shows("samepage top  fleet watched  memory state: ");
    shows("vm-2 ");
    shows("x debt");
    shows("sort: frames");
    assert_eq!(terminal.screen_and_cursor(), (true, false));
    assert_ne!(terminal.modes(), before);
    assert!(!terminal.shows("wset"));
    terminal.resize(120, 40);
    shows("wset");
    terminal.resize(60, 20);
    shows("This terminal is 60x20; samepage top needs 80x24.");
    terminal.resize(100, 30);
    shows("vm-2 ");
    terminal.type_keys("s");
    shows("sort: saved");
    terminal.type_keys("?");
    shows("hold the display, or resume it");
    terminal.type_keys("?p");
    shows("display held");
    terminal.type_keys("q");
    assert_eq!(top.end(), Some(0));
    eventually("the terminal as it was", || terminal.screen_and_cursor() == (false, true));
    assert_eq!(terminal.modes(), before);
    fleet.down();
}

#[test]
fn top_says_that_the_daemon_is_gone_and_ends_by_a_signal() {
    require_kvm!();
    let fleet = Fleet::up("");
    let terminal = Terminal::new(80, 24);
    let before = terminal.modes();
    let top = Top::start(&fleet, &terminal);
    eventually("guests on the terminal", || terminal.shows("vm-2 "));
    fleet.kill_daemon();
    eventually("that the daemon is gone", || terminal.shows("the daemon is gone (for "));
    assert!(terminal.shows("vm-2 "), "{:#?}", terminal.picture());
    // The next daemon takes the guests over, and top goes on.
    let _ = fleet.samepage(&["fleet", "up", fleet.file.to_str().expect("UTF-8")]);
    eventually("numbers again", || !terminal.shows("the daemon is gone") && terminal.shows("balloons "));
    kill_process(Pid::from_child(&top.child), Signal::TERM).expect("a signal sent");
    assert_eq!(top.end(), Some(0));
    eventually("the terminal as it was", || terminal.screen_and_cursor() == (false, true));
    assert_eq!(terminal.modes(), before);
    fleet.down();
}

#[test]
fn top_without_a_terminal_prints_a_table() {
    require_kvm!();
    let fleet = Fleet::up("");
    let table = fleet.samepage(&["top", "--once", "--sort", "frames"]);
    for text in ["ballooned", "vm-0", "vm-2", "fleet watched: 3 guests, memory state ", "debt: ", "cover: "] {
        assert!(table.contains(text), "{text} is not in\n{table}");
    }
    let piped = fleet.sandbox.samepage(["top"]).output().success();
    assert!(piped.stdout.contains("vm-0") && piped.stderr.contains("is not a terminal"), "{piped}");
    let json = fleet.json(&["top", "--once", "--json"]);
    assert_eq!(json["guests"].as_array().map(Vec::len), Some(GUESTS), "{json:#}");
    let promised = GUESTS as f64 * 32.0 * 1024.0 * 1024.0 / PAGE_BYTES;
    assert_eq!(number(&json["ledger"]["promised"]), promised);
    let wrong = fleet.sandbox.samepage(["top", "--interval", "0"]).output();
    assert!(wrong.code == Some(2) && wrong.stderr.contains("expected 0.1 to 3600 seconds"), "{wrong}");
    fleet.down();
}
