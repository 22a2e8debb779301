//! A VM's memory comes from the NUMA node that it is placed on, and its threads run there.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use tests::lab::lab_run_on_nodes;
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm};

const FLEET: &str = "name = 'numa'\nengine = 'off'\n[defaults]\nmemory = '64M'\n\
                     fill = { zero = 0, common = 50, duplicate = 0, unique = 50, pages = 8192 }\n";

fn nodes(guest: &Value) -> Vec<(u64, u64)> {
    let nodes = guest["nodes"].as_array().cloned().unwrap_or_default();
    nodes.iter().map(|on| (on["node"].as_u64().unwrap_or(99), on["pages"].as_u64().unwrap_or(0))).collect()
}

#[test]
fn a_vm_is_placed_on_a_node_of_this_host() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "32M", "--numa", "0,prefer"]);
    assert!(vm.com2().line().is_some_and(|line| line.starts_with("ready ")));
    let stopped = vm.ask(&serde_json::json!({"op": "stop"}));
    assert_eq!(stopped, "done", "{stopped:#}");
    let _ = vm.into_running().wait().success();
    let file = sandbox.file("numa.toml");
    fs::write(&file, format!("{FLEET}[[guest]]\nname = 'a'\nnuma = 0\n")).expect("a file in the sandbox");
    let up = ["fleet", "up", file.to_str().expect("UTF-8")];
    let _ = sandbox.samepage(up).timeout(Duration::from_secs(60)).output().success();
    let status = sandbox.samepage(["fleet", "status", "--json"]).output().success().json();
    let placed = nodes(&status["guests"][0]);
    assert!(placed.len() == 1 && placed[0].0 == 0 && placed[0].1 >= 8192, "{status:#}");
    let text = sandbox.samepage(["fleet", "status"]).output().success().stdout;
    assert!(text.contains("node 0"), "{text}");
    let _ = sandbox.samepage(["fleet", "down"]).output().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_node_that_is_not_there_is_refused() {
    let sandbox = Sandbox::new();
    for (node, expected) in
        [("900", "no NUMA node 900 with memory: expected 0"), ("0,strict", "expected NODE")]
    {
        let outcome = sandbox.samepage(["run", "--console", "none", "--numa", node]).output();
        assert!(matches!(outcome.code, Some(1 | 2)) && outcome.stderr.contains(expected), "{outcome}");
        let file = sandbox.file("numa.toml");
        fs::write(&file, format!("{FLEET}[[guest]]\nname = 'a'\nnuma = '{node}'\n")).expect("a file");
        let outcome = sandbox.samepage(["fleet", "up", file.to_str().expect("UTF-8")]).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains(expected), "{outcome}");
    }
    sandbox.assert_clean_within(SOON);
}

/// Two nodes, a processor each: every page is where its guest was placed, and so is every vCPU.
#[test]
fn lab_memory_and_vcpus_are_on_the_node_they_were_placed_on() {
    let script = r#"
        cd /var/tmp
        printf '%s' "$2" >numa.toml
        "$1" fleet up numa.toml >&2
        for pid in $("$1" fleet status --json | tr ',' '\n' | sed -n 's/.*"pid"://p' | tail -n +2); do
            echo "affinity $(sed -n 's/^Cpus_allowed_list:\t//p' "/proc/$pid/status")" >&2
        done
        "$1" fleet status >&2
        "$1" fleet status --json
        "$1" fleet down >&2
    "#;
    let guests = "[[guest]]\nname = 'near'\nnuma = 0\n[[guest]]\nname = 'far'\nnuma = 1\n\
                  [[guest]]\nname = 'rather'\nnuma = '1,prefer'\n[[guest]]\nname = 'any'\n";
    let samepage = tests::samepage();
    let samepage = samepage.to_str().expect("UTF-8");
    let fleet = format!("{FLEET}{guests}");
    let args = ["bash", "-euo", "pipefail", "-c", script, "lab", samepage, &fleet];
    let outcome = lab_run_on_nodes(2, Duration::from_secs(200), args).success();
    let status = outcome.json();
    let of = |n: usize| nodes(&status["guests"][n]);
    for (n, node) in [(0, 0), (1, 1), (2, 1)] {
        let placed = of(n);
        assert!(placed.len() == 1 && placed[0].0 == node && placed[0].1 >= 8192, "{n}: {outcome}");
    }
    assert!(of(3).iter().map(|(_, pages)| pages).sum::<u64>() >= 8192, "{outcome}");
    assert!(outcome.stderr.contains("node 1"), "{outcome}");
    let affinities: Vec<&str> =
        outcome.stderr.lines().filter_map(|line| line.strip_prefix("affinity ")).collect();
    assert_eq!(affinities, ["0", "1", "1", "0-1"], "{outcome}");
}
