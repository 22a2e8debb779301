//! A daemon over VMs that it did not start: `samepage host --open`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tests::api::ApiVm;
use tests::require_slabs;
use tests::run::Running;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually, field};

/// A daemon, once it is up.
fn host(sandbox: &Sandbox, args: &[&str], fleet: &str) -> (Running, PathBuf) {
    let running = sandbox.samepage([&["host"], args].concat()).timeout(SOON * 4).start();
    let socket = sandbox.runtime_dir().join("fleets").join(fleet).join("merge.sock");
    eventually("the daemon listens", || socket.exists() && status(sandbox).is_some());
    (running, socket)
}

fn status(sandbox: &Sandbox) -> Option<Value> {
    let outcome = sandbox.samepage(["fleet", "status", "--json"]).timeout(SOON).output();
    (outcome.code == Some(0)).then(|| serde_json::from_str(&outcome.stdout).expect("JSON"))
}

fn guests(sandbox: &Sandbox) -> Vec<Value> {
    status(sandbox).expect("a status")["guests"].as_array().expect("guests").clone()
}

fn fill(com2: &mut Client) {
    let line = com2.line().expect("the ready line");
    assert!(line.starts_with("ready "), "{line:?}");
    let fill = "fill seed=3 common=7 zero=0 common_pct=50 dup=0 unique=50 pages=6000";
    assert_eq!(com2.command(fill), "ok command=fill pages=6000");
}

#[test]
fn vms_that_others_start_join_are_merged_and_leave() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let (daemon, socket) = host(&sandbox, &["--open", "open"], "open");
    assert_eq!(guests(&sandbox), Vec::<Value>::new());
    let merge = socket.to_str().expect("UTF-8");
    // One that the API starts, and one that the command line starts, with a name.
    let api = ApiVm::start(&sandbox, &["--merge", merge, "--id", "from-api"]);
    api.boot(32);
    let api = api.into_vm();
    let other = Vm::start(&sandbox, "other", &["--memory", "48M", "--name", "other", "--merge", merge]);
    let (mut a, mut b) = (api.com2(), other.com2());
    fill(&mut a);
    fill(&mut b);
    eventually("both are there, merged with each other", || {
        let guests = guests(&sandbox);
        let shared = |guest: &Value| guest["pages"]["shared"].as_u64().unwrap_or(0);
        guests.len() == 2 && guests.iter().all(|guest| shared(guest) > 5000)
    });
    let all = guests(&sandbox);
    let names: Vec<_> = all.iter().map(|guest| guest["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["from-api", "other"]);
    for (guest, vm, mib) in [(&all[0], &api, 32), (&all[1], &other, 48)] {
        assert_eq!((&guest["domain"], &guest["state"]), (&json!("open"), &json!("running")), "{guest}");
        assert_eq!((&guest["pid"], &guest["memory_bytes"]), (&json!(vm.running().pid()), &json!(mib << 20)));
    }
    // Every view of the fleet shows them, once the daemon has looked again.
    let shown = |args: &[&str]| sandbox.samepage(args).timeout(SOON).output().success().stdout;
    eventually("top shows both", || {
        let top = shown(&["top", "--once"]);
        top.contains("from-api") && top.contains("other")
    });
    eventually("metrics have it", || shown(&["fleet", "metrics"]).contains("guest=\"from-api\""));
    // One ends, and is not missed.
    assert_eq!(api.ask(&json!({"op": "stop"})), json!("done"));
    assert_eq!(api.into_running().wait().success().stderr, "");
    eventually("it has left", || guests(&sandbox).len() == 1);
    // The daemon ends, and the other runs on, with all that it has.
    let _ = sandbox.samepage(["fleet", "down"]).timeout(SOON).output().success();
    let _ = daemon.wait().success();
    let verified = b.command("verify");
    assert_eq!((field(&verified, "checked"), field(&verified, "mismatched")), (6000, 0), "{verified}");
    // And joins the next one.
    let (daemon, _) = host(&sandbox, &["--open", "open"], "open");
    eventually("it is there again", || guests(&sandbox).len() == 1);
    let _ = sandbox.samepage(["fleet", "down"]).timeout(SOON).output().success();
    let _ = daemon.wait().success();
    assert_eq!(other.ask(&json!({"op": "stop"})), json!("done"));
    let _ = other.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn unknown_vms_are_refused_with_the_reason() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("open.toml");
    let text = "name = \"closed\"\n[open]\ndomains = [{ uid = 4294967294, domain = \"a\" }]\n";
    fs::write(&file, text).expect("a fleet file");
    let (daemon, socket) = host(&sandbox, &[file.to_str().expect("UTF-8")], "closed");
    let merge = socket.to_str().expect("UTF-8");
    let vm = Vm::start(&sandbox, "stranger", &["--memory", "32M", "--name", "stranger", "--merge", merge]);
    let said = "belongs to no domain of fleet closed: the table [open] of its file says which VMs do";
    eventually("the VM is notified", || vm.running().stderr_so_far().contains(said));
    eventually("its kind is known", || vm.running().stderr_so_far().contains("kind=NoDomain"));
    eventually("the daemon says it", || daemon.stderr_so_far().contains(said));
    let (pid, uid) = (vm.running().pid(), rustix::process::getuid().as_raw());
    let words = format!("process {pid} of user {uid} is refused: user {uid}");
    assert!(daemon.stderr_so_far().contains(&words), "{}", daemon.stderr_so_far());
    assert_eq!(guests(&sandbox), Vec::<Value>::new());
    // It runs all the same.
    fill(&mut vm.com2());
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    let _ = vm.into_running().wait().success();
    let _ = sandbox.samepage(["fleet", "down"]).timeout(SOON).output().success();
    let _ = daemon.wait();
    assert!(!Path::new(merge).exists());
    sandbox.assert_clean_within(SOON);
}
