//! However a VM is started, each thread of its process has a filter of system calls and no capabilities.

use std::ffi::OsStr;
use std::fs;

use rustix::process::Signal;
use serde_json::json;
use tests::api::ApiVm;
use tests::require_kvm;
use tests::run::Running;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm, eventually};

const NO_ENV: &[(&str, &OsStr)] = &[];

/// Of each thread of a process, its name and what of the walls it lacks.
fn lacks(pid: u32) -> Vec<(String, String)> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
    let statuses = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    let of_one = |status: String| {
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {key} in {status}")).trim().to_owned()
        };
        let wanted = [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapEff", "0000000000000000")];
        let lack = wanted.iter().find(|(key, is)| value(key) != *is);
        lack.map(|(key, is)| (value("Name"), format!("{key} is {} and not {is}", value(key))))
    };
    statuses.filter_map(of_one).collect()
}

#[track_caller]
pub(super) fn assert_confined(how: &str, pid: u32) {
    // Threads confine themselves, one by one, before they serve the guest.
    eventually(&format!("{how}: nothing is lacking, as at first {:?}", lacks(pid)), || lacks(pid).is_empty());
}

fn end(vm: Running) {
    vm.kill(Signal::TERM);
    assert_eq!(vm.wait().code, Some(0));
}

#[test]
fn every_thread_of_a_vm_is_confined_however_it_is_started() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "32M"]);
    assert_confined("run", vm.running().pid());
    end(vm.into_running());
    let file = sandbox.file("vm.json");
    let config = json!({"boot-source": {"kernel_image_path": "builtin"}, "machine-config": {"vcpu_count": 1, "mem_size_mib": 32}});
    fs::write(&file, config.to_string()).expect("a file");
    let file = file.to_str().expect("UTF-8");
    for (how, is_by_name) in [("run --api-sock", false), ("firecracker", true)] {
        let start = |args: &[&str]| match is_by_name {
            true => ApiVm::firecracker(&sandbox, args, NO_ENV),
            false => ApiVm::start(&sandbox, args),
        };
        let vm = start(&[]);
        vm.boot(32);
        assert_confined(how, vm.running().pid());
        end(vm.into_running());
        let vm = start(&["--config-file", file]);
        assert_confined(&format!("{how}, with a file"), vm.running().pid());
        end(vm.into_running());
    }
    let off = ApiVm::firecracker(&sandbox, &["--no-seccomp", "--config-file", file], NO_ENV);
    eventually("its vCPU is there", || lacks(off.running().pid()).len() > 1);
    end(off.into_running());
    sandbox.assert_clean_within(SOON);
}
