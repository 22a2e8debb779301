//! What commands print, where it cannot be printed.

use std::fs;

use tests::require_kvm;
use tests::sandbox::Sandbox;

/// Commands that print and need nothing: no fleet, no KVM.
const COMMANDS: &[&str] = &[
    "--help",
    "--version",
    "help",
    "help run",
    "run --help",
    "fleet up --help",
    "top --help",
    "measure --version",
    "experiment list",
    "experiment list --json",
    "measure --file $DIR/image",
    "measure --file $DIR/image --json",
    "fleet up $DIR/fleet.toml --dry-run",
    "fleet up $DIR/fleet.toml --dry-run --json",
    "simulate resources/scenarios/sim-idle-tax.toml --hosts 1",
    "simulate resources/scenarios/sim-idle-tax.toml --hosts 1 --json",
];
/// Those whose exit status depends on the machine.
const DIAGNOSES: &[&str] = &["doctor", "doctor --json"];

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    fs::write(sandbox.file("image"), [7; 8192]).expect("an image");
    fs::write(sandbox.file("fleet.toml"), "name = \"f\"\nengine = \"off\"\n[[guest]]\nname = \"a\"\n")
        .expect("a file");
    sandbox
}

fn in_workspace(script: &str) -> String {
    format!("cd {} && {script}", tests::workspace().display())
}

#[test]
fn a_full_disk_is_an_error_and_no_panic() {
    let sandbox = sandbox();
    for command in COMMANDS.iter().chain(DIAGNOSES) {
        let script = in_workspace(&format!("$SAMEPAGE {command} >/dev/full"));
        let outcome = sandbox.shell(&script).output();
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.stderr.contains("error: standard output cannot be written\n"), "{outcome}");
        assert!(outcome.stderr.contains("because: No space left on device"), "{outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    }
}

#[test]
fn a_reader_that_is_gone_changes_nothing_but_what_it_reads() {
    let sandbox = sandbox();
    for command in COMMANDS.iter().chain(DIAGNOSES) {
        let usual = sandbox.shell(&in_workspace(&format!("$SAMEPAGE {command}"))).output();
        // The reader has gone before anything is printed.
        let script =
            format!("{{ sleep 0.2; $SAMEPAGE {command}; echo $? >$DIR/status; }} | true; cat $DIR/status");
        let outcome = sandbox.shell(&in_workspace(&script)).output();
        let status = fs::read_to_string(sandbox.file("status")).expect("a status");
        assert_eq!(status.trim().parse().ok(), usual.code, "{outcome}");
        assert_eq!(outcome.stderr, usual.stderr, "{command}");
        if !DIAGNOSES.contains(command) {
            assert_eq!(usual.code, Some(0), "{usual}");
        }
    }
}

#[test]
fn standard_error_that_cannot_be_written_is_no_panic() {
    let sandbox = sandbox();
    for (command, status) in [("nonsense", 2), ("run --kernel $DIR/none", 1), ("fleet status --name none", 1)]
    {
        for to in ["/dev/full", "&-"] {
            let outcome = sandbox.shell(&format!("$SAMEPAGE {command} 2>{to}")).output();
            assert_eq!(outcome.code, Some(status), "{command} 2>{to}: {outcome}");
        }
        let outcome =
            sandbox.shell(&format!("{{ $SAMEPAGE {command}; echo $? >$DIR/status; }} 2>&1 | true")).output();
        let said = fs::read_to_string(sandbox.file("status")).expect("a status");
        assert_eq!(said.trim(), status.to_string(), "{outcome}");
    }
}

#[test]
fn what_a_fleet_prints_goes_wrong_in_the_same_way() {
    require_kvm!();
    let sandbox = sandbox();
    let up = "$SAMEPAGE fleet up $DIR/fleet.toml";
    let outcome = sandbox.shell(&format!("{up} >/dev/full")).output();
    // It is up all the same.
    assert_eq!(
        (outcome.code, outcome.stderr.contains("standard output cannot be written")),
        (Some(1), true),
        "{outcome}"
    );
    for command in [
        "fleet status",
        "fleet status --kvm --json",
        "fleet verify",
        "fleet verify --json",
        "fleet metrics",
        "top --once",
        "top --json",
        "balloon get a",
        "balloon set a 1M",
        "balloon set a 0 --wait",
        "balloon stats a",
        "balloon stats a --watch --json",
        "measure",
        "measure --json",
    ] {
        let outcome = sandbox.shell(&format!("$SAMEPAGE {command} >/dev/full")).output();
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.stderr.contains("standard output cannot be written"), "{outcome}");
        let script = format!("{{ sleep 0.2; $SAMEPAGE {command}; echo $? >$DIR/status; }} | true");
        let outcome = sandbox.shell(&script).output();
        let status = fs::read_to_string(sandbox.file("status")).expect("a status");
        assert_eq!(status.trim(), "0", "{command}: {outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    }
    let down = sandbox.shell("$SAMEPAGE fleet down | true").output();
    assert!(!down.stderr.contains("panicked"), "{down}");
    sandbox.assert_clean_within(tests::vm::SOON);
}
