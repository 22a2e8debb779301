//! A VM whose memory another process fills: what Firecracker's own tests of its handshake hold it
//! to, and handlers that answer nothing, or die.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::api::{ApiVm, request};
use tests::require_slabs;
use tests::run::{Run, Running};
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, eventually, field};

const MIB: u32 = 32;
const NO_ARGS: &[&str] = &[];
const FILL: &str = "fill seed=1 common=2 zero=10 common_pct=40 dup=10 unique=40 pages=4000";
const VERIFIED: &str = "ok command=verify checked=4000 mismatched=0 first=none";

/// A snapshot of a guest that has filled its memory, and has a balloon.
struct Saved {
    files: Sandbox,
    state: PathBuf,
    memory: PathBuf,
}

impl Saved {
    fn new() -> Self {
        let (sandbox, files) = (Sandbox::new(), Sandbox::new());
        let vm = ApiVm::start(&sandbox, NO_ARGS);
        vm.put("/balloon", &json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 0}));
        vm.boot(MIB);
        let mut com2 = Client::connect(&vm.com2);
        assert!(com2.line().expect("the ready line").starts_with("ready "));
        assert_eq!(com2.command(FILL), "ok command=fill pages=4000");
        vm.patch("/vm", &json!({"state": "Paused"}));
        let (state, memory) = (files.file("state"), files.file("memory"));
        vm.put("/snapshot/create", &json!({"snapshot_path": state, "mem_file_path": memory}));
        vm.running().kill(Signal::TERM);
        let _ = vm.into_running().wait().success();
        Self { files, state, memory }
    }

    /// A process that fills memory, once it listens.
    fn handler(&self, how: &str) -> (Running, PathBuf) {
        let socket = self.files.file(&format!("{how}.sock"));
        let program = env!("CARGO_BIN_EXE_page-fault-handler");
        let arguments = [socket.as_path(), &self.memory, Path::new(how)];
        let handler = Run::program(program, arguments).timeout(SOON * 2).start();
        eventually("the handler listens", || handler.stdout_so_far().starts_with("listening\n"));
        (handler, socket)
    }

    fn load(&self, socket: &Path, resume_vm: bool) -> Value {
        let backend = json!({"backend_type": "Uffd", "backend_path": socket});
        json!({"snapshot_path": self.state, "mem_backend": backend, "resume_vm": resume_vm})
    }
}

