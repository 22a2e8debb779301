//! Requests made of Firecracker's API description: for each endpoint bodies that are valid, lack a
//! key, have a value of another type, a key more, null, long and unusual text. Whatever they are,
//! an answer comes, and it is 200, 204, or 400 with a `fault_message`.

use rustix::process::Signal;
use serde_json::{Map, Value, json};
use tests::api::{Answer, ApiVm, Http, request};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::SOON;

/// Values that are put in the place of each one in a body.
fn odd_values() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(1.5),
        json!(u64::MAX),
        json!(""),
        json!("x".repeat(5000)),
        json!("\u{0}\u{1f}\u{7f}\u{202e}\u{1f600}\u{e4}/../../%n"),
        json!([]),
        json!([[[[]]]]),
        json!({}),
        json!({"a": {"a": {"a": {}}}}),
    ]
}

/// Each endpoint of the description with a body that has every key.
fn endpoints() -> Vec<(&'static str, &'static str, Value)> {
    let limiter = json!({
        "bandwidth": {"size": 1000, "one_time_burst": 10, "refill_time": 100},
        "ops": {"size": 10, "one_time_burst": null, "refill_time": 100}
    });
    let none = Value::Null;
    vec![
        ("GET", "/", none.clone()),
        ("GET", "/version", none.clone()),
        ("GET", "/vm/config", none.clone()),
        ("GET", "/machine-config", none.clone()),
        ("GET", "/balloon", none.clone()),
        ("GET", "/balloon/statistics", none.clone()),
        ("GET", "/balloon/hinting/status", none.clone()),
        ("GET", "/mmds", none.clone()),
        ("GET", "/hotplug/memory", none),
        ("PUT", "/actions", json!({"action_type": "FlushMetrics"})),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"})),
        (
            "PUT",
            "/balloon",
            json!({"amount_mib": 1, "deflate_on_oom": false, "stats_polling_interval_s": 1,
                "free_page_hinting": true, "free_page_reporting": true}),
        ),
        ("PATCH", "/balloon", json!({"amount_mib": 1})),
        ("PATCH", "/balloon/statistics", json!({"stats_polling_interval_s": 1})),
        ("PATCH", "/balloon/hinting/start", json!({"acknowledge_on_stop": true})),
        ("PATCH", "/balloon/hinting/stop", json!({})),
        (
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": "builtin", "boot_args": "quiet", "initrd_path": null}),
        ),
        (
            "PUT",
            "/cpu-config",
            json!({"kvm_capabilities": ["!56"],
                "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
                    "modifiers": [{"register": "eax", "bitmap": "0bxxxx0"}]}],
                "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b0x"}]}),
        ),
        (
            "PUT",
            "/drives/a",
            json!({"drive_id": "a", "path_on_host": "/nowhere", "is_root_device": false, "partuuid": null,
                "is_read_only": true, "cache_type": "Unsafe", "io_engine": "Sync", "rate_limiter": limiter, "socket": null}),
        ),
        ("PATCH", "/drives/a", json!({"drive_id": "a", "path_on_host": "/nowhere", "rate_limiter": limiter})),
        ("PUT", "/entropy", json!({"rate_limiter": limiter})),
        (
            "PUT",
            "/hotplug/memory",
            json!({"total_size_mib": 1024, "slot_size_mib": 128, "block_size_mib": 2}),
        ),
        ("PATCH", "/hotplug/memory", json!({"requested_size_mib": 128})),
        (
            "PUT",
            "/logger",
            json!({"level": "Off", "show_level": true, "show_log_origin": true, "module": "vmm", "log_path": null}),
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 32, "smt": false, "track_dirty_pages": false,
                "huge_pages": "None", "cpu_template": "None"}),
        ),
        (
            "PATCH",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 32, "smt": false, "track_dirty_pages": false,
                "huge_pages": "None", "cpu_template": "None"}),
        ),
        (
            "PUT",
            "/metrics",
            json!({"metrics_path": "/nowhere/metrics", "emit_id": true, "properties": {"a": "b"}}),
        ),
        (
            "PUT",
            "/mmds/config",
            json!({"version": "V2", "network_interfaces": ["a"], "ipv4_address": "169.254.169.254", "imds_compat": true}),
        ),
        ("PUT", "/mmds", json!({"latest": {"meta-data": {"ami-id": "ami-1"}}})),
        ("PATCH", "/mmds", json!({"latest": {"meta-data": {"ami-id": null}}})),
        (
            "PUT",
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "nowhere0", "guest_mac": "02:00:00:00:00:01", "mtu": 1500,
                "rx_rate_limiter": limiter, "tx_rate_limiter": limiter}),
        ),
        (
            "PATCH",
            "/network-interfaces/a",
            json!({"iface_id": "a", "rx_rate_limiter": limiter, "tx_rate_limiter": limiter}),
        ),
        (
            "PUT",
            "/pmem/a",
            json!({"id": "a", "path_on_host": "/nowhere", "root_device": false, "read_only": true, "rate_limiter": limiter}),
        ),
        (
            "PUT",
            "/serial",
            json!({"serial_out_path": "/nowhere/serial", "rate_limiter": {"size": 1, "refill_time": 1}}),
        ),
        (
            "PUT",
            "/snapshot/create",
            json!({"snapshot_type": "Full", "snapshot_path": "/nowhere/s", "mem_file_path": "/nowhere/m"}),
        ),
        (
            "PUT",
            "/snapshot/load",
            json!({"snapshot_path": "/nowhere/s", "mem_backend": {"backend_type": "File", "backend_path": "/nowhere/m"},
                "track_dirty_pages": false, "resume_vm": false, "network_overrides": [{"iface_id": "a", "host_dev_name": "t"}],
                "vsock_override": {"uds_path": "/nowhere/v"}, "clock_realtime": false, "huge_pages": "Snapshot"}),
        ),
        ("PATCH", "/vm", json!({"state": "Resumed"})),
        ("PUT", "/vsock", json!({"guest_cid": 3, "uds_path": "/nowhere/v", "vsock_id": "v"})),
    ]
}

