//! The program called as `firecracker`: its arguments, exit statuses and output, and the daemon
//! that its VMs join.

use std::ffi::OsStr;
use std::fs;

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::api::ApiVm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, eventually};
use tests::{require_kvm, require_slabs};

const NO_ENV: &[(&str, &OsStr)] = &[];

#[test]
fn versions_and_help_are_printed() {
    let sandbox = Sandbox::new();
    let version = sandbox.firecracker(["--version"]).output().success().stdout;
    assert!(version.starts_with("Firecracker v1."), "{version}");
    assert!(version.contains("This is Samepage"), "{version}");
    let by_subcommand = sandbox.samepage(["firecracker", "--version"]).output().success().stdout;
    assert_eq!(by_subcommand, version);
    let format = sandbox.firecracker(["--snapshot-version"]).output().success().stdout;
    assert!(format.starts_with('v') && format.lines().count() == 1, "{format}");
    let help = sandbox.firecracker(["--help"]).output().success().stdout;
    for part in
        ["Usage: firecracker [OPTIONS]", "--api-sock", "--config-file", "What differs from Firecracker"]
    {
        assert!(help.contains(part), "{part} is not in {help}");
    }
}

#[test]
fn wrong_arguments_and_configurations_have_firecrackers_statuses() {
    let sandbox = Sandbox::new();
    let socket = sandbox.file("api.sock");
    let socket = socket.to_str().expect("UTF-8");
    for (args, said) in [
        (vec!["--foo"], "--foo"),
        (vec!["--id", "a_b"], "letters, digits and hyphens"),
        (vec!["--api-sock", socket, "--level", "Loud"], "unknown level"),
        (vec!["--api-sock", socket, "--enable-pci"], "--enable-pci is not supported"),
        (vec!["--api-sock", socket, "--memory", "1G"], "--memory"),
        (vec!["--no-api"], "--config-file"),
        (vec!["--api-sock", socket, "--http-api-max-payload-size", "x"], "invalid value 'x'"),
    ] {
        for run in [
            sandbox.firecracker(&args).output(),
            sandbox.samepage([vec!["firecracker"], args.clone()].concat()).output(),
        ] {
            assert_eq!(run.code, Some(153), "{run}");
            assert!(run.stderr.contains(said), "{said}: {run}");
        }
    }
    let file = sandbox.file("vm.json");
    fs::write(&file, r#"{"machine-config": {"vcpu_count": 0, "mem_size_mib": 64}}"#).expect("a file");
    let config = ["--no-api", "--config-file", file.to_str().expect("UTF-8")];
    assert_eq!(sandbox.firecracker(config).output().code, Some(152));
    let missing = sandbox.firecracker(["--describe-snapshot", "/nowhere"]).output();
    assert_eq!(missing.code, Some(1), "{missing}");
    let nowhere = sandbox.firecracker(["--api-sock", "/nowhere/api.sock"]).output();
    assert_eq!(nowhere.code, Some(1), "{nowhere}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_vm_is_started_by_requests_and_by_a_file() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::firecracker(&sandbox, &["--id", "mine", "--no-seccomp"], NO_ENV);
    let instance = vm.get("/");
    assert_eq!((&instance["app_name"], &instance["id"]), (&json!("Samepage"), &json!("mine")));
    let version = vm.get("/version")["firecracker_version"].as_str().expect("a version").to_owned();
    assert!(version.starts_with("1."), "{version}");
    assert_ne!(instance["vmm_version"], version.as_str());
    vm.boot(32);
    assert!(!vm.control.exists(), "there is no daemon");
    vm.running().kill(Signal::TERM);
    assert_eq!(vm.into_running().wait().code, Some(0));
    sandbox.assert_clean_within(SOON);

    let file = sandbox.file("vm.json");
    let config = json!({"boot-source": {"kernel_image_path": "builtin"}, "machine-config": {"vcpu_count": 1, "mem_size_mib": 32}});
    fs::write(&file, config.to_string()).expect("a file");
    let vm = ApiVm::firecracker(&sandbox, &[OsStr::new("--config-file"), file.as_os_str()], NO_ENV);
    let instance = vm.get("/");
    assert_eq!((&instance["id"], &instance["state"]), (&json!("anonymous-instance"), &json!("Running")));
    vm.running().kill(Signal::TERM);
    assert_eq!(vm.into_running().wait().code, Some(0));
    sandbox.assert_clean_within(SOON);
}

/// By the variable, and by the file beside the link: without a word of Samepage's on the command
/// line.
#[test]
fn a_vm_joins_the_daemon_that_is_named() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let daemon = sandbox.samepage(["host", "--open", "named"]).timeout(SOON * 4).start();
    let merge = sandbox.runtime_dir().join("fleets/named/merge.sock");
    let guests = || -> Vec<Value> {
        let outcome = sandbox.samepage(["fleet", "status", "--json"]).timeout(SOON).output();
        let status: Option<Value> = serde_json::from_str(&outcome.stdout).ok();
        status.and_then(|status| status["guests"].as_array().cloned()).unwrap_or_default()
    };
    eventually("the daemon listens", || merge.exists());
    for (id, is_by_file) in [("by-variable", false), ("by-file", true)] {
        let variable = [("SAMEPAGE_MERGE", merge.as_os_str())];
        let file = sandbox.file("samepage.merge");
        if is_by_file {
            fs::write(&file, format!("{}\n", merge.display())).expect("a file");
        }
        let vm = ApiVm::firecracker(&sandbox, &["--id", id], if is_by_file { NO_ENV } else { &variable });
        vm.boot(32);
        eventually("it has joined", || guests().iter().any(|guest| guest["name"] == id));
        assert!(vm.control.exists());
        // A daemon that says otherwise beside the link, and a variable that says none: none.
        vm.running().kill(Signal::TERM);
        assert_eq!(vm.into_running().wait().code, Some(0));
        eventually("it has left", || guests().is_empty());
    }
    let alone = ApiVm::firecracker(&sandbox, &["--id", "alone"], &[("SAMEPAGE_MERGE", OsStr::new(""))]);
    alone.boot(32);
    assert!(!alone.control.exists(), "an empty variable joins none");
    alone.running().kill(Signal::TERM);
    assert_eq!(alone.into_running().wait().code, Some(0));
    let _ = sandbox.samepage(["fleet", "down"]).timeout(SOON).output().success();
    let _ = daemon.wait().success();
    sandbox.assert_clean_within(SOON);
}
