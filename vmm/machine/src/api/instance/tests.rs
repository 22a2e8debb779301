use super::*;
use devices::GuestMemory;
use devices::reclaim::{Gpa, Reclaim};
use devices::virtio::balloon::Balloon as Device;
use std::ops::Range;
use vm_memory::GuestAddress;

use wire::http::Status;

/// A VM that only remembers its requests.
struct Fake {
    paused: bool,
    /// A vCPU that does not leave the guest.
    stuck: bool,
    balloon: Option<(Device, Handle)>,
    hints: Vec<&'static str>,
    polls: Vec<Duration>,
}

struct Nothing;

impl Reclaim for Nothing {
    fn discard(&self, _: Range<Gpa>) -> io::Result<()> {
        Ok(())
    }
}

impl Machine for Fake {
    fn is_paused(&self) -> bool {
        self.paused
    }

    fn pause(&mut self) -> bool {
        self.paused = !self.stuck;
        self.paused
    }

    fn resume(&mut self) {
        self.paused = false;
    }

    fn create_snapshot(&mut self, create: &CreateSnapshot, _: Setup) -> Result<(), CreateError> {
        match self.paused {
            true => std::fs::write(&create.snapshot_path, "").map_err(|source| CreateError::StateFile {
                what: "open",
                path: create.snapshot_path.clone(),
                source,
            }),
            false => Err(CreateError::Runs),
        }
    }

    fn replace_drive(&mut self, drive: &crate::Drive) -> Result<(), DriveError> {
        drive.check()
    }

    fn press_power_button(&self) -> bool {
        false
    }

    fn balloon(&self) -> Option<&Handle> {
        self.balloon.as_ref().map(|(_, handle)| handle)
    }

    fn balloon_host(&self) -> Value {
        json!({"held_pages": 3})
    }

    fn set_balloon(&mut self, pages: u32) -> Result<(), BalloonError> {
        self.balloon().ok_or(BalloonError::None)?.set_target(pages);
        Ok(())
    }

    fn start_hinting(&mut self, acknowledge_on_stop: bool) -> Result<(), BalloonError> {
        self.hints.push(if acknowledge_on_stop { "start and acknowledge" } else { "start" });
        Ok(())
    }

    fn stop_hinting(&mut self) -> Result<(), BalloonError> {
        self.hints.push("stop");
        Ok(())
    }

    fn set_net_limits(&mut self, number: usize, _: Limits, _: Limits) -> bool {
        number == 0
    }

    fn poll_statistics(&mut self, every: Duration) -> io::Result<()> {
        self.polls.push(every);
        Ok(())
    }
}

#[derive(Default)]
struct Fakes {
    fail: bool,
    stuck: bool,
}

impl Launch for Fakes {
    type Vm = Fake;

    fn launch(&mut self, spec: &Spec, _: &BootSource, _: &mmds::Store) -> Result<Fake, VmError> {
        if std::mem::take(&mut self.fail) {
            return Err(VmError::host("do as it was told")(io::Error::from(io::ErrorKind::OutOfMemory)));
        }
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let balloon =
            spec.balloon.as_ref().map(|b| Device::new(balloon::device_config(b), &memory, Box::new(Nothing)));
        Ok(Fake { paused: false, stuck: self.stuck, balloon, hints: Vec::new(), polls: Vec::new() })
    }

    fn load(&mut self, load: &LoadSnapshot, before: &Spec, _: &mmds::Store) -> Result<(Spec, Fake), Fault> {
        load.memory()?;
        let mut fake = self
            .launch(
                before,
                &BootSource { kernel_image_path: "k".into(), initrd_path: None, boot_args: None },
                &mmds::Store::default(),
            )
            .map_err(Fault::LoadStart)?;
        fake.paused = !load.resume_vm;
        Ok((before.clone(), fake))
    }
}

type Tried = Instance<Fakes>;

