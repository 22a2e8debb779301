//! `samepage walk`: a guest's address, through its page tables, down to the host's frame.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};
use tests::run::Outcome;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually};
use tests::{require_kvm, require_slabs};

const LIMIT: Duration = Duration::from_secs(240);
const FLEET: &str = r#"
name = "walked"
engine = "slab"
[defaults]
memory = "32M"
fill = { zero = 0, common = 100, duplicate = 0, unique = 0 }
[[guest]]
name = "vm"
count = 2
"#;

fn walk(sandbox: &Sandbox, args: &[&str]) -> Outcome {
    sandbox.samepage(["walk"].iter().chain(args)).timeout(LIMIT).output()
}

fn entries(walked: &Value) -> &Vec<Value> {
    walked["steps"].as_array().expect("steps")
}

#[test]
fn a_page_is_followed_to_its_slab_and_a_write_breaks_it() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("fleet.toml");
    fs::write(&file, FLEET).expect("a fleet file");
    let fleet = |args: &[&str]| sandbox.samepage(["fleet"].iter().chain(args)).timeout(LIMIT).output();
    let _ = fleet(&["up", file.to_str().expect("UTF-8")]).success();
    let _ = fleet(&["status", "--settle"]).success();
    // All of a guest's pages but its own 4 MiB or so are shared.
    let page =
        |guest: &str, at: u64| walk(&sandbox, &[guest, &format!("{at:#x}"), "--json"]).success().json();
    let at = (8..24).map(|mib| mib << 20).find(|at| page("vm-0", *at)["host"]["place"]["slab"].is_object());
    let at = at.expect("a page in a slab");
    let before = page("vm-0", at);
    assert_eq!(before["end"]["page"]["gpa"], at, "the built-in guest has its memory where it is: {before}");
    let sharers = before["host"]["sharers"].as_array().expect("sharers");
    assert!(sharers.iter().any(|sharer| sharer["guest"] == "vm-1"), "{before}");
    // The same slab, asked of the other guest.
    let of_other = sharers.iter().find(|sharer| sharer["guest"] == "vm-1").expect("a sharer");
    let other = page("vm-1", of_other["gpa"].as_u64().expect("an address"));
    assert_eq!(other["host"]["place"], before["host"]["place"], "{other}");
    let text = walk(&sandbox, &["vm-0", &at.to_string()]).success().stdout;
    for part in ["level 4", "guest-physical", "slab ", "with vm-"] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }

    let watching = sandbox.samepage(["walk", "vm-0", &at.to_string(), "--watch", "200", "--json"]);
    let watching = watching.timeout(LIMIT).start();
    eventually("the first look", || !watching.stdout_so_far().is_empty());
    let mut com2 = Client::connect(&sandbox.runtime_dir().join("fleets/walked/vm-0.com2"));
    let filled = com2.command("fill seed=77 common=7 zero=0 common_pct=0 dup=0 unique=100");
    assert!(filled.starts_with("ok command=fill "), "{filled}");
    eventually("the write shows", || watching.stdout_so_far().lines().count() > 1);
    watching.kill(rustix::process::Signal::INT);
    let looks = watching.wait().success().stdout;
    let after: Value = serde_json::from_str(looks.lines().nth(1).expect("a line")).expect("JSON");
    assert_eq!((&after["end"], &after["host"]["hva"]), (&before["end"], &before["host"]["hva"]), "{looks}");
    assert_ne!(after["host"]["place"], before["host"]["place"], "{looks}");
    let _ = fleet(&["down", "--now"]).success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_lone_vm_is_walked_and_what_cannot_be_is_said() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "64M", "--cpus", "2"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some());
    let (socket, _) = Vm::sockets(&sandbox, "vm");
    let socket = socket.to_str().expect("UTF-8");
    let ask = |args: &[&str]| walk(&sandbox, &[&[socket], args].concat());
    let absent = ask(&["0x3000000", "--json"]).success().json();
    assert_eq!(absent["host"]["place"], "absent", "{absent}");
    assert_eq!(entries(&absent)[0]["level"], absent["paging"]["levels"], "{absent}");
    // Where no RAM is.
    let beyond = ask(&["0xfec00000", "--json"]).success().json();
    assert_eq!(beyond["host"], Value::Null, "{beyond}");
    // As root: the frame. The tables themselves are pages that were written.
    let table = absent["paging"]["root"].as_u64().expect("a root");
    let written = ask(&[&table.to_string(), "--json"]).success().json();
    assert_eq!(written["host"]["place"], "private", "{written}");
    let audit = ask(&["--audit", "--json"]).success().json();
    assert_eq!((&audit["is_partial"], &audit["maps_null"]), (&json!(false), &json!(true)), "{audit}");
    let mapped: u64 =
        audit["mapped_bytes"].as_object().expect("sizes").values().filter_map(Value::as_u64).sum();
    assert!(mapped >= 64 << 20, "{audit}");
    // It runs on, and is as it was.
    assert_eq!(vm.ask(&json!({"op": "status"}))["status"]["paused"], false);
    assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    let _ = ask(&["0x3000000"]).success();
    assert_eq!(vm.ask(&json!({"op": "status"}))["status"]["paused"], true);
    for (args, said) in [
        (&["0x800000000000"][..], "is no address of this guest"),
        (&["0x1000", "--vcpu", "2"], "there is no vCPU 2: this VM has 2"),
        (&["elsewhere"], "expected an address"),
        (&[], "required"),
        (&["0x1000", "--audit"], "cannot be used with"),
    ] {
        let refused = ask(args);
        assert!(refused.code != Some(0) && refused.stderr.contains(said), "{args:?}: {refused}");
    }
    let silly = vm.ask(&json!({"op": "walk", "address": 0, "vcpu": 0, "root": u64::MAX}));
    assert_eq!(silly["walked"]["end"]["no_table"]["table"], u64::MAX - 4095, "{silly}");
    vm.running().kill(rustix::process::Signal::TERM);
}
