//! The API of a VM, `samepage run --api-sock`, with the built-in guest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::api::{ApiVm, Http, request};
use tests::require_kvm;
use tests::run::Run;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, eventually, field};

const NO_ARGS: &[&str] = &[];

/// Ends the VM and looks that nothing is left.
fn stop(sandbox: &Sandbox, vm: ApiVm) {
    vm.running().kill(Signal::TERM);
    let outcome = vm.into_running().wait().success();
    assert_eq!(outcome.stderr, "note: SIGTERM: the VM ends\n", "{outcome}");
    sandbox.assert_clean_within(SOON);
}

/// COM2 of a VM that was started, once its guest is ready.
fn ready(vm: &ApiVm) -> Client {
    let mut com2 = Client::connect(&vm.com2);
    let line = com2.line().expect("the ready line");
    assert!(line.starts_with("ready "), "{line:?}");
    com2
}

#[test]
fn a_vm_is_configured_started_paused_and_resumed() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, &["--id", "mine-1"]);
    let mode = vm.socket.metadata().expect("the socket").permissions().mode();
    assert_eq!(mode & 0o177, 0, "{mode:o}");
    let said = vm.get("/");
    assert_eq!((&said["app_name"], &said["id"]), (&json!("Samepage"), &json!("mine-1")));
    assert_eq!(said["state"], "Not started");
    assert_eq!(vm.get("/version")["firecracker_version"], said["vmm_version"]);
    assert_eq!(vm.get("/machine-config")["mem_size_mib"], 128);
    let start = json!({"action_type": "InstanceStart"});
    assert!(vm.ask("PUT", "/actions", &start).fault().contains("without kernel configuration"));
    vm.put("/machine-config", &json!({"vcpu_count": 2, "mem_size_mib": 32}));
    vm.patch("/machine-config", &json!({"mem_size_mib": 48}));
    vm.put("/boot-source", &json!({"kernel_image_path": "builtin", "boot_args": ""}));
    let metrics = sandbox.file("metrics");
    vm.put("/metrics", &json!({"metrics_path": metrics}));
    assert!(!vm.control.exists(), "there is a VM before it was started");
    vm.put("/actions", &start);
    assert_eq!(vm.get("/")["state"], "Running");
    let mut com2 = ready(&vm);
    // The sockets of `samepage run` and the API speak of the same VM.
    let status = Client::connect(&vm.control).ask(&json!({"op": "status"}))["status"].clone();
    assert_eq!((&status["vcpus"], &status["memory_bytes"]), (&json!(2), &json!(48 << 20)), "{status}");
    assert_eq!((&status["name"], &status["pid"]), (&json!("mine-1"), &json!(vm.running().pid())));
    for (method, path, body) in [
        ("PUT", "/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 64})),
        ("PATCH", "/machine-config", json!({"vcpu_count": 1})),
        ("PUT", "/boot-source", json!({"kernel_image_path": "builtin"})),
        ("PUT", "/balloon", json!({"amount_mib": 1, "deflate_on_oom": true})),
        ("PUT", "/metrics", json!({"metrics_path": metrics})),
        ("PUT", "/actions", start),
    ] {
        let answer = vm.ask(method, path, &body);
        assert!(answer.fault().contains("not supported after starting"), "{path}: {answer:?}");
    }
    let keys = vm.ask("PUT", "/actions", &json!({"action_type": "SendCtrlAltDel"}));
    assert!(keys.fault().contains("no driver for it yet"), "{keys:?}");
    // Paused, the guest says nothing; what was asked meanwhile it answers later.
    vm.patch("/vm", &json!({"state": "Paused"}));
    assert_eq!(vm.get("/")["state"], "Paused");
    assert_eq!(Client::connect(&vm.control).ask(&json!({"op": "status"}))["status"]["paused"], true);
    com2.send(b"report\n");
    vm.put("/actions", &json!({"action_type": "FlushMetrics"}));
    vm.patch("/vm", &json!({"state": "Resumed"}));
    assert!(com2.line().expect("an answer").starts_with("ok command=report"));
    assert_eq!(Client::connect(&vm.control).ask(&json!({"op": "pause"})), json!("done"));
    assert_eq!(vm.get("/")["state"], "Paused");
    vm.patch("/vm", &json!({"state": "Resumed"}));
    let text = fs::read_to_string(&metrics).expect("metrics");
    let sample: Value = serde_json::from_str(text.trim_end()).expect("one line of JSON");
    assert_eq!((&sample["state"], &sample["memory_bytes"]), (&json!("Paused"), &json!(48 << 20)));
    assert_eq!(sample["pid"], vm.running().pid());
    let config = vm.get("/vm/config");
    assert_eq!(config["machine-config"]["mem_size_mib"], 48, "{config}");
    assert_eq!(config["metrics"]["metrics_path"], json!(metrics), "{config}");
    // The guest's own end is the process's, and of its sockets.
    com2.send(b"poweroff\n");
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_balloon_is_sized_and_watched() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let too_large = json!({"amount_mib": 129, "deflate_on_oom": false});
    assert!(vm.ask("PUT", "/balloon", &too_large).fault().contains("more than the guest's memory"));
    vm.put(
        "/balloon",
        &json!({"amount_mib": 4, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_hinting": true}),
    );
    vm.boot(64);
    let mut com2 = ready(&vm);
    let statistics = || vm.get("/balloon/statistics");
    eventually("a balloon of 4 MiB", || statistics()["actual_pages"] == 1024);
    vm.patch("/balloon", &json!({"amount_mib": 16}));
    assert_eq!(vm.get("/balloon")["amount_mib"], 16);
    eventually("a balloon of 16 MiB", || statistics()["actual_mib"] == 16);
    let said = statistics();
    assert_eq!((&said["target_pages"], &said["target_mib"]), (&json!(4096), &json!(16)), "{said}");
    // The host has back what the guest gave, by its own page table.
    assert_eq!(said["host"]["held_pages"], 4096, "{said}");
    assert_eq!(said["host"]["absent_pages"], 4096, "{said}");
    // The guest is asked again and again: what it says follows.
    let used = || {
        let said = statistics();
        Some((said["total_memory"].as_u64()?.checked_sub(said["free_memory"].as_u64()?)?) >> 20)
    };
    eventually("the guest misses 16 MiB", || used() >= Some(16));
    assert!(statistics()["host"]["age_seconds"].as_f64() >= Some(0.0), "{}", statistics());
    vm.patch("/balloon/statistics", &json!({"stats_polling_interval_s": 2}));
    vm.patch("/balloon", &json!({"amount_mib": 0}));
    eventually("the guest has its memory again", || used().is_some_and(|mib| mib < 16));
    assert_eq!(statistics()["actual_pages"], 0);
    // What the guest had written to and freed goes back by a run of hinting, and what it holds
    // stays.
    let fill = "fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages=8000";
    assert_eq!(com2.command(fill), "ok command=fill pages=8000");
    com2.command("free percent=50");
    let full_kib = vm.running().rss_kib();
    vm.patch("/balloon/hinting/start", &json!({"acknowledge_on_stop": true}));
    eventually("the freed pages are hinted", || {
        statistics()["host"]["hinted_bytes"].as_u64() >= Some(4000 * 4096)
            && vm.running().rss_kib() + 3500 * 4 < full_kib
    });
    eventually("the run is done", || vm.get("/balloon/hinting/status")["host_cmd"] == 1);
    vm.patch("/balloon/hinting/stop", &Value::Null);
    assert_eq!(com2.command("verify"), "ok command=verify checked=4000 mismatched=0 first=none");
    assert_eq!(field(&com2.command("balloon check"), "nonzero"), 0);
    for (path, body, said) in [
        ("/balloon", json!({"amount_mib": 65}), "more than the guest's memory"),
        ("/balloon/statistics", json!({"stats_polling_interval_s": 0}), "cannot be enabled or disabled"),
    ] {
        assert!(vm.ask("PATCH", path, &body).fault().contains(said), "{path}");
    }
    stop(&sandbox, vm);
}

#[test]
fn a_start_that_fails_can_be_tried_again() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let kernel = sandbox.file("kernel");
    fs::write(&kernel, "no kernel at all").expect("a file");
    vm.put("/boot-source", &json!({"kernel_image_path": kernel}));
    for _ in 0..3 {
        let answer = vm.ask("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
        assert!(answer.fault().contains("could not be started: the kernel cannot be used"), "{answer:?}");
        assert!(!vm.control.exists() && !vm.com2.exists(), "sockets of a VM that is not there");
    }
    assert_eq!(vm.get("/")["state"], "Not started");
    // Its RAM is unmapped, however often it was tried.
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm.running().pid())).expect("maps");
    let bytes = |line: &str| {
        let (from, to) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(to, 16).ok()? - u64::from_str_radix(from, 16).ok()?)
    };
    let mappings = maps.lines().filter(|l| l.contains(" rw-p ") && bytes(l) >= Some(128 << 20)).count();
    assert_eq!(mappings, 0, "{maps}");
    vm.boot(32);
    let mut com2 = ready(&vm);
    assert!(com2.command("report").starts_with("ok "));
    stop(&sandbox, vm);
}