const LOAD: &str = r#"{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"}}"#;

fn new() -> Tried {
    Instance::new("me".into(), Fakes::default())
}

/// One that runs, configured by these requests before.
fn running(before: &[(&str, &str, &str)]) -> Tried {
    let mut instance = new();
    for (method, path, body) in before {
        done(&mut instance, method, path, body);
    }
    done(&mut instance, "PUT", "/boot-source", BUILT_IN_SOURCE);
    done(&mut instance, "PUT", "/actions", START);
    instance
}

fn ask(instance: &mut Tried, method: &str, path: &str, body: &str) -> Response {
    match Request::parse(method, path, body.as_bytes()) {
        Ok(request) => instance.serve(request),
        Err(fault) => panic!("{method} {path} {body}: {}", fault.message()),
    }
}

#[track_caller]
fn done(instance: &mut Tried, method: &str, path: &str, body: &str) {
    assert_eq!(ask(instance, method, path, body), Response::done(), "{method} {path} {body}");
}

#[track_caller]
fn shown(instance: &mut Tried, path: &str) -> Value {
    let response = ask(instance, "GET", path, "");
    let value: Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!(response.status, Status::Ok, "{path}: {value}");
    value
}

#[track_caller]
fn refused(instance: &mut Tried, method: &str, path: &str, body: &str, said: &str) {
    let response = ask(instance, method, path, body);
    let text = String::from_utf8(response.body).unwrap();
    assert_eq!(response.status, Status::BadRequest, "{method} {path} {body}: {text}");
    let message = serde_json::from_str::<Value>(&text).unwrap()["fault_message"].clone();
    assert!(message.as_str().unwrap().contains(said), "{method} {path} {body}: {message}");
}

const BUILT_IN_SOURCE: &str = r#"{"kernel_image_path":"builtin"}"#;
const START: &str = r#"{"action_type":"InstanceStart"}"#;
const FLUSH: &str = r#"{"action_type":"FlushMetrics"}"#;
const KEYS: &str = r#"{"action_type":"SendCtrlAltDel"}"#;
const SIZE: &str = r#"{"vcpu_count":2,"mem_size_mib":64}"#;
const BALLOON: &str = r#"{"amount_mib":8,"deflate_on_oom":true}"#;
const POLLED: &str =
    r#"{"amount_mib":8,"deflate_on_oom":false,"stats_polling_interval_s":5,"free_page_hinting":true}"#;
const BEFORE: &str = "not supported before starting the microVM.";
const AFTER: &str = "not supported after starting the microVM.";

