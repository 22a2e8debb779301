//! What Firecracker's callers send, byte for byte as their code makes it: firectl and
//! firecracker-go-sdk (JSON by Go's encoder, `omitempty`), and a configuration file that spells out
//! every key, as Firecracker's own does.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::{Value, json};
use tests::api::{Answer, ApiVm, Http};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, eventually};

const ID: &str = "8e5f12f5-4b1b-4a0e-8d6e-2c2f0a3b6a11";

/// As Go's net/http sends it through go-openapi's runtime.
fn go(client: &mut Http, method: &str, path: &str, body: &str) -> Answer {
    let length = body.len();
    client.send(format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {length}\r\n\
         Accept: application/json\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n{body}"
    ));
    client.answer().unwrap_or_else(|| panic!("connection closed on {method} {path}"))
}

#[track_caller]
fn put(client: &mut Http, path: &str, body: &str) {
    let answer = go(client, "PUT", path, &format!("{body}\n"));
    assert_eq!(answer.status, 204, "{path} {body}: {answer:?}");
}

fn fifo(path: &Path) {
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o700.into(), 0).expect("a FIFO");
}

fn end(sandbox: &Sandbox, vm: ApiVm) {
    let running = vm.into_running();
    running.kill(rustix::process::Signal::TERM);
    assert_eq!(running.wait().code, Some(0));
    sandbox.assert_clean_within(SOON);
}