#[test]
fn a_file_configures_a_vm() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let example = tests::workspace().join("resources/api/vm.json");
    let vm = ApiVm::start(&sandbox, &["--config-file".as_ref(), example.as_os_str()]);
    eventually("it runs", || vm.get("/")["state"] == "Running");
    // What is shown is a config file again.
    let shown = vm.get("/vm/config");
    assert_eq!(shown["boot-source"]["kernel_image_path"], "builtin", "{shown}");
    let _ = ready(&vm);
    stop(&sandbox, vm);
    let again = sandbox.file("again.json");
    fs::write(&again, shown.to_string()).expect("a file");
    let (_, com2) = tests::vm::Vm::sockets(&sandbox, "vm");
    let mut args = ["run", "--console", "none", "--no-api", "--config-file"].map(Into::into).to_vec();
    args.extend([again.into_os_string(), "--com2".into(), com2.clone().into_os_string()]);
    let running = sandbox.samepage(args).start();
    let mut com2 = Client::connect(&com2);
    assert!(com2.line().expect("the ready line").starts_with("ready "));
    com2.send(b"poweroff\n");
    let _ = running.wait().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_wrong_file_has_a_status_of_its_own() {
    let sandbox = Sandbox::new();
    let file = sandbox.file("vm.json");
    let builtin = r#""boot-source":{"kernel_image_path":"builtin"}"#;
    for (text, said) in [
        ("".to_owned(), "not a JSON object"),
        ("{}".to_owned(), "without kernel configuration"),
        (format!("{{{builtin},\"machine_config\":{{}}}}"), "did you mean \"machine-config\"?"),
        (format!("{{{builtin},\"entropy\":{{\"a\":1}}}}"), "unknown field `a`"),
        (
            format!(
                "{{{builtin},\"drives\":[{{\"drive_id\":\"a\",\"path_on_host\":\"/none\",\"is_root_device\":true}}]}}"
            ),
            "the drive /none cannot be opened",
        ),
        (format!("{{{builtin},\"balloon\":{{\"amount_mib\":1}}}}"), "missing field `deflate_on_oom`"),
        (format!("{{{builtin},\"machine-config\":{{\"vcpu_count\":99,\"mem_size_mib\":64}}}}"), "99"),
    ] {
        fs::write(&file, &text).expect("a file");
        let socket = sandbox.runtime_dir().join("api.sock");
        let mut args = ["run", "--console", "none", "--config-file"].map(Into::into).to_vec();
        args.extend([file.clone().into_os_string(), "--api-sock".into(), socket.into_os_string()]);
        let outcome = sandbox.samepage(args).output();
        assert_eq!(outcome.code, Some(152), "{text}: {outcome}");
        assert!(outcome.stderr.contains(said), "{text}: {outcome}");
        sandbox.assert_clean_within(SOON);
    }
}

