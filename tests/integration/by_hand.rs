//! The guide's table of mechanisms: every command in it exists, and runs.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use tests::documents;
use tests::require_slabs;
use tests::sandbox::Sandbox;
use tests::vm::SOON;

const LIMIT: Duration = Duration::from_secs(240);
/// What a command says that this machine cannot run.
const NOT_HERE: &str = "nothing of this experiment can be run here";

/// Mechanism, command and what it printed, of each row.
fn rows() -> Vec<[String; 3]> {
    let page = documents::read(Path::new("resources/docs/guide/by-hand.md"));
    let rows = page.text.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    rows.map(|line| {
        // A bar within a command is written with a backslash before it.
        let line = line.trim_end().replace("\\|", "\u{1}");
        let cells: Vec<String> =
            line.trim_matches('|').split('|').map(|cell| cell.trim().replace('\u{1}', "|")).collect();
        cells.try_into().unwrap_or_else(|cells| panic!("not three cells: {cells:?}"))
    })
    .collect()
}

#[test]
fn every_row_has_a_command_and_what_it_printed() {
    let rows = rows();
    assert!(rows.len() >= 15, "{rows:?}");
    for [mechanism, command, printed] in &rows {
        assert!(command.starts_with('`') && command.ends_with('`'), "{mechanism}: {command}");
        assert!(!printed.is_empty(), "{mechanism} has printed nothing");
    }
}

#[test]
fn every_command_runs() {
    require_slabs!();
    let _alone = tests::zram::swap_alone();
    // For thrashing; where it cannot be made, that row says so.
    let _swap = tests::zram::Zram::new(256).ok();
    for [mechanism, command, _] in rows() {
        let sandbox = Sandbox::new();
        symlink(tests::samepage(), sandbox.file("samepage")).expect("a link to the program");
        let script =
            format!("set -e\nexport PATH=\"$DIR:$PATH\"\ncd \"$DIR\"\n{}\n", command.trim_matches('`'));
        let outcome = sandbox.shell(&script).timeout(LIMIT).output();
        if outcome.stderr.contains(NOT_HERE) {
            tests::host::skipped(module_path!(), &format!("{mechanism}: {}", outcome.stderr.trim()));
            continue;
        }
        assert_eq!(outcome.code, Some(0), "{mechanism}: {outcome}");
        assert!(!outcome.stdout.trim().is_empty(), "{mechanism} prints nothing: {outcome}");
        sandbox.assert_clean_within(SOON);
    }
}
