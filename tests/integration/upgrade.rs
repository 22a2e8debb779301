//! The program replaced while it runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::require_kvm;
use tests::run::Run;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, eventually};

/// A copy of the program, and what runs it.
struct Installed {
    sandbox: Sandbox,
    path: PathBuf,
}

impl Installed {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let path = sandbox.file("samepage");
        fs::copy(tests::samepage(), &path).expect("a copy of the program");
        Self { sandbox, path }
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::program(&self.path, args).env("SAMEPAGE_RUNTIME_DIR", self.sandbox.runtime_dir())
    }

    /// Puts something else in its place, as a package manager does.
    fn replace(&self) {
        let new = self.sandbox.file("new");
        fs::write(&new, "#!/bin/sh\necho another program >&2\nexit 99\n").expect("a script");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("its mode");
        fs::rename(&new, &self.path).expect("a program replaced");
    }
}

fn comm(pid: i64) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

#[test]
fn a_daemon_starts_guests_of_its_own_build() {
    require_kvm!();
    let installed = Installed::new();
    let scenario = installed.sandbox.file("storm.toml");
    // Guests arrive one after another, so that there is a moment between them.
    fs::write(
        &scenario,
        "name = \"late\"\nabout = \"guests one after the other\"\n[fleet]\nname = \"late\"\nengine = \"off\"\n\
         [fleet.overcommit]\ncapacity = \"2G\"\n[fleet.defaults]\nmemory = \"16M\"\n[[fleet.guest]]\nname = \"g\"\ncount = 4\n\
         [[phase]]\nname = \"arrive\"\narrive = \"all\"\nstagger_seconds = 3\n",
    )
    .expect("a scenario");
    let running = installed.run(&["stress", scenario.to_str().expect("UTF-8"), "--json"]).start();
    let vms = || {
        installed
            .sandbox
            .processes()
            .into_iter()
            .filter(|p| p.args.contains(" run --name"))
            .collect::<Vec<_>>()
    };
    eventually("the first guest", || !vms().is_empty());
    installed.replace();
    for vm in vms() {
        // It has another name until it has begun.
        eventually("it is called as its program is", || comm(vm.pid.into()) == "samepage");
        assert!(vm.args.starts_with(&installed.path.display().to_string()), "{vm:?}");
    }
    let verdict = running.wait();
    let verdict: Value = verdict.success().json();
    for guest in verdict["guests"].as_array().expect("guests") {
        assert_ne!(guest["fate"], "died", "{guest:#}");
        assert_ne!(guest["fate"], "absent", "{guest:#}");
    }
    installed.sandbox.assert_clean_within(SOON);
}

#[test]
fn a_frozen_process_is_let_go_by_a_guard_of_the_same_build() {
    let installed = Installed::new();
    let mut held = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
    let pid = held.id().to_string();
    let measured = measure_after_replacing(&installed, &pid);
    held.kill().and_then(|()| held.wait()).expect("the end of sleep");
    assert!(!measured.contains("No such file") && !measured.contains("another program"), "{measured}");
}

/// Starts the program by its descriptor, with another in its place: what it says.
fn measure_after_replacing(installed: &Installed, pid: &str) -> String {
    let script = format!(
        "exec 3<{path}; mv {new} {path}; exec -a {path} /proc/self/fd/3 measure --pid {pid} --freeze",
        path = installed.path.display(),
        new = script_beside(&installed.path).display(),
    );
    installed.sandbox.shell(&script).output().stderr
}

fn script_beside(path: &Path) -> PathBuf {
    let new = path.with_extension("new");
    fs::write(&new, "#!/bin/sh\necho another program >&2\nexit 99\n").expect("a script");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("its mode");
    new
}

#[test]
fn trials_of_another_build_are_told_of() {
    require_kvm!();
    let installed = Installed::new();
    let results = installed.sandbox.file("results.jsonl");
    let args = [
        "experiment",
        "run",
        "identical-vms",
        "--guests",
        "1",
        "--engine",
        "off",
        "--repeat",
        "1",
        "--memory",
        "32M",
    ];
    let args = [&args[..], &["--results", results.to_str().expect("UTF-8")]].concat();
    let first = installed.run(&args).timeout(SOON * 3).output().success();
    assert!(!first.stderr.contains("another build"), "{first}");
    let again = installed.run(&args).output().success();
    assert!(!again.stderr.contains("another build"), "{again}");
    // A byte more makes another build of it.
    let mut bytes = fs::read(&installed.path).expect("the program");
    bytes.push(0);
    let other = installed.sandbox.file("other");
    fs::write(&other, bytes).expect("another build");
    fs::set_permissions(&other, fs::Permissions::from_mode(0o755)).expect("its mode");
    let resumed =
        Run::program(&other, &args).env("SAMEPAGE_RUNTIME_DIR", installed.sandbox.runtime_dir()).output();
    let resumed = resumed.success();
    assert!(resumed.stderr.contains("by another build of samepage than this one"), "{resumed}");
    assert!(resumed.stdout.contains("by another build of samepage than this one"), "{resumed}");
}