#[test]
fn signals_end_it_before_there_is_a_vm() {
    let sandbox = Sandbox::new();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let vm = ApiVm::start(&sandbox, NO_ARGS);
        // A client that is there, and one in the middle of a request, hold nothing up.
        let (_idle, mut busy) = (vm.connect(), vm.connect());
        busy.send("PUT /act");
        vm.running().kill(signal);
        let _ = vm.into_running().wait().success();
        sandbox.assert_clean_within(SOON);
    }
}

#[test]
fn a_path_in_use_is_refused_and_left_alone() {
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let mut args = ["run", "--api-sock"].map(Into::into).to_vec();
    args.push(vm.socket.clone().into_os_string());
    let outcome = sandbox.samepage(args).output();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("it is there already"), "{outcome}");
    assert_eq!(vm.get("/")["state"], "Not started");
    stop(&sandbox, vm);
}

#[test]
fn malformed_requests_are_refused_and_others_are_served() {
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let long = "x".repeat(9000);
    for (bytes, said) in [
        ("hello\r\n\r\n".to_owned(), "not HTTP/1.1"),
        ("\x16\x03\x01\x02\x00".to_owned(), "not HTTP/1.1"),
        ("GET / HTTP/2.0\r\n\r\n".to_owned(), "not HTTP/1.1"),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), "not HTTP/1.1"),
        (format!("GET /{long} HTTP/1.1\r\n\r\n"), "longer than 8192 bytes"),
        (format!("GET / HTTP/1.1\r\nA: {long}\r\n\r\n"), "longer than 8192 bytes"),
        ("PUT /vm HTTP/1.1\r\nContent-Length: 51201\r\n\r\n".to_owned(), "51201 bytes"),
        (request("PUT", "/vm", &"x".repeat(60_000)), "60000 bytes"),
        ("PUT /vm HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_owned(), "Content-Length"),
        ("PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(), "Transfer-Encoding"),
    ] {
        let mut client = vm.connect();
        client.send(&bytes);
        let answer = client.answer().expect("an answer");
        assert!(answer.fault().contains(said), "{bytes:?}: {answer:?}");
        assert!(answer.head.contains("Connection: close"), "{answer:?}");
        assert_eq!(client.answer(), None, "{bytes:?}");
    }
    // What is HTTP but no request of ours is refused, and the connection goes on.
    let mut client = vm.connect();
    for (method, path, body, said) in [
        ("PUT", "/foo", json!({}), "Invalid request method and/or path: PUT /foo."),
        ("DELETE", "/", Value::Null, "Invalid request method and/or path: DELETE /."),
        ("PUT", "/hotplug/memory", json!({}), "not supported by Samepage yet"),
        (
            "PUT",
            "/pmem/a",
            json!({"id": "a", "path_on_host": "/nowhere"}),
            "Unable to create the pmem device",
        ),
        ("PUT", "/drives/root", json!({}), "missing field `drive_id`"),
        ("PUT", "/actions", Value::Null, "Empty PUT request."),
        (
            "PUT",
            "/actions",
            json!({"action_type": "Dance"}),
            "deserializing the json body of a request: unknown",
        ),
        ("PUT", "/actions", json!({"action_type": "InstanceStart", "x": 1}), "unknown field `x`"),
        ("GET", "/", json!({}), "GET request cannot have a body."),
        ("PATCH", "/vm", json!({"state": "Paused"}), "not supported before starting"),
    ] {
        let answer = client.ask(method, path, &body);
        assert!(answer.fault().contains(said), "{method} {path}: {answer:?}");
    }
    assert_eq!(client.ask("GET", "/", &Value::Null).status, 200);
    stop(&sandbox, vm);
}

