//! A fleet's metrics as others read them: Prometheus' own text by default, OpenMetrics by wish, and
//! the programs that people have: `promtool check metrics` and node_exporter's textfile collector.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use tests::open_metrics::Metrics;
use tests::run::{Outcome, Run};
use tests::sandbox::Sandbox;
use tests::vm::{SOON, eventually};
use tests::{require_kvm, require_tool};

const LIMIT: Duration = Duration::from_secs(240);
const TEXT: &str = "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n";
const OPEN_METRICS: &str = "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
/// What Prometheus 2.53 sends, and 3.5.
const PROMETHEUS_2: &str = "application/openmetrics-text;version=1.0.0;q=0.5,\
    application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
const PROMETHEUS_3: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
    application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
    text/plain;version=0.0.4;q=0.3,*/*;q=0.2";

/// With the engine that has the most to tell, a policy, a limit on first touches, and a name that
/// needs no escape.
fn fleet(address: SocketAddr) -> String {
    format!(
        r#"
name = "told"
metrics = "{address}"
engine = "slab"
overcommit = {{ capacity = "256M" }}
[defaults]
memory = "32M"
fill = {{ zero = 10, common = 50, duplicate = 20, unique = 20, pages = 2000 }}
[[guest]]
name = "vm"
count = 2
"#
    )
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port")
}

/// The head and the body of what is answered to a GET of `/metrics` with this header.
fn get(address: SocketAddr, header: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("a server");
    // By 1.0 the answer is in one piece, and ends with the connection.
    let request = format!("GET /metrics HTTP/1.0\r\nHost: told\r\n{header}\r\n");
    stream.write_all(request.as_bytes()).expect("a request sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (format!("{head}\r\n"), body.to_owned())
}

/// `promtool check metrics` on this text.
fn check(promtool: &Path, text: &str, sandbox: &Sandbox) -> Outcome {
    let file = sandbox.file("checked");
    fs::write(&file, text).expect("a file");
    let script = r#""$0" check metrics <"$1""#;
    Run::program("sh", [OsStr::new("-c"), OsStr::new(script), promtool.as_os_str(), file.as_os_str()])
        .output()
}

/// It has nothing against it: not even against a name, a unit or a missing help.
fn checked_by_promtool(promtool: &Path, text: &str, sandbox: &Sandbox) {
    let outcome = check(promtool, text, sandbox).success();
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""), "of\n{text}");
}

/// The names of the samples of a text in Prometheus' own format.
fn names(text: &str) -> Vec<&str> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let mut names: Vec<&str> = samples.filter_map(|line| line.split(['{', ' ']).next()).collect();
    names.dedup();
    names
}

#[test]
fn prometheus_and_its_promtool_read_every_metric() {
    require_kvm!();
    let promtool = require_tool!("promtool");
    let sandbox = Sandbox::new();
    let address = free_address();
    let file = sandbox.file("fleet.toml");
    fs::write(&file, fleet(address)).expect("a fleet file");
    let samepage = |args: &[&str]| sandbox.samepage(args).timeout(LIMIT).output().success().stdout;
    let _ = samepage(&["fleet", "up", file.to_str().expect("UTF-8")]);

    for plain in ["", "Accept: */*\r\n", "Accept: text/html, */*;q=0.8\r\n", "Accept: text/plain\r\n"] {
        let (head, body) = get(address, plain);
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains(TEXT), "{plain}: {head}");
        checked_by_promtool(&promtool, &body, &sandbox);
    }
    let (head, body) = get(address, "Accept: application/openmetrics-text;q=0.2, text/plain;q=0.3\r\n");
    assert!(head.contains(TEXT) && !body.contains("# EOF"), "{head}");
    let mut asked = Vec::new();
    for accept in [PROMETHEUS_2, PROMETHEUS_3, "application/openmetrics-text"] {
        let (head, body) = get(address, &format!("Accept: {accept}\r\n"));
        assert!(head.contains(OPEN_METRICS), "{accept}: {head}");
        asked.push(Metrics::parse(&body).unwrap_or_else(|mistake| panic!("{mistake}\n{body}")));
    }

    let printed = samepage(&["fleet", "metrics"]);
    checked_by_promtool(&promtool, &printed, &sandbox);
    let open = samepage(&["fleet", "metrics", "--format", "openmetrics"]);
    let open = Metrics::parse(&open).unwrap_or_else(|mistake| panic!("{mistake}\n{open}"));
    assert_eq!(open.sample_names(), asked[0].sample_names());
    // The same samples by the same names in both: queries need not know which it was.
    let printed_names = names(&printed);
    assert!(printed_names.len() > 40, "{printed_names:?}");
    let unknown: Vec<_> = printed_names.iter().filter(|name| !open.sample_names().contains(**name)).collect();
    assert!(unknown.is_empty(), "only in text: {unknown:?}");
    assert!(printed.contains("# TYPE samepage_build_info gauge\n"), "{printed}");
    assert_eq!(open.0["samepage_build"].kind, "info");

    let _ = samepage(&["fleet", "down"]);
    sandbox.assert_clean_within(SOON);
}

#[test]
fn promtool_finds_what_is_wrong() {
    let promtool = require_tool!("promtool");
    let sandbox = Sandbox::new();
    for wrong in ["# TYPE a_build info\na_build_info 1\n", "# TYPE a counter\n# HELP a A.\na 1\n"] {
        assert_ne!(check(&promtool, wrong, &sandbox).code, Some(0), "{wrong}");
    }
}

#[test]
fn node_exporter_takes_them_from_a_file() {
    require_kvm!();
    let exporter = require_tool!("prometheus-node-exporter");
    let sandbox = Sandbox::new();
    let (file, address) = (sandbox.file("fleet.toml"), free_address());
    fs::write(&file, fleet(address)).expect("a fleet file");
    let samepage = |args: &[&str]| sandbox.samepage(args).timeout(LIMIT).output().success().stdout;
    let _ = samepage(&["fleet", "up", file.to_str().expect("UTF-8")]);
    let textfiles = sandbox.file("textfiles");
    fs::create_dir(&textfiles).expect("a directory");
    // What the first look has seen.
    let mut text = String::new();
    eventually("the ledger was read", || {
        text = samepage(&["fleet", "metrics"]);
        text.contains("samepage_guest_promised_bytes{")
    });
    fs::write(textfiles.join("samepage.prom"), &text).expect("a text file");
    let _ = samepage(&["fleet", "down"]);

    let serves = free_address();
    let arguments = [
        "--collector.disable-defaults".to_owned(),
        "--collector.textfile".to_owned(),
        format!("--collector.textfile.directory={}", textfiles.display()),
        format!("--web.listen-address={serves}"),
    ];
    let running = Run::program(exporter, arguments).timeout(LIMIT).start();
    eventually("node_exporter listens", || TcpStream::connect(serves).is_ok());
    let (_, body) = get(serves, "");
    drop(running);
    assert!(body.contains("\nnode_textfile_scrape_error 0\n"), "{body}");
    let promised = "samepage_guest_promised_bytes{fleet=\"told\",guest=\"vm-1\"} 3.3554432e+07\n";
    assert!(body.contains(promised), "{body}");
    sandbox.assert_clean_within(SOON);
}