#[test]
fn a_handler_fills_memory_and_is_told_what_is_given_back() {
    require_slabs!();
    let saved = Saved::new();
    let (handler, socket) = saved.handler("serve");
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    vm.put("/snapshot/load", &saved.load(&socket, true));
    let said = handler.stdout_so_far();
    let regions: Value = serde_json::from_str(said.lines().nth(1).expect("the regions")).expect("JSON");
    assert_eq!(regions.as_array().map(Vec::len), Some(1), "{regions}");
    assert_eq!((&regions[0]["size"], &regions[0]["offset"]), (&json!(MIB << 20), &json!(0)), "{regions}");
    let mut com2 = Client::connect(&vm.com2);
    assert!(com2.line().expect("the generation").starts_with("generation number="));
    let before = vm.running().rss_kib();
    assert_eq!(com2.command("verify"), VERIFIED);
    assert!(vm.running().rss_kib() > before + 12_000, "pages come when they are touched");
    // Inflated and deflated: what is given back is told, and reads as zeros after.
    assert!(field(&com2.command("free percent=60"), "freed") > 2000);
    vm.patch("/balloon", &json!({"amount_mib": 8}));
    eventually("the handler hears of 8 MiB", || handler.stdout_so_far().contains("removed 2048\n"));
    assert_eq!(field(&com2.command("balloon check"), "nonzero"), 0);
    vm.patch("/balloon", &json!({"amount_mib": 0}));
    let verified = com2.command("verify");
    assert!(verified.contains("mismatched=0"), "{verified}");
    // Saved again: pages that were never touched are not lost.
    vm.patch("/vm", &json!({"state": "Paused"}));
    let (state, memory) = (saved.files.file("again.state"), saved.files.file("again.memory"));
    vm.put("/snapshot/create", &json!({"snapshot_path": state, "mem_file_path": memory}));
    let (other, next) = (Sandbox::new(), saved.files.file("again"));
    let again = ApiVm::start(&other, NO_ARGS);
    again.put("/snapshot/load", &json!({"snapshot_path": state, "mem_file_path": memory, "resume_vm": true}));
    let mut com2 = Client::connect(&again.com2);
    assert!(com2.line().expect("the generation").starts_with("generation number="));
    assert!(com2.command("verify").contains("mismatched=0"), "{}", next.display());
    for vm in [vm, again] {
        vm.running().kill(Signal::TERM);
        let _ = vm.into_running().wait().success();
    }
    let _ = handler.wait().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn where_no_handler_listens_nothing_is_started() {
    require_slabs!();
    let saved = Saved::new();
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let refused = |socket: &Path, said: &str| {
        let answer = vm.ask("PUT", "/snapshot/load", &saved.load(socket, true));
        assert!(answer.fault().contains(said), "{answer:?}");
        assert_eq!(vm.get("/")["state"], "Not started");
    };
    let prefix = "Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: Error creating guest memory \
                  from uffd: Failed to connect to UDS Unix stream";
    refused(&saved.files.file("none"), &format!("{prefix}: No such file or directory (os error 2)"));
    refused(&saved.memory, &format!("{prefix}: Connection refused (os error 111)"));
    drop(UnixListener::bind(saved.files.file("left")).expect("a socket"));
    refused(&saved.files.file("left"), &format!("{prefix}: Connection refused (os error 111)"));
    // The same process then loads.
    let (handler, socket) = saved.handler("serve");
    vm.put("/snapshot/load", &saved.load(&socket, false));
    assert_eq!(vm.get("/")["state"], "Paused");
    vm.running().kill(Signal::TERM);
    let _ = vm.into_running().wait().success();
    let _ = handler.wait().success();
    // With what moves pages about it is not possible.
    let merged = ApiVm::start(&sandbox, &["--merge", "/none"]);
    let (handler, socket) = saved.handler("deaf");
    let answer = merged.ask("PUT", "/snapshot/load", &saved.load(&socket, false));
    assert!(answer.fault().contains("cannot be used with --merge"), "{answer:?}");
    merged.running().kill(Signal::TERM);
    let _ = merged.into_running().wait().success();
    handler.kill(Signal::KILL);
}

#[test]
fn a_handler_that_answers_nothing_freezes_its_vm_and_no_other() {
    require_slabs!();
    let saved = Saved::new();
    let (_handler, socket) = saved.handler("deaf");
    let (sandbox, beside) = (Sandbox::new(), Sandbox::new());
    let (vm, other) = (ApiVm::start(&sandbox, NO_ARGS), ApiVm::start(&beside, NO_ARGS));
    let mut frozen = vm.connect();
    frozen.send(request("PUT", "/snapshot/load", &saved.load(&socket, true).to_string()));
    let body = json!({"snapshot_path": saved.state, "mem_file_path": saved.memory, "resume_vm": true});
    other.put("/snapshot/load", &body);
    let mut com2 = Client::connect(&other.com2);
    assert!(com2.line().expect("the generation").starts_with("generation number="));
    assert_eq!(com2.command("verify"), VERIFIED);
    // Frozen, not gone, and nothing was made up for it.
    assert!(frozen.is_silent());
    assert_eq!(vm.running().stderr_so_far(), "");
    vm.running().kill(Signal::KILL);
    drop(vm);
    other.running().kill(Signal::TERM);
    let _ = other.into_running().wait().success();
}

#[test]
fn a_handler_that_dies_stops_its_vm_which_says_so() {
    require_slabs!();
    let saved = Saved::new();
    // Enough to load, and for some of what it then verifies.
    let (handler, socket) = saved.handler("die:1500");
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    vm.put("/snapshot/load", &saved.load(&socket, true));
    let mut com2 = Client::connect(&vm.com2);
    assert!(com2.line().expect("the generation").starts_with("generation number="));
    com2.send(b"verify\n");
    let _ = handler.wait().success();
    eventually("it says so", || vm.running().stderr_so_far().contains("which fills guest memory, has ended"));
    let said = vm.running().stderr_so_far();
    assert!(said.contains("the VM is paused"), "{said}");
    assert_eq!(vm.get("/")["state"], "Paused");
    let body = json!({"snapshot_path": saved.files.file("s"), "mem_file_path": saved.files.file("m")});
    let answer = vm.ask("PUT", "/snapshot/create", &body);
    assert!(answer.fault().contains("the process that fills guest memory has ended"), "{answer:?}");
    vm.running().kill(Signal::TERM);
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

/// The main thread sleeps on a page of its own then, and cannot be asked.
#[test]
fn a_handler_that_dies_while_a_vm_is_loaded_ends_it() {
    require_slabs!();
    let saved = Saved::new();
    let (handler, socket) = saved.handler("deaf");
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, NO_ARGS);
    let mut frozen = vm.connect();
    frozen.send(request("PUT", "/snapshot/load", &saved.load(&socket, true).to_string()));
    eventually("it was told of memory", || handler.stdout_so_far().contains("base_host_virt_addr"));
    handler.kill(Signal::KILL);
    let outcome = vm.into_running().wait();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("main thread waits for a page of it: the VM ends"), "{outcome}");
}