#[test]
fn requests_come_in_pieces_together_and_from_half_open_connections() {
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let body = json!({"vcpu_count": 3, "mem_size_mib": 32}).to_string();
    let mut client = vm.connect();
    for byte in request("PUT", "/machine-config", &body).bytes() {
        client.send([byte]);
    }
    assert_eq!(client.answer().expect("an answer").status, 204);
    let pipelined = [("GET", "/machine-config"), ("PUT", "/foo"), ("GET", "/"), ("GET", "/version")];
    client.send(pipelined.map(|(method, path)| request(method, path, "")).concat().repeat(50));
    client.end();
    for _ in 0..50 {
        for (expected, key) in
            [(200, "vcpu_count"), (400, "fault_message"), (200, "id"), (200, "firecracker_version")]
        {
            let answer = client.answer().expect("an answer");
            assert_eq!(answer.status, expected, "{answer:?}");
            assert!(!answer.body[key].is_null(), "answers are out of order: {answer:?}");
        }
    }
    assert_eq!(client.answer(), None);
    let mut client = vm.connect();
    let length = body.len();
    client.send(format!(
        "PUT /machine-config HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
    ));
    assert_eq!(client.answer().expect("leave to go on").status, 100);
    client.send(&body);
    assert_eq!(client.answer().expect("an answer").status, 204);
    client.send("GET / HTTP/1.0\r\n\r\n");
    assert!(client.answer().expect("an answer").head.contains("Connection: close"));
    assert_eq!(client.answer(), None);
    stop(&sandbox, vm);
}

#[test]
fn a_slow_client_is_given_up_on_and_holds_nobody_up() {
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let (mut slow, mut idle) = (vm.connect(), vm.connect());
    slow.send("PUT /actions HTTP/1.1\r\nContent-Length: 10\r\n\r\n{");
    // One that asks and asks and never reads.
    let mut deaf = vm.connect();
    deaf.send(request("GET", "/vm/config", "").repeat(300));
    assert_eq!(vm.get("/")["state"], "Not started");
    let answer = slow.answer().expect("why it is given up on");
    assert!(answer.fault().contains("not complete after 10 s"), "{answer:?}");
    assert_eq!(slow.answer(), None);
    // A client that merely waits is welcome to.
    assert_eq!(idle.ask("GET", "/", &Value::Null).status, 200);
    stop(&sandbox, vm);
}