/// All that one change in it makes of a body.
fn variants(body: &Value) -> Vec<Value> {
    let mut all = vec![body.clone()];
    let Value::Object(keys) = body else { return all };
    for key in keys.keys() {
        let mut without = keys.clone();
        without.remove(key);
        all.push(without.into());
        all.extend(odd_values().into_iter().map(|value| with(keys, key, value)));
        // One level deeper, where limits and lists are.
        all.extend(variants(&keys[key]).into_iter().skip(1).map(|value| with(keys, key, value)));
    }
    all.push(with(keys, "additional", json!(1)));
    all.push(with(keys, &"k".repeat(2000), json!(1)));
    all
}

fn with(keys: &Map<String, Value>, key: &str, value: Value) -> Value {
    let mut keys = keys.clone();
    keys.insert(key.to_owned(), value);
    keys.into()
}

#[track_caller]
fn assert_answered(answer: &Answer, asked: &str) {
    match answer.status {
        200 | 204 => {}
        400 => {
            let said = answer.body["fault_message"].as_str().unwrap_or_default();
            assert!(!said.is_empty(), "{asked}: no fault_message in {answer:?}");
        }
        status => panic!("{asked}: {status}: {answer:?}"),
    }
}

/// Sends everything over connections that are used again while they live.
fn ask_all(vm: &ApiVm) -> usize {
    let mut client = vm.connect();
    let mut asked = 0;
    let mut send = |client: &mut Http, method: &str, path: &str, body: &str| {
        client.send(request(method, path, body));
        let shown = format!("{method} {path} {}", body.chars().take(200).collect::<String>());
        let answer = client.answer().unwrap_or_else(|| panic!("{shown}: no answer"));
        assert_answered(&answer, &shown);
        asked += 1;
        if answer.head.contains("Connection: close") {
            *client = vm.connect();
        }
    };
    for (method, path, body) in endpoints() {
        for variant in variants(&body) {
            let text = if variant.is_null() { String::new() } else { variant.to_string() };
            send(&mut client, method, path, &text);
        }
        // Bodies that are no object, or no JSON.
        for text in
            ["", "[]", "null", "1", "\"a\"", "{", "{}", "}{", "{\"a\":", "\u{feff}{}", "[[[[[[[[[[[[[["]
        {
            send(&mut client, method, path, text);
        }
        for method in ["GET", "PUT", "PATCH", "DELETE", "POST", "OPTIONS", "get"] {
            send(&mut client, method, path, "{}");
            send(&mut client, method, &format!("{path}/x"), "{}");
            send(&mut client, method, &format!("{path}?a=b"), "{}");
        }
    }
    let deep = "[".repeat(20_000);
    send(&mut client, "PUT", "/mmds", &deep);
    send(&mut client, "PUT", "/mmds", &format!("{{\"a\":{}", "{\"a\":".repeat(5000)));
    asked
}

#[test]
fn every_request_is_answered_before_and_after_the_start() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::firecracker(&sandbox, &["--id", "asked"], &[]);
    let before = ask_all(&vm);
    assert!(before > 2000, "{before} requests are few");
    assert_eq!(vm.get("/")["state"], "Not started");
    // Whatever was put, it can be replaced by what works.
    vm.running().kill(Signal::TERM);
    assert_eq!(vm.into_running().wait().code, Some(0));
    sandbox.assert_clean_within(SOON);
    let vm = ApiVm::firecracker(&sandbox, &["--id", "asked"], &[]);
    vm.boot(32);
    ask_all(&vm);
    let state = vm.get("/")["state"].clone();
    assert!(state == "Running" || state == "Paused", "{state}");
    vm.running().kill(Signal::TERM);
    assert_eq!(vm.into_running().wait().code, Some(0));
    sandbox.assert_clean_within(SOON);
}