/// `firectl --kernel=... --root-drive=... --firecracker-log=... --metrics-fifo=...`: the SDK's
/// handlers in their order.
#[test]
fn firectl_starts_a_vm() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (root, data) = (sandbox.file("root"), sandbox.file("data"));
    for image in [&root, &data] {
        fs::write(image, vec![0; 1 << 20]).expect("an image");
    }
    let (log, metrics) = (sandbox.file("fc_fifo"), sandbox.file("fc_metrics_fifo"));
    fifo(&log);
    fifo(&metrics);
    // `firecracker --api-sock SOCK --id ID --no-seccomp`: by the SDK's command builder.
    let vm = ApiVm::firecracker(&sandbox, &["--id", ID, "--no-seccomp"], &[]);
    let mut client = vm.connect();
    // Waiting for the socket.
    assert_eq!(go(&mut client, "GET", "/machine-config", "").status, 200);
    // The SDK reads the log, but not the metrics.
    let mut reader =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&log).expect("a reader");
    let logger =
        json!({"level": "Debug", "log_path": log, "show_level": true, "show_log_origin": false}).to_string();
    put(&mut client, "/logger", &logger);
    put(&mut client, "/metrics", &json!({"metrics_path": metrics}).to_string());
    put(&mut client, "/machine-config", r#"{"mem_size_mib":512,"smt":true,"vcpu_count":1}"#);
    let config = go(&mut client, "GET", "/machine-config", "").body;
    assert_eq!((&config["mem_size_mib"], &config["smt"]), (&json!(512), &json!(true)));
    let args = "ro console=ttyS0 noapic reboot=k panic=1 pci=off nomodules";
    put(&mut client, "/boot-source", &format!(r#"{{"boot_args":"{args}","kernel_image_path":"builtin"}}"#));
    for (id, path, is_root) in [("2", &data, false), ("1", &root, true)] {
        let drive =
            json!({"drive_id": id, "is_read_only": false, "is_root_device": is_root, "path_on_host": path});
        put(&mut client, &format!("/drives/{id}"), &drive.to_string());
    }
    put(&mut client, "/actions", r#"{"action_type":"InstanceStart"}"#);
    let instance = go(&mut client, "GET", "/", "").body;
    assert_eq!((&instance["id"], &instance["state"]), (&json!(ID), &json!("Running")));
    // As the SDK's UpdateGuestDrive.
    let patch = json!({"drive_id": "2", "path_on_host": data}).to_string();
    assert_eq!(go(&mut client, "PATCH", "/drives/2", &patch).status, 204);
    put(&mut client, "/actions", r#"{"action_type":"FlushMetrics"}"#);
    let mut lines = String::new();
    let mut from_metrics =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&metrics).expect("a reader");
    // The writer has it open: there is no end, only nothing more for now.
    let _ = from_metrics.read_to_string(&mut lines);
    let sample: Value = serde_json::from_str(lines.trim()).unwrap_or_else(|e| panic!("{e}: {lines:?}"));
    assert_eq!(sample["id"], ID);
    let mut logged = String::new();
    eventually("the log has the last request", || {
        let _ = reader.read_to_string(&mut logged);
        logged.contains("PUT \"/actions\"")
    });
    let line = logged.lines().find(|line| line.contains("PUT \"/machine-config\"")).expect("its line");
    assert!(line.contains(&format!("[{ID}:api:INFO] ")), "{line}");
    end(&sandbox, vm);
}

/// What firecracker-go-sdk sends besides: a balloon, a pause, what it patches.
#[test]
fn the_go_sdk_balloons_and_pauses_a_vm() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::firecracker(&sandbox, &["--id", ID, "--no-seccomp"], &[]);
    let mut client = vm.connect();
    put(
        &mut client,
        "/machine-config",
        r#"{"cpu_template":"None","mem_size_mib":256,"smt":false,"track_dirty_pages":false,"vcpu_count":2}"#,
    );
    put(&mut client, "/boot-source", r#"{"kernel_image_path":"builtin"}"#);
    put(&mut client, "/balloon", r#"{"amount_mib":10,"deflate_on_oom":true,"stats_polling_interval_s":1}"#);
    put(&mut client, "/actions", r#"{"action_type":"InstanceStart"}"#);
    for (path, body) in [
        ("/vm", r#"{"state":"Paused"}"#),
        ("/vm", r#"{"state":"Resumed"}"#),
        ("/balloon", r#"{"amount_mib":20}"#),
        ("/balloon/statistics", r#"{"stats_polling_interval_s":2}"#),
    ] {
        let answer = go(&mut client, "PATCH", path, body);
        assert_eq!(answer.status, 204, "{path} {body}: {answer:?}");
    }
    // A snapshot as it takes one: paused, and both paths.
    let files = serde_json::json!({"mem_file_path": sandbox.file("m"), "snapshot_path": sandbox.file("s")});
    for (method, path, body) in [
        ("PATCH", "/vm", r#"{"state":"Paused"}"#.to_owned()),
        ("PUT", "/snapshot/create", files.to_string()),
        ("PATCH", "/vm", r#"{"state":"Resumed"}"#.to_owned()),
    ] {
        let answer = go(&mut client, method, path, &body);
        assert_eq!(answer.status, 204, "{path} {body}: {answer:?}");
    }
    assert_eq!(go(&mut client, "GET", "/balloon", "").body["amount_mib"], 20);
    assert_eq!(go(&mut client, "GET", "/balloon/statistics", "").body["target_mib"], 20);
    let answer = go(&mut client, "PATCH", "/hotplug/memory", r#"{"requested_size_mib":1}"#);
    assert_eq!(answer.fault(), "PATCH /hotplug/memory is not supported by Samepage yet.");
    let answer = go(&mut client, "PATCH", "/network-interfaces/1", r#"{"iface_id":"1"}"#);
    assert_eq!(answer.fault(), "There is no network interface \"1\".");
    end(&sandbox, vm);
}

/// A file with every section and key spelt out, null or as by default, starts; what it says
/// otherwise is refused by its line.
#[test]
fn a_configuration_that_spells_everything_out_is_accepted() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let root = sandbox.file("rootfs.ext4");
    fs::write(&root, vec![0; 1 << 20]).expect("an image");
    let text = format!(
        r#"{{
  "boot-source": {{
    "kernel_image_path": "builtin",
    "boot_args": "console=ttyS0 reboot=k panic=1",
    "initrd_path": null
  }},
  "drives": [
    {{
      "drive_id": "rootfs",
      "partuuid": null,
      "is_root_device": true,
      "cache_type": "Unsafe",
      "is_read_only": false,
      "path_on_host": {root:?},
      "io_engine": "Sync",
      "rate_limiter": null,
      "socket": null
    }}
  ],
  "machine-config": {{
    "vcpu_count": 2,
    "mem_size_mib": 64,
    "smt": false,
    "track_dirty_pages": false,
    "huge_pages": "None",
    "cpu_template": null
  }},
  "cpu-config": null,
  "balloon": null,
  "network-interfaces": [],
  "vsock": null,
  "logger": null,
  "metrics": null,
  "mmds-config": null,
  "entropy": null,
  "serial": null,
  "pmem": [],
  "memory-hotplug": null
}}
"#
    );
    let file = sandbox.file("vm_config.json");
    fs::write(&file, &text).expect("a config file");
    let path = file.to_str().expect("UTF-8");
    let log = sandbox.file("log");
    let callers = ["--boot-timer", "--show-level", "--show-log-origin", "--level", "Info"];
    let times = ["--start-time-us", "1", "--start-time-cpu-us", "2", "--parent-cpu-time-us", "3"];
    let more = ["--mmds-size-limit", "51200", "--http-api-max-payload-size", "60000", "--module", "vmm"];
    let mut args = vec!["--config-file", path, "--log-path", log.to_str().expect("UTF-8")];
    args.extend(callers.into_iter().chain(times).chain(more));
    let vm = ApiVm::firecracker(&sandbox, &args, &[]);
    let config = vm.get("/vm/config");
    assert_eq!(config["drives"][0]["path_on_host"], json!(root));
    assert_eq!(vm.get("/")["state"], "Running");
    // A body of more than Firecracker's limit, and one of more than the limit that was given.
    let long = |bytes: usize| json!({"state": "Paused", "x": "y".repeat(bytes)});
    assert!(vm.ask("PATCH", "/vm", &long(55_000)).fault().contains("unknown field"));
    assert!(vm.ask("PATCH", "/vm", &long(60_000)).fault().contains("at most 60000 are allowed"));
    let said = fs::read_to_string(&log).expect("a log");
    assert!(said.contains(":INFO:") && said.contains("GET \"/vm/config\""), "{said}");
    let note = "note: --boot-timer does nothing";
    eventually("the note is said", || vm.running().stderr_so_far().contains(note));
    end(&sandbox, vm);

    for (wrong, right, section, said) in [
        (
            r#""io_engine": "Async""#,
            r#""io_engine": "Sync""#,
            "drives",
            "io_engine \"Async\" is not supported",
        ),
        (
            r#""cpu_template": "T2""#,
            r#""cpu_template": null"#,
            "machine-config",
            "cpu_template \"T2\" is not",
        ),
        (r#""memory-hotplug": {"a": 1}"#, r#""memory-hotplug": null"#, "memory-hotplug", "not supported by"),
        (
            r#""mmds-config": {"version": "V2"}"#,
            r#""mmds-config": null"#,
            "mmds-config",
            "missing field `network_interfaces`",
        ),
        (r#""vcpu_cnt": 2"#, r#""vcpu_count": 2"#, "machine-config", "unknown field `vcpu_cnt`"),
    ] {
        let text = text.replace(right, wrong);
        let line = 1 + text.lines().position(|line| line.contains(wrong)).expect("what is wrong");
        // What is wrong with the last key of an object is found at the object's end.
        let is_last = text.lines().nth(line).is_some_and(|next| next.trim_start().starts_with('}'));
        let line = line + usize::from(is_last && !said.starts_with("unknown field"));
        fs::write(&file, text).expect("a config file");
        let run = sandbox.firecracker(["--no-api", "--config-file", path]).output();
        assert_eq!(run.code, Some(152), "{run}");
        for part in [format!("the section {section:?}"), said.into(), format!("at line {line} column")] {
            assert!(run.stderr.contains(&part), "{part} is not in {run}");
        }
    }
    sandbox.assert_clean_within(SOON);
}

/// An unsupported option is refused by name before anything is made.
#[test]
fn options_of_firecracker_that_mean_something_else_are_refused() {
    let sandbox = Sandbox::new();
    let socket = sandbox.file("api.sock");
    for (args, said) in [
        (vec!["--seccomp-filter", "f"], "--seccomp-filter is not supported by Samepage yet"),
        (vec!["--enable-pci"], "--enable-pci is not supported by Samepage yet"),
        (vec!["--level", "Loud"], "unknown level \"Loud\": expected Off, Error"),
        (vec!["--start-time-us", "x"], "invalid value 'x'"),
    ] {
        let mut all = vec!["run", "--api-sock", socket.to_str().expect("UTF-8")];
        all.extend(args);
        let run = sandbox.samepage(all).output();
        assert_eq!(run.code, Some(2), "{run}");
        assert!(run.stderr.contains(said), "{said}: {run}");
    }
    assert!(!socket.exists());
}

/// Kata: a configuration file beside the API, with placeholder drives, a socket for the agent, and
/// metrics and log in FIFOs; then it asks what the instance is, and pauses and resumes it. The
/// jailer before it, and the PATCH of drives after it, are for others.
#[test]
fn kata_starts_a_vm_from_its_file() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (root, pool) = (sandbox.file("kata-containers.img"), sandbox.file("drive_pool_0"));
    for image in [&root, &pool] {
        fs::write(image, vec![0; 1 << 20]).expect("an image");
    }
    let (log, metrics, hybrid) =
        (sandbox.file("logs.fifo"), sandbox.file("metrics.fifo"), sandbox.file("kata.hvsock"));
    fifo(&log);
    fifo(&metrics);
    let config = json!({
        "boot-source": {"kernel_image_path": "builtin", "boot_args": "console=ttyS0 reboot=k panic=1 pci=off"},
        "drives": [
            {"drive_id": "rootfs", "path_on_host": root, "is_root_device": false, "is_read_only": true},
            {"drive_id": "drive_0", "path_on_host": pool, "is_root_device": false, "is_read_only": false},
        ],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "smt": false},
        "vsock": {"guest_cid": 3, "uds_path": hybrid, "vsock_id": "root"},
        "logger": {"log_path": log, "level": "Error"},
        "metrics": {"metrics_path": metrics},
    });
    let file = sandbox.file("fcConfig.json");
    fs::write(&file, config.to_string()).expect("a config file");
    let args = ["--id", "0a1b2c", "--config-file", file.to_str().expect("UTF-8")];
    let vm = ApiVm::firecracker(&sandbox, &args, &[]);
    let mut client = vm.connect();
    let instance = go(&mut client, "GET", "/", "").body;
    assert_eq!((&instance["id"], &instance["state"]), (&json!("0a1b2c"), &json!("Running")));
    assert!(hybrid.exists(), "there is no socket for the agent");
    for state in ["Paused", "Resumed"] {
        let answer = go(&mut client, "PATCH", "/vm", &json!({"state": state}).to_string());
        assert_eq!(answer.status, 204, "{answer:?}");
    }
    assert_eq!(go(&mut client, "GET", "/vm/config", "").body["drives"][1]["drive_id"], "drive_0");
    end(&sandbox, vm);
}