#[test]
fn a_guest_works_on_among_a_hundred_clients() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    vm.boot(64);
    let mut com2 = ready(&vm);
    let clients: Vec<_> = (0..100)
        .map(|n| {
            let socket = vm.socket.clone();
            thread::spawn(move || {
                let mut client = Http::connect(&socket);
                for round in 0..20 {
                    let (method, path, body, status) = match (n + round) % 5 {
                        0 => ("GET", "/", Value::Null, 200),
                        1 => ("GET", "/vm/config", Value::Null, 200),
                        2 => ("PATCH", "/vm", json!({"state": "Resumed"}), 204),
                        3 => ("PUT", "/balloon", json!({"amount_mib": 1}), 400),
                        _ => ("PATCH", "/balloon", json!({"amount_mib": 1}), 400),
                    };
                    assert_eq!(client.ask(method, path, &body).status, status, "{method} {path}");
                }
            })
        })
        .collect();
    let fill = com2.command("fill seed=1 common=7 zero=10 common_pct=40 dup=10 unique=40 pages=8000");
    assert!(fill.starts_with("ok "), "{fill}");
    let verify = com2.command("verify");
    assert_eq!((field(&verify, "checked"), field(&verify, "mismatched")), (8000, 0), "{verify}");
    for client in clients {
        client.join().expect("a client that was served");
    }
    // More than are served at a time: the oldest idle ones make room.
    let mut many: Vec<_> = (0..300).map(|_| vm.connect()).collect();
    assert_eq!(many.pop().expect("the last").ask("GET", "/", &Value::Null).status, 200);
    let served = many.iter_mut().rev().take(200).all(|c| c.ask("GET", "/", &Value::Null).status == 200);
    assert!(served, "a client that came late was not served");
    assert_eq!(field(&com2.command("verify"), "mismatched"), 0);
    drop(many);
    stop(&sandbox, vm);
}

#[test]
fn curl_is_served() {
    require_kvm!();
    let sandbox = Sandbox::new();
    if Run::program("sh", ["-c", "command -v curl"]).output().code != Some(0) {
        return tests::host::skipped("curl_is_served", "curl is not installed");
    }
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let curl = |method: &str, path: &str, body: &str| {
        let socket = vm.socket.to_str().expect("a path in UTF-8");
        let url = format!("http://localhost{path}");
        let mut args = vec!["-sS", "-w", " %{http_code}", "--unix-socket", socket, "-X", method, &url];
        if !body.is_empty() {
            args.extend(["-H", "Content-Type: application/json", "-H", "Expect: 100-continue", "-d", body]);
        }
        Run::program("curl", args).output().success().stdout
    };
    let metrics = sandbox.file("metrics");
    let metrics = json!({"metrics_path": metrics}).to_string();
    let balloon =
        r#"{"amount_mib":8,"deflate_on_oom":true,"stats_polling_interval_s":1,"free_page_hinting":true}"#;
    // Every endpoint, in an order in which each works.
    for (method, path, body, shows) in [
        ("GET", "/version", "", "firecracker_version"),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64}"#, ""),
        ("PATCH", "/machine-config", r#"{"vcpu_count":2}"#, ""),
        ("GET", "/machine-config", "", r#""vcpu_count":2"#),
        ("PUT", "/boot-source", r#"{"kernel_image_path":"builtin"}"#, ""),
        ("PUT", "/metrics", &metrics, ""),
        ("PUT", "/balloon", balloon, ""),
        ("GET", "/vm/config", "", r#""amount_mib":8"#),
        ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, ""),
        ("PATCH", "/balloon", r#"{"amount_mib":16}"#, ""),
        ("GET", "/balloon", "", r#""amount_mib":16"#),
        ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":2}"#, ""),
        ("GET", "/balloon/statistics", "", r#""host":"#),
        ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#, ""),
    ] {
        let said = curl(method, path, body);
        let code = if shows.is_empty() { " 204" } else { " 200" };
        assert!(said.contains(shows) && said.ends_with(code), "{method} {path}: {said}");
    }
    // These need the guest's driver.
    eventually("hinting starts", || curl("PATCH", "/balloon/hinting/start", "").ends_with(" 204"));
    assert!(curl("GET", "/balloon/hinting/status", "").contains("host_cmd"));
    assert_eq!(curl("PATCH", "/balloon/hinting/stop", ""), " 204");
    assert_eq!(curl("PATCH", "/vm", r#"{"state":"Paused"}"#), " 204");
    let said = curl("GET", "/", "");
    assert!(said.contains(r#""state":"Paused""#) && said.ends_with(" 200"), "{said}");
    let said = curl("PUT", "/foo", "{}");
    assert!(
        said.contains("Invalid request method and/or path: PUT /foo.") && said.ends_with(" 400"),
        "{said}"
    );
    // A body far too long: curl still gets to read why.
    let said = curl("PUT", "/actions", &"x".repeat(100_000));
    assert!(said.contains("100000 bytes") && said.ends_with(" 400"), "{said}");
    stop(&sandbox, vm);
}
