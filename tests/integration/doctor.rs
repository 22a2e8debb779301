//! `samepage doctor`: what it says is what the host shows.

use tests::host::without_kvm;
use tests::sandbox::Sandbox;

#[test]
fn it_prints_json_and_changes_nothing() {
    let sandbox = Sandbox::new();
    let report = sandbox.samepage(["doctor", "--json"]).output().success().json();
    assert_eq!(report["guests_run"].as_bool(), Some(without_kvm().is_none()), "{report:#}");
    assert!(sandbox.leaks().is_empty(), "{:?}", sandbox.leaks());
}

#[test]
fn help_has_examples() {
    let sandbox = Sandbox::new();
    for command in [&["run"][..], &["doctor"], &["demo"], &["image"], &["fleet"], &["measure"]] {
        let outcome = sandbox.samepage([command, &["--help"]].concat()).output().success();
        assert!(outcome.stdout.contains("Examples:"), "{outcome}");
    }
}