/// Every endpoint before the start and after it, on a VM without a balloon and without metrics: done or shown (`""`),
/// or refused with these words.
const TABLE: &[(&str, &str, &str, &str, &str)] = &[
    ("GET", "/", "", "", ""),
    ("GET", "/version", "", "", ""),
    ("GET", "/vm/config", "", "", ""),
    ("GET", "/machine-config", "", "", ""),
    ("PUT", "/machine-config", SIZE, "", AFTER),
    ("PATCH", "/machine-config", r#"{"vcpu_count":1}"#, "", AFTER),
    ("PUT", "/boot-source", BUILT_IN_SOURCE, "", AFTER),
    ("PUT", "/balloon", BALLOON, "", AFTER),
    ("PUT", "/metrics", r#"{"metrics_path":"/dev/null"}"#, "", AFTER),
    ("PUT", "/logger", "{}", "", AFTER),
    ("PUT", "/actions", START, "without kernel configuration", AFTER),
    ("PUT", "/actions", FLUSH, BEFORE, "no metrics file"),
    ("PUT", "/actions", KEYS, BEFORE, "no driver for it"),
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path":"s","mem_file_path":"m"}"#,
        BEFORE,
        "save/restore unavailable while running",
    ),
    ("PUT", "/snapshot/load", LOAD, "", AFTER),
    ("PATCH", "/vm", r#"{"state":"Paused"}"#, BEFORE, ""),
    ("PATCH", "/vm", r#"{"state":"Resumed"}"#, BEFORE, ""),
    ("GET", "/balloon", "", "No balloon device", "No balloon device"),
    ("PATCH", "/balloon", r#"{"amount_mib":0}"#, BEFORE, "No balloon device"),
    ("GET", "/balloon/statistics", "", BEFORE, "No balloon device"),
    ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":1}"#, BEFORE, "No balloon device"),
    ("PATCH", "/balloon/hinting/start", "", BEFORE, "No balloon device"),
    ("GET", "/balloon/hinting/status", "", BEFORE, "No balloon device"),
    ("PATCH", "/balloon/hinting/stop", "", BEFORE, "No balloon device"),
];

#[test]
fn each_endpoint_has_its_time() {
    for (method, path, body, before, after) in TABLE {
        for (mut instance, said) in [(new(), before), (running(&[]), after)] {
            match (said.is_empty(), *method) {
                (false, _) => refused(&mut instance, method, path, body, said),
                (true, "GET") => _ = shown(&mut instance, path),
                (true, _) => done(&mut instance, method, path, body),
            }
        }
    }
}

#[test]
fn drives_are_taken_by_name_and_the_root_is_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, [0; 1024]).unwrap();
    let drive = |id: &str, root: bool| json!({"drive_id": id, "path_on_host": path, "is_root_device": root, "is_read_only": true});
    let put = |instance: &mut Tried, id: &str, root: bool| {
        done(instance, "PUT", &format!("/drives/{id}"), &drive(id, root).to_string());
    };
    let mut instance = new();
    assert_eq!(shown(&mut instance, "/vm/config")["drives"], json!([]));
    put(&mut instance, "a", false);
    put(&mut instance, "b", true);
    put(&mut instance, "c", false);
    // Once more, as something else.
    put(&mut instance, "a", false);
    let all = json!([drive("b", true), drive("a", false), drive("c", false)]);
    assert_eq!(shown(&mut instance, "/vm/config")["drives"], all);
    let refuse = |instance: &mut Tried, id: &str, body: &Value, said: &str| {
        refused(instance, "PUT", &format!("/drives/{id}"), &body.to_string(), said);
    };
    refuse(&mut instance, "d", &drive("d", true), "A root block device already exists: \"b\"");
    refuse(&mut instance, "d-1", &drive("d-1", false), "can only contain alphanumeric characters");
    let mut odd = drive("d", false);
    odd["partuuid"] = json!("a b");
    refuse(&mut instance, "d", &odd, "The partuuid \"a b\" is not one");
    put(&mut instance, "d", false);
    refuse(&mut instance, "e", &drive("e", false), "There are 4 drives already");
    put(&mut instance, "b", false);
    put(&mut instance, "d", true);
    assert_eq!(shown(&mut instance, "/vm/config")["drives"][0], drive("d", true));
    std::fs::write(&path, [0; 1000]).unwrap();
    refuse(&mut instance, "d", &drive("d", true), "has 1000 bytes: expected a multiple of 512");
    std::fs::remove_file(&path).unwrap();
    refuse(&mut instance, "d", &drive("d", true), "cannot be opened for reading");
    assert_eq!(shown(&mut instance, "/vm/config")["drives"][0], drive("d", true));
    let mut instance = running(&[]);
    refuse(&mut instance, "a", &drive("a", false), AFTER);
}

#[test]
fn states_have_firecrackers_names() {
    let mut instance = new();
    let said = shown(&mut instance, "/");
    assert_eq!(
        said,
        json!({"app_name": "Samepage", "id": "me", "state": "Not started", "vmm_version": VERSION})
    );
    let mut instance = running(&[]);
    for (state, named) in
        [("Paused", "Paused"), ("Paused", "Paused"), ("Resumed", "Running"), ("Resumed", "Running")]
    {
        done(&mut instance, "PATCH", "/vm", &json!({"state": state}).to_string());
        assert_eq!(shown(&mut instance, "/")["state"], named);
    }
    let mut instance = new();
    instance.launch_mut().stuck = true;
    done(&mut instance, "PUT", "/boot-source", BUILT_IN_SOURCE);
    done(&mut instance, "PUT", "/actions", START);
    refused(&mut instance, "PATCH", "/vm", r#"{"state":"Paused"}"#, "did not leave the guest");
    assert_eq!(shown(&mut instance, "/")["state"], "Running");
}

#[test]
fn a_start_that_failed_says_why_and_can_be_tried_again() {
    let mut instance = new();
    instance.launch_mut().fail = true;
    done(&mut instance, "PUT", "/boot-source", BUILT_IN_SOURCE);
    refused(
        &mut instance,
        "PUT",
        "/actions",
        START,
        "could not be started: cannot do as it was told: out of",
    );
    assert_eq!(shown(&mut instance, "/")["state"], "Not started");
    done(&mut instance, "PUT", "/machine-config", SIZE);
    done(&mut instance, "PUT", "/actions", START);
}

#[test]
fn machines_have_bounds() {
    let mut instance = new();
    let default = json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
        "huge_pages": "None"});
    assert_eq!(shown(&mut instance, "/machine-config"), default);
    let wrong = [
        (r#"{"vcpu_count":0}"#, "vCPU number is invalid: 0, expected 1 to 32"),
        (r#"{"vcpu_count":33}"#, "vCPU number is invalid"),
        (r#"{"mem_size_mib":15}"#, "memory size (MiB) is invalid: 15, expected 16 to 1048576"),
        (r#"{"mem_size_mib":1048577}"#, "memory size"),
        (r#"{"mem_size_mib":18446744073709551615}"#, "memory size"),
        (r#"{"mem_size_mib":17,"huge_pages":"2M"}"#, "not a multiple"),
        (r#"{"smt":true,"vcpu_count":2}"#, "smt is not supported by Samepage yet with more than one vCPU"),
    ];
    for (body, said) in wrong {
        refused(&mut instance, "PATCH", "/machine-config", body, said);
        assert_eq!(shown(&mut instance, "/machine-config"), default, "{body} was taken all the same");
    }
    // What firectl sends of one vCPU.
    done(&mut instance, "PUT", "/machine-config", r#"{"mem_size_mib":512,"smt":true,"vcpu_count":1}"#);
    assert_eq!(shown(&mut instance, "/machine-config")["smt"], true);
    refused(&mut instance, "PATCH", "/machine-config", r#"{"vcpu_count":2}"#, "smt is not supported");
    done(&mut instance, "PATCH", "/machine-config", r#"{"smt":false,"track_dirty_pages":null}"#);
    done(&mut instance, "PATCH", "/machine-config", r#"{"track_dirty_pages":true}"#);
    assert_eq!(shown(&mut instance, "/machine-config")["track_dirty_pages"], true);
    for body in [r#"{"vcpu_count":32}"#, r#"{"mem_size_mib":1048576}"#, r#"{"mem_size_mib":16}"#] {
        done(&mut instance, "PATCH", "/machine-config", body);
    }
    let said = shown(&mut instance, "/machine-config");
    assert_eq!((&said["vcpu_count"], &said["mem_size_mib"]), (&json!(32), &json!(16)));
    done(&mut instance, "PUT", "/machine-config", SIZE);
    assert_eq!(shown(&mut instance, "/vm/config")["machine-config"]["vcpu_count"], 2);
}

#[test]
fn boot_sources_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let (file, fifo) = (dir.path().join("file"), dir.path().join("fifo"));
    std::fs::write(&file, "x").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let mut instance = new();
    for wrong in [dir.path().join("none"), dir.path().to_owned(), fifo] {
        let kernel = json!({"kernel_image_path": wrong}).to_string();
        refused(&mut instance, "PUT", "/boot-source", &kernel, "kernel file cannot be opened");
        let initrd = json!({"kernel_image_path": file, "initrd_path": wrong}).to_string();
        refused(&mut instance, "PUT", "/boot-source", &initrd, "initrd file cannot be opened");
    }
    let initrd = json!({"kernel_image_path": "builtin", "initrd_path": file}).to_string();
    refused(&mut instance, "PUT", "/boot-source", &initrd, "takes no initrd_path");
    assert_eq!(shown(&mut instance, "/vm/config")["boot-source"], Value::Null);
    let all = json!({"kernel_image_path": file, "initrd_path": file, "boot_args": "quiet"});
    done(&mut instance, "PUT", "/boot-source", &all.to_string());
    assert_eq!(shown(&mut instance, "/vm/config")["boot-source"], all);
}

#[test]
fn a_balloon_fits_its_guest() {
    let mut instance = new();
    refused(
        &mut instance,
        "PUT",
        "/balloon",
        r#"{"amount_mib":129,"deflate_on_oom":true}"#,
        "129 MiB is more",
    );
    done(&mut instance, "PUT", "/balloon", r#"{"amount_mib":128,"deflate_on_oom":true}"#);
    // The guest must not become too small for its balloon either.
    refused(&mut instance, "PUT", "/machine-config", SIZE, "more than the guest's memory, 64 MiB");
    done(&mut instance, "PUT", "/balloon", BALLOON);
    done(&mut instance, "PUT", "/machine-config", SIZE);
    let said = json!({"amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 0,
        "free_page_hinting": false, "free_page_reporting": false});
    assert_eq!(shown(&mut instance, "/balloon"), said);
    let mut instance = running(&[("PUT", "/machine-config", SIZE), ("PUT", "/balloon", BALLOON)]);
    refused(&mut instance, "PATCH", "/balloon", r#"{"amount_mib":65}"#, "65 MiB is more");
    refused(&mut instance, "PATCH", "/balloon", r#"{"amount_mib":4294967295}"#, "is more");
    assert_eq!(shown(&mut instance, "/balloon")["amount_mib"], 8);
    done(&mut instance, "PATCH", "/balloon", r#"{"amount_mib":64}"#);
    assert_eq!(shown(&mut instance, "/balloon")["amount_mib"], 64);
    assert_eq!(shown(&mut instance, "/vm/config")["balloon"]["amount_mib"], 64);
    // A target that was set elsewhere is shown as it is.
    instance.vm().unwrap().set_balloon(256 * 3).unwrap();
    assert_eq!(shown(&mut instance, "/balloon")["amount_mib"], 3);
}

#[test]
fn statistics_are_on_from_the_start_or_never() {
    let every = |s: u32| json!({"stats_polling_interval_s": s}).to_string();
    let mut off = running(&[("PUT", "/balloon", BALLOON)]);
    refused(&mut off, "GET", "/balloon/statistics", "", "statistics are disabled");
    refused(&mut off, "PATCH", "/balloon/statistics", &every(1), "cannot be enabled or disabled");
    done(&mut off, "PATCH", "/balloon/statistics", &every(0));
    assert!(off.vm().unwrap().polls.is_empty());
    let mut on = running(&[("PUT", "/balloon", POLLED)]);
    refused(&mut on, "PATCH", "/balloon/statistics", &every(0), "cannot be enabled or disabled");
    done(&mut on, "PATCH", "/balloon/statistics", &every(7));
    assert_eq!(on.vm().unwrap().polls, [5, 7].map(Duration::from_secs));
    assert_eq!(shown(&mut on, "/balloon")["stats_polling_interval_s"], 7);
    let said = shown(&mut on, "/balloon/statistics");
    let expected = json!({"target_pages": 2048, "actual_pages": 0, "target_mib": 8, "actual_mib": 0,
        "host": {"held_pages": 3}});
    assert_eq!(said, expected);
}

#[test]
fn hinting_needs_a_balloon_that_has_it() {
    let mut without = running(&[("PUT", "/balloon", BALLOON)]);
    for (method, path) in [("PATCH", "start"), ("GET", "status"), ("PATCH", "stop")] {
        let path = format!("/balloon/hinting/{path}");
        refused(&mut without, method, &path, "", "hinting is not enabled");
    }
    let mut with = running(&[("PUT", "/balloon", POLLED)]);
    done(&mut with, "PATCH", "/balloon/hinting/start", "");
    done(&mut with, "PATCH", "/balloon/hinting/start", r#"{"acknowledge_on_stop":false}"#);
    done(&mut with, "PATCH", "/balloon/hinting/stop", "");
    assert_eq!(with.vm().unwrap().hints, ["start and acknowledge", "start", "stop"]);
}

#[test]
fn metrics_are_flushed_to_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let metrics = json!({"metrics_path": path}).to_string();
    let mut instance = new();
    refused(&mut instance, "PUT", "/metrics", r#"{"metrics_path":"/"}"#, "metrics file cannot be opened");
    let mut instance = running(&[("PUT", "/metrics", &metrics), ("PUT", "/balloon", BALLOON)]);
    done(&mut instance, "PUT", "/actions", FLUSH);
    done(&mut instance, "PATCH", "/vm", r#"{"state":"Paused"}"#);
    done(&mut instance, "PUT", "/actions", FLUSH);
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let states: Vec<_> = lines.iter().map(|l| &l["state"]).collect();
    assert_eq!(states, ["Running", "Paused"]);
    assert_eq!(lines[0]["memory_bytes"], 128 << 20);
    assert_eq!(
        (&lines[0]["balloon"]["target_mib"], &lines[0]["balloon"]["host"]["held_pages"]),
        (&json!(8), &json!(3))
    );
    let mut twice = new();
    done(&mut twice, "PUT", "/metrics", &metrics);
    refused(&mut twice, "PUT", "/metrics", &metrics, "Reinitialization of metrics not allowed.");
}

#[test]
fn a_snapshot_is_loaded_into_a_vm_of_which_nothing_was_said() {
    for (method, path, body) in [
        ("PUT", "/machine-config", SIZE),
        ("PUT", "/boot-source", BUILT_IN_SOURCE),
        ("PUT", "/balloon", BALLOON),
    ] {
        let mut instance = new();
        done(&mut instance, method, path, body);
        refused(
            &mut instance,
            "PUT",
            "/snapshot/load",
            LOAD,
            "not allowed after configuring boot-specific resources",
        );
    }
    let memory = |rest: &str| format!(r#"{{"snapshot_path":"s"{rest}}}"#);
    for (body, said) in [
        (memory(""), "missing field: either `mem_backend` or `mem_file_path`"),
        (
            memory(r#","mem_file_path":"m","mem_backend":{"backend_type":"File","backend_path":"m"}"#),
            "too many fields: either `mem_backend` or `mem_file_path`",
        ),
    ] {
        refused(&mut new(), "PUT", "/snapshot/load", &body, said);
    }
    let mut instance = new();
    done(&mut instance, "PUT", "/logger", "{}");
    done(&mut instance, "PUT", "/snapshot/load", LOAD);
    assert_eq!(shown(&mut instance, "/")["state"], "Paused");
    refused(&mut instance, "PUT", "/snapshot/load", LOAD, AFTER);
    done(&mut instance, "PATCH", "/vm", r#"{"state":"Resumed"}"#);
    let mut instance = new();
    done(&mut instance, "PUT", "/snapshot/load", &memory(r#","mem_file_path":"m","resume_vm":true"#));
    assert_eq!(shown(&mut instance, "/")["state"], "Running");
}
